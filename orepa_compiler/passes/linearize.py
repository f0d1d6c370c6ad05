"""Linearize: branch norms become scaling layers, and one norm follows the sum.

The three steps of Hu et al. 2022, Fig. 3, for a sum of branches that each are a conv, a conv and a
norm, a norm, or the input itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, fx, nn

from orepa_compiler.blocks import LINEARIZED, Block, LinearBlock, inserted_norm
from orepa_compiler.branches import Identity, Kernel
from orepa_compiler.capture import Call, Capture, join
from orepa_compiler.elementwise import is_add, is_difference
from orepa_compiler.errors import NotLinear, ReparamError
from orepa_compiler.layers import conv_operator, is_batch_norm, is_idle, is_plain_conv
from orepa_compiler.operators import ConvOperator
from orepa_compiler.planning import Edit, Plan, Refusal
from orepa_compiler.regions import Interpreter
from orepa_compiler.rewrite import Part, free_name, replace_regions, set_module
from orepa_compiler.selection import Where, selection
from orepa_compiler.tracing import trace


@dataclass(frozen=True)
class Linearize:
    """Turns sums of branches with norms of their own into linear blocks with one norm behind.

    Outputs in eval mode stay the same: v = g / sqrt(var + eps) starts each scaling layer, and what
    the branch norms add goes to the bias of the norm behind the sum.
    """

    where: Where = None
    name: str = "linearize"
    training: bool = True
    preserves: frozenset[str] = frozenset({"eval"})

    def plan(self, capture: Capture) -> Plan:
        interpreter = Interpreter(capture, capture.module)
        is_selected = selection(self.where)
        edits, refusals = [], []
        for owner, nodes in _sums(capture, interpreter):
            module = capture.module(owner)
            if not is_selected(owner, module):
                continue
            try:
                region = _region(capture, interpreter, owner, [node.name for node in nodes])
                new = _block(capture, region, capture.skeleton)
            except NotLinear as error:
                kind = type(module).__name__
                refusals.append(Refusal(self.name, owner, kind, error.reason))
                continue
            edits.append(self._edit(capture, region, new))
        return Plan(tuple(edits), tuple(refusals))

    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        interpreter = Interpreter(capture, capture.module)
        for path, edits in groupby(plan.edits, key=lambda edit: edit.path):
            owner = model.get_submodule(path)
            graph = trace(owner)
            if isinstance(graph, str):
                raise ReparamError(f"its forward cannot be traced ({graph})", path=path)
            parts: list[Part] = []
            for edit in edits:
                region = _region(capture, interpreter, path, list(edit.options["nodes"]))
                block = _block(capture, region, model)
                name = free_name(owner, "block") + ("" if not parts else f"_{len(parts) + 1}")
                parts.append((region.nodes, region.source, name, block))
            model = set_module(model, path, replace_regions(owner, graph, parts))
        return model, plan

    def _edit(self, capture: Capture, region: _Sum, new: LinearBlock) -> Edit:
        modules = [capture.module(path) for chain in region.chains for path in chain.paths]
        before = sum(p.numel() for module in modules for p in module.parameters())
        after = sum(p.numel() for p in new.parameters())
        what = " + ".join(chain.text(capture) for chain in region.chains)
        target = f"linear block with {len(region.chains)} branches"
        options: dict[str, Any] = {"nodes": region.nodes, "source": region.source}
        return Edit(self.name, region.owner, what, target, (before, after), options=options)


@dataclass(frozen=True)
class _Chain:
    """One branch: the paths of its layers, from the source to the sum."""

    paths: tuple[str, ...]

    def text(self, capture: Capture) -> str:
        names = [type(capture.module(path)).__name__ for path in self.paths]
        return " - ".join(names) or "identity"


@dataclass(frozen=True)
class _Sum:
    """A sum of branches in the forward of `owner`."""

    owner: str
    nodes: list[str]
    source: str
    operator: ConvOperator
    chains: tuple[_Chain, ...]
    norm_follows: bool


def _sums(capture: Capture, interpreter: Interpreter) -> Iterator[tuple[str, list[fx.Node]]]:
    """The nodes of each maximal region that ends in a sum, without the layers behind the sum."""
    for region in interpreter.regions(sums_only=True):
        last = max(i for i, node in enumerate(region.value.nodes) if is_add(node))
        yield region.owner, list(region.value.nodes[: last + 1])


def _region(capture: Capture, interpreter: Interpreter, owner: str, nodes: list[str]) -> _Sum:
    value = interpreter.value_of(owner, nodes)
    assert value.operator is not None
    last = value.nodes[-1]
    chains = tuple(_chains(capture, owner, last, value.source))
    followers = [user for user in last.users if user.op == "call_module"]
    norm_follows = len(last.users) == 1 and any(
        is_batch_norm(capture.module(capture.path_of(Call(owner, user)))) for user in followers
    )
    has_norms = any(is_batch_norm(capture.module(p)) for chain in chains for p in chain.paths)
    if not has_norms:
        raise NotLinear("its branches have no norms: it is linear already")
    if _asks_for_mode(capture.module(owner)):
        raise NotLinear(
            "its forward differs between train and eval mode, and a rewritten one could not"
        )
    return _Sum(owner, nodes, value.source.name, value.operator, chains, norm_follows)


def _asks_for_mode(owner: nn.Module) -> bool:
    """Whether the forward of a module of the skeleton reads self.training."""
    mode = owner.training
    traces = [str(trace(owner.train(training))) for training in (False, True)]
    owner.train(mode)
    return traces[0] != traces[1]


def _chains(capture: Capture, owner: str, node: fx.Node, source: fx.Node) -> Iterator[_Chain]:
    """The branches that a node adds up."""
    while node is not source and node.op == "call_module":
        if not is_idle(capture.module(capture.path_of(Call(owner, node)))):
            break
        (node,) = node.all_input_nodes
    if is_difference(node):
        raise NotLinear("a branch is subtracted; linear blocks add their branches")
    if is_add(node):
        for operand in node.args:
            if isinstance(operand, fx.Node):
                yield from _chains(capture, owner, operand, source)
        return
    paths: list[str] = []
    while node is not source:
        if is_add(node):
            raise NotLinear("a layer stands behind a sum of branches inside another sum")
        if node.op != "call_module":
            raise NotLinear(f"a branch is changed by {node.name} in the forward, not by a layer")
        call = Call(owner, node)
        paths = [*_leaves(capture, capture.path_of(call)), *paths]
        operand = node.args[0]
        assert isinstance(operand, fx.Node)
        node = operand
    yield _Chain(tuple(paths))


def _leaves(capture: Capture, path: str) -> list[str]:
    """The layers of a module that is a plain sequence, without those that do nothing."""
    if is_idle(capture.module(path)):
        return []
    if path not in capture.graphs:
        return [path]
    leaves: list[str] = []
    for node in capture.graphs[path].nodes:
        if node.op == "call_module":
            leaves += _leaves(capture, capture.path_of(Call(path, node)))
        elif node.op not in ("placeholder", "output"):
            raise NotLinear(f"{join(path, node.name)} is a sum inside a branch")
    return leaves


def _block(capture: Capture, region: _Sum, model: nn.Module) -> LinearBlock:
    """The linear block of a sum, with the weights of `model`."""
    like = next(model.get_submodule(region.owner).parameters())
    whole = replace(region.operator, weight=like.new_empty(region.operator.weight.shape), bias=None)
    parts = [_part(model, whole, chain) for chain in region.chains]
    names = _names([part.branch for part in parts], whole)
    conv = whole.to_module()
    norm = None if region.norm_follows else inserted_norm(whole, like)
    makers = {name: _always(part.branch) for name, part in zip(names, parts, strict=True)}
    block = LinearBlock(conv, Block(LINEARIZED, makers, {}), norm=norm)  # type: ignore[arg-type]
    factors = torch.stack([part.factor for part in parts]).to(like)
    block.scaling = nn.Parameter(factors)
    shift = torch.stack([part.shift for part in parts]).sum(0).to(like)
    if norm is not None:
        norm.bias = nn.Parameter(shift)
    else:
        block.bias = nn.Parameter(shift)
    sources = [model.get_submodule(path) for chain in region.chains for path in chain.paths]
    if not any(p.requires_grad for module in sources for p in module.parameters()):
        block.requires_grad_(False)
    return block.train(capture.module(region.owner).training)


@dataclass(frozen=True)
class _Part:
    """A branch with what its norm did: scale by `factor`, add `shift`, both (C_out,)."""

    branch: Identity | Kernel
    factor: Tensor
    shift: Tensor


def _part(model: nn.Module, whole: ConvOperator, chain: _Chain) -> _Part:
    modules = [model.get_submodule(path) for path in chain.paths]
    convs = [module for module in modules if is_plain_conv(module)]
    norms = [module for module in modules if is_batch_norm(module)]
    if modules != convs + norms or len(convs) > 1 or len(norms) > 1:
        layers = " - ".join(type(module).__name__ for module in modules)
        raise NotLinear(f"a branch is {layers}; only conv - norm, conv, norm or nothing is taken")
    affine = conv_operator(norms[0]) if norms else None
    if convs:
        operator = conv_operator(convs[0])
        branch: Identity | Kernel = Kernel(operator)
        trains = convs[0].weight.requires_grad
        branch.weight = nn.Parameter(operator.weight.detach().clone(), requires_grad=trains)  # type: ignore[arg-type]
        bias = operator.bias
    else:
        branch, bias = Identity(whole), None
    one = next(iter([*branch.parameters(), *branch.buffers()])).new_ones(whole.out_channels)
    factor = one if affine is None else affine.weight.flatten()
    shift = factor.new_zeros(()) * factor if affine is None else _bias(affine)
    return _Part(branch, factor, shift if bias is None else shift + factor * bias)


def _bias(affine: ConvOperator) -> Tensor:
    assert affine.bias is not None
    return affine.bias


def _names(branches: list[Identity | Kernel], whole: ConvOperator) -> list[str]:
    """Names by what the branch is; the first full-size kernel is the origin."""
    names: list[str] = []
    for branch in branches:
        name = "identity" if isinstance(branch, Identity) else "pointwise"
        if isinstance(branch, Kernel) and branch.kernel_size == whole.kernel_size:
            name = "origin"
        number = sum(other.split("_")[0] == name for other in names)
        names.append(name if not number else f"{name}_{number + 1}")
    return names


def _always(branch: nn.Module) -> Any:
    return lambda conv: branch
