"""Layers that are called as functions, and arithmetic with constants: what each computes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.analysis.regions import Interpreter
from orepa_compiler.analysis.values import LinearValue
from orepa_compiler.capture import capture
from orepa_compiler.passes import is_leaf
from tests.convolution_reference import assert_same, error, reference
from tests.operator_factories import random_tensor

Run = Callable[[Any, Tensor], Tensor]


class Net(nn.Module):
    """Tensors and layers for a forward to use."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.kernel = nn.Parameter(random_tensor(6, 4, 3, 2, seed=1))
        self.grouped = nn.Parameter(random_tensor(6, 2, 3, 3, seed=2))
        self.matrix = nn.Parameter(random_tensor(6, 4, seed=3))
        self.bias = nn.Parameter(random_tensor(6, seed=4))
        self.gamma = nn.Parameter(random_tensor(4, 1, 1, seed=5))
        self.number = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
        self.line = nn.Parameter(random_tensor(6, 4, 3, seed=6))
        self.cube = nn.Parameter(random_tensor(6, 4, 1, 2, 3, seed=7))
        self.norm = nn.BatchNorm2d(6).double().eval()
        self.point = nn.Conv2d(4, 4, 1).double()
        with torch.no_grad():
            self.norm.running_mean.copy_(random_tensor(6, seed=8))  # type: ignore[union-attr]
            self.norm.running_var.copy_(random_tensor(6, seed=9).exp())  # type: ignore[union-attr]
            self.norm.weight.copy_(random_tensor(6, seed=10))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def interpreted(run: Run) -> tuple[nn.Module, Interpreter]:
    net = Net(run).eval()
    captured = capture(net, training=False, is_leaf=is_leaf)
    return net, Interpreter(captured, net.get_submodule, at_any_cost=True)


def last(interpreter: Interpreter) -> LinearValue | None:
    graph = interpreter.graph("")
    assert graph is not None
    output = next(iter(reversed(graph.nodes))).args[0]
    return interpreter.values("").get(output)  # type: ignore[arg-type]


def norm_of(m: Any, x: Tensor, **options: Any) -> Tensor:
    n = m.norm
    return F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias, **options)


MAPS: dict[str, Run] = {
    "conv2d": lambda m, x: F.conv2d(x, m.kernel, m.bias),
    "its geometry": lambda m, x: torch.conv2d(x, m.kernel, None, (2, 1), (1, 2), (1, 3)),
    "one number for all axes": lambda m, x: F.conv2d(x, m.kernel, padding=1, stride=2),
    "groups by name": lambda m, x: F.conv2d(input=x, weight=m.grouped, groups=2, padding=[1]),
    "same": lambda m, x: F.conv2d(x, m.kernel, padding="same"),
    "valid": lambda m, x: F.conv2d(x, m.kernel, padding="valid"),
    "a kernel made of others": lambda m, x: F.conv2d(x, m.kernel * m.number + m.kernel.exp()),
    "a kernel of another layer": lambda m, x: F.conv2d(x, m.point.weight, m.point.bias),
    "batch_norm": lambda m, x: norm_of(m, F.conv2d(x, m.kernel)),
    "batch_norm, eps": lambda m, x: norm_of(m, F.conv2d(x, m.kernel), eps=0.1, training=False),
    "batch_norm, bare": lambda m, x: F.batch_norm(
        F.conv2d(x, m.kernel), m.norm.running_mean, m.norm.running_var
    ),
    "padded": lambda m, x: F.conv2d(F.pad(x, (1, 0, 2, 1)), m.grouped, groups=2),
    "padded by name": lambda m, x: m.point(F.pad(x, pad=[-1, 1], mode="constant", value=0)),
    "reflected": lambda m, x: m.point(F.pad(x, (1, 2, 2, 1), "reflect")),
    "pooled": lambda m, x: m.point(F.avg_pool2d(x, 3, 2, 1)),
    "pooled by name": lambda m, x: m.point(F.avg_pool2d(x, kernel_size=(2, 1), stride=1)),
    "times a parameter": lambda m, x: m.point(x) * m.gamma,
    "times one number": lambda m, x: m.number * m.point(x),
    "times a number": lambda m, x: torch.mul(m.point(x), -0.5),
    "over": lambda m, x: m.point(x) / (m.gamma.exp() + 1),
    "over a number": lambda m, x: m.point(x).div(3),
    "plus": lambda m, x: m.point(x) + m.gamma,
    "minus": lambda m, x: m.point(x) - m.gamma,
    "from": lambda m, x: m.gamma - m.point(x),
    "from a number": lambda m, x: 1 - m.point(x),
    "in place": lambda m, x: operator.iadd(m.point(x).mul_(m.gamma), 2),
    "cropped": lambda m, x: m.point(x)[:, :, 1:-2, :-1],
    "cropped from the back": lambda m, x: m.point(x)[..., 1:],
    "cropped on one axis": lambda m, x: norm_of(m, F.conv2d(x, m.kernel))[:, :, 2:],
    "plus twice a parameter": lambda m, x: torch.add(m.point(x), m.gamma, alpha=2),
    "a parameter minus half": lambda m, x: torch.sub(m.gamma, m.point(x), alpha=0.5),
    "plus twice itself, as once written": lambda m, x: torch.add(m.point(x), 2, m.gamma),
    "by another name": lambda m, x: torch.true_divide(torch.multiply(m.point(x), 3), m.gamma),
    "by keyword": lambda m, x: torch.mul(m.point(x), other=m.gamma),
    "the input cropped": lambda m, x: m.point(x[:, :, 1:-1, 1:-1]) + x[:, :, 1:-1, 1:-1],
    "the input, scaled": lambda m, x: x * 0.5 + m.point(x),
}


