"""Collapse: blocks, branches and norms become plain convs.

Operators are read and composed in float64 and cast once. Norms are always folded; two convs are
joined only where that costs no more MACs. The running statistics are used, whatever mode the model
is in.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from orepa_compiler.algebra.layers import holds_kernel, is_idle
from orepa_compiler.analysis.concatenation import concatenated_convs
from orepa_compiler.analysis.crossing import crossings
from orepa_compiler.analysis.functional import functional_conv
from orepa_compiler.analysis.preceding import norms_before
from orepa_compiler.analysis.regions import Interpreter, Region
from orepa_compiler.analysis.shifting import norm_behind
from orepa_compiler.blocks import LINEARIZED, LinearBlock
from orepa_compiler.blocks.own_forward import own_conv
from orepa_compiler.capture import Call, Capture, ancestors, join
from orepa_compiler.errors import ReparamError
from orepa_compiler.passes.collapse.folding import (
    absorb_norm,
    fold_block,
    fold_regions,
    own_parameters,
)
from orepa_compiler.passes.collapse.kept import is_inside, kept_apart, left_norms, read_away
from orepa_compiler.planning import Edit, Plan, Refusal


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
            edits += self._shared_norms(capture, _taken(edits))
        taken = _taken(edits)
        refusals: list[Refusal] = []
        for path, module in capture.skeleton.named_modules():
            if not isinstance(module, LinearBlock) or is_inside(path, taken):
                continue
            if reason := capture.hook_refusal(path):
                refusals.append(Refusal(self.name, path, f"block {module.block_name}", reason))
            else:
                edits.append(_block_edit(self, capture, path, module))
        if self.fold_norm:
            taken |= set(read_away(capture, interpreter, edits))
            refusals += left_norms(self.name, capture, interpreter, taken)
            refusals += kept_apart(self.name, capture, interpreter, edits, taken)
        return Plan(tuple(edits), tuple(refusals))

    def _region_edits(
        self, capture: Capture, interpreter: Interpreter, norms: list[tuple[Region | str, str]]
    ) -> list[Edit]:
        regions = {_key(region): region for region in interpreter.regions()}
        behind: dict[tuple[str, str], str] = {}
        for region, norm in norms:
            if isinstance(region, Region):
                regions.setdefault(_key(region), region)
                behind[_key(region)] = norm
        before: dict[tuple[str, str], str] = {}
        taken = _called(capture, regions.values()) | {norm for _, norm in norms}
        for region, norm in norms_before(interpreter):
            if not is_inside(norm, taken):
                regions.setdefault(_key(region), region)
                before[_key(region)] = norm
        called = _called(capture, regions.values())
        order = {owner: number for number, owner in enumerate(capture.graphs)}
        keys = sorted(regions, key=lambda key: order[key[0]])  # one owner's regions together
        keys = [key for key in keys if not is_inside(key[0], called)]  # a norm outside joined more
        return [
            _region_edit(self.name, capture, regions[k], before.get(k), behind.get(k)) for k in keys
        ]

    def _shared_norms(self, capture: Capture, taken: set[str]) -> list[Edit]:
        """The edits for norms behind a concatenation of convs."""
        return [
            _concatenation_edit(self.name, capture, convs, norm)
            for convs, norm in concatenated_convs(capture)
            if not any(is_inside(path, taken) for path in (*convs, norm))
        ]

    def apply(self, model: nn.Module, capture: Capture, plan: Plan) -> tuple[nn.Module, Plan]:
        for owner, edits in groupby(plan.edits, key=lambda edit: edit.options["owner"]):
            if owner is not None:
                model = fold_regions(model, capture, owner, list(edits))
                continue
            for edit in edits:
                fold = fold_block if edit.options["kind"] == "block" else absorb_norm
                model = fold(model, capture, edit)
        return model.eval(), plan


def _key(region: Region) -> tuple[str, str]:
    return region.owner, region.node_names[-1]


def _called(capture: Capture, regions: Iterable[Region]) -> set[str]:
    """The paths of the modules that some regions call."""
    calls = [Call(region.owner, node) for region in regions for node in region.value.nodes]
    return {capture.path_of(call) for call in calls if call.node.op == "call_module"}


def _taken(edits: list[Edit]) -> set[str]:
    return {path for edit in edits for path in edit.options["modules"]}


def _region_edit(
    name: str, capture: Capture, region: Region, before: str | None, behind: str | None
) -> Edit:
    """The edit for a region: which modules go, and where the one conv stands.

    before, behind: the paths of norms in other modules that go too.
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
        "modules": [*([before] if before else []), *paths, *([behind] if behind else [])],
        "before": before,
        "behind": behind,
    }
    if region.is_path:
        options["at"] = next(p for p, m in zip(paths, modules, strict=True) if holds_kernel(m))
        options["rest"] = paths[-1] if region.value.rest is not None else None
    gone = [capture.module(path) for path in options["modules"]]
    size = sum(p.numel() for module in gone for p in module.parameters())
    size += sum(p.numel() for p in own_parameters(capture.module(region.owner), region.value))
    names = [type(module).__name__ for module in gone if not is_idle(module)]
    names += filter(None, map(functional_conv, region.value.nodes))
    what = " + ".join(names)
    target = _conv_text(operator.in_channels, operator.out_channels, operator.kernel_size)
    path = options.get("at", region.owner)
    return Edit(name, path, what, target, (size, after), options=options)


