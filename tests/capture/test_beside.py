"""What forwards do beside their graphs, and which layers stay for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from orepa_compiler.capture import Capture, capture
from orepa_compiler.passes import is_leaf

COUNT = 0


class Pair(nn.Module):
    """A conv and its norm. run: between the two, on the module itself."""

    def __init__(self, run: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.run, self.calls, self.state = run, 0, SimpleNamespace(calls=0)
        self.kept: Any = None

    def forward(self, x: Tensor) -> Any:
        return self.run(self, self.conv(x))


def captured(run: Callable[[Any, Tensor], Any]) -> Capture:
    return capture(Pair(run), training=False, is_leaf=is_leaf)


def counts(m: Any, y: Tensor) -> Tensor:
    m.calls += 1
    return m.norm(y)


def counts_and_looks(m: Any, y: Tensor) -> Tensor:
    m.calls += 1
    return m.norm(y) if m.calls < 100 else y


def counts_in_an_object(m: Any, y: Tensor) -> Tensor:
    m.state.calls += 1
    return m.norm(y)


def counts_in_the_world(m: Any, y: Tensor) -> Tensor:
    global COUNT
    COUNT += 1
    return m.norm(y)


def draws(m: Any, y: Tensor) -> Tensor:
    return m.norm(y) if random.random() < 0.5 else y


def draws_by_torch(m: Any, y: Tensor) -> Tensor:
    return m.norm(y) * torch.rand(())


def remembers(m: Any, y: Tensor) -> Tensor:
    m.kept = y
    return m.norm(y)


def reads_what_it_remembers(m: Any, y: Tensor) -> Tensor:
    m.kept = y if m.kept is None else m.kept
    return m.norm(m.kept)


STEERED = {
    counts: None,
    counts_and_looks: "it changes its calls",
    counts_in_an_object: "it changes its state",
    counts_in_the_world: "it changes the global COUNT",
    draws: "it draws random numbers",
    draws_by_torch: "it draws random numbers",
    remembers: None,
    reads_what_it_remembers: "it changes its kept",
}


@pytest.mark.parametrize(("run", "why"), STEERED.items(), ids=[f.__name__ for f in STEERED])
def test_what_a_forward_changes_and_reads_may_steer_its_next_call(
    run: Any, why: str | None
) -> None:
    random.seed(2)  # the first number is above 0.5, so that the norm runs
    found = captured(run)
    assert found.doubtful.get("") == why
    if why and run is not draws:
        assert found.refusal("norm") == f"the forward of the model may go another way: {why}"


def test_a_value_that_is_left_somewhere_has_one_reader_more() -> None:
    graph = captured(remembers).graphs[""]
    conv = next(node for node in graph.nodes if node.target == "conv")
    assert [user.name for user in conv.users] == ["norm", "keep_"]


def test_random_numbers_are_drawn_as_if_nobody_had_looked() -> None:
    random.seed(2)
    before = random.getstate()
    captured(draws)
    assert random.getstate() == before


CHILDREN = {
    "norm": [
        lambda m, y: (setattr(m.norm, "eps", 0.1), m.norm(y))[1],
        lambda m, y: (m.norm.train(), m.norm(y), m.norm.eval())[1],
    ],
    "conv": [
        lambda m, y: m.norm(y) * sum(p.pow(2).sum() for p in m.conv.parameters()),
        lambda m, y: m.norm(y) * m.conv.state_dict()["weight"].mean(),
        lambda m, y: m.norm(y) + functional_call(m.conv, {"bias": m.conv.bias * 2}, (y[:, :3],)),
        lambda m, y: m.norm(y) * m.conv._parameters["weight"].mean(),
        lambda m, y: m.norm(y) * next(m.conv.parameters()).type(torch.float64).mean(),
    ],
}


@pytest.mark.parametrize(
    ("path", "run"), [(path, run) for path, runs in CHILDREN.items() for run in runs]
)
def test_a_child_that_is_set_or_read_past_the_graph_stays(path: str, run: Any) -> None:
    found = captured(run)
    reason = found.refusal(path)
    assert reason is not None
    named = ("the forward of the model sets its", "the forward of the model uses it")
    assert reason.startswith(named) or "reads its weight" in reason or "cannot be traced" in reason
    assert "" in found.untraced or found.swap_refusal(path) == reason


class Decoder(nn.Module):
    """Uses the kernel of a conv elsewhere, which it keeps in a list."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.tied, self.gain = [conv], nn.Parameter(torch.ones(1))

    def forward(self, y: Tensor) -> Tensor:
        return F.conv_transpose2d(y, self.tied[0].weight) * self.gain


def test_a_weight_that_is_reached_through_a_list_is_a_shared_one() -> None:
    net = nn.Sequential(Pair(counts))
    net.append(Decoder(net[0].conv))  # type: ignore[arg-type]
    found = capture(net, training=False, is_leaf=is_leaf)
    assert found.refusal("0.conv") == (
        "the forward of 1 uses it, or its weight, where no graph shows it"
    )
    assert found.refusal("0.norm") is None


class Talks(nn.Module):
    """Two forwards with one object between them."""

    def __init__(self) -> None:
        super().__init__()
        state = SimpleNamespace(skips=False)
        self.first, self.second = Pair(self.says), Pair(self.hears)
        self.first.state = self.second.state = state

    @staticmethod
    def says(m: Any, y: Tensor) -> Tensor:
        m.state.skips = True
        return m.norm(y)

    @staticmethod
    def hears(m: Any, y: Tensor) -> Tensor:
        return y if m.state.skips else m.norm(y)

    def forward(self, x: Tensor) -> Any:
        return self.first(x), self.second(x)


def test_what_one_forward_changes_steers_those_that_read_it() -> None:
    found = capture(Talks(), training=False, is_leaf=is_leaf)
    assert found.doubtful["second"] == "it reads what the forward of first changes"
