"""Stand-ins answer as the tensor would that they stand for, or end the trace; never in C++."""

from __future__ import annotations

import builtins
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

from orepa_compiler.capture.tracing.forward import trace

Run = Callable[[Tensor], Any]


class Net(nn.Module):
    def __init__(self, run: Run) -> None:
        super().__init__()
        self.conv, self.run = nn.Conv2d(3, 3, 1), run

    def forward(self, x: Tensor) -> Any:
        return self.run(self.conv(x))


def targets(run: Run) -> list[str]:
    graph = trace(Net(run))
    assert isinstance(graph, fx.Graph), graph
    return [str(getattr(node.target, "__name__", node.target)) for node in graph.nodes]


def reason(run: Run) -> str:
    found = trace(Net(run))
    assert isinstance(found, str), "it was traced"
    return found


@pytest.mark.parametrize(
    "asks",
    [
        lambda y: hasattr(y, "mask"),
        lambda y: getattr(y, "mask", None) is not None,
        lambda y: isinstance(y, (list, tuple)),
        lambda y: not isinstance(y, Tensor),
        lambda y: not torch.is_tensor(y),
        lambda y: callable(y),
        lambda y: not isinstance(y.shape, tuple),
        lambda y: not isinstance(y.shape[0], int),
    ],
)
def test_a_question_is_answered_as_for_a_tensor(asks: Callable[[Tensor], bool]) -> None:
    assert "relu" in targets(lambda y: y if asks(y) else torch.relu(y))


def test_what_a_tensor_does_not_have_is_an_attribute_error() -> None:
    def run(y: Tensor) -> Tensor:
        with pytest.raises(AttributeError, match="'Tensor' object has no attribute 'tensors'"):
            y.tensors  # type: ignore[attr-defined]  # noqa: B018
        return torch.relu(y)

    assert "relu" in targets(run)


@pytest.mark.parametrize(
    ("asks", "why"),
    [
        (lambda y: bool(y.max() > 0), "control flow"),
        (lambda y: float(y.max()), "value of a tensor (float)"),
        (lambda y: int(y.max()), "value of a tensor (int)"),
        (lambda y: range(y.argmax()), "value of a tensor (index)"),
        (lambda y: len(y), "value of a tensor (len)"),
        (lambda y: list(y), "iterates over a value"),
        (lambda y: np.asarray(y), "value of a tensor (array)"),
        (lambda y: y.__dlpack__(), "value of a tensor (dlpack)"),
    ],
)
def test_an_error_that_the_forward_catches_still_ends_the_trace(
    asks: Callable[[Tensor], Any], why: str
) -> None:
    def run(y: Tensor) -> Tensor:
        try:
            asks(y)
        except Exception:
            return y
        return torch.relu(y)

    found = reason(run)
    assert why in found
    assert "goes on where that fails" in found


@pytest.mark.parametrize(
    "run",
    [
        lambda y: torch.relu(y) if type(y) is Tensor else y,
        lambda y: torch.relu(y) if y.__class__ is Tensor else y,
    ],
)
def test_a_type_that_is_asked_for_past_isinstance_is_refused(run: Run) -> None:
    assert "asks for the type of a value" in reason(run)


def test_an_attribute_that_is_set_is_a_node_that_later_readers_read() -> None:
    def run(y: Tensor) -> Tensor:
        y.data = y.data.clamp(max=0.5)
        return torch.relu(y)

    assert targets(run)[-3:] == ["set_attribute_", "relu", "output"]


def test_a_tensor_with_an_attribute_of_its_own_is_asked_for_it_by_nobody() -> None:
    def run(y: Tensor) -> Tensor:
        y.mask = None  # type: ignore[attr-defined]
        return y if hasattr(y, "mask") else torch.relu(y)

    assert "'mask', which some forward sets on a tensor" in reason(run)


MADE_OF_A_STAND_IN = (
    "torch.as_tensor(y)", "torch.tensor(y)", "torch.Tensor(y)", "torch.asarray(y)",
    "torch.arange(3, dtype=y.dtype)", "torch.full((2,), y.max())", "torch.zeros(y.shape)",
    "torch.eye(y.shape[1])", "nn.Parameter(y)", "torch.tensor([y, y])",
)  # fmt: skip


def test_no_stand_in_reaches_the_code_of_torch() -> None:
    """Where it would, the process dies; so they are tried in another one, each said first."""
    code = [
        "import torch; from torch import nn",
        "from orepa_compiler.capture.tracing.forward import trace",
        "class Net(nn.Module):",
        "    def __init__(self, made): super().__init__(); self.made = made",
        "    def forward(self, y): return self.made(y)",
        *(f"print({made!r}, flush=True); trace(Net(lambda y: {made}))"
          for made in MADE_OF_A_STAND_IN),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"it died in {done.stdout.splitlines()[-1:]}: {done.stderr}"
    assert done.stdout.splitlines() == list(MADE_OF_A_STAND_IN)


def test_python_is_left_as_it_was() -> None:
    before = (builtins.isinstance, builtins.hasattr, builtins.getattr, torch.arange)
    trace(Net(lambda y: y if hasattr(y, "mask") else torch.relu(y)))
    assert (builtins.isinstance, builtins.hasattr, builtins.getattr, torch.arange) == before