# torch says that it may copy the input to pad it unevenly, and that add(x, 2, y) is of old
@pytest.mark.filterwarnings("ignore:Using padding='same'", "ignore:This overload of add")
@pytest.mark.parametrize("run", MAPS.values(), ids=MAPS)
def test_a_function_of_maps(run: Run) -> None:
    net, interpreter = interpreted(run)
    value = last(interpreter)
    assert value is not None
    assert value.operator is not None
    assert value.source.op == "placeholder"
    x = random_tensor(2, 4, 9, 8, seed=20)
    with torch.no_grad():
        assert_same(reference(value.operator, x), net(x.clone()))


OTHER_RANKS: dict[str, tuple[Run, tuple[int, ...]]] = {
    "linear": (lambda m, x: F.linear(x, m.matrix, m.bias), (3, 4)),
    "linear, scaled": (lambda m, x: F.linear(x, m.matrix) * m.bias / 2 + m.bias, (3, 4)),
    "conv1d": (lambda m, x: F.conv1d(F.pad(x, (2, 1)), m.line, m.bias, 2), (2, 4, 9)),
    "conv3d": (lambda m, x: F.conv3d(x, m.cube, padding=(0, 1, 1)), (2, 4, 3, 4, 5)),
}


@pytest.mark.parametrize(("run", "shape"), OTHER_RANKS.values(), ids=OTHER_RANKS)
def test_other_ranks(run: Run, shape: tuple[int, ...]) -> None:
    net, interpreter = interpreted(run)
    value = last(interpreter)
    assert value is not None
    assert value.operator is not None
    x = random_tensor(*shape, seed=21)
    with torch.no_grad():
        assert_same(value.operator(x), net(x))


