"""A net's equal forms: equal bit by bit, and better to hold in int8."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.capture import capture
from orepa_compiler.export.int8.ranges import lost_channels
from orepa_compiler.passes import is_leaf
from orepa_compiler.quantization.pairs import Pair, pairs
from tests.quantization.nets import images, linear_blocks


class Spread(nn.Module):
    """Convs between which the channels are far apart; a grouped one, pooling, and a sum."""

    def __init__(self, activation: Callable[[], nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), activation())
        self.two = nn.Sequential(
            nn.Conv2d(8, 8, 3, 2, 1, groups=2, padding_mode="reflect"),
            activation(),
            nn.MaxPool2d(2),
        )
        self.three = nn.Conv2d(8, 8, 1, bias=False)
        self.left, self.right = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Sequential(nn.Linear(8, 6), activation(), nn.Dropout(), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.three(self.two(self.one(x))))
        y = torch.relu(self.left(y)) + self.right(y)
        z: Tensor = self.head(y.mean((2, 3)))
        return z


def spread(**options: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    net = Spread(**options)
    with torch.no_grad():
        net.one[0].weight[:6] *= 1e-4
        net.one[0].bias[:6] *= 1e-4
        net.two[0].weight[:4] *= 1e4  # which reads channels 0 to 3
        net.two[0].weight[4:, :2] *= 1e4
    return net.eval()


def found(net: nn.Module) -> set[Pair]:
    return set(pairs(capture(net, training=False, is_leaf=is_leaf)))


def test_pairs_are_layers_with_nothing_but_scaling_between() -> None:
    # three's map goes to left and right, theirs into a sum: those are no pairs
    expected = {Pair("one.0", "two.0"), Pair("two.0", "three"), Pair("head.0", "head.3")}
    assert found(spread()) == expected
    assert found(spread(activation=nn.LeakyReLU)) == expected
    assert found(spread(activation=lambda: nn.PReLU())) == expected


@pytest.mark.parametrize("activation", [nn.GELU, nn.Hardswish, nn.ReLU6, nn.Sigmoid])
def test_behind_another_activation_there_is_none(activation: type[nn.Module]) -> None:
    assert found(spread(activation=activation)) == set()


def test_a_layer_that_runs_twice_or_has_a_hook_is_in_no_pair() -> None:
    net = spread()
    net.two[0].register_forward_hook(lambda module, args, output: None)
    assert found(net) == {Pair("head.0", "head.3")}

    class Twice(Spread):
        def forward(self, x: Tensor) -> Tensor:
            self.one(x)
            return super().forward(x)

    twice = Twice().eval()
    assert Pair("one.0", "two.0") not in found(twice)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_same_net_bit_by_bit_in_another_form(dtype: torch.dtype) -> None:
    net, x = spread().to(dtype), images().to(dtype)
    equal = orepa.equalize(net, [x, images(seed=1).to(dtype)])
    for batch in (x, images(seed=2).to(dtype)):
        assert torch.equal(equal(batch), net(batch))
    assert not torch.equal(equal.two[0].weight, net.two[0].weight)
    assert torch.equal(equal.left.weight, net.left.weight)


def test_int8_then_holds_the_channels() -> None:
    net = spread()
    assert [layer.path for layer in lost_channels(net, [(images(),)])] == ["two.0"]
    assert lost_channels(orepa.equalize(net, images()), [(images(),)]) == []


def test_a_channel_of_zeros_keeps_its_scale() -> None:
    net = spread()
    with torch.no_grad():
        net.one[0].weight[0], net.one[0].bias[0] = 0.0, 0.0
        net.two[0].weight[:, 1] = 0.0
    equal = orepa.equalize(net, images())
    assert torch.equal(equal(images()), net(images()))
    assert torch.equal(equal.one[0].weight[:2], net.one[0].weight[:2])


def test_what_does_not_scale_after_all_is_not_handed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "orepa_compiler.int8.equalizing._factor", lambda peak, reader: -torch.ones_like(peak)
    )
    with pytest.raises(
        orepa.ReparamError, match=r"gives another output on batch 0 \(off by .*hand"
    ):
        orepa.equalize(spread(), images())


def test_mistakes_are_errors() -> None:
    with pytest.raises(
        orepa.ReparamError, match=r"^stem\.0: still in training form; call orepa\.col"
    ):
        orepa.equalize(linear_blocks(), images())
    with pytest.raises(
        orepa.ReparamError, match="Spread has no two layers with only ReLU, pooling"
    ):
        orepa.equalize(spread(activation=nn.GELU), images())
    with pytest.raises(orepa.ReparamError, match="and equalize works on a model that does not"):
        orepa.equalize(orepa.fake_quantize(spread()), images())
    with pytest.raises(orepa.ReparamError, match="inputs: an empty list"):
        orepa.equalize(spread(), [])
