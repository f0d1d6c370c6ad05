"""What forwards tell of the form of their maps, and what is refused where they do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.algebra.maps import TOKENS, Maps, second
from orepa_compiler.analysis.forms import MapForm
from orepa_compiler.analysis.regions import Interpreter
from orepa_compiler.capture import capture
from orepa_compiler.passes import is_leaf
from tests.convolution_reference import error
from tests.norms import randomise_norms

SIZE = 6
Run = Callable[[Any, Tensor], Any]


class Gain(nn.Module):
    """One factor for each channel, whose forward tells nothing of its input."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Net(nn.Module):
    """All sizes are equal, so that a confused axis computes something."""

    def __init__(self, run: Run, *shape: int) -> None:
        super().__init__()
        self.conv, self.point = nn.Conv2d(SIZE, SIZE, 3, padding=1), nn.Conv2d(SIZE, SIZE, 1)
        self.line, self.cube = nn.Conv1d(SIZE, SIZE, 1), nn.Conv3d(SIZE, SIZE, 1)
        self.linear = nn.Linear(SIZE, SIZE)
        self.norm, self.tokens = nn.BatchNorm2d(SIZE), nn.BatchNorm1d(SIZE)
        self.any_norm = nn.SyncBatchNorm(SIZE)
        self.relu, self.gain, self.gains = nn.ReLU(), Gain(SIZE, 1, 1), Gain(1, SIZE, 1, 1)
        self.g = nn.Parameter(torch.rand(shape) + 0.5)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def form_of(run: Run) -> MapForm:
    """What is known of the input of a net."""
    found = capture(Net(run), training=False, is_leaf=is_leaf)
    graph = found.graphs[""]
    return Interpreter(found, found.module).forms.of("", next(iter(graph.nodes)))


MAPS, F32 = Maps(SIZE, second(2)), torch.float32
TOLD: dict[str, tuple[Run, MapForm]] = {
    "nothing": (lambda m, x: x.exp(), MapForm()),
    "a conv": (lambda m, x: m.conv(x), MapForm(MAPS, frozenset({3, 4}), F32)),
    "a conv behind an activation": (
        lambda m, x: m.conv(torch.relu(x)),
        MapForm(MAPS, frozenset({3, 4})),
    ),
    "a norm": (lambda m, x: m.norm(x), MapForm(MAPS, frozenset({4}), is_batched=True)),
    "a norm behind a conv": (
        lambda m, x: m.norm(m.conv(x)),
        MapForm(MAPS, frozenset({4}), F32, is_batched=True),
    ),
    "a norm of any rank behind a conv": (
        lambda m, x: m.any_norm(m.cube(x)),
        MapForm(Maps(SIZE, second(3)), frozenset({5}), F32, is_batched=True),
    ),
    "BatchNorm1d": (
        lambda m, x: m.tokens(x),
        MapForm(Maps(SIZE, second(0, 1)), frozenset({2, 3}), is_batched=True),
    ),
    "BatchNorm1d of what has two axes": (
        lambda m, x: m.tokens(m.relu(m.linear(x.permute(1, 0)))),
        MapForm(counts=frozenset({2}), dtype=F32),
    ),
    "a linear layer": (
        lambda m, x: m.linear(x),
        MapForm(Maps(SIZE, TOKENS), frozenset(range(1, 9)), F32),
    ),
    "four slices": (
        lambda m, x: m.conv(x)[:, :, 1:, :],
        MapForm(MAPS, frozenset({4}), F32),
    ),
    "a crop of its rows": (
        lambda m, x: m.conv(x[..., 1:, :]),
        MapForm(MAPS, frozenset({3, 4}), F32),
    ),
    "a module around": (
        lambda m, x: m.norm(m.gain(m.conv(x))),
        MapForm(MAPS, frozenset({4}), F32, is_batched=True),
    ),
    "a conv behind a division": (lambda m, x: m.conv(x / 255), MapForm(MAPS, frozenset({3, 4}))),
    "a conv behind a factor in place": (
        lambda m, x: m.conv(x.mul_(2)),
        MapForm(MAPS, frozenset({3, 4}), F32),
    ),
    "a conv behind three channels": (
        lambda m, x: m.conv(x - m.gain.gamma),
        MapForm(counts=frozenset(range(5))),
    ),
    "functions": (
        lambda m, x: F.max_pool2d(F.conv2d(F.pad(x, (1, 1)), m.point.weight), 2),
        MapForm(MAPS, frozenset({3, 4}), F32),
    ),
}


