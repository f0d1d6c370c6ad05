"""Blocks: the paper's scaling, feature maps against the squeezed form, and a conv's attributes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from orepa_compiler.algebra.layers import conv_operator
from orepa_compiler.blocks import (
    REPARAM_CONVS,
    Block,
    BranchSum,
    LinearBlock,
    ReparamConv,
    Scaling,
    inserted_norm,
    squeezed,
)
from orepa_compiler.blocks.catalogue import (
    DEEP_STEM,
    OREPA,
    OREPA_1X1,
    automatic_block,
    is_large_stem,
)
from orepa_compiler.branches import Kernel, Pointwise
from orepa_compiler.errors import NotLinear
from orepa_compiler.generation.squeezing import squeeze
from tests.convolution_reference import assert_same, dense, reference
from tests.norms import randomise_norms
from tests.operator_factories import conv, random_tensor

SIZES = {1: (17,), 2: (14, 15), 3: (6, 5, 7)}
SCALINGS: tuple[Scaling, ...] = ("vector", "scalar", "none")

CONVS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "3x3 stride 2": lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False),
    "groups 8": lambda: nn.Conv2d(16, 8, 3, padding=1, groups=8),
    "depthwise dilated": lambda: nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4),
    "2x5 circular": lambda: nn.Conv2d(4, 6, (2, 5), padding=(1, 2), padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    "4x4 same": lambda: nn.Conv2d(4, 6, 4, padding="same"),
    "1x1": lambda: nn.Conv2d(4, 6, 1, stride=2),
    "1x1 groups": lambda: nn.Conv2d(6, 4, 1, groups=2, bias=False),
    "7x7 stem": lambda: nn.Conv2d(3, 4, 7, stride=2, padding=3),
    "1d": lambda: nn.Conv1d(4, 6, 5, padding=2),
    "3d": lambda: nn.Conv3d(2, 3, 3, padding=1),
}
EVERY_CONV = pytest.mark.parametrize("make", CONVS.values(), ids=CONVS)
SAME_WARNING = pytest.mark.filterwarnings("ignore:Using padding='same' with even:UserWarning")


def trained(conv: Any, scaling: Scaling = "vector", norm: bool = False) -> LinearBlock:
    """A float64 block whose every parameter has moved: scalings of 0 would hide a branch."""
    conv = conv.double()
    operator = conv_operator(conv)
    block = replace(automatic_block(operator), scaling_layer=scaling)
    behind = inserted_norm(operator, conv.weight) if norm else None
    made = LinearBlock(conv, block, norm=behind)
    with torch.no_grad():
        for number, parameter in enumerate(made.parameters()):
            change = random_tensor(*parameter.shape, seed=number)
            parameter.add_(change * (0.3 if parameter.numel() > 1 else 0.1))
    return made


def image(conv: Any) -> Tensor:
    return random_tensor(2, conv.in_channels, *SIZES[len(conv.kernel_size)])


def test_scaling_starts_at_the_values_of_the_paper() -> None:
    block = BranchSum(conv(3, 3, channels=(4, 6)), OREPA)
    expected = {
        "pointwise": 1.0,
        "origin": 0.25,
        "pointwise_kernel": 0.5,
        "average": 0.5,
        "frequency": 0.0,
        "depthwise_pointwise": 0.5,
    }
    assert set(block.branches) == set(expected)
    assert block.scaling is not None
    for name, row in zip(block.branches, block.scaling, strict=True):
        assert row.tolist() == [expected[name]] * 6, name
    point = BranchSum(conv(1, 1, channels=(4, 6)), OREPA_1X1)
    assert list(point.branches) == ["origin", "pointwise_pointwise"]
    assert point.scaling is not None
    assert point.scaling[:, 0].tolist() == [1.0, 0.5]


@pytest.mark.parametrize(("scaling", "shape"), [("vector", (6, 6)), ("scalar", (6, 1))])
def test_scaling_shapes(scaling: Scaling, shape: tuple[int, int]) -> None:
    block = BranchSum(conv(3, 3, channels=(4, 6)), replace(OREPA, scaling_layer=scaling))
    assert block.scaling is not None
    assert block.scaling.shape == shape
    assert block.scaling[:, 0].tolist() == [0.25, 1.0, 0.5, 0.5, 0.0, 0.5]


def test_no_scaling_layer() -> None:
    block = BranchSum(conv(3, 3, channels=(4, 6)), replace(OREPA, scaling_layer="none"))
    assert block.scaling is None
    assert "scaling" not in block.state_dict()


def test_a_branch_without_a_factor_starts_at_one() -> None:
    block = BranchSum(conv(3, 3), Block("B", {"a": Kernel, "b": Pointwise}, {"b": 0.5}))
    assert block.scaling is not None
    assert block.scaling[:, 0].tolist() == [1.0, 0.5]


def test_branches_that_do_not_apply_are_left_out() -> None:
    assert not OREPA.make(conv(1, 1))
    assert not OREPA_1X1.make(conv(3, 3))
    assert not DEEP_STEM.make(conv(5, 5))
    maker = Block("B", {"origin": Kernel, "never": lambda conv: None}, {"never": 3.0})
    assert list(BranchSum(conv(3), maker).branches) == ["origin"]


@pytest.mark.parametrize(
    ("op", "name"),
    [
        (conv(1, 1), "OREPA_1X1"),
        (conv(1), "OREPA_1X1"),
        (conv(3, 3), "OREPA"),
        (conv(1, 3), "OREPA"),
        (conv(5, 5), "OREPA"),
        (conv(7, 7), "DEEP_STEM"),
        (conv(9, 9, stride=2), "DEEP_STEM"),
        (conv(8, 8), "OREPA"),
        (conv(7, 1), "OREPA"),
        (conv(7, 7, groups=2), "OREPA"),
        (conv(7, 7, channels=(17, 8)), "OREPA"),
    ],
)
def test_automatic_block(op: Any, name: str) -> None:
    assert automatic_block(op).name == name
    assert is_large_stem(op) == (name == "DEEP_STEM")


@pytest.mark.parametrize("scaling", SCALINGS)
@EVERY_CONV
def test_squeeze_is_the_scaled_sum_of_the_branches(
    make: Callable[[], nn.Module], scaling: Scaling
) -> None:
    """W_e = sum_m diag(v_m) W_m, spelled out on dense kernels placed by the reference conv."""
    block = trained(make(), scaling)
    x = image(block)
    with torch.no_grad():
        total = 0
        for number, branch in enumerate(block.branches.values()):
            y = reference(branch.operator(), x)
            if block.scaling is not None:
                y = block.scaling[number].reshape(1, -1, *(1,) * len(block.kernel_size)) * y
            total = total + y
        assert isinstance(total, Tensor)
        assert_same(reference(squeeze(block.branches.values(), block.scaling), x), total)
        by_name = block.branch_operators()
        assert list(by_name) == list(block.branches)
        summed = sum(reference(operator, x) for operator in by_name.values())
        assert isinstance(summed, Tensor)
        assert_same(summed, total)


@SAME_WARNING
@pytest.mark.parametrize("scaling", SCALINGS)
@EVERY_CONV
def test_squeezed_form_has_the_same_values_and_gradients(
    make: Callable[[], nn.Module], scaling: Scaling
) -> None:
    block = trained(make(), scaling, norm=True)
    one = squeezed(copy.deepcopy(block))
    results = []
    for module in (block, one):
        x = image(block).requires_grad_()
        y = module(x)
        (y * random_tensor(*y.shape, seed=9)).sum().backward()
        results.append((y.detach(), x.grad, dict(module.named_parameters())))
    (y1, g1, p1), (y2, g2, p2) = results
    assert_same(y2, y1)
    assert g1 is not None
    assert g2 is not None
    assert_close(g2, g1, "input")
    assert list(p1) == list(p2)
    for name in p1:
        assert p1[name].grad is not None, name
        assert p2[name].grad is not None, name
        assert_close(p2[name].grad, p1[name].grad, name)


def assert_close(actual: Any, expected: Any, name: str) -> None:
    """Through the norm, gradients are differences of large sums: hence 1e-10 and not 1e-12."""
    assert actual.shape == expected.shape
    scale = max(float(expected.abs().max()), 1e-3)
    assert float((actual - expected).abs().max()) <= 1e-10 * scale, name


@SAME_WARNING
@EVERY_CONV
def test_the_block_computes_one_conv_and_its_bias(make: Callable[[], nn.Module]) -> None:
    layer = make()
    block = trained(layer)
    x = image(block)
    plain: Any = layer
    with torch.no_grad():
        plain.weight.copy_(block.weight)
        if plain.bias is not None:
            assert block.bias is not None
            plain.bias.copy_(block.bias)
        assert_same(block(x), plain(x))
        assert_same(squeezed(block)(x), plain(x))
        assert_same(reference(conv_operator(block), x), plain(x))


@EVERY_CONV
def test_a_block_answers_the_attributes_of_its_conv(make: Callable[[], nn.Module]) -> None:
    layer: Any = make()
    block = squeezed(trained(layer).float())
    for name in (
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        "padding_mode",
    ):  # fmt: skip
        assert getattr(block, name) == getattr(layer, name), name
    assert block.weight.shape == layer.weight.shape
    assert (block.weight.dtype, block.weight.device.type) == (torch.float32, "cpu")
    assert block.double().weight.dtype == torch.float64
    assert block.weight.requires_grad
    assert (block.bias is None) == (layer.bias is None)
    assert type(block) is REPARAM_CONVS[len(layer.kernel_size)]
    assert type(block).__name__ == f"Reparam{type(layer).__name__}"


def test_repr_tells_geometry_and_block() -> None:
    block = squeezed(trained(nn.Conv2d(4, 6, 3, padding=1)))
    assert repr(block).split("\n")[1].strip() == (
        "4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1, "
        "block=OREPA, scaling=vector"
    )


class FeatureConvs(TorchDispatchMode):
    """Counts convolutions by the size of what they read, and notes their kernels' dtypes."""

    def __init__(self, size: tuple[int, ...]) -> None:
        super().__init__()
        self.size = size
        self.on_features: list[torch.dtype] = []
        self.made: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_large = name == "convolution" and all(
            size >= wanted for size, wanted in zip(args[0].shape[2:], self.size, strict=True)
        )
        if is_large:
            self.on_features.append(args[1].dtype)
        elif name in ("mm", "bmm", "add", "mul", "convolution"):
            self.made |= {arg.dtype for arg in args if isinstance(arg, Tensor)}
        return func(*args, **(kwargs or {}))


