"""Tells by running it on numbers whether part of a forward is an activation, a norm or a gate.

An activation may have a class or a formula of its own: x * sigmoid(x), x + sin(a x)^2 / a. What a
part does to each number alone, and not linearly, is one, whatever its name. As all of defaults, it
only chooses: whether a rewrite is exact never depends on it.
"""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.algebra.classifiers import is_norm
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture import Call, Capture, join
from orepa_compiler.capture.effects.finding import Surroundings
from orepa_compiler.capture.effects.randomness import RandomState
from orepa_compiler.capture.tracing.forward import trace

ACTIVATES, NORMALIZES, CLOSES, SCALES = "activates", "normalizes", "closes", "scales"

Function = Callable[[Tensor], Tensor]

_MOST = 24  # nodes of one activation
_SIDE = 4  # of the maps that are tried, on each axis behind the channels
_TYPES = (_ConvNd, nn.Linear, nn.RNNBase, nn.MultiheadAttention, nn.Embedding, ConvBlock)


def computed_behind(capture: Capture, call: Call, channels: int, rank: int) -> tuple[Call, str]:
    """The first node that all readers of a value go through, and what they compute together.

    "" where there is none, or nothing of these. channels, rank: those of the value's map.
    """
    call = _where_it_is_read(capture, call)
    shape, found = (2, channels, *(_SIDE,) * rank), (call, "")
    for nodes in _closed(capture, call):
        end = Call(call.owner, nodes[-1])
        kind = kind_of_function(partial(_run, capture, call, nodes), shape)
        if found[1] == ACTIVATES and kind != CLOSES:
            return found  # what is behind it is of no interest, but for a bound
        if kind in (NORMALIZES, CLOSES):
            return end, kind
        if kind:
            found = end, kind
    return found


def _where_it_is_read(capture: Capture, call: Call) -> Call:
    """The value as the forward names it in which it is read by more than a module's border."""
    while len(call.node.users) == 1:
        (user,) = call.node.users
        outside = capture.calls.get(call.owner, []) if call.owner else []
        if user.op == "output" and user.args[0] is call.node and len(outside) == 1:
            call = outside[0]
        elif user.op == "call_module" and _is_entered(capture, Call(call.owner, user)):
            inside = capture.entry(Call(call.owner, user), call)
            if inside is None:
                break
            call = inside
        else:
            break
    return call


def _is_entered(capture: Capture, call: Call) -> bool:
    """Whether what a module computes is told by its layers, one by one."""
    is_chain = isinstance(capture.module(capture.path_of(call)), nn.Sequential)
    return is_chain or not _is_tried(capture, call.owner, call.node)


def _closed(capture: Capture, call: Call) -> Iterator[list[fx.Node]]:
    """Nodes behind a value that nobody else reads but for the last; ever more of them."""
    graph, inside, nodes = call.node.graph, {call.node}, list[fx.Node]()
    known: set[fx.Node] = set()  # weights and numbers, and what is made of them
    after = False
    for node in graph.nodes:
        after = after or node is call.node
        sources = set(node.all_input_nodes)
        is_call = node.op in ("call_function", "call_method")
        if node.op == "get_attr" or (is_call and sources and sources <= known):
            known.add(node)
        elif after and sources & inside:
            if not sources <= inside | known or not _is_tried(capture, call.owner, node):
                return
            inside.add(node)
            nodes.append(node)
            if all(inside.issuperset(each.users) for each in inside - {node}):
                yield list(nodes)
            if len(nodes) > _MOST:
                return


def _is_tried(capture: Capture, owner: str, node: fx.Node) -> bool:
    """Whether a node may be run here: a function of torch, or a layer without a kernel."""
    if node.op == "call_module":
        module = capture.module(capture.path_of(Call(owner, node)))
        return len(node.args) == 1 and not node.kwargs and _is_small(module)
    if node.op == "call_method":
        return True
    if getattr(node.target, "__name__", "").endswith("_norm"):
        return False
    home = str(getattr(node.target, "__module__", None) or "torch")
    is_script = isinstance(node.target, torch.jit.ScriptFunction)
    return node.op == "call_function" and (
        is_script or home.partition(".")[0] in ("torch", "_operator", "builtins", "math")
    )