@pytest.mark.parametrize(("run", "form"), TOLD.values(), ids=TOLD)
def test_what_is_known_of_an_input(run: Run, form: MapForm) -> None:
    assert form_of(run) == form


BATCH, SINGLE = (2, *(SIZE,) * 3), (SIZE,) * 3
FOLDED: dict[str, tuple[Run, tuple[int, ...]]] = {
    "(C, 1, 1)": (lambda m, x: m.norm(m.conv(x) * m.g), (SIZE, 1, 1)),
    "(1, C, 1, 1) behind a norm": (lambda m, x: m.norm(m.conv(x)) * m.g, (1, SIZE, 1, 1)),
    "(1,)": (lambda m, x: m.norm(m.conv(x) * m.g), (1,)),
    "(1, 1, 1)": (lambda m, x: m.norm(m.conv(x) * m.g), (1, 1, 1)),
    "one number": (lambda m, x: m.norm(m.conv(x) * m.g), ()),
    "a module that scales": (lambda m, x: m.norm(m.gain(m.conv(x))), ()),
    "a module that scales batches": (lambda m, x: m.gains(m.norm(m.conv(x))), ()),
    "a crop before a norm": (lambda m, x: m.norm(m.conv(x)[:, :, 1:-1]), ()),
    "a crop from the right": (lambda m, x: m.norm(m.conv(x)[..., 1:-1]), ()),
    "alpha": (lambda m, x: m.norm(torch.add(m.conv(x), m.point(x), alpha=0.5)), ()),
    "a norm of any rank": (lambda m, x: m.any_norm(m.conv(x)), ()),
}
KEPT: dict[str, tuple[Run, tuple[int, ...]]] = {
    "rows": (lambda m, x: m.norm(m.conv(x) * m.g), (SIZE, 1)),
    "columns": (lambda m, x: m.norm(m.conv(x) * m.g), (SIZE,)),
    "a position": (lambda m, x: m.norm(m.conv(x) + m.g), (1, SIZE, 1)),
    "images": (lambda m, x: m.norm(m.conv(x) * m.g), (2, 1, 1, 1)),
}


def compared(net: nn.Module, x: Tensor) -> tuple[nn.Module, float]:
    """The collapsed net, and how far it is from the net."""
    deploy = orepa.collapse(net)
    with torch.no_grad():
        one, two = net(x), deploy(x)
    assert one.shape == two.shape
    assert one.dtype == two.dtype
    return deploy, error(two, one)


def folded(deploy: nn.Module) -> set[str]:
    """The paths of the modules that went."""
    edits = orepa.recorded_plans(deploy)[-1].edits
    return {path for edit in edits for path in edit.options["modules"]}


def made(run: Run, shape: tuple[int, ...]) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(Net(run, *shape)).double().eval()


@pytest.mark.parametrize(("run", "shape"), FOLDED.values(), ids=FOLDED)
def test_a_constant_of_the_channels_is_folded(run: Run, shape: tuple[int, ...]) -> None:
    net = made(run, shape)
    deploy, wrong = compared(net, torch.randn(BATCH, dtype=torch.float64))
    assert wrong < 1e-12
    assert not {"norm", "any_norm"}.isdisjoint(folded(deploy))


def test_a_norm_of_tokens_follows_a_linear_layer() -> None:
    """BatchNorm1d on (N, C), which flatten(1) shows; on (N, T, C) it works on another axis."""
    net = made(lambda m, x: m.tokens(m.linear(x.flatten(1))), ())
    deploy, wrong = compared(net, torch.randn(3, SIZE, dtype=torch.float64))
    assert wrong < 1e-12
    assert not is_batch_norm(deploy.tokens)
    net = made(lambda m, x: m.tokens(m.linear(x)), ())
    deploy, wrong = compared(net, torch.randn(3, SIZE, SIZE, dtype=torch.float64))
    assert wrong < 1e-12
    assert is_batch_norm(deploy.tokens)


