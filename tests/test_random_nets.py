"""Nets of random steps come through expand, training and collapse with the same outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_conv_like
from orepa_compiler.blocks import ConvBlock
from tests.norms import randomise_norms
from tests.random_nets import CHANNELS, KINDS, RETURNS, RandomNet, Step


def steps(kinds: tuple[str, ...], inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    back = st.integers(0, 3)
    step = st.builds(Step, st.sampled_from(kinds), back, back, st.integers(0, 99), inner)
    return st.lists(step, min_size=1, max_size=8).map(tuple)


FLAT = tuple(kind for kind in KINDS if kind not in RETURNS)
NETS = steps(KINDS, steps(KINDS, steps(FLAT, st.just(()))))


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn([CHANNELS] * 4, generator=generator, dtype=torch.float64)


def outputs(net: nn.Module) -> Tensor:
    with torch.no_grad():
        return net.eval()(images()).clone()


def made(program: tuple[Step, ...]) -> tuple[nn.Module, Tensor]:
    """The net of a program and its outputs, where it has a conv and a net can be judged by them."""
    torch.manual_seed(0)
    net = randomise_norms(RandomNet(program)).double().eval()
    assume(any(map(is_conv_like, net.modules())))
    try:
        expected = outputs(net)
    except RuntimeError:  # a write in place that torch itself refuses
        assume(False)
    assume(expected.isfinite().all() and 1e-3 < expected.abs().max() < 1e4)
    return net, expected


def assert_same(net: nn.Module, expected: Tensor) -> None:
    error = (outputs(net) - expected).abs().max() / expected.abs().max()
    assert error < 1e-9, f"{error:.2g}"


def trained(net: nn.Module) -> nn.Module:
    """The net with every parameter and statistic moved, as training does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter += 0.05 * noise
    return randomise_norms(net, seed=2)


pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning"),
    pytest.mark.filterwarnings("ignore::orepa_compiler.NothingExpandedWarning"),
]

fuzz = settings(
    max_examples=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much,
                           HealthCheck.data_too_large],
)  # fmt: skip


@fuzz
@given(NETS)
def test_collapse_keeps_the_outputs(program: tuple[Step, ...]) -> None:
    net, expected = made(program)
    assert_same(orepa.collapse(net), expected)
    assert_same(orepa.collapse(net, inputs=images()), expected)
    assert_same(net, expected)


@pytest.mark.parametrize("options", [{"where": "**"}, {"block": orepa.OREPA}])
@fuzz
@given(NETS)
def test_there_and_back(options: dict[str, Any], program: tuple[Step, ...]) -> None:
    net, expected = made(program)
    expanded = orepa.expand(net, inputs=images(), **options)
    assert_same(expanded, expected)
    after = outputs(trained(expanded))
    assume(after.isfinite().all() and 1e-3 < after.abs().max() < 1e4)
    deploy = orepa.collapse(expanded, inputs=images())
    assert_same(deploy, after)
    assert not any(isinstance(module, ConvBlock) for module in deploy.modules())
