"""Which values share memory, and what a node may write over: against runs that write over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from orepa_compiler.capture import capture
from orepa_compiler.capture.forwards import Forwards
from orepa_compiler.passes import is_leaf


class Net(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Chosen(nn.Module):
    """Writes over its second input, and gives the first back."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.act(y)
        return x


def forwards(net: nn.Module) -> tuple[Forwards, dict[str, fx.Node]]:
    captured = capture(net, training=False, is_leaf=is_leaf)
    found = Forwards(captured, captured.module)
    graph = found.graph("")
    assert graph is not None
    return found, {node.name: node for node in graph.nodes}


# What gives a view of x or x itself, and what gives a tensor of its own.
VIEWS: list[Callable[[Any, Tensor], Tensor]] = [
    lambda m, x: x.view(-1),
    lambda m, x: x[:, :1],
    lambda m, x: x.permute(0, 2, 3, 1).transpose(1, 2),
    lambda m, x: x.chunk(2, 1)[0],
    lambda m, x: x.detach(),
    lambda m, x: F.dropout(x, 0.5, False),
    lambda m, x: torch.einsum("nchw->nwhc", x),
    lambda m, x: F.relu(x, True),
    lambda m, x: m.flat(x),
    lambda m, x: m.same(x),
    lambda m, x: m.act(x),
    lambda m, x: m.box(x),
    lambda m, x: m.chosen(x, x + 1),
]
FRESH: list[Callable[[Any, Tensor], Tensor]] = [
    lambda m, x: x + 1,
    lambda m, x: F.relu(x),
    lambda m, x: torch.cat([x, x], 1),
    lambda m, x: m.conv(x),
    lambda m, x: m.norm(x),
    lambda m, x: m.deep(x),
    lambda m, x: m.chosen(x + 1, x),
    lambda m, x: F.interpolate(x, scale_factor=2.0),
]
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "flat": nn.Flatten,
    "same": nn.Identity,
    "act": lambda: nn.ReLU(inplace=True),
    "box": lambda: nn.Sequential(nn.Dropout(), nn.Sequential(nn.ReLU(inplace=True))),
    "chosen": Chosen,
    "conv": lambda: nn.Conv2d(4, 4, 1),
    "norm": lambda: nn.BatchNorm2d(4),
    "deep": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(inplace=True)),
}


@pytest.mark.parametrize(
    ("give", "is_view"), [*((give, True) for give in VIEWS), *((give, False) for give in FRESH)]
)
def test_what_may_be_a_view_is_told_from_what_is_none(
    give: Callable[[Any, Tensor], Tensor], is_view: bool
) -> None:
    net = Net(lambda m, x: give(m, x).zero_(), **{n: make() for n, make in LAYERS.items()}).eval()
    x = torch.ones(2, 4, 3, 3)
    with torch.no_grad():
        net(x)
    assert bool((x == 0).any()) == is_view, "the run itself says otherwise"
    found, nodes = forwards(net)
    last = next(node for name, node in nodes.items() if name.startswith("zero_"))
    assert found.memory.overwrites("", last, nodes["x"]) == is_view


@pytest.mark.parametrize("name", LAYERS)
def test_what_a_module_writes_over(name: str) -> None:
    layer = LAYERS[name]()

    def run(m: Any, x: Tensor) -> Tensor:
        y = x * 1
        m.layer(y, x * 2) if isinstance(layer, Chosen) else m.layer(y)
        return y

    net = Net(run, layer=layer).eval()
    x = torch.linspace(-1, 1, 72).reshape(2, 4, 3, 3)
    with torch.no_grad():
        is_written = not torch.equal(net(x), x)
    found, nodes = forwards(net)
    assert found.memory.overwrites("", nodes["layer"], nodes["mul"]) == is_written


def test_what_no_graph_tells_may_write_over_all_that_it_is_given() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) if x.sum() > 0 else x

    found, nodes = forwards(Net(lambda m, x: m.asks(x * 1, x), asks=Asks()))
    assert found.memory.overwrites("", nodes["asks"], nodes["x"])
    assert found.memory.overwrites("", nodes["asks"], nodes["mul"])


def test_a_module_with_a_hook_may_write_over_its_input() -> None:
    net = Net(lambda m, x: m.conv(x * 1), conv=nn.Conv2d(4, 4, 1))
    net.conv.register_forward_pre_hook(lambda module, args: None)
    found, nodes = forwards(net)
    assert found.memory.overwrites("", nodes["conv"], nodes["mul"])
    assert not found.memory.overwrites("", nodes["conv"], nodes["x"])


def test_a_value_of_its_own_is_told_from_an_input_and_a_view() -> None:
    found, nodes = forwards(Net(lambda m, x: torch.relu(x).view(-1) * 2))
    own = {n for n, node in nodes.items() if n != "output" and found.memory.is_own("", node)}
    assert own == {"relu", "mul"}


def test_two_inputs_may_be_one_tensor() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.relu(x) + y.mul_(2)

    found = forwards(Net(lambda m, x: m.two(x, x), two=Two()))[0]
    graph = found.graph("two")
    assert graph is not None
    inside = {node.name: node for node in graph.nodes}
    assert found.memory.overwrites("two", inside["mul_"], inside["x"])
    assert not found.memory.overwrites("two", inside["mul_"], inside["relu"])