def _absorption_edit(name: str, capture: Capture, conv: str, norm: str) -> Edit:
    """The edit that folds a norm into a conv that is no operator of the algebra."""
    modules = [capture.module(path) for path in (conv, norm)]
    kept = own_conv(modules[0])
    before, after = (
        sum(p.numel() for m in modules for p in m.parameters()),
        _folded_size(modules[0]),
    )
    what = " + ".join(type(module).__name__ for module in modules)
    options = {"kind": "absorb", "owner": None, "modules": [conv, norm]}
    return Edit(name, conv, what, type(kept).__name__, (before, after), options=options)


def _concatenation_edit(name: str, capture: Capture, convs: list[str], norm: str) -> Edit:
    """The edit that folds a norm into the convs whose concatenation it reads, each its channels."""
    paths = [*convs, norm]
    modules = [capture.module(path) for path in paths]
    before = sum(p.numel() for module in modules for p in module.parameters())
    after = sum(_folded_size(module) for module in modules[:-1])
    what = f"{len(convs)} concatenated convs + {type(modules[-1]).__name__}"
    around = [path for path in ancestors(norm) if path in capture.graphs]
    within = next(a for a in around if all(is_inside(path, {a}) for path in convs))
    options = {"kind": "concatenation", "owner": None, "modules": paths, "within": within}
    return Edit(name, norm, what, f"{len(convs)} convs", (before, after), options=options)


def _folded_size(conv: nn.Module) -> int:
    """The parameters of a conv that has taken a norm."""
    kernel = conv.weight
    assert isinstance(kernel, Tensor)
    return kernel.numel() + int(conv.out_channels)  # type: ignore[arg-type]


def _block_edit(collapse: Collapse, capture: Capture, path: str, block: LinearBlock) -> Edit:
    options = {"kind": "block", "owner": None, "modules": [path]}
    is_shifted = block.norm is not None or block.scaling_layer == "norm"
    if not collapse.fold_norm:
        if block.block_name == LINEARIZED:
            raise ReparamError(
                "its branches were linearized, so the norms they had are gone; use fold_norm=True",
                path=path,
            )
        if is_shifted and not block.replaces_bias:
            options["bias_to"] = _bias_taker(capture, path, block)
    before = sum(p.numel() for p in block.parameters())
    has_bias = (block.replaces_bias or is_shifted) and not options.get("bias_to")
    after = block.weight.numel() + (block.out_channels if has_bias else 0)
    target = _conv_text(block.in_channels, block.out_channels, block.kernel_size)
    what = f"block {block.block_name}"
    return Edit(collapse.name, path, what, target, (before, after), options=options)


def _bias_taker(capture: Capture, path: str, block: LinearBlock) -> str:
    """The norm that can take the bias which a block makes and its conv had no place for."""
    if norm := norm_behind(capture, path):
        return norm
    whose = (
        "its inserted norm needs" if block.norm is not None else "the norms of its branches need"
    )
    raise ReparamError(
        f"{whose} a bias to go to, the original conv has none, and no BatchNorm is known to be "
        "all that reads it; use fold_norm=True",
        path=path,
    )


def _conv_text(in_channels: int, out_channels: int, kernel_size: tuple[int, ...]) -> str:
    kernel = "x".join(map(str, kernel_size))
    return f"Conv{len(kernel_size)}d {in_channels} -> {out_channels} {kernel}"
