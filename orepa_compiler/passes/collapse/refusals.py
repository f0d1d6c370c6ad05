"""Says why collapse leaves norms, convs that are not joined, and borders."""

from __future__ import annotations

from collections.abc import Iterator

from orepa_compiler.algebra.classifiers import is_batch_norm, is_conv_like
from orepa_compiler.analysis.regions import Interpreter
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture import Call, Capture, ancestors, join
from orepa_compiler.passes.collapse.candidates import is_inside
from orepa_compiler.passes.collapse.folds import Fold, FoldRegion
from orepa_compiler.planning import Refusal


def left_norms(
    name: str, capture: Capture, interpreter: Interpreter, taken: set[str]
) -> Iterator[Refusal]:
    """The norms that a conv could have absorbed and that stay, each with its reason."""
    for path, module in capture.skeleton.named_modules():
        if not is_batch_norm(module) or is_inside(path, taken):
            continue
        if any(isinstance(capture.module(owner), ConvBlock) for owner in ancestors(path)):
            continue
        reason = capture.refusal(path)
        calls = capture.calls.get(path, [])
        for call in calls:
            reason = reason or interpreter.reasons.get((call.owner, call.node.name))
        reason = reason or interpreter.reasons.get((path, ""))
        reason = reason or _feeding_refusal(capture, calls) or _feeder(capture, calls)
        yield Refusal(name, path, type(module).__name__, reason)


def _feeding_refusal(capture: Capture, norms: list[Call]) -> str | None:
    """Why the layer that gives a norm its input has to stay, or None."""
    for norm in norms:
        for node in norm.node.all_input_nodes:
            path = capture.path_of(Call(norm.owner, node)) if node.op == "call_module" else ""
            if path and (reason := capture.refusal(path)):
                return f"{path}, which feeds it, stays: {reason}"
    return None


def _feeder(capture: Capture, norms: list[Call]) -> str:
    """What feeds a norm, where that is no conv alone."""
    found = capture.producer(norms[0]) if norms else None
    if found is None:
        return "no conv alone feeds it"
    if found.node.op != "call_module":
        name = getattr(found.node.target, "__name__", found.node.target)
        return f"no conv alone feeds it, but {str(name).strip('_')}"
    path = capture.path_of(found)
    name = type(capture.module(path)).__name__
    if is_conv_like(capture.module(path)):
        return f"no conv alone feeds it: what {path} gives is read elsewhere too"
    return f"no conv alone feeds it, but {name}"


def read_away(capture: Capture, interpreter: Interpreter, folds: list[Fold]) -> Iterator[str]:
    """The modules that nobody calls, and whose tensors only the regions of some folds read."""
    regions = [fold for fold in folds if isinstance(fold, FoldRegion)]
    gone = {(region.owner, node) for region in regions for node in region.nodes}
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


def kept_apart(
    name: str, capture: Capture, interpreter: Interpreter, folds: list[Fold], taken: set[str]
) -> Iterator[Refusal]:
    """Convs that are not joined with what is linear before them, and borders that are none."""
    called = {(c.owner, c.node.name): path for path, calls in capture.calls.items() for c in calls}
    regions = [fold for fold in folds if isinstance(fold, FoldRegion)]
    joined = {(region.owner, node) for region in regions for node in region.nodes[1:]}
    for (owner, node), reason in interpreter.reasons.items():
        path = called.get((owner, node), owner)
        module = capture.module(path)
        is_border = reason.startswith("border") and not is_batch_norm(module)
        is_told = is_border or (is_conv_like(module) and not capture.refusal(path, reader=owner))
        if is_told and (owner, node) not in joined and not is_inside(owner, taken):
            yield Refusal(name, path, type(module).__name__, reason)
