"""Questions about a tensor that a tracer's stand-in answers otherwise than the tensor does.

Some of them end the process, so each form is judged in one of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.hostile.apart import faults_apart
from tests.hostile.forms import SIZE, Form, Pair, conv


def asks(question: Any, *, behind: bool = True) -> Any:
    """A pair whose norm is skipped where the question about its input, or map, says so."""

    class Asks(Pair):
        def forward(self, x: Any) -> Any:
            y = self.conv(x)
            return self.norm(y) if question(y if behind else x) else y

    return Asks


def mixes(factor: Any) -> Any:
    """A pair with something between that is made of the input, by a call into C++."""

    class Mixes(Pair):
        def forward(self, x: Any) -> Any:
            return self.norm(self.conv(x) * factor(x))

    return Mixes


def tried(question: Any) -> Any:
    def answer(x: Any) -> bool:
        try:
            return bool(question(x))
        except Exception:
            return True

    return answer


def named(x: Any) -> bool:
    match x:
        case Tensor():
            return False
        case _:
            return True


class SetsAttribute(Pair):
    """A tag on the map decides further on."""

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        y.raw = True
        return F.relu(y) if getattr(y.clone(), "raw", False) else self.norm(y)


class Tagged(nn.Module):
    """A child tags its map; the parent reads the tag."""

    class Child(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Any) -> Any:
            y = self.conv(x)
            y.is_raw = True
            return y

    def __init__(self) -> None:
        super().__init__()
        self.child, self.norm = self.Child(), nn.BatchNorm2d(SIZE)

    def forward(self, x: Any) -> Any:
        y = self.child(x)
        return y if hasattr(y, "is_raw") else self.norm(y)


class NestedInput(Pair):
    """A list of tensors or one: the well-known question of detectors."""

    def forward(self, x: Any) -> Any:
        maps = x.tensors if hasattr(x, "tensors") else x
        return F.relu(self.norm(self.conv(maps)))


class Raises(Pair):
    """What a tensor has not is asked for, and the error is the way."""

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        try:
            y = y.mask(x)
        except AttributeError:
            return y
        return self.norm(y)


class Positions(Pair):
    """As detectors make their positions: from sizes and the type of the map."""

    def forward(self, x: Any) -> Any:
        y = self.norm(self.conv(x))
        rows = torch.arange(y.shape[2], dtype=y.dtype, device=y.device)
        return y + rows.view(1, 1, -1, 1)


class Formatted(Pair):
    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return self.norm(y) if f"{y}".startswith("conv") or "Proxy" in repr(y) else y


class Keyed(Pair):
    """The map is a key in a dict of the forward's own."""

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        known = {id(y): True}
        return y if known.get(id(y)) and isinstance(y, Tensor) else self.norm(y)


QUESTIONS = {
    "hasattr": lambda y: hasattr(y, "mask"),
    "getattr with default": lambda y: getattr(y, "mask", None) is not None,
    "isinstance": lambda y: not isinstance(y, Tensor),
    "type is": lambda y: type(y) is not Tensor,
    "__class__": lambda y: y.__class__.__name__ != "Tensor",
    "match": named,
    "callable": lambda y: callable(y),
    "bool in a try": tried(lambda y: y.abs().max() > 50),
    "float in a try": tried(lambda y: float(y.mean()) > 50),
    "len in a try": tried(lambda y: len(y) > 50),
    "iter in a try": tried(lambda y: sum(y).mean() > 50),
    "in, in a try": tried(lambda y: 1e9 in y),
    "numpy in a try": tried(lambda y: np.asarray(y.detach()).max() > 50),
    "requires_grad": lambda y: not isinstance(y.requires_grad, bool),
    "grad_fn": lambda y: y.grad_fn is None,
    "data_ptr": tried(lambda y: y.data_ptr() == 0),
}
FACTORS = {
    "as_tensor": lambda x: torch.as_tensor(x).mean(),
    "tensor": lambda x: torch.tensor(x).mean(),
    "Tensor": lambda x: torch.Tensor(x).mean(),
    "arange of its type": lambda x: torch.arange(SIZE, dtype=x.dtype),
    "full of its largest": lambda x: torch.full((SIZE, 1, 1), x.max()),
    "full of an item": lambda x: torch.full((SIZE, 1, 1), float(x.max()), dtype=torch.float64),
    "numpy": lambda x: float(np.asarray(x).mean()),
    "from numpy": lambda x: torch.from_numpy(x.numpy()).mean(),
    "new_full": lambda x: x.new_full((SIZE, 1, 1), 2.0),
    "tensor of an item": lambda x: torch.tensor([x.mean(), x.std()]).sum(),
    "Parameter": lambda x: nn.Parameter(x.detach()).mean(),
}
FORMS = {
    **{name: Form(asks(question)) for name, question in QUESTIONS.items()},
    **{
        f"{name}, of the input": Form(asks(QUESTIONS[name], behind=False))
        for name in ("hasattr", "type is", "grad_fn")
    },
    **{f"torch: {name}": Form(mixes(factor)) for name, factor in FACTORS.items()},
    "an attribute is set": Form(SetsAttribute),
    "a tag set by a child": Form(Tagged),
    "x.tensors": Form(NestedInput, norms=0, blocks=1),
    "AttributeError caught": Form(Raises),
    "positions": Form(Positions, norms=0, blocks=1),
    "f-string": Form(Formatted),
    "a key": Form(Keyed),
}


@pytest.mark.parametrize("name", FORMS)
def test_exact_or_refused(name: str) -> None:
    found = faults_apart(__name__)[name]
    assert not found, "\n".join(found)
