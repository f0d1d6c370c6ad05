"""Collapse: blocks, branches and norms become plain convs.

Operators are read and composed in float64 and cast once. Norms are always folded; two convs are
joined only where that costs no more MACs. The running statistics are used, whatever mode the model
is in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.absorption import absorb
from orepa_compiler.blocks import LINEARIZED, LinearBlock
from orepa_compiler.capture import Call, Capture, ancestors, join
from orepa_compiler.crossing import crossings, with_norm
from orepa_compiler.errors import NotLinear, ReparamError
from orepa_compiler.layers import (
    conv_operator,
    holds_kernel,
    is_batch_norm,
    is_channels_last,
    is_idle,
    linear_part,
)
from orepa_compiler.linear import Linear
from orepa_compiler.operators import CONV_MODULES, ConvOperator
from orepa_compiler.own_forward import OwnForwardConv, own_conv
from orepa_compiler.planning import Edit, Plan, Refusal
from orepa_compiler.regions import Interpreter, Region
from orepa_compiler.rewrite import free_name, replace_regions, set_module, set_module_everywhere
from orepa_compiler.tracing import trace


@dataclass(frozen=True)
class Collapse:
    """Folds every linear region into one conv; with fold_norm=False only blocks, norms stay."""

    fold_norm: bool = True
    name: str = "collapse"
    training: bool = False
    preserves: frozenset[str] = frozenset({"eval"})

    def plan(self, capture: Capture) -> Plan:
        interpreter = Interpreter(capture, capture.module)
        edits: list[Edit] = []
        if self.fold_norm:
            behind = list(crossings(interpreter))
            edits += self._region_edits(capture, interpreter, behind)
            pairs = [(conv, norm) for conv, norm in behind if isinstance(conv, str)]
            edits += [_absorption_edit(self.name, capture, conv, norm) for conv, norm in pairs]
        taken = {path for edit in edits for path in edit.options["modules"]}
        refusals: list[Refusal] = []
        for path, module in capture.skeleton.named_modules():
            if not isinstance(module, LinearBlock) or _is_inside(path, taken):
                continue
            if reason := capture.hook_refusal(path):
                refusals.append(Refusal(self.name, path, f"block {module.block_name}", reason))
            else:
                edits.append(_block_edit(self.name, path, module, fold_norm=self.fold_norm))
        if self.fold_norm:
            refusals += self._left_norms(capture, interpreter, taken)
        return Plan(tuple(edits), tuple(refusals))

    def _region_edits(
        self, capture: Capture, interpreter: Interpreter, norms: list[tuple[Region | str, str]]
    ) -> list[Edit]:
        regions = {(r.owner, r.node_names[-1]): r for r in interpreter.regions()}
        behind: dict[tuple[str, str], str] = {}
        for region, norm in norms:
            if isinstance(region, Region):
                key = (region.owner, region.node_names[-1])
                regions.setdefault(key, region)
                behind[key] = norm
        order = {owner: number for number, owner in enumerate(capture.graphs)}
        keys = sorted(regions, key=lambda key: order[key[0]])  # one owner's regions together
        return [_region_edit(self.name, capture, regions[k], behind.get(k)) for k in keys]

    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        for owner, edits in groupby(plan.edits, key=lambda edit: edit.options["owner"]):
            if owner is not None:
                model = _apply_regions(model, capture, owner, list(edits))
                continue
            for edit in edits:
                if edit.options["kind"] == "absorb":
                    model = _apply_absorption(model, edit)
                    continue
                conv = _plain_conv(model.get_submodule(edit.path), edit.path)
                model = set_module_everywhere(model, capture.aliases[edit.path], conv)
        return model.eval(), plan

    def _left_norms(
        self, capture: Capture, interpreter: Interpreter, taken: set[str]
    ) -> Iterator[Refusal]:
        """The norms that a conv could have absorbed and that stay, each with its reason."""
        for path, module in capture.skeleton.named_modules():
            if not is_batch_norm(module) or _is_inside(path, taken):
                continue
            if isinstance(capture.skeleton.get_submodule(path.rpartition(".")[0]), LinearBlock):
                continue
            reason = capture.refusal(path)
            for call in capture.calls.get(path, []):
                reason = reason or interpreter.reasons.get((call.owner, call.node.name))
            reason = reason or interpreter.reasons.get((path, "")) or "no conv alone feeds it"
            yield Refusal(self.name, path, type(module).__name__, reason)


def _region_edit(name: str, capture: Capture, region: Region, behind: str | None) -> Edit:
    """The edit for a region: which modules go, and where the one conv stands.

    behind: the path of a norm in another module that goes too.
    """
    calls = [
        (join(region.owner, str(node.target)), capture.path_of(Call(region.owner, node)))
        for node in region.value.nodes
        if node.op == "call_module"
    ]
    paths = [path for _, path in calls]
    modules = [capture.module(path) for path in paths]
    operator = region.value.operator
    assert operator is not None
    after = operator.weight.numel() + operator.out_channels
    options: dict[str, Any] = {
        "kind": "path" if region.is_path else "graph",
        "owner": region.owner,
        "nodes": region.node_names,
        "source": region.value.source.name,
        "modules": [*paths, behind] if behind else paths,
        "behind": behind,
    }
    if region.is_path:
        options["at"] = next(p for p, m in zip(paths, modules, strict=True) if holds_kernel(m))
        options["rest"] = paths[-1] if region.value.rest is not None else None
    gone = [capture.module(path) for path in options["modules"]]
    before = sum(p.numel() for module in gone for p in module.parameters())
    what = " + ".join(type(module).__name__ for module in gone if not is_idle(module))
    target = _conv_text(operator.in_channels, operator.out_channels, operator.kernel_size)
    path = options.get("at", region.owner)
    return Edit(name, path, what, target, (before, after), options=options)


def _absorption_edit(name: str, capture: Capture, conv: str, norm: str) -> Edit:
    """The edit that folds a norm into a conv that is no operator of the algebra."""
    modules = [capture.module(path) for path in (conv, norm)]
    kept = own_conv(modules[0])
    kernel = modules[0].weight
    assert isinstance(kernel, Tensor)
    before = sum(p.numel() for module in modules for p in module.parameters())
    after = kernel.numel() + int(kept.out_channels)  # type: ignore[arg-type]
    what = " + ".join(type(module).__name__ for module in modules)
    options = {"kind": "absorb", "owner": None, "modules": [conv, norm]}
    return Edit(name, conv, what, type(kept).__name__, (before, after), options=options)


def _block_edit(name: str, path: str, block: LinearBlock, *, fold_norm: bool) -> Edit:
    if block.block_name == LINEARIZED and not fold_norm:
        raise ReparamError(
            "its branches were linearized, so the norms they had are gone; use fold_norm=True",
            path=path,
        )
    if block.norm is not None and not block.replaces_bias and not fold_norm:
        raise ReparamError(
            "its inserted norm needs a bias to go to, and the original conv has none; "
            "use fold_norm=True",
            path=path,
        )
    before = sum(p.numel() for p in block.parameters())
    has_bias = block.replaces_bias or block.norm is not None
    after = block.weight.numel() + (block.out_channels if has_bias else 0)
    target = _conv_text(block.in_channels, block.out_channels, block.kernel_size)
    options = {"kind": "block", "owner": None, "modules": [path]}
    return Edit(name, path, f"block {block.block_name}", target, (before, after), options=options)


def _conv_text(in_channels: int, out_channels: int, kernel_size: tuple[int, ...]) -> str:
    kernel = "x".join(map(str, kernel_size))
    return f"Conv{len(kernel_size)}d {in_channels} -> {out_channels} {kernel}"


def _is_inside(path: str, taken: set[str]) -> bool:
    return not taken.isdisjoint([path, *ancestors(path)])


def _apply_regions(model: nn.Module, capture: Capture, owner: str, edits: list[Edit]) -> nn.Module:
    """All regions of one owner: first the paths, whose children are swapped, then its graph."""
    read = _in_float64(model)
    replacements = []
    for edit in edits:
        interpreter = Interpreter(capture, read)
        chain = _chain(edit) if edit.options["kind"] == "path" else []
        value = interpreter.value_of(owner, edit.options["nodes"], chain)
        if behind := edit.options["behind"]:
            value = with_norm(value, behind, read)
        conv = _conv_for(value, [model.get_submodule(path) for path in edit.options["modules"]])
        if behind:
            model = set_module(model, behind, _rest(model, behind) or nn.Identity())
        if edit.options["kind"] == "path":
            model = _apply_path(model, edit, conv)
        else:
            replacements.append((edit, conv, value))
    if not replacements:
        return model
    module = model.get_submodule(owner).eval()  # the mode is written into the graph
    graph = trace(module)
    if isinstance(graph, str):
        raise ReparamError(f"its forward cannot be traced any more ({graph})", path=owner)
    name = free_name(module, "reparam_conv")
    parts = []
    for number, (edit, conv, value) in enumerate(replacements, 1):
        rest = _rest(model, edit.options["modules"][-1]) if value.rest is not None else None
        child = conv if rest is None else nn.Sequential(conv, rest)
        label = name if number == 1 else f"{name}_{number}"
        parts.append((edit.options["nodes"], edit.options["source"], label, child))
    return set_module(model, owner, replace_regions(module, graph, parts))


def _apply_absorption(model: nn.Module, edit: Edit) -> nn.Module:
    conv_path, norm_path = edit.options["modules"]
    read = _in_float64(model)
    exact = read(conv_path)
    exact = exact.plain() if isinstance(exact, OwnForwardConv) else exact
    affine, rest = linear_part(read(norm_path))
    conv = _like(absorb(exact, affine), list(model.get_submodule(conv_path).parameters()))
    rest = _rest(model, norm_path) if rest is not None else None
    return set_module(set_module(model, conv_path, conv), norm_path, rest or nn.Identity())


def _chain(edit: Edit) -> list[str]:
    return [path for path in edit.options["modules"] if path != edit.options["behind"]]


def _apply_path(model: nn.Module, edit: Edit, conv: nn.Module) -> nn.Module:
    for path in edit.options["modules"]:
        new = conv if path == edit.options["at"] else nn.Identity()
        if path == edit.options["rest"]:
            new = _rest(model, path) or new
        if path != edit.options["behind"]:
            model = set_module(model, path, new)
    return model


def _rest(model: nn.Module, path: str) -> nn.Module | None:
    """What stays of a norm with an activation: the user's own activation module."""
    return linear_part(model.get_submodule(path))[1]


