"""Folding: the edits of collapse are made, each operator in float64 and cast once."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from orepa_compiler.algebra.layers import linear_part
from orepa_compiler.analysis.absorption import absorb
from orepa_compiler.analysis.crossing import with_norm
from orepa_compiler.analysis.linear import Linear
from orepa_compiler.analysis.preceding import after_norm
from orepa_compiler.analysis.regions import Interpreter
from orepa_compiler.analysis.shifting import give_bias
from orepa_compiler.blocks import LinearBlock
from orepa_compiler.blocks.plain import like, plain_conv
from orepa_compiler.capture import Capture
from orepa_compiler.errors import NotLinear, ReparamError
from orepa_compiler.planning import Edit
from orepa_compiler.rewrite import free_name, replace_regions, set_module, set_module_everywhere


def fold_regions(model: nn.Module, capture: Capture, owner: str, edits: list[Edit]) -> nn.Module:
    """All regions of one owner: first the paths, whose children are swapped, then its graph."""
    read = _in_float64(model)
    replacements = []
    for edit in edits:
        interpreter = Interpreter(capture, read, at_any_cost=True)  # the plan looked at the cost
        chain = _chain(edit) if edit.options["kind"] == "path" else []
        value = interpreter.value_of(owner, edit.options["nodes"], chain)
        if before := edit.options.get("before"):
            value = after_norm(value, before, read)
        if behind := edit.options["behind"]:
            value = with_norm(value, behind, read)
        modules = [model.get_submodule(path) for path in edit.options["modules"]]
        direct = own_parameters(model.get_submodule(owner), value)
        replaced = [*(p for module in modules for p in module.parameters()), *direct]
        assert value.operator is not None
        conv = like(value.operator.to_module(), replaced)
        for norm in filter(None, (before, behind)):
            model = set_module(model, norm, _rest(model, norm) or nn.Identity())
        if edit.options["kind"] == "path":
            model = _fold_path(model, edit, conv)
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


def absorb_norm(model: nn.Module, capture: Capture, edit: Edit) -> nn.Module:
    """A norm, into one conv, or into the convs whose concatenation it reads, each its channels."""
    *paths, norm = edit.options["modules"]
    read = _in_float64(model)
    affine, rest = linear_part(read(norm))
    assert affine.bias is not None
    convs = [_own_class(read(path), path) for path in paths]
    widths = [int(conv.out_channels) for conv in convs]  # type: ignore[arg-type]
    factors, shifts = affine.weight.flatten().split(widths), affine.bias.split(widths)
    for path, conv, factor, shift in zip(paths, convs, factors, shifts, strict=True):
        parameters = list(model.get_submodule(path).parameters())
        model = set_module(model, path, like(absorb(conv, factor, shift), parameters))
    return set_module(
        model, norm, (_rest(model, norm) if rest is not None else None) or nn.Identity()
    )


def _own_class(module: nn.Module, path: str) -> nn.Module:
    """The conv of the user's class that a module is, or stands for."""
    return _plain_conv(module, path) if isinstance(module, LinearBlock) else module


def _chain(edit: Edit) -> list[str]:
    """The layers of a region that is a path, without the norms in other modules."""
    norms = (edit.options.get("before"), edit.options["behind"])
    return [path for path in edit.options["modules"] if path not in norms]


def _fold_path(model: nn.Module, edit: Edit, conv: nn.Module) -> nn.Module:
    for path in _chain(edit):
        new = conv if path == edit.options["at"] else nn.Identity()
        if path == edit.options["rest"]:
            new = _rest(model, path) or new
        model = set_module(model, path, new)
    return model


def _rest(model: nn.Module, path: str) -> nn.Module | None:
    """What stays of a norm with an activation: the user's own activation module."""
    return linear_part(model.get_submodule(path))[1]


def _in_float64(model: nn.Module) -> Callable[[str], nn.Module]:
    return lambda path: copy.deepcopy(model.get_submodule(path)).double().eval()


def own_parameters(owner: nn.Module, value: Linear) -> list[nn.Parameter]:
    """The parameters that the forward of a region's owner reads itself, for this region."""
    names = [str(node.target) for node in value.nodes if node.op == "get_attr"]
    known = dict(owner.named_parameters(remove_duplicate=False))
    return [known[name] for name in names if name in known]


def fold_block(model: nn.Module, capture: Capture, edit: Edit) -> nn.Module:
    """A block, into the conv that it stands for; what it adds may go to the bias of a norm."""
    conv = _plain_conv(model.get_submodule(edit.path), edit.path)
    if norm := edit.options.get("bias_to"):
        give_bias(conv, model.get_submodule(norm))
    return set_module_everywhere(model, capture.aliases[edit.path], conv)


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
