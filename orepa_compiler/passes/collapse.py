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

from torch import Tensor, nn

from orepa_compiler.algebra.layers import (
    holds_kernel,
    is_batch_norm,
    is_conv_like,
    is_idle,
    linear_part,
)
from orepa_compiler.analysis.absorption import absorb
from orepa_compiler.analysis.crossing import crossings, with_norm
from orepa_compiler.analysis.functional import functional_conv
from orepa_compiler.analysis.linear import Linear
from orepa_compiler.analysis.regions import Interpreter, Region
from orepa_compiler.analysis.shifting import give_bias, norm_behind
from orepa_compiler.blocks import LINEARIZED, LinearBlock
from orepa_compiler.blocks.own_forward import OwnForwardConv, own_conv
from orepa_compiler.blocks.plain import like, plain_conv
from orepa_compiler.capture import Call, Capture, ancestors, join
from orepa_compiler.errors import NotLinear, ReparamError
from orepa_compiler.planning import Edit, Plan, Refusal
from orepa_compiler.rewrite import free_name, replace_regions, set_module, set_module_everywhere


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
                edits.append(_block_edit(self, capture, path, module))
        if self.fold_norm:
            taken |= set(_read_away(capture, interpreter, edits))
            refusals += self._left_norms(capture, interpreter, taken)
            refusals += _kept_apart(self.name, capture, interpreter, edits, taken)
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
        calls = [Call(r.owner, n) for r in regions.values() for n in r.value.nodes]
        called = {capture.path_of(call) for call in calls if call.node.op == "call_module"}
        order = {owner: number for number, owner in enumerate(capture.graphs)}
        keys = sorted(regions, key=lambda key: order[key[0]])  # one owner's regions together
        keys = [key for key in keys if not _is_inside(key[0], called)]  # a norm behind joined more
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
                if norm := edit.options.get("bias_to"):
                    give_bias(conv, model.get_submodule(norm))
                model = set_module_everywhere(model, capture.aliases[edit.path], conv)
        return model.eval(), plan

    def _left_norms(
        self, capture: Capture, interpreter: Interpreter, taken: set[str]
    ) -> Iterator[Refusal]:
        """The norms that a conv could have absorbed and that stay, each with its reason."""
        for path, module in capture.skeleton.named_modules():
            if not is_batch_norm(module) or _is_inside(path, taken):
                continue
            if any(isinstance(capture.module(owner), LinearBlock) for owner in ancestors(path)):
                continue
            reason = capture.refusal(path)
            calls = capture.calls.get(path, [])
            for call in calls:
                reason = reason or interpreter.reasons.get((call.owner, call.node.name))
            reason = reason or interpreter.reasons.get((path, ""))
            reason = reason or _feeding_refusal(capture, calls) or "no conv alone feeds it"
            yield Refusal(self.name, path, type(module).__name__, reason)


def _feeding_refusal(capture: Capture, norms: list[Call]) -> str | None:
    """Why the layer that gives a norm its input has to stay, or None."""
    for norm in norms:
        for node in norm.node.all_input_nodes:
            path = capture.path_of(Call(norm.owner, node)) if node.op == "call_module" else ""
            if path and (reason := capture.refusal(path)):
                return f"{path}, which feeds it, stays: {reason}"
    return None


def _read_away(capture: Capture, interpreter: Interpreter, edits: list[Edit]) -> Iterator[str]:
    """The modules that nobody calls, and whose tensors only the regions of some edits read."""
    gone = {(edit.options["owner"], n) for edit in edits for n in edit.options.get("nodes", [])}
    for path in capture.reads.keys() - capture.calls.keys():
        readers = [
            (owner, node.name)
            for owner in capture.reads[path]
            for child, nodes in interpreter.readers(owner).items()
            for node in nodes
            if join(owner, child) in capture.aliases[path]
        ]
        if gone.issuperset(readers):
            yield path


def _kept_apart(
    name: str, capture: Capture, interpreter: Interpreter, edits: list[Edit], taken: set[str]
) -> Iterator[Refusal]:
    """Convs that are not joined with what is linear before them, and borders that are none."""
    called = {(c.owner, c.node.name): path for path, calls in capture.calls.items() for c in calls}
    joined = {(e.options["owner"], node) for e in edits for node in e.options.get("nodes", [])[1:]}
    for (owner, node), reason in interpreter.reasons.items():
        path = called.get((owner, node), owner)
        module = capture.module(path)
        is_border = reason.startswith("border") and not is_batch_norm(module)
        is_told = is_border or (is_conv_like(module) and not capture.refusal(path, reader=owner))
        if is_told and (owner, node) not in joined and not _is_inside(owner, taken):
            yield Refusal(name, path, type(module).__name__, reason)


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
    before += sum(p.numel() for p in _own_parameters(capture.module(region.owner), region.value))
    names = [type(module).__name__ for module in gone if not is_idle(module)]
    names += filter(None, map(functional_conv, region.value.nodes))
    what = " + ".join(names)
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


def _is_inside(path: str, taken: set[str]) -> bool:
    return not taken.isdisjoint([path, *ancestors(path)])


def _apply_regions(model: nn.Module, capture: Capture, owner: str, edits: list[Edit]) -> nn.Module:
    """All regions of one owner: first the paths, whose children are swapped, then its graph."""
    read = _in_float64(model)
    replacements = []
    for edit in edits:
        interpreter = Interpreter(capture, read, at_any_cost=True)  # the plan looked at the cost
        chain = _chain(edit) if edit.options["kind"] == "path" else []
        value = interpreter.value_of(owner, edit.options["nodes"], chain)
        if behind := edit.options["behind"]:
            value = with_norm(value, behind, read)
        modules = [model.get_submodule(path) for path in edit.options["modules"]]
        direct = _own_parameters(model.get_submodule(owner), value)
        replaced = [*(p for module in modules for p in module.parameters()), *direct]
        assert value.operator is not None
        conv = like(value.operator.to_module(), replaced)
        if behind:
            model = set_module(model, behind, _rest(model, behind) or nn.Identity())
        if edit.options["kind"] == "path":
            model = _apply_path(model, edit, conv)
        else:
            replacements.append((edit, conv, value))
    if not replacements:
        return model
    module = model.get_submodule(owner).eval()  # the mode is written into the graph
    graph = capture.own_graph(owner, module)
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
    conv = like(absorb(exact, affine), list(model.get_submodule(conv_path).parameters()))
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


def _own_parameters(owner: nn.Module, value: Linear) -> list[nn.Parameter]:
    """The parameters that the forward of a region's owner reads itself, for this region."""
    names = [str(node.target) for node in value.nodes if node.op == "get_attr"]
    known = dict(owner.named_parameters(remove_duplicate=False))
    return [known[name] for name in names if name in known]


def _plain_conv(block: nn.Module, path: str) -> nn.Module:
    """The conv that a block stands for, with its own geometry, kernel collapsed."""
    if not isinstance(block, LinearBlock):
        raise ReparamError(
            f"the plan does not fit: it collapses a block, here is a {type(block).__name__}",
            path=path,
        )
    try:
        return plain_conv(block)
    except NotLinear as error:
        raise ReparamError(error.reason, path=path) from error