def _in_float64(model: nn.Module) -> Callable[[str], nn.Module]:
    return lambda path: copy.deepcopy(model.get_submodule(path)).double().eval()


def _conv_for(value: Linear, modules: list[nn.Module]) -> nn.Module:
    """The plain conv of a region, in the precision and layout of the modules it replaces."""
    assert value.operator is not None
    parameters = [p for module in modules for p in module.parameters()]
    return _like(value.operator.to_module(), parameters)


def _plain_conv(block: nn.Module, path: str) -> nn.Module:
    """The conv that a block stands for, with its own geometry, kernel collapsed."""
    if not isinstance(block, LinearBlock):
        raise ReparamError(
            f"the plan does not fit: it collapses a block, here is a {type(block).__name__}",
            path=path,
        )
    if isinstance(block, OwnForwardConv):
        return _like(copy.deepcopy(block).double().plain(), list(block.parameters()))
    try:
        operator: ConvOperator = conv_operator(copy.deepcopy(block).double())
    except NotLinear as error:
        raise ReparamError(error.reason, path=path) from error
    conv = CONV_MODULES[operator.rank](
        block.in_channels,
        block.out_channels,
        block.kernel_size,  # type: ignore[arg-type]
        block.stride,  # type: ignore[arg-type]
        block.padding,  # type: ignore[arg-type]
        block.dilation,  # type: ignore[arg-type]
        block.groups,
        operator.bias is not None,
        block.padding_mode,  # type: ignore[arg-type]
        device="meta",
    )
    conv.weight = nn.Parameter(operator.weight.detach())
    if operator.bias is not None:
        conv.bias = nn.Parameter(operator.bias.detach())
    return _like(conv, list(block.parameters()))


def _like(conv: nn.Module, parameters: list[nn.Parameter]) -> nn.Module:
    """The conv in the dtype, memory format and requires_grad of what it replaces."""
    kernels = [p for p in parameters if p.dim() > 2] or parameters
    channels_last = any(is_channels_last(p) for p in kernels)
    for name, parameter in list(conv.named_parameters(recurse=False)):
        value: Tensor = parameter.detach().to(kernels[0].dtype)
        if channels_last and value.dim() == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        wanted = any(p.requires_grad for p in parameters)
        setattr(conv, name, nn.Parameter(value, requires_grad=wanted))
    return conv
