"""Finds the parts of a model that plans have made: a detector's backbone, what an EMA averages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from torch import nn

from orepa_compiler.blocks import Block, ConvBlock
from orepa_compiler.capture import ancestors, join
from orepa_compiler.capture.skeleton import value_copy
from orepa_compiler.compiler import replay
from orepa_compiler.errors import CheckpointError, ReparamError
from orepa_compiler.planning import Plan, recorded_plans
from orepa_compiler.rewriting.swapping import exchange

Parts = Mapping[str, Sequence[Plan]]


def planned_parts(model: nn.Module) -> dict[str, tuple[Plan, ...]]:
    """Collects, by module path, the plans that were recorded there; the model's own at "".

    Raises CheckpointError where no plan tells how a block was made: what reads the file could not
    make it again.
    """
    parts = {path: plans for path, m in model.named_modules() if (plans := recorded_plans(m))}
    told = {id(module) for path, plans in parts.items() for module in _made(model, path, plans)}
    for path, module in model.named_modules():
        if isinstance(module, ConvBlock) and id(module) not in told:
            raise CheckpointError(
                "no plan tells how this block was made: its model was expanded, and a part of it "
                "was taken out or put elsewhere; save that model, or expand the part",
                path=path,
            )
    return parts


def _made(model: nn.Module, path: str, plans: Sequence[Plan]) -> Iterator[nn.Module]:
    for edit in (edit for plan in plans for edit in plan.edits):
        try:
            yield model.get_submodule(join(path, edit.path))
        except AttributeError:  # a later edit took it away
            continue


def wrapper_of(stock: nn.Module, parts: Parts) -> str | None:
    """Finds the path at which the stock model stands in what held all parts; "" for itself.

    None where there is no such path.
    """
    outer = next(iter(parts))
    for wrapper in sorted({*ancestors(outer), outer}, key=len):
        inner = [path for part in parts if (path := inside(part, wrapper)) is not None]
        if len(inner) == len(parts) and all(_has(stock, path) for path in inner):
            return wrapper
    return None


def inside(path: str, outer: str) -> str | None:
    """Gives a path as seen from the module at another one; None where that is not around it."""
    start = f"{outer}." if outer else ""
    return "" if path == outer else path.removeprefix(start) if path.startswith(start) else None


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def replayed(
    stock: nn.Module, parts: Parts, keys: set[str], block: Block | Literal["auto"]
) -> nn.Module:
    """Applies the plans of its parts to the stock model, so that its keys are those of the file.

    A part may have been made before the whole or after it, and no plan says which: the order that
    gives the keys is taken. Raises what the plans raise where none does.
    """
    inner_first = sorted(parts, key=lambda path: -len(path))
    orders = [inner_first, inner_first[::-1]] if len(parts) > 1 else [inner_first]
    for order in orders:
        is_last = order is orders[-1]
        try:
            made = _in_order(stock if is_last else value_copy(stock), parts, order, block)
        except ReparamError:
            if is_last:
                raise
            continue
        if is_last or set(made.state_dict()) == keys:
            return made
    raise AssertionError("the last order returns or raises")


def _in_order(
    model: nn.Module, parts: Parts, order: Sequence[str], block: Block | Literal["auto"]
) -> nn.Module:
    for path in order:
        for plan in parts[path]:
            part = model.get_submodule(path)
            made = replay(part, plan, block=block)
            model = exchange(model, part, made) if path else made
    return model