@pytest.mark.parametrize(("run", "shape"), KEPT.values(), ids=KEPT)
def test_a_constant_of_another_axis_stays(run: Run, shape: tuple[int, ...]) -> None:
    net = made(run, shape)
    deploy, wrong = compared(net, torch.randn(BATCH, dtype=torch.float64))
    assert wrong < 1e-12
    assert is_batch_norm(deploy.norm)


UNBATCHED: dict[str, tuple[Run, tuple[int, ...]]] = {
    "a batch's axis, added": (lambda m, x: m.g - m.conv(x), (1, 1, 1, 1)),
    "rows": (lambda m, x: m.conv(x) * m.g, (SIZE, 1)),
    "the channels": (lambda m, x: m.conv(x) * m.g, (SIZE, 1, 1)),
    "a crop": (lambda m, x: m.point(m.conv(x)[:, :, 1:-1]), ()),
    "a crop from the right": (lambda m, x: m.point(m.conv(x)[..., 1:-1, :]), ()),
}


@pytest.mark.parametrize(("run", "shape"), UNBATCHED.values(), ids=UNBATCHED)
def test_maps_with_and_without_a_batch(run: Run, shape: tuple[int, ...]) -> None:
    net = made(run, shape)
    for size in (BATCH, SINGLE):
        _, wrong = compared(net, torch.randn(size, dtype=torch.float64))
        assert wrong < 1e-12


@pytest.mark.parametrize("shape", [(SIZE, 1, 1), (1,), ()])
def test_a_wider_constant_makes_the_map_wider(shape: tuple[int, ...]) -> None:
    """A float64 tensor beside a float32 map; one number changes no type."""

    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.point(m.conv(x) * m.g)
        return y

    def wide(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.conv(x) * m.g
        return y

    net = Net(wide, *shape).eval()
    net.g = nn.Parameter(net.g.detach().double())
    deploy, wrong = compared(net, torch.randn(BATCH))
    assert wrong < 1e-6
    (plan,) = orepa.recorded_plans(deploy)
    assert bool(plan.edits) == (shape == ())


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grey_image_takes_the_channels_of_what_is_subtracted(channels: int) -> None:
    class Normalised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(torch.rand(3, 1, 1))
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x - self.mean))

    torch.manual_seed(0)
    net = randomise_norms(Normalised()).double().eval()
    deploy, wrong = compared(net, torch.randn(2, channels, 6, 6, dtype=torch.float64))
    assert wrong < 1e-12
    assert not is_batch_norm(deploy.norm)


def test_bytes_are_divided_before_the_conv() -> None:
    class Pictures(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x / 255))

    torch.manual_seed(0)
    net = randomise_norms(Pictures()).eval()
    x = torch.randint(0, 255, (2, 3, 6, 6), dtype=torch.uint8)
    deploy, wrong = compared(net, x)
    assert wrong < 1e-5
    assert not is_batch_norm(deploy.norm)


def test_a_norm_that_stays_in_train_mode_is_no_operator() -> None:
    class Stays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.point, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def train(self, mode: bool = True) -> Stays:
            super().train(mode)
            self.norm.train()
            return self

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.point(self.norm(self.conv(x)).relu()))

    torch.manual_seed(0)
    net = randomise_norms(Stays()).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = net(x)
    deploy = orepa.collapse(net)
    assert is_batch_norm(deploy.norm)
    assert not is_batch_norm(deploy.last)
    deploy.norm.train()
    assert error(deploy(x), expected) < 1e-12
    reasons = {r.path: r.reason for r in orepa.recorded_plans(deploy)[-1].refusals}
    assert reasons["norm"] == (
        "BatchNorm2d stays in train mode when the model is in eval mode, and takes the statistics "
        "of the batch"
    )