@SAME_WARNING
@EVERY_CONV
def test_squeezed_form_runs_one_conv_on_the_feature_map(make: Callable[[], nn.Module]) -> None:
    block = trained(make())
    x = image(block)
    with FeatureConvs(tuple(x.shape[2:])) as counted:
        squeezed(block)(x)
    assert len(counted.on_features) == 1
    with FeatureConvs((1,) * (x.dim() - 2)) as counted:
        block(x)
    assert len(counted.on_features) >= len(block.branches), "the count must see convs at all"


@pytest.mark.parametrize("name", ["3x3", "1x1", "7x7 stem", "groups 8", "reflect"])
def test_kernel_is_made_in_float32_under_autocast(name: str) -> None:
    block = squeezed(trained(CONVS[name]()).float())
    x = image(block).float()
    exact = block.weight.detach()
    with torch.autocast("cpu", torch.bfloat16), FeatureConvs(tuple(x.shape[2:])) as counted:
        weight = block.weight
        y = block(x)
    assert counted.on_features == [torch.bfloat16]
    assert counted.made == {torch.float32}
    assert weight.dtype == torch.float32
    assert torch.equal(weight, exact)
    plain: Any = CONVS[name]()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain.weight.copy_(exact)
        plain.bias.copy_(block.bias)
        assert torch.equal(plain(x), y)
    assert torch.is_autocast_enabled("cpu") is False