def _is_small(module: nn.Module) -> bool:
    """Whether a layer holds nothing but vectors, and does nothing beside computing."""
    for part in module.modules():
        hooked = part._forward_hooks or part._forward_pre_hooks
        if isinstance(part, _TYPES) or hooked or is_norm(part):  # affine here, not in training
            return False
    tensors = (*module.parameters(), *module.buffers())
    if any(sum(size > 1 for size in tensor.shape) > 1 for tensor in tensors):
        return False
    around = Surroundings({id(module): ""})
    graph = trace(module, around=around)
    seen = around.broken.get("")
    return not (seen and seen.does) if isinstance(graph, str) else _is_plain(graph)


def _is_plain(graph: fx.Graph) -> bool:
    return "effects" not in next(iter(reversed(graph.nodes))).meta


def _run(capture: Capture, call: Call, nodes: list[fx.Node], x: Tensor) -> Tensor:
    """What nodes give, where the value of the call is x and weights are made up."""
    values: dict[fx.Node, Any] = {call.node: x}

    def value(node: fx.Node) -> Any:
        if node not in values:
            values[node] = _value(capture, call.owner, node, value)
        return values[node]

    made: Tensor = [value(node) for node in nodes][-1]
    return made


def _value(capture: Capture, owner: str, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    if node.op == "get_attr":
        holder, _, name = str(node.target).rpartition(".")
        return _filled(getattr(capture.module(join(owner, holder)), name), str(node.target))
    args: Any = fx.node.map_arg(node.args, value)
    kwargs = fx.node.map_arg(node.kwargs, value)
    if node.op == "call_module":
        return with_values(capture.module(capture.path_of(Call(owner, node))))(*args)
    target: Any = node.target
    return (
        getattr(args[0], target)(*args[1:], **kwargs)
        if node.op == "call_method"
        else target(*args, **kwargs)
    )


def with_values(module: nn.Module) -> nn.Module:
    """A copy of a layer, in eval mode, with made-up values: positive, the same at each call."""
    made = copy.deepcopy(module).to_empty(device="cpu").double().eval()
    with torch.no_grad():
        for name, tensor in (*made.named_parameters(), *made.named_buffers()):
            if tensor.is_floating_point():
                tensor.copy_(_filled(tensor, name))
    return made


def _filled(tensor: Tensor, name: str) -> Tensor:
    if not tensor.is_floating_point():
        return torch.zeros(tensor.shape, dtype=tensor.dtype)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return 0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def kind_of_function(function: Function, shape: tuple[int, ...]) -> str:
    """What a function of maps of a shape computes, as its values tell; "" where nothing of these.

    SCALES: each number linearly. ACTIVATES: each alone, in another way. CLOSES: so that all lie in
    (-1, 1), as a gate does. NORMALIZES: the same for maps that are a multiple of each other.
    """
    before = RandomState()
    try:
        with torch.random.fork_rng(devices=[]):
            return _kind_of(function, shape)
    except Exception:  # the user's code, on maps that it was not written for
        return ""
    finally:
        before.put_back()


def _kind_of(function: Function, shape: tuple[int, ...]) -> str:
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    y = function(x.clone())
    if not isinstance(y, Tensor) or y.shape != x.shape or not y.isfinite().all():
        return ""
    if y.dtype != x.dtype:  # rounded, as by x.half().float()
        return ""
    if not _near(function(x.clone()), y):  # drawn at random
        return ""
    mask = torch.rand(shape, generator=generator) < 0.5
    other = torch.where(mask, x, -2 * x + 1)
    if not _near(function(other.clone())[mask], y[mask]):
        is_norm = _near(function(50 * x), y, 1e-2) and not _near(y, y.mean(), 1e-2)
        return NORMALIZES if is_norm else ""
    middle = function((x + other) / 2)
    if _near(middle, (y + function(other.clone())) / 2):
        return SCALES
    far = torch.cat([function(factor * x) for factor in (1.0, 10.0, 100.0)])
    return CLOSES if float(far.abs().max()) <= 1 + 1e-6 else ACTIVATES


def _near(one: Tensor, two: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(one, two, rtol=tolerance, atol=tolerance)
