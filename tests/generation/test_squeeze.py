"""Kernel generation against the algebra: values, gradients, and what is kept for backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from orepa_compiler import generation
from orepa_compiler.algebra.layers import conv_operator
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks import Block, LinearBlock, ReparamConv, squeezed
from orepa_compiler.blocks.catalogue import OREPA, OREPA_1X1, automatic_block
from orepa_compiler.branches import AveragePool, DepthwisePointwise, Kernel, SequenceBranch
from orepa_compiler.generation import channelwise, contraction, generate
from orepa_compiler.generation.squeezing import squeeze
from tests.convolution_reference import assert_same
from tests.operator_factories import random_tensor


class Dropped(SequenceBranch):
    """A user's branch: a kernel whose taps are dropped at random, with a bias."""

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        self.weight = nn.Parameter(torch.randn_like(conv.weight))
        self.bias = nn.Parameter(conv.weight.new_ones(conv.out_channels))

    def layers(self) -> tuple[ConvOperator, ...]:
        kept = nn.functional.dropout(self.weight.exp(), 0.5)
        return (self.spatial(kept, self.groups).with_bias(self.bias),)


class Wide(SequenceBranch):
    """A user's branch with more taps than the conv it stands beside."""

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        shape = (*conv.weight.shape[:2], *(size + 2 for size in conv.kernel_size))
        self.weight = nn.Parameter(conv.weight.new_empty(shape).normal_())

    def layers(self) -> tuple[ConvOperator, ...]:
        pads = tuple((before + 1, after + 1) for before, after in self.pads)
        return (replace(self.spatial(self.weight.sin(), self.groups), padding=pads),)


MIXED = Block("MIXED", {**OREPA.branches, "wide": Wide}, OREPA.scaling)
USERS = Block("USERS", {"dropped": Dropped}, {})
SEPARABLE = Block("SEPARABLE", {"only": DepthwisePointwise}, {})
KERNELS = Block("KERNELS", {"a": Kernel, "b": Kernel, "c": AveragePool}, {})
ONE_TAP = Block("ONE_TAP", {"only": AveragePool}, {})

CASES: dict[str, tuple[Callable[[], Any], Block | None]] = {
    "3x3": (lambda: nn.Conv2d(16, 32, 3, padding=1), None),
    "3x3 narrow": (lambda: nn.Conv2d(5, 3, 3), None),
    "2x5": (lambda: nn.Conv2d(4, 6, (2, 5), padding=(1, 2)), None),
    "4x4": (lambda: nn.Conv2d(4, 6, 4), None),
    "1x3": (lambda: nn.Conv2d(4, 16, (1, 3)), None),
    "groups 2": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), None),
    "groups 8": (lambda: nn.Conv2d(16, 8, 3, groups=8), None),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), None),
    "depthwise times 2": (lambda: nn.Conv2d(6, 12, 5, groups=6, dilation=2), None),
    "1x1": (lambda: nn.Conv2d(32, 16, 1, stride=2), None),
    "1x1 widening": (lambda: nn.Conv2d(4, 16, 1), None),
    "1x1 groups": (lambda: nn.Conv2d(6, 4, 1, groups=2), None),
    "1d": (lambda: nn.Conv1d(4, 6, 5, padding=2), None),
    "1d depthwise": (lambda: nn.Conv1d(8, 8, 3, groups=8), None),
    "3d": (lambda: nn.Conv3d(3, 5, 3, padding=1), None),
    "3d groups": (lambda: nn.Conv3d(4, 4, (1, 3, 2), groups=2), None),
    "stem": (lambda: nn.Conv2d(3, 6, 7, stride=2, padding=3), None),
    "with a wide branch": (lambda: nn.Conv2d(4, 6, 3, padding=1), MIXED),
    "separable alone": (lambda: nn.Conv2d(4, 6, 3, groups=2), SEPARABLE),
    "one tap alone": (lambda: nn.Conv2d(4, 6, 3), ONE_TAP),
    "kernels alone": (lambda: nn.Conv2d(4, 6, 3), KERNELS),
    "wide alone": (lambda: nn.Conv2d(4, 6, 3, padding=1), Block("WIDE", {"wide": Wide}, {})),
}
EVERY_CASE = pytest.mark.parametrize("name", CASES)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


# Kernels of how many numbers are made in few operations on a CPU: all of them, or none.
WAYS = {"few operations": 2**30, "parts": 0}