def test_autocast_is_back_on_after_the_kernel_was_made() -> None:
    block = trained(CONVS["3x3"]()).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert block.weight.dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["3x3", "1x1", "7x7 stem", "1d", "3d"])
def test_deepcopy_pickle_and_state_dict(name: str) -> None:
    block = randomise_norms(squeezed(trained(CONVS[name](), norm=True)))
    x = image(block)
    expected = block(x).detach()
    block.eval()
    expected = block(x).detach()
    twins = [copy.deepcopy(block), pickle.loads(pickle.dumps(block))]
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    fresh = squeezed(trained(CONVS[name](), norm=True)).eval()
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_()
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    for twin in (*twins, fresh):
        assert type(twin) is type(block)
        assert torch.equal(twin(x), expected)
        with torch.no_grad():
            next(twin.parameters()).add_(1)
    assert torch.equal(block(x), expected)


def test_squeezing_keeps_parameters_hooks_and_mode() -> None:
    block = trained(CONVS["3x3"](), norm=True).eval()
    block.register_forward_hook(lambda module, args, y: y + 1)
    one = squeezed(block)
    assert [id(p) for p in one.parameters()] == [id(p) for p in block.parameters()]
    assert not one.training
    assert list(one.state_dict()) == list(block.state_dict())
    x = image(block)
    assert_same(one(x), block(x))
    assert one.train().norm.training
    assert isinstance(one, ReparamConv)


