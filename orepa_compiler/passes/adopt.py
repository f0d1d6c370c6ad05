"""Adopt: a module's own way to collapse, taken where it proves right.

The blocks of timm, RepVGG, MobileOne and others know how to become one conv. Where the analysis
would leave work in them, their own method is called on a copy before anything else is done, and the
copy is taken if it gives the outputs of the module before.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.blocks.plain import like, plain_conv
from orepa_compiler.capture import Capture, ancestors, join
from orepa_compiler.errors import NotLinear
from orepa_compiler.planning import Edit, Plan, Refusal
from orepa_compiler.planning.overlaps import Touched
from orepa_compiler.rewriting.swapping import METHODS, set_module_everywhere
from orepa_compiler.verification.evaluation import Side, batches_of, evaluate, evaluation_mode
from orepa_compiler.verification.nesting import map_tensors, named_leaves

# In the order in which timm.utils.reparameterize_model looks for them.
# What is left of a conv that a method itself casts to float32; errors of a method are far larger.
TOLERANCE = 1e-5
# Random maps: the size of their axes.
_SIZE = 16

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Adopt:
    """Replaces modules by what their own method makes of them.

    paths: which, none inside another. inputs: batches for the model, to see what each module is
    called on; None: a random map is tried. checks: False believes the methods, for a plan that was
    checked when it was made.
    """

    paths: tuple[str, ...] = ()
    inputs: Any = None
    checks: bool = True
    name: str = "adopt"
    training: bool | None = False
    preserves: frozenset[str] = frozenset({"eval"})

    def plan(self, capture: Capture) -> Plan:
        """What would be tried; whether it is right shows when it is done."""
        edits, refusals = [], []
        for path in self.paths:
            module = capture.module(path)
            kind, method = type(module).__name__, own_method(module)
            inner = [join(path, name) for name, _ in module.named_modules()]
            if reason := next(filter(None, map(capture.hook_refusal, inner)), None):
                refusals.append(Refusal(self.name, path, kind, reason))
                continue
            size = sum(p.numel() for p in module.parameters())
            options = {"method": method}
            target = f"what its {method}() makes"
            edits.append(Edit(self.name, path, kind, target, (size, size), options=options))
        return Plan(tuple(edits), tuple(refusals))

    def touched(self, edit: Edit) -> Touched:
        return Touched((edit.path,))

    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        calls = self._calls(model, [edit.path for edit in plan.edits])
        done, refusals = [], list(plan.refusals)
        for edit in plan.edits:
            module, method = model.get_submodule(edit.path), str(edit.option("method"))
            found = self._converted(module, method, calls.get(edit.path))
            if isinstance(found, str):
                kind = type(module).__name__
                refusals.append(Refusal(self.name, edit.path, kind, found))
                continue
            model = set_module_everywhere(model, capture.aliases[edit.path], found)
            size = sum(p.numel() for p in found.parameters())
            target = f"{type(found).__name__}, by its {method}()"
            done.append(replace(edit, after=target, parameters=(edit.parameters[0], size)))
        return model, Plan(tuple(done), tuple(refusals))

    def _converted(self, module: nn.Module, method: str, call: Call | None) -> nn.Module | str:
        """What the method makes of a copy, or why that is not taken."""
        before = copy.deepcopy(module).double().eval()
        try:
            after = _without_blocks(copy.deepcopy(before))
        except NotLinear as error:
            return f"a block in it cannot become one conv: {error.reason}"
        untouched, alive = _state_of(after), _held_by(after)
        try:
            with _float64_by_default():  # also in the layers that the method makes
                result = getattr(after, method)()
        except Exception as error:  # the method is the user's code
            return f"its {method}() raised {type(error).__name__}: {_line(error)}"
        made = result if isinstance(result, nn.Module) else after
        if made is after and _state_of(after) == untouched:
            return f"its {method}() changes nothing"
        del alive
        after = made.double().eval()
        # A copy runs: a forward may keep what it made in float64 (the grid of a YOLO's head).
        if self.checks and (reason := _difference(before, copy.deepcopy(after), method, call)):
            return reason
        parameters = list(module.parameters())
        if parameters:  # what the module's own _apply casts beside parameters comes back by it
            after = after.to(parameters[0].dtype)
        return like(after, parameters).train(module.training)

    def _calls(self, model: nn.Module, paths: list[str]) -> dict[str, Call]:
        """What each module is first called on, in float64, when the model runs on the inputs."""
        calls: dict[str, Call] = {}
        if self.inputs is None or not self.checks or not paths:
            return calls

        def watch(path: str) -> Callable[..., None]:
            def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
                calls.setdefault(path, map_tensors((args, kwargs), _exact))

            return keep

        with ExitStack() as stack, evaluation_mode(model):
            for path in paths:
                hook = model.get_submodule(path).register_forward_pre_hook(
                    watch(path), with_kwargs=True
                )
                stack.callback(hook.remove)
            side = Side("model", model, hint="; give inputs= that it takes")
            evaluate(side, batches_of(self.inputs))
        return calls


def _state_of(module: nn.Module) -> list[Any]:
    """What a module is, by identity: its parts, their classes, attributes, tensors and versions.

    For as long as what it holds is alive: an id may be given again.
    """
    held = [(path, type(part), *_ids(vars(part))) for path, part in module.named_modules()]
    tensors = (*module.parameters(), *module.buffers())
    return [*held, [(id(tensor), tensor._version) for tensor in tensors]]


def _held_by(module: nn.Module) -> list[Any]:
    attributes = [value for part in module.modules() for value in vars(part).values()]
    return [*attributes, *module.modules(), *module.parameters(), *module.buffers()]


def _ids(attributes: dict[str, Any]) -> Iterator[Any]:
    for name, value in attributes.items():
        yield name, [*map(id, value.values())] if isinstance(value, dict) else id(value)


def _without_blocks(module: nn.Module) -> nn.Module:
    """The module with plain convs for its blocks: a method of its own knows no others."""
    blocks: dict[ConvBlock, list[str]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, ConvBlock):
            blocks.setdefault(part, []).append(path)
    for block, paths in blocks.items():
        module = set_module_everywhere(module, paths, plain_conv(block))
    return module


def own_method(module: nn.Module) -> str | None:
    """The method by which a module that is none of ours turns into its deploy form, or None."""
    if isinstance(module, ConvBlock):
        return None
    return next((name for name in METHODS if _is_called_alone(getattr(module, name, None))), None)


def _is_called_alone(method: Any) -> bool:
    """Whether it is a method without arguments: a layer of that name, or fuse(a, b), is none."""
    if not callable(method) or isinstance(method, nn.Module):
        return False
    try:
        inspect.signature(method).bind()
    except TypeError:
        return False
    except ValueError:  # it does not say
        pass
    return True


def unfinished(model: nn.Module, done: Plan) -> tuple[str, ...]:
    """The paths of modules with a method of their own in which there is something left to do.

    done: what was tried before, which is not tried again. The innermost come first, and none around
    one that was refused: a part says more than the whole what is wrong.
    """
    tried = {edit.path for edit in done.edits} | {refusal.path for refusal in done.refusals}
    left = [p for p, m in model.named_modules() if own_method(m) and _has_work(m)]
    found = [path for path in left if path not in tried]
    inner = [*found, *(refusal.path for refusal in done.refusals)]
    around = {outer for path in inner for outer in ancestors(path)}
    return tuple(path for path in found if path not in around)


def _has_work(module: nn.Module) -> bool:
    """Whether there are norms, or several convs, with no module between that has a method."""
    inner = list(module.modules())[1:]
    if any(map(is_batch_norm, _without_methods(module))):
        return True
    convs = sum(isinstance(part, _ConvNd) for part in inner)
    return convs > 1 and not any(map(own_method, inner))


def _without_methods(module: nn.Module) -> Iterator[nn.Module]:
    """The modules inside, but for those with a method and what is inside of them."""
    for child in module.children():
        if own_method(child) is None:
            yield child
            yield from _without_methods(child)


def _difference(before: nn.Module, after: nn.Module, method: str, call: Call | None) -> str | None:
    """Why the two do not agree, with the numbers, or None where they do."""
    tried = [call] if call is not None else list(_random_calls(before))
    for args, kwargs in tried:
        with torch.no_grad():
            try:
                expected = named_leaves(before(*map_tensors(args, torch.clone), **kwargs))
            except Exception as error:  # a random map of another form may do
                if call is None:
                    continue
                return f"its {method}() cannot be checked in float64: {_line(error)}"
            try:
                found = named_leaves(after(*map_tensors(args, torch.clone), **kwargs))
            except Exception as error:
                return f"after its {method}() it raises {type(error).__name__}: {_line(error)}"
        worst = _largest_error(found, expected)
        if worst <= TOLERANCE:
            return None
        return (
            f"its {method}() gives other outputs: relative error {worst:.1e}, allowed "
            f"{TOLERANCE:.0e}; kept as it is"
        )
    return f"its {method}() cannot be checked: it runs on no random map; give inputs="


@contextmanager
def _float64_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _random_calls(module: nn.Module) -> Iterator[Call]:
    """Maps that a module could be meant for, by the layers in it."""
    generator = torch.Generator().manual_seed(0)
    seen: set[tuple[int, ...]] = set()
    for layer in module.modules():
        width = getattr(layer, "in_channels", getattr(layer, "num_features", None))
        kernel = getattr(layer, "weight", None)
        if not isinstance(width, int) or not isinstance(kernel, Tensor):
            continue
        rank = kernel.dim() - 2 if kernel.dim() > 2 else 2
        shape = (2, width, *(_SIZE,) * rank)
        if shape not in seen:
            seen.add(shape)
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
            yield (x.to(kernel.device),), {}


def _largest_error(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of any output, relative to the largest value of that output."""
    if found.keys() != expected.keys() or not expected:
        return float("inf")
    worst = 0.0
    for name, right in expected.items():
        left = found[name]
        if not isinstance(left, Tensor) or left.shape != right.shape:
            return float("inf")
        size = right.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        ratio = float((left - right).abs().max() / size)
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def _exact(tensor: Tensor) -> Tensor:
    return tensor.detach().double().clone() if tensor.is_floating_point() else tensor.clone()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
