"""Kernels by recorded graphs, with a stand-in for CUDA's that runs the recorded work again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler import generation
from orepa_compiler.blocks import ReparamConv
from orepa_compiler.errors import ReparamError
from orepa_compiler.generation import graphs
from orepa_compiler.generation.graphs import generate_replayed
from tests.generation.test_squeeze import trained
from tests.operator_factories import random_tensor
from tests.training_nets import expanded_net, loss, optimizer_of


class StandIn:
    """Like a CUDA graph: the work reads where it read at first, and writes where it wrote."""

    made: list[StandIn]

    def __init__(self, work: Callable[[], Tensor]) -> None:
        self._work, self._made, self.runs = work, work(), 0
        self.made.append(self)

    def run(self) -> Tensor:
        self.runs += 1
        return self._made.copy_(self._work())


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[StandIn]:
    monkeypatch.setitem(graphs.GRAPHS, "cpu", StandIn)
    monkeypatch.setattr(generation, "ALIKE", 1)
    StandIn.made = []
    return StandIn.made


def x(seed: int) -> Tensor:
    return random_tensor(4, 3, 12, 12, seed=seed)


def step(net: nn.Module, optimizer: Any, seed: int, **options: Any) -> None:
    optimizer.zero_grad()
    with orepa.kernels_once(net, **options):
        for part in (0, 50):
            loss(net, x(seed + part)).backward()
    optimizer.step()


def difference(left: nn.Module, right: nn.Module) -> float:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("last", [False, True])
def test_steps_by_graphs_are_the_steps_without(recorded: list[StandIn], last: bool) -> None:
    layout = torch.channels_last if last else torch.contiguous_format
    nets = [expanded_net().to(memory_format=layout) for _ in range(2)]  # type: ignore[call-overload]
    began = copy.deepcopy(nets[0])
    for net, options in zip(nets, ({"graphs": True}, {}), strict=True):
        optimizer = optimizer_of(net)
        for seed in range(5):
            step(net, optimizer, seed, **options)
    assert difference(*nets) < 1e-12
    assert difference(nets[0], began) > 0.01
    assert [graph.runs for graph in recorded] == [5, 5], "one forward and one backward, again"


def test_what_a_graph_gave_is_not_written_over(recorded: list[StandIn]) -> None:
    blocks = [trained("3x3"), trained("1x1"), trained("3x3")]
    model = nn.ModuleList(blocks)
    weights, grads = run(model, blocks, 1.0)
    kept = [tensor.detach().clone() for tensor in (*weights, *grads)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
            parameter.grad = None
    others = [tensor for own in run(model, blocks, 3.0) for tensor in own]
    assert len(recorded) == 2
    for tensor, before, now in zip((*weights, *grads), kept, others, strict=True):
        assert torch.equal(tensor, before)
        assert not torch.equal(tensor, now)


def run(
    model: nn.Module, blocks: list[ReparamConv], scale: float
) -> tuple[list[Tensor], list[Tensor]]:
    """The kernels, and the gradients of the scaling parameters."""
    made = [operator.weight for operator in generate_replayed(model, blocks)]
    torch.autograd.backward(made, [scale * torch.ones_like(weight) for weight in made])
    found = [block.scaling.grad for block in blocks if block.scaling is not None]
    return made, [grad for grad in found if grad is not None]


MOVES: dict[str, Callable[[nn.Module], Any]] = {
    "to": lambda net: net.float().double(),
    "load": lambda net: net.load_state_dict(copy.deepcopy(net).state_dict(), assign=True),
    "filters": lambda net: [b.mul_(2) for n, b in net.named_buffers() if n.endswith("prior")],
}


@pytest.mark.parametrize("move", MOVES)
def test_where_tensors_have_moved_graphs_are_recorded_anew(
    recorded: list[StandIn], move: str
) -> None:
    nets = [expanded_net() for _ in range(2)]
    for net, options in zip(nets, ({"graphs": True}, {}), strict=True):
        step(net, optimizer_of(net), 0, **options)
        with torch.no_grad():
            MOVES[move](net)
        step(net, optimizer_of(net), 1, **options)
    assert difference(*nets) < 1e-12
    assert len(recorded) == 4


def test_a_block_that_is_not_reached_goes_without_a_graph(recorded: list[StandIn]) -> None:
    nets = [expanded_net() for _ in range(2)]
    for net, options in zip(nets, ({"graphs": True}, {}), strict=True):
        with orepa.kernels_once(net, **options):
            net[:3](x(0)).square().mean().backward()  # type: ignore[index]
    for ours, theirs in zip(*(net.parameters() for net in nets), strict=True):
        assert (ours.grad is None) == (theirs.grad is None)
        if ours.grad is not None and theirs.grad is not None:
            assert float((ours.grad - theirs.grad).abs().max()) < 1e-12
    assert [graph.runs for graph in recorded] == [1]


def test_blocks_of_other_kinds_are_made_beside(recorded: list[StandIn]) -> None:
    blocks = [trained("with a wide branch"), trained("wide alone"), trained("1x1")]
    for block, made in zip(blocks, generate_replayed(nn.ModuleList(blocks), blocks), strict=True):
        torch.testing.assert_close(made.weight, block.weight)
        assert made.weight.requires_grad
    assert len(recorded) == 1


def test_what_graphs_need() -> None:
    net = expanded_net()
    with pytest.raises(ReparamError) as error, orepa.kernels_once(net, graphs=True):
        pytest.fail("entered")
    assert str(error.value) == (
        "graphs=True needs parameters on cuda, these are on cpu; leave it out"
    )
    with (
        pytest.raises(ReparamError, match=r"^kernels_once takes compiled= or graphs=, not both"),
        orepa.kernels_once(net, compiled=True, graphs=True),
    ):
        pytest.fail("entered")
    step(net, optimizer_of(net), 0)


def test_the_mode_of_the_compiler_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[Any] = []

    def as_it_is(function: Any, **options: Any) -> Any:
        modes.append(options["mode"])
        return function

    monkeypatch.setattr(torch, "compile", as_it_is)
    nets = [expanded_net() for _ in range(2)]
    step(nets[0], optimizer_of(nets[0]), 0, compiled="reduce-overhead")
    step(nets[0], optimizer_of(nets[0]), 1, compiled="reduce-overhead")
    for seed in range(2):
        step(nets[1], optimizer_of(nets[1]), seed)
    assert modes == ["reduce-overhead"]
    # two optimizers each with a fresh momentum on both sides
    assert difference(*nets) < 1e-12