@pytest.mark.parametrize("training", [True, False])
def test_a_block_takes_over_the_mode_and_the_dtype(training: bool) -> None:
    layer = nn.Conv2d(4, 6, 3).double().train(training)
    norm = inserted_norm(conv_operator(layer), layer.weight)
    block = LinearBlock(layer, OREPA, norm=norm)
    assert all(module.training == training for module in block.modules())
    assert {p.dtype for p in block.parameters()} == {torch.float64}
    assert {b.dtype for b in block.buffers()} == {torch.float64, torch.int64}


def test_the_bias_is_the_convs_and_gives_way_to_a_norm() -> None:
    layer = nn.Conv2d(4, 6, 3)
    block = LinearBlock(layer, OREPA)
    assert block.bias is not None
    assert torch.equal(block.bias, layer.bias)
    assert block.bias.data_ptr() != layer.bias.data_ptr()
    behind = LinearBlock(layer, OREPA, norm=nn.BatchNorm2d(6))
    assert behind.own_bias() is None
    assert behind.replaces_bias
    assert not LinearBlock(nn.Conv2d(4, 6, 3, bias=False), OREPA).replaces_bias


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_an_inserted_norm_is_the_identity_in_eval_mode(rank: int) -> None:
    op = conv(*(3,) * rank, channels=(4, 6))
    norm = inserted_norm(op, op.weight).eval()
    x = random_tensor(3, 6, *(5,) * rank)
    assert norm.weight.dtype == torch.float64
    assert_same(norm(x), x)


def test_operator_of_a_block_holds_its_norm() -> None:
    block = randomise_norms(trained(CONVS["2x5 circular"](), norm=True)).eval()
    x = image(block)
    with torch.no_grad():
        assert_same(reference(conv_operator(block), x), block(x))
        assert_same(reference(conv_operator(squeezed(block)), x), block(x))


def test_operator_of_a_block_names_the_norm_that_stands_in_the_way() -> None:
    block = LinearBlock(nn.Conv2d(4, 6, 3), OREPA, norm=nn.GroupNorm(2, 6))
    with pytest.raises(NotLinear, match="the norm of the block: GroupNorm is not a known linear"):
        conv_operator(block)


def test_a_refused_conv_makes_no_block() -> None:
    class Own(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(NotLinear, match="Own has a forward of its own"):
        LinearBlock(Own(4, 4, 3), OREPA)


def test_equal_branches_diverge_only_with_scaling_layers() -> None:
    """Prop. 1: without scaling, two equal kinds of branch receive the same gradient."""
    for scaling, equal in (("none", True), ("vector", False)):
        block = Block("TWO", {"a": Kernel, "b": Kernel}, {"b": 0.5}, scaling)  # type: ignore[arg-type]
        one = squeezed(LinearBlock(nn.Conv2d(4, 6, 3).double(), block))
        one(random_tensor(2, 4, 6, 6)).square().sum().backward()
        grads = [branch.weight.grad for branch in one.branches.values()]
        assert torch.allclose(grads[0], grads[1], rtol=1e-9) is equal


def test_blocks_nest() -> None:
    inner = Block("INNER", {"origin": Kernel, "pointwise": Pointwise}, {"origin": 0.5})
    outer = Block("OUTER", {"sum": lambda op: BranchSum(op, inner), "origin": Kernel}, {"sum": 2.0})
    block = LinearBlock(nn.Conv2d(4, 6, 3, padding=1).double(), outer)
    x = image(block)
    with torch.no_grad():
        assert_same(squeezed(block)(x), block(x))
        nested: Any = block.branches["sum"]
        kernel = 0.5 * dense(nested.branches["origin"].operator())
        kernel[..., 1, 1] += nested.branches["pointwise"].weight[..., 0, 0]
        expected = 2 * kernel + block.branches["origin"].weight
        assert_same(block.weight, expected)