NOT_LINEAR: dict[str, tuple[Run, str]] = {
    "a kernel made of the map": (lambda m, x: F.conv2d(m.kernel, x), ""),
    "the statistics of the batch": (
        lambda m, x: norm_of(m, F.conv2d(x, m.kernel), training=True),
        "F.batch_norm with training=True takes the statistics of the batch",
    ),
    "no statistics": (
        lambda m, x: F.batch_norm(F.conv2d(x, m.kernel), None, None),
        "F.batch_norm without running statistics is not affine in eval mode",
    ),
    "padded with a number": (
        lambda m, x: F.pad(m.point(x), (1, 1, 1, 1), value=2.0),
        "border: it pads with 2; a conv pads with zeros, or with the bias of the one before it",
    ),
    "of unknown width": (
        lambda m, x: F.pad(x, (1, 1)),
        "the number of channels that it sees is not known",
    ),
    "beyond the axes": (
        lambda m, x: m.point(F.pad(x, (0, 0, 0, 0, 1, 1))),
        "the number of channels that it sees is not known",
    ),
    "pooled otherwise": (
        lambda m, x: m.point(F.avg_pool2d(x, 3, ceil_mode=True)),
        "average pooling with ceil_mode or divisor_override is not one conv",
    ),
    "channels cropped": (lambda m, x: m.point(x)[:, 1:], ""),
    "every second pixel": (lambda m, x: m.point(x)[:, :, ::2], ""),
    "a fixed number of pixels": (lambda m, x: m.point(x)[:, :, :5], ""),
    "one row": (lambda m, x: m.point(x)[:, :, 0], ""),
    "over the map": (lambda m, x: 1 / m.point(x), ""),
    "two maps": (lambda m, x: m.point(x) * x, ""),
    "another axis": (
        lambda m, x: m.point(x) * m.matrix.sum(0),
        "a constant of shape (4,) is not one number for each of the 4 channels",
    ),
    "rows": (
        lambda m, x: m.point(x) * m.matrix.sum(0).reshape(4, 1),
        "a constant of shape (4, 1) is not one number for each of the 4 channels",
    ),
    "a position": (
        lambda m, x: m.point(x) + m.matrix.sum(0).reshape(1, 4, 1),
        "a constant of shape (1, 4, 1) is not one number for each of the 4 channels",
    ),
    "rows cut, where there may be no batch": (
        lambda m, x: m.point(x)[:, :, 2:],
        "an index that counts axes from the left cuts others of a map without a batch; write it as "
        "[..., 1:-1]",
    ),
    "bytes": (lambda m, x: m.point(x / 255), "what it reads is not known to be of floating point"),
    "rounded": (lambda m, x: torch.div(m.point(x), 2, rounding_mode="floor"), ""),
    "an integer power": (lambda m, x: m.point(x) ** 2, ""),
}


@pytest.mark.parametrize(("run", "reason"), NOT_LINEAR.values(), ids=NOT_LINEAR)
def test_what_is_no_linear_layer(run: Run, reason: str) -> None:
    _, interpreter = interpreted(run)
    value = last(interpreter)
    assert value is None or value.source.op != "placeholder"
    if reason:
        assert reason in interpreter.reasons.values()


@given(
    pads=st.lists(st.integers(-2, 3), min_size=4, max_size=4),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    cut=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_padded_and_cropped_anyhow(
    pads: list[int], kernel: tuple[int, int], stride: int, cut: tuple[int, int]
) -> None:
    """One conv, or a border that is named; a refused one must really differ."""
    weight = random_tensor(5, 4, *kernel)

    class Cropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(weight)

        def forward(self, x: Tensor) -> Tensor:
            y = F.conv2d(F.pad(x, pads), self.weight, None, stride)
            return y[:, :, cut[0] :, : -cut[1] or None]

    net = Cropped().eval()
    interpreter = Interpreter(capture(net, training=False, is_leaf=is_leaf), net.get_submodule)
    value = last(interpreter)
    assert value is not None
    assert value.operator is not None
    assert value.source.op == "placeholder"
    x = random_tensor(1, 4, 11, 12, seed=3)
    with torch.no_grad():
        assert_same(reference(value.operator, x), net(x))


class OverParameterized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Parameter(torch.randn(8, 8, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, torch.einsum("otkl,tikl->oikl", self.left, self.right)).relu()


def test_a_model_whose_only_conv_is_a_function_is_collapsed() -> None:
    torch.manual_seed(0)
    net = OverParameterized().double().requires_grad_(False)
    x = random_tensor(2, 8, 5, 5)
    deploy = orepa.collapse(net)
    assert error(deploy(x), net(x)) < 1e-12
    (conv,) = (m for m in deploy.modules() if isinstance(m, nn.Conv2d))
    assert not conv.weight.requires_grad
    assert conv.weight.dtype == torch.float64
    assert len(list(deploy.parameters())) == 1
    edit = orepa.recorded_plans(deploy)[-1].edits[0]
    assert (edit.before, edit.after, edit.parameters) == (
        "conv2d",
        "Conv2d 8 -> 8 1x1",
        (128, 72),
    )


def test_a_model_with_no_conv_at_all_is_refused() -> None:
    with pytest.raises(orepa.ReparamError, match="has no conv, so there is nothing"):
        orepa.collapse(nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    with pytest.raises(orepa.ReparamError, match="OverParameterized has no conv"):
        orepa.expand(OverParameterized())
