"""Each branch against the formula of Hu et al. 2022 (Fig. 6), written out in loops."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from math import cos, pi, prod

import pytest
import torch
from torch import Tensor, nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks.catalogue import DeepStem
from orepa_compiler.branches import (
    AveragePool,
    DepthwisePointwise,
    FrequencyFilter,
    Identity,
    Kernel,
    Pointwise,
    PointwiseKernel,
    PointwisePointwise,
    SequenceBranch,
    frequency_prior,
)
from tests.convolution_reference import assert_same, dense, reference
from tests.operator_factories import conv, random_tensor

SIZES = {1: (13,), 2: (9, 10), 3: (6, 5, 7)}

GEOMETRIES: dict[str, ConvOperator] = {
    "3x3": conv(3, 3, channels=(4, 6), padding=1),
    "3x3 stride 2": conv(3, 3, channels=(4, 6), padding=1, stride=2),
    "3x3 unpadded": conv(3, 3, channels=(4, 6)),
    "3x3 padded by 3": conv(3, 3, channels=(4, 6), padding=3),
    "3x3 dilated": conv(3, 3, channels=(4, 4), padding=[2, 3], dilation=[2, 3]),
    "groups 2": conv(3, 3, channels=(4, 6), padding=1, groups=2),
    "groups 8": conv(3, 3, channels=(16, 8), padding=1, groups=8),
    "depthwise": conv(3, 3, channels=(6, 6), padding=1, groups=6),
    "depthwise multiplied": conv(3, 3, channels=(5, 10), padding=1, groups=5),
    "1x3": conv(1, 3, channels=(4, 5), padding=[0, 1]),
    "3x5 stride 2x1": conv(3, 5, channels=(3, 7), padding=[1, 2], stride=[2, 1]),
    "2x4 even": conv(2, 4, channels=(4, 6), padding=[0, 1]),
    "4x4 same": conv(4, 4, channels=(4, 6), padding=[(1, 2), (1, 2)]),
    "2x2 stride 2": conv(2, 2, channels=(4, 6), stride=2),
    "reflect": conv(3, 3, channels=(4, 6), padding=2, mode="reflect"),
    "replicate stride 2": conv(3, 3, channels=(4, 6), padding=1, mode="replicate", stride=2),
    "circular": conv(3, 3, channels=(4, 6), padding=1, mode="circular"),
    "circular even, same": conv(4, 3, channels=(4, 6), padding=[(1, 2), 1], mode="circular"),
    "1d": conv(3, channels=(4, 6), padding=1, stride=2),
    "1d even": conv(4, channels=(4, 6), padding=1, dilation=2),
    "3d": conv(3, 3, 3, channels=(2, 4), padding=1),
    "3d mixed": conv(1, 2, 3, channels=(4, 4), padding=[0, 0, 1], groups=2, stride=[1, 2, 1]),
}
BRANCHES = (
    Kernel, Pointwise, PointwiseKernel, AveragePool, FrequencyFilter, DepthwisePointwise,
)  # fmt: skip
EVERY_GEOMETRY = pytest.mark.parametrize("op", GEOMETRIES.values(), ids=GEOMETRIES)
EVERY_BRANCH = pytest.mark.parametrize("cls", BRANCHES)


def randomise(branch: nn.Module) -> None:
    """Parameters as training leaves them: an identity start would hide a swapped index."""
    with torch.no_grad():
        for number, parameter in enumerate(branch.parameters()):
            parameter.copy_(random_tensor(*parameter.shape, seed=number + 50))


def spread_groups(weight: Tensor, groups: int) -> Tensor:
    return dense(ConvOperator(weight, groups=groups))


def full(branch: SequenceBranch, op: ConvOperator) -> Tensor:
    """The branch's kernel by the paper's formula, without groups, (C_out, C_in, *K)."""
    taps = list(product(*map(range, op.kernel_size)))
    kernel = torch.zeros(op.out_channels, op.in_channels, *op.kernel_size, dtype=torch.float64)
    if isinstance(branch, Kernel):
        return spread_groups(branch.weight, op.groups)
    if isinstance(branch, (Pointwise, AveragePool, FrequencyFilter)):
        point = spread_groups(branch.weight, op.groups).flatten(1)
    elif isinstance(branch, PointwiseKernel):
        first = spread_groups(branch.pointwise + start(branch.pointwise), op.groups).flatten(1)
        second = spread_groups(branch.kernel, op.groups)
    else:
        first = spread_groups(branch.depthwise, op.in_channels)
        second = spread_groups(branch.pointwise, op.groups).flatten(1)
    for tap in taps:
        at = (slice(None), slice(None), *tap)
        if isinstance(branch, Pointwise):
            is_centre = all(t == (k - 1) // 2 for t, k in zip(tap, op.kernel_size, strict=True))
            kernel[at] = point if is_centre else 0 * point
        elif isinstance(branch, AveragePool):
            kernel[at] = point / prod(op.kernel_size)
        elif isinstance(branch, FrequencyFilter):
            for o in range(op.out_channels):
                kernel[(o, slice(None), *tap)] = point[o] * cosine(o, tap, op)
        elif isinstance(branch, PointwiseKernel):
            kernel[at] = second[at] @ first
        else:
            kernel[at] = second @ first[at]
    return kernel


def start(pointwise: Tensor) -> Tensor:
    """1 where row t, in its group, reads the channel of its own number (modulo the width)."""
    ones = torch.zeros_like(pointwise)
    for t in range(pointwise.shape[0]):
        ones[t, t % pointwise.shape[1]] = 1
    return ones


def cosine(c: int, tap: tuple[int, ...], op: ConvOperator) -> float:
    """Supplement Table 1, with the channels shared among the axes that have taps to tell apart."""
    axes = [axis for axis, size in enumerate(op.kernel_size) if size > 1]
    bounds = [op.out_channels * i // len(axes) for i in range(len(axes) + 1)]
    part = next(i for i in range(len(axes)) if c < bounds[i + 1])
    axis = axes[part]
    return cos((c - bounds[part] + 1) * (tap[axis] + 0.5) * pi / op.kernel_size[axis])


@EVERY_GEOMETRY
@EVERY_BRANCH
def test_operator_is_the_formula(cls: type[SequenceBranch], op: ConvOperator) -> None:
    branch = cls(op)
    randomise(branch)
    expected = ConvOperator(
        full(branch, op), None, op.stride, op.padding, op.dilation, 1, op.padding_mode
    )
    x = random_tensor(2, op.in_channels, *SIZES[op.rank])
    with torch.no_grad():
        assert_same(reference(branch.operator(), x), reference(expected, x))


@EVERY_GEOMETRY
@EVERY_BRANCH
def test_feature_maps_agree_with_the_operator(cls: type[SequenceBranch], op: ConvOperator) -> None:
    branch = cls(op)
    randomise(branch)
    x = random_tensor(2, op.in_channels, *SIZES[op.rank])
    with torch.no_grad():
        assert_same(branch(x), branch.operator()(x))


@EVERY_GEOMETRY
@EVERY_BRANCH
def test_a_branch_fits_beside_the_conv(cls: type[SequenceBranch], op: ConvOperator) -> None:
    whole = op.with_bias(None) + cls(op).operator()
    geometry = (op.kernel_size, op.stride, op.padding, op.dilation, op.groups)
    assert (
        whole.kernel_size,
        whole.stride,
        whole.padding,
        whole.dilation,
        whole.groups,
    ) == geometry


@EVERY_BRANCH
def test_gradients_reach_every_parameter(cls: type[SequenceBranch]) -> None:
    branch = cls(conv(3, 3, channels=(4, 6), padding=1))
    randomise(branch)
    branch.operator().weight.square().sum().backward()
    grads = [parameter.grad for parameter in branch.parameters()]
    assert grads
    assert all(grad is not None and grad.abs().min() > 0 for grad in grads)


@pytest.mark.parametrize("channels", [1, 2, 5, 8])
@pytest.mark.parametrize("height", [2, 3, 5])
@pytest.mark.parametrize("width", [3, 4])
def test_frequency_prior_of_the_paper(channels: int, height: int, width: int) -> None:
    prior = frequency_prior(channels, (height, width))
    assert prior.shape == (channels, height, width)
    assert prior.dtype == torch.float64
    half = channels // 2
    for c in range(channels):
        for h in range(height):
            for w in range(width):
                if c < half:
                    expected = cos((c + 1) * (h + 0.5) * pi / height)
                else:
                    expected = cos((c - half + 1) * (w + 0.5) * pi / width)
                assert abs(float(prior[c, h, w]) - expected) < 1e-12


def test_frequency_prior_is_a_buffer_that_does_not_train() -> None:
    branch = FrequencyFilter(conv(3, 3, channels=(4, 6)))
    assert [name for name, _ in branch.named_parameters()] == ["weight"]
    assert branch.state_dict()["prior"].shape == (6, 1, 3, 3)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_pointwise_kernel_starts_as_its_kernel(groups: int) -> None:
    """The 1 x 1 is the identity at first; above 4 groups it writes each channel twice."""
    branch = PointwiseKernel(conv(3, 3, channels=(16, 8), padding=1, groups=groups))
    copies = 2 if groups > 4 else 1
    width = 16 // groups
    assert branch.pointwise.shape == (16 * copies, width, 1, 1)
    assert branch.kernel.shape == (8, width * copies, 3, 3)
    assert torch.equal(branch.pointwise, torch.zeros_like(branch.pointwise))
    summed = branch.kernel.reshape(8, copies, width, 3, 3).sum(1)
    assert_same(branch.operator().weight, summed)
    x = random_tensor(1, 16, 4, 4)
    inside = branch.layers()[0](x).reshape(1, groups, copies, width, 4, 4)
    for number in range(copies):
        assert torch.equal(inside[:, :, number].reshape(x.shape), x)


def test_depthwise_multiplies_the_channels_by_eight() -> None:
    branch = DepthwisePointwise(conv(3, 5, channels=(4, 6), groups=2))
    assert branch.depthwise.shape == (32, 1, 3, 5)
    assert branch.pointwise.shape == (6, 16, 1, 1)
    first, second = branch.layers()
    assert (first.groups, second.groups) == (4, 2)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_the_point_lies_at_floor_of_half(size: int) -> None:
    op = conv(size, channels=(2, 3))
    whole = conv(size, channels=(2, 3)).with_bias(None) + Pointwise(op).operator()
    change = (whole.weight - op.weight).abs().sum((0, 1)) > 1e-9
    assert change.nonzero().flatten().tolist() == [(size - 1) // 2]


@pytest.mark.parametrize(("width", "out"), [(4, 8), (8, 4), (6, 6)])
@pytest.mark.parametrize("groups", [1, 2])
def test_pointwise_pointwise_has_one_identity(width: int, out: int, groups: int) -> None:
    op = conv(1, 1, channels=(width, out), groups=groups, stride=2)
    branch = PointwisePointwise(op)
    inside = min(width, out)
    assert branch.first.shape == (inside, width // groups, 1, 1)
    assert branch.second.shape == (out, inside // groups, 1, 1)
    eye, other = (branch.first, branch.second) if out > width else (branch.second, branch.first)
    assert torch.equal(eye, start(eye))
    assert_same(branch.operator().weight, other)
    randomise(branch)
    matrices = [spread_groups(w, groups).flatten(1) for w in (branch.first, branch.second)]
    assert_same(dense(branch.operator()).flatten(1), matrices[1] @ matrices[0])
    x = random_tensor(2, width, 5, 5)
    with torch.no_grad():
        assert_same(branch(x), reference(branch.operator(), x))


@pytest.mark.parametrize("name", ["3x3", "2x4 even", "circular", "1d even", "3d", "groups 2"])
def test_identity_gives_its_input_back(name: str) -> None:
    op = GEOMETRIES[name]
    out = op.in_channels
    square = conv(*op.kernel_size, channels=(out, out), groups=op.groups)
    centred = tuple(
        (d * ((k - 1) // 2), d * (k - 1) - d * ((k - 1) // 2))
        for d, k in zip(op.dilation, op.kernel_size, strict=True)
    )
    fitted = ConvOperator(square.weight, None, (), centred, op.dilation, op.groups, op.padding_mode)
    x = random_tensor(1, out, *SIZES[op.rank])
    assert torch.equal(reference(Identity(fitted).operator(), x), x)
    assert not list(Identity(fitted).parameters())


@pytest.mark.parametrize("make", BRANCHES)
def test_a_fresh_branch_has_the_dtype_of_the_conv(make: Callable[..., nn.Module]) -> None:
    for dtype in (torch.float32, torch.float64):
        branch = make(conv(3, 3, channels=(4, 6)).to(dtype))
        assert {tensor.dtype for tensor in branch.state_dict().values()} == {dtype}


STEMS = {
    "7x7 stride 2": conv(7, 7, channels=(3, 5), stride=2, padding=3),
    "9x9": conv(9, 9, channels=(2, 3), padding=4),
    "7x7 unpadded": conv(7, 7, channels=(3, 4), stride=3),
    "7x7 circular": conv(7, 7, channels=(3, 4), padding=3, mode="circular"),
    "7x7 reflect": conv(7, 7, channels=(3, 4), padding=3, stride=2, mode="reflect"),
    "7x7 dilated": conv(7, 7, channels=(2, 3), padding=6, dilation=2),
    "7 in 1d": conv(7, channels=(3, 4), padding=3, stride=2),
}


@pytest.mark.parametrize("op", STEMS.values(), ids=STEMS)
def test_deep_stem_is_the_sequence_of_its_layers(op: ConvOperator) -> None:
    """A true convolution of the kernels: with the flip forgotten the two sides differ."""
    stem = DeepStem(op)
    assert len(stem.stack) == (op.kernel_size[0] - 1) // 2
    x = random_tensor(1, op.in_channels, *(20 + op.extent[0],) * op.rank)
    with torch.no_grad():
        stacked = x
        for layer in stem.layers():
            assert set(layer.kernel_size) == {3}
            stacked = reference(layer, stacked)
        composed = stem.operator()
        assert (composed.kernel_size, composed.stride) == (op.kernel_size, op.stride)
        assert (composed.padding, composed.dilation) == (op.padding, op.dilation)
        assert_same(reference(composed, x), stacked)
        assert_same(stem(x), stacked)


def test_deep_stem_layers_are_blocks_of_the_paper() -> None:
    stem = DeepStem(STEMS["7x7 stride 2"])
    assert [layer.block_name for layer in stem.stack] == ["OREPA"] * 3
    assert [layer.stride for layer in stem.stack] == [(1, 1), (1, 1), (2, 2)]
    assert [layer.pads for layer in stem.stack] == [((3, 3),) * 2, ((0, 0),) * 2, ((0, 0),) * 2]
    assert [layer.branches["origin"].weight.shape[1] for layer in stem.stack] == [3, 5, 5]
