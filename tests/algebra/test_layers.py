"""Each layer against the operator that stands for it, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm.layers
import torch
import torchvision
from timm.layers import norm_act
from torch import Tensor, nn

from orepa_compiler.algebra.classifiers import (
    is_activation,
    is_batch_norm,
    is_conv_like,
    is_dropout,
    is_idle,
    is_norm,
    is_plain_conv,
    own_forward_reason,
)
from orepa_compiler.algebra.layers import conv_operator, conv_padding, linear_part
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.algebra.overriding import has_torch_forward
from orepa_compiler.capture.skeleton import meta_copy
from orepa_compiler.errors import NotLinear
from tests.convolution_reference import assert_same, reference
from tests.norms import randomise_norms
from tests.operator_factories import random_tensor

SIZES = {1: (11,), 2: (9, 8), 3: (5, 6, 7)}

CONVS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1),
    "2d": lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "2d no bias": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, bias=False),
    "3d": lambda: nn.Conv3d(4, 4, (1, 2, 3), padding=(0, 1, 1), groups=2),
    "depthwise": lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4),
    "same": lambda: nn.Conv2d(4, 6, (4, 3), padding="same", dilation=(1, 2)),
    "same, even and dilated": lambda: nn.Conv1d(4, 6, 4, padding="same", dilation=3),
    "same, circular": lambda: nn.Conv2d(4, 6, 4, padding="same", padding_mode="circular"),
    "valid": lambda: nn.Conv2d(4, 6, 3, padding="valid", stride=2),
    "reflect": lambda: nn.Conv2d(4, 6, 3, padding=(2, 1), padding_mode="reflect"),
    "replicate": lambda: nn.Conv3d(4, 6, 3, padding=1, padding_mode="replicate"),
    "circular": lambda: nn.Conv1d(4, 6, 5, padding=2, padding_mode="circular"),
}
NORMS: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm1d": lambda: nn.BatchNorm1d(4),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4, eps=0.1),
    "BatchNorm3d": lambda: nn.BatchNorm3d(4),
    "not affine": lambda: nn.BatchNorm2d(4, affine=False),
    "cumulative momentum": lambda: nn.BatchNorm2d(4, momentum=None),
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(4),
    "torchvision frozen": lambda: torchvision.ops.FrozenBatchNorm2d(4, eps=0.1),
    "timm without act": lambda: norm_act.BatchNormAct2d(4, apply_act=False, eps=0.1),
    "timm frozen without act": lambda: norm_act.FrozenBatchNormAct2d(4, apply_act=False),
}
POOLS: dict[str, Callable[[], nn.Module]] = {
    "1d": lambda: nn.AvgPool1d(3, stride=2, padding=1),
    "2d": lambda: nn.AvgPool2d((3, 2), stride=(2, 1), padding=(1, 0)),
    "2d default stride": lambda: nn.AvgPool2d(2),
    "3d": lambda: nn.AvgPool3d(2, stride=1, padding=1),
    "unpadded, counts no padding": lambda: nn.AvgPool2d(3, 1, count_include_pad=False),
}


def rank_of(layer: nn.Module) -> int:
    name = type(layer).__name__
    return next((rank for rank in (1, 2, 3) if f"{rank}d" in name), 2)


# torch warns that it copies the input there, which is all the same to us.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("make", [*CONVS.values(), *NORMS.values()], ids=[*CONVS, *NORMS])
def test_operator_computes_what_the_layer_does(make: Callable[[], nn.Module]) -> None:
    layer = randomise_norms(make()).double().eval()
    x = random_tensor(2, 4, *SIZES[rank_of(layer)])
    with torch.no_grad():
        assert_same(reference(conv_operator(layer), x), layer(x))


@pytest.mark.parametrize("make", POOLS.values(), ids=POOLS)
def test_average_pooling(make: Callable[[], nn.Module]) -> None:
    layer = make()
    x = random_tensor(2, 4, *SIZES[rank_of(layer)])
    assert_same(reference(conv_operator(layer, 4), x), layer(x))


@pytest.mark.parametrize("layer", [nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(0.5)])
def test_layers_that_do_nothing_are_the_identity(layer: nn.Module) -> None:
    x = random_tensor(3, 5)
    assert torch.equal(reference(conv_operator(layer, 5), x), x)
    with pytest.raises(NotLinear, match=f"channels that {type(layer).__name__} sees is not known"):
        conv_operator(layer)


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_a_norm_reads_no_values(make: Callable[[], nn.Module]) -> None:
    assert conv_operator(meta_copy(make())).weight.is_meta


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm1d(4, 1e-5, 0.1, True, False)],
)
def test_a_norm_without_running_statistics_is_refused(norm: nn.Module) -> None:
    with pytest.raises(NotLinear) as caught:
        conv_operator(norm)
    assert caught.value.reason == (
        f"{type(norm).__name__} keeps no running statistics (track_running_stats=False), "
        "so it is not affine in eval mode"
    )


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        (nn.AvgPool2d(3, ceil_mode=True), "ceil_mode or divisor_override is not one conv"),
        (nn.AvgPool1d(3, ceil_mode=True), "ceil_mode or divisor_override is not one conv"),
        (nn.AvgPool2d(3, divisor_override=2), "ceil_mode or divisor_override is not one conv"),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), "border: .* another number there"),
        (nn.AvgPool3d(3, padding=1, count_include_pad=False), "count_include_pad=False divides"),
    ],
)
def test_average_pooling_that_is_no_conv_is_refused(pool: nn.Module, reason: str) -> None:
    with pytest.raises(NotLinear, match=reason):
        conv_operator(pool, 4)
    with pytest.raises(NotLinear, match="the number of channels that AvgPool"):
        conv_operator(pool)


@pytest.mark.parametrize("cls", [norm_act.BatchNormAct2d, norm_act.FrozenBatchNormAct2d])
def test_a_norm_with_activation_is_split(cls: type[nn.Module]) -> None:
    layer = randomise_norms(cls(4, act_layer=nn.SiLU)).double().eval()
    x = random_tensor(2, 4, 5, 6)
    operator, rest = linear_part(layer)
    assert isinstance(rest, nn.SiLU)
    assert_same(rest(reference(operator, x)), layer(x))
    with pytest.raises(NotLinear, match=f"{cls.__name__} is followed by its activation SiLU"):
        conv_operator(layer)


def test_a_norm_with_dropout_and_activation_keeps_both_in_order() -> None:
    layer = norm_act.BatchNormAct2d(4, drop_layer=nn.Dropout2d)
    _, rest = linear_part(layer)
    assert isinstance(rest, nn.Sequential)
    assert [type(part) for part in rest] == [nn.Dropout2d, nn.ReLU]
    assert linear_part(norm_act.BatchNormAct2d(4, apply_act=False))[1] is None


def test_linear_part_of_a_plain_layer_leaves_nothing() -> None:
    conv = nn.Conv2d(4, 4, 1)
    operator, rest = linear_part(conv)
    assert operator.weight is conv.weight
    assert rest is None


class Doubled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Padded(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, 2 * weight, bias)


class Renamed(nn.Conv2d):
    """A subclass that changes nothing but the name."""


@pytest.mark.parametrize(
    "layer",
    [
        Doubled(4, 4, 3),
        Padded(4, 4, 3),
        timm.layers.StdConv2d(4, 4, 3),
        timm.layers.ScaledStdConv2d(4, 4, 3),
        timm.layers.Conv2dSame(4, 4, 3),
    ],
)
def test_a_conv_with_a_forward_of_its_own_is_refused_by_name(layer: nn.Module) -> None:
    reason = f"{type(layer).__name__} has a forward of its own"
    assert own_forward_reason(layer) == reason
    assert not is_plain_conv(layer)
    with pytest.raises(NotLinear) as caught:
        conv_operator(layer)
    assert caught.value.reason == reason


@pytest.mark.parametrize("name", ["forward", "_conv_forward"])
def test_a_forward_set_on_the_instance_is_refused(name: str) -> None:
    conv = nn.Conv2d(4, 4, 3)
    setattr(conv, name, lambda *args: args[0])
    assert own_forward_reason(conv) == "Conv2d has a forward of its own"
    with pytest.raises(NotLinear, match="Conv2d has a forward of its own"):
        conv_operator(conv)


def test_a_subclass_that_keeps_the_forward_is_plain() -> None:
    assert is_plain_conv(Renamed(4, 4, 3))
    assert conv_operator(Renamed(4, 4, 3)).kernel_size == (3, 3)


class OwnCall(nn.Conv2d):
    def __call__(self, x: Tensor) -> Tensor:
        return 2 * super().__call__(x)


class OwnCheck(nn.BatchNorm2d):
    def _check_input_dim(self, input: Tensor) -> None:
        input.mul_(2)


class OwnStride(nn.Conv2d):
    stride = property(lambda self: (2, 2), lambda self, value: None)  # type: ignore[assignment]


class OwnEps(nn.BatchNorm2d):
    eps = property(lambda self: 0.5, lambda self, value: None)  # type: ignore[assignment]


class Looks(nn.Conv2d):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return 2 * value if name == "weight" else value


class Moded:
    """A mixin."""

    padding_mode = property(lambda self: "circular", lambda self, value: None)


class Mixed(nn.Conv2d, Moded):
    """Whose padding mode is that of the mixin, as it is found on the class."""


class Harmless(nn.Conv2d):
    """Other methods and attributes than those that a forward uses."""

    kind = "harmless"

    def extra_repr(self) -> str:
        return "harmless"

    def reset_parameters(self) -> None:
        super().reset_parameters()


OVERRIDING: list[tuple[Callable[[], nn.Module], str]] = [
    (lambda: OwnCall(4, 4, 1), "OwnCall has a forward of its own"),
    (lambda: OwnCheck(4), "OwnCheck has a _check_input_dim of its own, which the forward of"),
    (lambda: OwnStride(4, 4, 1), "OwnStride has a stride of its own"),
    (lambda: OwnEps(4), "OwnEps has a eps of its own, which the forward of its base class uses"),
    (lambda: Looks(4, 4, 1), "Looks has a __getattr__ of its own"),
    (lambda: Mixed(4, 4, 1), "Mixed has a padding_mode of its own"),
]


@pytest.mark.parametrize(("make", "reason"), OVERRIDING)
def test_a_subclass_that_changes_what_its_forward_uses_is_refused(
    make: Callable[[], nn.Module], reason: str
) -> None:
    layer = make()
    assert not has_torch_forward(layer)
    with pytest.raises(NotLinear) as caught:
        conv_operator(layer)
    assert caught.value.reason.startswith(reason)


def test_a_subclass_that_changes_nothing_that_its_forward_uses_is_read() -> None:
    layer, x = Harmless(4, 4, 3).double(), random_tensor(2, 4, 6, 6)
    assert has_torch_forward(layer)
    with torch.no_grad():
        assert_same(reference(conv_operator(layer), x), layer(x))


def test_a_method_set_on_a_norm_is_refused() -> None:
    norm = nn.BatchNorm2d(4)
    norm._check_input_dim = lambda input: input.mul_(2)  # type: ignore[method-assign,assignment]
    with pytest.raises(NotLinear, match="BatchNorm2d has a _check_input_dim of its own"):
        conv_operator(norm)


CHANGED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "a stride": (lambda: nn.Conv2d(4, 6, 3, stride=2, padding=1), {"stride": 1}),
    "a padding": (lambda: nn.Conv2d(4, 6, 3), {"padding": 2}),
    "a padding as a list": (lambda: nn.Conv2d(4, 6, 3), {"padding": [1, 2]}),
    "one for all axes": (lambda: nn.Conv2d(4, 6, 3), {"padding": (2,), "stride": (2,)}),
    "a dilation": (lambda: nn.Conv1d(4, 6, 3, padding="same"), {"dilation": 2}),
    "the padding of a reflecting conv": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        {"padding": (2, 0)},
    ),
    "another mode": (lambda: nn.Conv2d(4, 6, 3, padding=1), {"padding_mode": "circular"}),
    "another mode and padding": (
        lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="reflect"),
        {"padding": 3, "padding_mode": "replicate"},
    ),
    "zeros again": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        {"padding": 2, "padding_mode": "zeros"},
    ),
    "the sizes that it tells": (lambda: nn.Conv2d(4, 6, 3), {"kernel_size": (1, 1)}),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(("make", "changes"), CHANGED.values(), ids=CHANGED)
def test_attributes_that_were_changed_after_it_was_made(
    make: Callable[[], nn.Module], changes: dict[str, Any]
) -> None:
    layer = make().double()
    for name, value in changes.items():
        setattr(layer, name, value)
    x = random_tensor(2, 4, *(9,) * (layer.weight.dim() - 2))  # type: ignore[operator]
    with torch.no_grad():
        assert_same(reference(conv_operator(layer), x), layer(x))


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class OwnIdentity(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class OwnDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, training=True)


class OwnPool(nn.AvgPool2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (0, 1, 0, 1)))


OWN = [OwnNorm(4), OwnIdentity(), OwnDropout(), OwnPool(3), timm.layers.AvgPool2dSame(3, 2)]


@pytest.mark.parametrize("layer", OWN, ids=lambda layer: type(layer).__name__)
def test_no_subclass_with_another_forward_is_read_as_its_base(layer: nn.Module) -> None:
    name = type(layer).__name__
    with pytest.raises(NotLinear, match=f"{name} has a forward of its own"):
        conv_operator(layer, 4)
    assert not is_idle(layer.eval())


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(4), nn.Identity(), nn.Dropout(), nn.AvgPool2d(3),
     torchvision.ops.FrozenBatchNorm2d(4), norm_act.BatchNormAct2d(4)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_no_layer_with_another_forward_set_on_it_is_read(layer: nn.Module) -> None:
    layer.forward = lambda x: x + 1
    for read in (conv_operator, linear_part):
        with pytest.raises(NotLinear, match=f"{type(layer).__name__} has a forward of its own"):
            read(layer, 4)
    assert not is_idle(layer.eval())


def test_an_unknown_layer_is_refused_by_name_and_says_how_to_add_it() -> None:
    with pytest.raises(NotLinear) as caught:
        conv_operator(nn.GELU())
    assert caught.value.reason == (
        "GELU is not a known linear layer; if it is one, add it with conv_operator.register(GELU)"
    )
    with pytest.raises(NotLinear, match="ConvTranspose2d is a transposed conv, and no conv of"):
        conv_operator(nn.ConvTranspose2d(4, 4, 3))
    assert own_forward_reason(nn.ConvTranspose2d(4, 4, 3)) == (
        "ConvTranspose2d is a transposed conv"
    )


def test_a_layer_can_be_registered() -> None:
    class Gain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(random_tensor(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.gain[:, None, None] * x

    @conv_operator.register(Gain)
    def _(layer: Gain, in_channels: int | None = None) -> ConvOperator:
        return ConvOperator(layer.gain.reshape(-1, 1, 1, 1), groups=4)

    layer, x = Gain(), random_tensor(1, 4, 3, 3)
    assert_same(reference(conv_operator(layer), x), layer(x))
    assert linear_part(layer)[1] is None


@pytest.mark.parametrize(
    ("conv", "expected"),
    [
        (nn.Conv2d(2, 2, (3, 5), padding=(1, 2)), ((1, 1), (2, 2))),
        (nn.Conv2d(2, 2, (3, 5), padding="valid"), ((0, 0), (0, 0))),
        (nn.Conv2d(2, 2, (4, 5), padding="same"), ((1, 2), (2, 2))),
        (nn.Conv1d(2, 2, 2, padding="same", dilation=3), ((1, 2),)),
        (nn.Conv1d(2, 2, 1, padding="same"), ((0, 0),)),
    ],
)
def test_padding_is_spelled_out(conv: nn.Conv2d, expected: object) -> None:
    assert conv_padding(conv) == expected


class ConvNorm(nn.Module):
    """Named for a norm, but a block of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)


