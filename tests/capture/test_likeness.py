"""One trace tells of all modules that are alike, and only of those."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, fx, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.capture import Capture, capture, visiting
from orepa_compiler.capture.likeness import Likeness
from orepa_compiler.capture.skeleton import aliases_of
from orepa_compiler.passes import is_leaf
from tests.norms import randomise_norms

MODELS = (
    "test_resnet",
    "test_efficientnet",
    "test_byobnet",
    "test_convnext",
    "levit_128s",
    "ghostnetv3_050",
    "coat_tiny",
    "hrnet_w18_small",
)


class Block(nn.Module):
    def __init__(self, width: int = 3, *, act: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 1), nn.BatchNorm2d(width)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y.relu() if self.act else y)

    def slow(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x).relu())

    def fast(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Settings:
    def __init__(self, act: bool) -> None:
        self.act = act


class OtherBlock(Block):
    pass


def changed(change: Callable[[Any], object]) -> Block:
    block = Block()
    change(block)
    return block


def shared_tensor(block: Any) -> None:
    block.conv.bias = block.norm.bias


def likeness(*modules: nn.Module) -> list[int | None]:
    model = copy.deepcopy(nn.ModuleList(modules))
    likeness = Likeness(dict(model.named_modules()), aliases_of(model))
    return [likeness.number(module) for module in model]


def test_equal_modules_are_alike_whatever_their_values() -> None:
    one, two = likeness(Block(), Block())
    assert one is not None
    assert one == two


@pytest.mark.parametrize("value", [0.5, "text", (1, [2, {"a": 3}]), torch.float16, {1, 2}, max])
def test_attributes_that_are_equal(value: Any) -> None:
    one, two = likeness(*(changed(lambda b: setattr(b, "kept", value)) for _ in range(2)))
    assert one is not None
    assert one == two


def test_objects_with_equal_attributes_are_equal() -> None:
    one, two, other = likeness(
        *(
            changed(lambda b, act=act: setattr(b, "kept", Settings(act)))
            for act in (True, True, False)
        )
    )
    assert one is not None
    assert one == two != other


def test_modules_that_chose_the_same_method() -> None:
    one, two, other = likeness(
        changed(lambda b: setattr(b, "forward", b.slow)),
        changed(lambda b: setattr(b, "forward", b.slow)),
        Block(),
    )
    assert one is not None
    assert one == two != other


@pytest.mark.parametrize(
    "other",
    [
        Block(act=True),
        Block(4),
        OtherBlock(),
        Block().double(),
        Block().eval(),
        changed(lambda b: setattr(b, "extra", 1)),
        changed(lambda b: setattr(b, "act", 0)),
        changed(lambda b: b.requires_grad_(False)),
        changed(lambda b: setattr(b.norm, "bias", None)),
        changed(lambda b: b.conv.register_forward_hook(print)),
        changed(lambda b: setattr(b, "norm", nn.Sequential(b.norm))),
        changed(lambda b: b.register_buffer("mask", torch.ones(3))),
        changed(lambda b: setattr(b, "forward", b.slow)),
        changed(lambda b: setattr(b, "act", partial(max, 1))),
    ],
)
def test_a_difference_that_a_forward_could_see(other: nn.Module) -> None:
    one, two = likeness(Block(), other)
    assert one is not None
    assert one != two


def with_kept(value: Any) -> Block:
    return changed(lambda block: setattr(block, "kept", value))


def with_forward(name: str) -> Block:
    return changed(lambda block: setattr(block, "forward", getattr(block, name)))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (with_kept(nn.Parameter(torch.ones(2))), with_kept(nn.Parameter(torch.ones(3)))),
        (with_kept(max), with_kept(min)),
        (with_kept(1), with_kept(True)),
        (with_kept([1, 2]), with_kept((1, 2))),
        (with_kept(partial(max, 1)), with_kept(partial(max, 2))),
        (with_forward("slow"), with_forward("fast")),
    ],
)
def test_two_that_differ_in_one_thing(one: nn.Module, two: nn.Module) -> None:
    first, second = likeness(one, two)
    assert first is not None
    assert second is not None
    assert first != second


def _twice(block: Any) -> None:
    block.again = block.conv


@pytest.mark.parametrize(
    "change",
    [
        shared_tensor,
        _twice,
        lambda b: setattr(b, "kept", iter(())),
        lambda b: setattr(b, "kept", [b.conv]),
        lambda b: setattr(b, "kept", [nn.ReLU()]),
        lambda b: setattr(b, "kept", torch.ones(2)),
        lambda b: setattr(b, "forward", MethodType(Block.slow, Block())),
    ],
)
def test_what_cannot_be_compared_is_alike_to_none(change: Callable[[Any], object]) -> None:
    number, around = likeness(changed(change), nn.Sequential(changed(change)))
    assert number is None
    assert around is None


def test_a_norm_is_folded_in_those_blocks_where_it_may_be() -> None:
    """The first two are traced once; the third has an activation between."""
    net = nn.Sequential(Block(), Block(), Block(act=True), nn.Sequential(nn.ReLU(), Block()))
    randomise_norms(net).eval()
    deploy, x = orepa.collapse(net), torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(deploy(x), net(x))
    assert [sum(map(is_batch_norm, block.modules())) for block in deploy] == [0, 0, 1, 0]


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    modules: list[nn.Module] = []
    trace = visiting.trace

    def counted(module: nn.Module, *args: Any, **options: Any) -> Any:
        modules.append(module)
        return trace(module, *args, **options)

    monkeypatch.setattr(visiting, "trace", counted)
    return modules


def test_a_deep_net_is_traced_once_for_each_kind_of_block(traced: list[nn.Module]) -> None:
    captured = _capture(nn.Sequential(*(Block() for _ in range(20))))
    assert len({id(graph) for graph in captured.graphs.values()}) == 21  # each has its own
    assert len(traced) == 2


def test_a_forward_that_makes_a_tensor_is_traced_in_each_module(traced: list[nn.Module]) -> None:
    class Shifted(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.arange(3.0).view(1, 3, 1, 1)

    captured = _capture(nn.Sequential(Shifted(), Shifted()))
    for path in ("0", "1"):  # the tensor is an attribute that the trace sets on its module
        fx.GraphModule(captured.module(path), captured.graphs[path])
    assert len({*map(id, traced)}) == 3


def test_a_caller_that_passes_a_module_is_traced_each_time(traced: list[nn.Module]) -> None:
    class Inner(Block):
        def forward(self, x: Tensor, options: Any) -> Tensor:  # type: ignore[override]
            return super().forward(x) * options["scale"]

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.act = Inner(), nn.ReLU()

        def forward(self, x: Tensor) -> Any:
            return self.inner(x, {"scale": 2, "act": self.act})

    captured = _capture(nn.Sequential(Outer(), Outer()))
    assert len(traced) == 5
    for path in ("0.inner", "1.inner"):
        given = captured.arguments[path].constants["options"]["act"]
        assert given is captured.module(path.replace("inner", "act"))


def test_what_is_inside_of_a_block_is_not_traced(traced: list[nn.Module]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    expanded = orepa.expand(net)
    traced.clear()
    assert [*_capture(expanded).graphs] == [""]
    assert len(traced) == 1


def test_a_block_that_is_called_in_another_way_is_traced_again(traced: list[nn.Module]) -> None:
    class Gate(Block):
        def forward(self, x: Tensor, slow: bool = False) -> Tensor:  # type: ignore[override]
            return self.slow(x) if slow else super().forward(x)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = Gate(), Gate(), Gate()

        def forward(self, x: Tensor) -> Any:
            return self.three(self.two(self.one(x), slow=True), slow=True)

    graphs = _capture(Net()).graphs
    assert [("relu" in str(graphs[path])) for path in ("one", "two", "three")] == [0, 1, 1]
    assert len(traced) == 3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("training", [False, True])
def test_a_capture_is_the_same_as_with_every_module_traced(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm.create_model(name).to("meta")
    found = _as_text(_capture(model, training=training))
    monkeypatch.setattr(Likeness, "number", lambda self, module: None)
    assert found == _as_text(_capture(model, training=training))


def _capture(model: nn.Module, *, training: bool = False) -> Capture:
    return capture(model, training=training, is_leaf=is_leaf)


def _as_text(captured: Capture) -> list[str]:
    lines = [f"{path}: {why}" for path, why in captured.untraced.items()]
    for path, graph in captured.graphs.items():
        kinds = [node.meta.get("kind") for node in graph.nodes]
        lines.append(f"{path}: {graph} {kinds} {captured.arguments.get(path)}")
    calls = [(path, c.owner, c.node.name) for path, cs in captured.calls.items() for c in cs]
    return [*lines, str(calls), str(captured.reads)]