@pytest.fixture(params=WAYS, autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(generation, "SMALL_ALONE", WAYS[request.param])
    return str(request.param)


in_parts = pytest.mark.parametrize("way", ["parts"], indirect=True)


def trained(name: str, scaling: Any = "vector") -> ReparamConv:
    """A float64 block of which every parameter has moved."""
    make, block = CASES[name]
    conv = make().double()
    block = block or automatic_block(conv_operator(conv))
    made = squeezed(LinearBlock(conv, replace(block, scaling_layer=scaling)))
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            parameter.add_(random_tensor(*parameter.shape, seed=number) * 0.3)
    return made


def by_algebra(block: ReparamConv) -> ConvOperator:
    return squeeze(block.branches.values(), block.scaling)  # type: ignore[arg-type]


def gradients(block: ReparamConv, operator: ConvOperator) -> dict[str, Tensor]:
    named = {name: p for name, p in block.named_parameters() if name != "bias"}
    outputs = [t for t in (operator.weight, operator.bias) if t is not None]
    seeds = [torch.empty_like(t).copy_(random_tensor(*t.shape, seed=5)) for t in outputs]
    found = torch.autograd.grad(outputs, list(named.values()), seeds)
    return dict(zip(named, found, strict=True))


def assert_agrees(block: ReparamConv) -> None:
    made, expected = generate(block), by_algebra(block)
    assert_same(made.weight, expected.weight)
    for field in ("stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(made, field) == getattr(expected, field), field
    ours, theirs = gradients(block, made), gradients(block, expected)
    assert ours
    for name in ours:
        assert_same(ours[name], theirs[name], name)


@pytest.mark.parametrize("scaling", ["vector", "scalar", "none"])
@EVERY_CASE
def test_generation_is_the_algebra_in_values_and_gradients(name: str, scaling: str) -> None:
    assert_agrees(trained(name, scaling))


@pytest.mark.parametrize("name", [n for n in CASES if "1d" not in n and "3d" not in n])
def test_the_same_in_channels_last(name: str) -> None:
    block = trained(name).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_agrees(block)


@in_parts
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", ["3x3", "1x1", "1x3"])
def test_the_same_where_products_run_as_convs(
    name: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where the difference would show; the switch itself is for float32."""
    ran = []

    def as_conv(kernel: Tensor, inner: Tensor) -> bool:
        ran.append(kernel.shape[0] % 16 == 0)
        return ran[-1]

    monkeypatch.setattr(contraction, "_runs_as_conv", as_conv)
    block = trained(name).to(memory_format=FORMATS[layout])  # type: ignore[call-overload]
    assert_agrees(block)
    assert len(ran) == 2
    assert all(ran)


@in_parts
def test_large_float32_products_run_as_convs_and_small_or_exact_ones_do_not() -> None:
    kernel, inner = torch.empty(256, 64, 9), torch.empty(64, 128)
    assert contraction._runs_as_conv(kernel, inner)
    assert not contraction._runs_as_conv(kernel[:255], inner)
    assert not contraction._runs_as_conv(kernel[:16], inner)
    assert not contraction._runs_as_conv(kernel[:, :, :1].repeat(99, 1, 1), inner)
    assert not contraction._runs_as_conv(kernel.double(), inner.double())
    assert not contraction._runs_as_conv(kernel.to("meta"), inner.to("meta"))


@in_parts
@pytest.mark.parametrize("name", ["3x3", "groups 2", "depthwise times 2"])
def test_the_same_where_channels_go_through_in_parts(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channelwise, "PART", 40)
    assert_agrees(trained(name))


@pytest.mark.parametrize("name", ["3x3", "groups 8", "1x1", "stem"])
def test_float32_is_as_exact_as_the_algebra_in_float32(name: str) -> None:
    exact = trained(name)
    block = copy.deepcopy(exact).float()
    difference = (generate(block).weight - generate(exact).weight).abs().max()
    assert difference <= 1e-6 * generate(exact).weight.abs().max()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", ["3x3", "groups 2", "2x5", "with a wide branch"])
def test_the_kernel_lies_in_memory_as_the_parameters_do(name: str, layout: str) -> None:
    block = trained(name).to(memory_format=FORMATS[layout])  # type: ignore[call-overload]
    assert generate(block).weight.is_contiguous(memory_format=FORMATS[layout])


def test_a_volumes_kernel_lies_in_memory_as_the_parameters_do() -> None:
    block = trained("3d").to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
    assert generate(block).weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert_agrees(block)


@contextmanager
def kept_for_backward() -> Iterator[list[Tensor]]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        yield kept


@EVERY_CASE
def test_nothing_but_parameters_is_kept_for_backward(name: str) -> None:
    block = trained(name)
    places = {p.data_ptr() for p in block.parameters()}
    with kept_for_backward() as kept:
        weight = generate(block).weight
    # rows of a wide branch are scaled by indices into the scaling parameter: no kernels
    beyond = sum(t.numel() for t in kept if t.data_ptr() not in places and t.is_floating_point())
    assert beyond == 0
    with kept_for_backward() as kept:
        by_algebra(block)
    assert weight.requires_grad
    assert sum(t.numel() for t in kept if t.data_ptr() not in places), "the count must see kernels"


@pytest.mark.parametrize("name", ["3x3 narrow", "groups 2", "1x1 groups", "with a wide branch"])
def test_first_and_second_derivatives_by_differences(name: str) -> None:
    block = trained(name)
    names, values = zip(*block.named_parameters(), strict=True)

    def kernel(*parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(Generated(block), {f"block.{n}": named[n] for n in named})

    assert torch.autograd.gradcheck(kernel, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(kernel, values, fast_mode=True)


class Generated(nn.Module):
    def __init__(self, block: ReparamConv) -> None:
        super().__init__()
        self.block = block

    def forward(self) -> Tensor:
        return generate(self.block).weight


def test_a_second_derivative_runs_hooks_once_and_reaches_the_parameters() -> None:
    block = trained("3x3 narrow")
    calls: list[str] = []
    assert block.scaling is not None
    block.scaling.register_hook(lambda grad: calls.append("scaling"))
    weight = generate(block).weight
    (first,) = torch.autograd.grad(weight.square().sum(), block.scaling, create_graph=True)
    assert calls == ["scaling"]
    first.square().sum().backward()
    assert all(p.grad is not None for n, p in block.named_parameters() if n != "bias")


def test_twenty_sgd_steps_stay_on_the_path_of_the_algebra() -> None:
    """Weight decay and momentum, through norms, in float64."""
    plain = nn.Sequential(*(trained(n) for n in ("3x3", "1x1")), nn.BatchNorm2d(16)).double()
    nets = [plain, copy.deepcopy(plain)]
    nets[1] = nn.Sequential(*(ByAlgebra(b) if isinstance(b, ReparamConv) else b for b in nets[1]))
    nets = [net.to(memory_format=torch.channels_last) for net in nets]  # type: ignore[call-overload]
    start = [p.detach().clone() for p in nets[0].parameters()]
    for net in nets:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-2)
        for step in range(20):
            x = random_tensor(4, 16, 8, 8, seed=step)
            optimizer.zero_grad()
            (net(x) - x[:, :, ::2, ::2][:, :, :3, :3].mean()).square().mean().backward()
            optimizer.step()
    moved = 0.0
    for ours, theirs, began in zip(nets[0].parameters(), nets[1].parameters(), start, strict=True):
        assert float((ours - theirs).detach().abs().max()) < 1e-9
        moved = max(moved, float((ours - began).detach().abs().max()))
    assert moved > 0.1


class ByAlgebra(nn.Module):
    """A block whose kernel autograd follows through the algebra."""

    def __init__(self, block: ReparamConv) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return by_algebra(self.block).with_bias(self.block.bias)(x)


def test_a_branch_that_draws_at_random_draws_the_same_in_backward() -> None:
    conv = nn.Conv2d(4, 6, 3).double()
    block = squeezed(LinearBlock(conv, replace(USERS, scaling_layer="none")))
    made = generate(block)
    (grad,) = torch.autograd.grad(made.weight.sum(), block.branches["dropped"].weight)
    # d exp(w) / d w = exp(w) where it was kept, 0 where it was dropped
    torch.testing.assert_close(grad, made.weight.detach())
    assert 0 < int((grad == 0).sum()) < grad.numel()


@pytest.mark.parametrize(("name", "branch"), [("3x3 narrow", "origin"), ("users", "dropped")])
def test_a_parameter_edited_between_forward_and_backward_is_an_error(
    name: str, branch: str
) -> None:
    block = squeezed(LinearBlock(nn.Conv2d(4, 6, 3), USERS)) if name == "users" else trained(name)
    weight = generate(block).weight
    with torch.no_grad():
        block.branches[branch].weight.mul_(2)  # type: ignore[operator]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        weight.sum().backward()


@pytest.mark.parametrize("name", ["3x3 narrow", "1x1", "with a wide branch"])
def test_frozen_branches_get_no_gradient_and_leave_the_others_theirs(name: str) -> None:
    block = trained(name)
    expected = gradients(block, by_algebra(block))
    block.branches["origin"].requires_grad_(False)
    generate(block).weight.backward(random_tensor(*by_algebra(block).weight.shape, seed=5))
    for path, parameter in block.named_parameters():
        if path.startswith("branches.origin"):
            assert parameter.grad is None
        elif path != "bias":
            assert parameter.grad is not None
            assert_same(parameter.grad, expected[path], path)


def test_no_graph_where_nothing_is_trained() -> None:
    block = trained("with a wide branch")
    with torch.no_grad():
        assert not generate(block).weight.requires_grad
    assert not generate(block.requires_grad_(False)).weight.requires_grad


@pytest.mark.parametrize("scaling", ["vector", "none"])
@pytest.mark.parametrize("name", ["kernels alone", "3x3", "1x1", "separable alone"])
def test_what_comes_in_is_not_written_to_and_no_gradients_share_memory(
    name: str, scaling: str
) -> None:
    block = trained(name, scaling)
    before = copy.deepcopy(block.state_dict())
    weight = generate(block).weight
    grad = torch.empty_like(weight).normal_()
    given = grad.clone()
    weight.backward(grad)
    assert torch.equal(grad, given)
    for path, tensor in block.state_dict().items():
        assert torch.equal(tensor, before[path]), path
    gradients = [p.grad for p in block.parameters() if p.grad is not None]
    spans = [span(tensor) for tensor in [grad, weight, *gradients]]
    for (start, _), (_, end) in zip(sorted(spans)[1:], sorted(spans), strict=False):
        assert start >= end


def span(tensor: Tensor) -> tuple[int, int]:
    """Where a dense tensor begins and ends in memory."""
    return tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes


def test_backward_may_run_twice() -> None:
    block = trained("3x3")
    weight = generate(block).weight
    weight.sum().backward(retain_graph=True)
    assert block.scaling is not None
    assert block.scaling.grad is not None
    once = block.scaling.grad.clone()
    weight.sum().backward()
    assert_same(block.scaling.grad, 2 * once)


# torch.func.jvp has rules that torch still writes in TorchScript
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_transforms_see_plain_operations() -> None:
    block = trained("groups 2")
    named = dict(block.named_parameters())

    def norm(parameters: dict[str, Tensor]) -> Tensor:
        calling = {f"block.{name}": value for name, value in parameters.items()}
        return torch.func.functional_call(Generated(block), calling).square().sum()

    found = torch.func.grad(norm)(named)
    expected = gradients(block, by_algebra(block))
    by_algebra(block).weight.square().sum().backward()
    assert set(expected) | {"bias"} == set(found)
    for name in expected:
        assert_same(found[name], block.get_parameter(name).grad, name)  # type: ignore[arg-type]
    with forward_ad.dual_level():
        scaling = forward_ad.make_dual(named["scaling"].detach(), torch.ones(6, 6).double())
        dual = norm({**named, "scaling": scaling})
        tangent = forward_ad.unpack_dual(dual).tangent
    assert_same(tangent, found["scaling"].sum())


def test_biases_of_branches_are_added_to_the_blocks_own() -> None:
    conv = nn.Conv2d(4, 6, 3).double()
    linear = LinearBlock(conv, replace(USERS, branches={"dropped": Dropped, "origin": Kernel}))
    block = squeezed(linear.requires_grad_(False))
    x = random_tensor(2, 4, 5, 5)
    torch.manual_seed(0)
    expected = linear(x)
    torch.manual_seed(0)
    assert_same(block(x), expected)
    torch.manual_seed(0)
    assert_same(conv_operator(block)(x), expected)


def test_branches_of_other_kinds_go_through_the_algebra() -> None:
    class OwnKernel(Kernel):
        def layers(self) -> tuple[ConvOperator, ...]:
            return (self.spatial(2 * self.weight, self.groups),)

    for block in (
        Block("SUBCLASS", {**OREPA.branches, "own": OwnKernel}, {}),
        Block("POINT", {**OREPA.branches, "pointwise": lambda conv: Kernel(point(conv))}, {}),
    ):
        made = squeezed(LinearBlock(nn.Conv2d(4, 6, 3, padding=1).double(), block))
        assert len(generation.recipe_of(made).rows) == len(made.branches) - 1
        assert_agrees(made)


def point(conv: ConvOperator) -> ConvOperator:
    """Where a 1 x 1 conv stands beside a 3 x 3 one."""
    padding = tuple((before - 1, after - 1) for before, after in conv.padding)
    return ConvOperator(conv.weight[:, :, :1, :1], conv.bias, conv.stride, padding)


def test_parameters_that_are_not_alike_go_through_the_algebra() -> None:
    block = trained("1x1")
    block.branches["origin"].float()
    assert generation.recipe_of(block).rows == ()
    assert generate(block).weight.dtype == torch.float64
    assert OREPA_1X1.branches


def test_autocast_around_backward_leaves_gradients_in_float32() -> None:
    block = trained("3x3").float()
    exact = gradients(block, by_algebra(block))
    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(block, generate(block))
    for name in exact:
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], exact[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_kernel_and_the_maps_lie_in_memory_as_in_the_plain_net(
    kernel: int, layout: torch.memory_format
) -> None:
    plain = nn.Conv2d(8, 16, kernel).to(memory_format=layout)
    block = squeezed(LinearBlock(plain, automatic_block(conv_operator(plain))))
    block.to(memory_format=layout)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=layout)
    assert generate(block).weight.stride() == plain.weight.stride()
    assert block(x).stride() == plain(x).stride()