def test_what_is_a_norm() -> None:
    norms = [nn.BatchNorm1d(2), nn.GroupNorm(1, 2), nn.LayerNorm(2), nn.InstanceNorm2d(2)]
    more = [nn.LocalResponseNorm(2), timm.layers.LayerNorm2d(2), norm_act.BatchNormAct2d(2)]
    assert all(map(is_norm, [*norms, *more, torchvision.ops.FrozenBatchNorm2d(2), nn.RMSNorm(2)]))
    assert not any(map(is_norm, [ConvNorm(), nn.Conv2d(1, 1, 1), nn.ReLU()]))
    affine = [nn.BatchNorm3d(2), nn.SyncBatchNorm(2), torchvision.ops.FrozenBatchNorm2d(2)]
    assert all(map(is_batch_norm, [*affine, norm_act.BatchNormAct2d(2)]))
    assert not any(map(is_batch_norm, [nn.GroupNorm(1, 2), nn.InstanceNorm2d(2), ConvNorm()]))


def test_what_is_an_activation_a_dropout_a_conv() -> None:
    assert all(map(is_activation, [nn.ReLU(), nn.GELU(), nn.Sigmoid(), timm.layers.Swish()]))
    assert not any(map(is_activation, [nn.MultiheadAttention(2, 1), nn.Identity(), nn.Dropout()]))
    drops = [nn.Dropout(), nn.Dropout3d(), nn.AlphaDropout(), timm.layers.DropPath(0.1),
             torchvision.ops.StochasticDepth(0.1, "row")]  # fmt: skip
    assert all(map(is_dropout, drops))
    assert not is_dropout(nn.Identity())
    assert is_conv_like(nn.ConvTranspose1d(1, 1, 1))
    assert is_conv_like(timm.layers.StdConv2d(1, 1, 1))
    assert not is_conv_like(nn.Linear(1, 1))


def test_dropout_is_idle_in_eval_mode_alone() -> None:
    assert is_idle(nn.Identity().train())
    for drop in (nn.Dropout(), timm.layers.DropPath(0.1)):
        assert not is_idle(drop.train())
        assert is_idle(drop.eval())
    assert not is_idle(nn.ReLU().eval())
