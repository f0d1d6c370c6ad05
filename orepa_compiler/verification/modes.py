"""Compares a model in a mode, and gives it back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import fx, nn

from orepa_compiler.errors import ReparamError
from orepa_compiler.verification.undoing import Snapshot


@contextmanager
def evaluation_mode(*functions: Any) -> Iterator[None]:
    """Every module as its own eval() leaves it inside, and as it was before after it.

    A model's own train() may keep a norm as in training, or merge weights: what its eval() changed,
    in flags, attributes, registrations and values, is put back bit by bit.
    """
    roots = [f for f in functions if isinstance(f, nn.Module)]
    with ExitStack() as stack:
        for root in roots:
            stack.enter_context(_evaluating(root))
        yield


@contextmanager
def unchanged(*functions: Any) -> Iterator[None]:
    """What the calls inside leave on modules, in attributes and buffers, is undone after it."""
    roots = [f for f in functions if isinstance(f, nn.Module)]
    snapshot = Snapshot.of([m for root in roots for m in root.modules()], with_parameters=False)
    try:
        yield
    finally:
        for put_back in snapshot.changes():
            put_back()


@contextmanager
def _evaluating(root: nn.Module) -> Iterator[None]:
    before = [(child, child.training) for child in root.modules()]
    # The base class sets flags and nothing else: no copy of the weights is needed then.
    switching = [m for child, _ in before if _switches(child) for m in child.modules()]
    snapshot = Snapshot.of(list(dict.fromkeys(switching)))
    undo: list[Callable[[], None]] = []
    try:
        try:
            _to_eval(root)
        finally:
            undo += snapshot.changes()
            del snapshot  # the copies of what did not change are free again
        yield
    finally:
        for put_back in undo:
            put_back()
        for child, flag in before:
            child.training = flag


def _to_eval(root: nn.Module) -> None:
    """Puts a model in eval mode; a program of torch.export stays in the one it was exported in.

    Raises ReparamError where a module in it refuses eval().
    """
    try:
        root.eval()
    except NotImplementedError as error:
        if isinstance(root, fx.GraphModule):  # as torch.export gives it: the mode is in its graph
            return
        raise ReparamError(
            f"a {type(root).__name__} cannot be put in eval mode: {error} Where a part of it is a "
            "program of torch.export, compare the model that the program was exported from"
        ) from error


def _switches(module: nn.Module) -> bool:
    """Whether a module does more than set flags when its mode changes."""
    kind = type(module)
    own = kind.train is not nn.Module.train or kind.eval is not nn.Module.eval
    return own or not {"train", "eval"}.isdisjoint(vars(module))


def modules_in_train_mode(function: Any) -> str:
    """How much of a model is in train mode, in words; "" for nothing, and for a function."""
    children = list(function.modules()) if isinstance(function, nn.Module) else []
    count = sum(child.training for child in children)
    return f"{count} of {len(children)} modules" if count else ""
