"""Norms behind a concatenation of convs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.planning import recorded_plans
from orepa_compiler.proving.certifying import certify
from tests.norms import randomise_norms

Parts = Callable[["Mixed", Tensor], Tensor]


class Mixed(nn.Module):
    """Convs of several kernel sizes, each on its channels, as in MixNet."""

    def __init__(self, parts: Parts | None = None) -> None:
        super().__init__()
        self.small = nn.Conv2d(2, 3, 1, bias=False)
        self.large = nn.Conv2d(2, 5, 3, padding=1)
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        if self.parts is not None:
            return self.parts(self, x)
        left, right = torch.split(x, [2, 2], 1)
        return torch.cat([self.small(left), self.large(right)], 1)


class Net(nn.Module):
    def __init__(self, mixed: nn.Module | None = None, width: int = 8) -> None:
        super().__init__()
        self.mixed = mixed or Mixed()
        self.norm = nn.BatchNorm2d(width)
        self.last = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.mixed(x))))


X = torch.randn(2, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def prepared(model: nn.Module) -> nn.Module:
    return randomise_norms(model).double().eval()


def norms_left(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if is_batch_norm(module)]


def check(model: nn.Module, *, left: list[str]) -> nn.Module:
    """The collapsed model, which leaves these norms and computes what the model does."""
    expected = model(X)
    deploy = orepa.collapse(model)
    assert norms_left(deploy) == left
    torch.testing.assert_close(deploy(X), expected, rtol=0, atol=1e-12)
    return deploy


def test_each_conv_takes_its_channels_of_the_norm() -> None:
    deploy = check(prepared(Net()), left=[])
    assert isinstance(deploy.norm, nn.Identity)
    assert deploy.mixed.small.bias is not None


@pytest.mark.parametrize("block", [orepa.OREPA, orepa.DBB])
def test_so_do_blocks(block: orepa.Block) -> None:
    model = orepa.expand(prepared(Net()), block=block, where="**").eval()
    assert isinstance(model.mixed.large, ConvBlock)
    deploy = check(randomise_norms(model), left=[])
    assert type(deploy.mixed.small) is type(deploy.mixed.large) is nn.Conv2d


def test_so_do_convs_with_a_forward_of_their_own() -> None:
    module = pytest.importorskip("timm.layers.conv2d_same")
    mixed = Mixed()
    mixed.small, mixed.large = nn.ConvTranspose2d(2, 3, 3, padding=1), module.Conv2dSame(2, 5, 3)
    check(prepared(Net(mixed)), left=[])
    check(orepa.expand(prepared(Net(mixed)), where="**").eval(), left=[])


def test_the_activation_of_the_norm_stays() -> None:
    layers = pytest.importorskip("timm.layers")
    model = Net()
    model.norm = layers.BatchNormAct2d(8, act_layer=nn.PReLU)
    assert isinstance(check(prepared(model), left=[]).norm, nn.PReLU)


def test_a_conv_inside_a_container_is_found() -> None:
    mixed = Mixed()
    mixed.large = nn.Sequential(nn.ReLU(), nn.Sequential(mixed.large))
    check(prepared(Net(mixed)), left=[])


def test_convs_of_one_forward() -> None:
    class Flat(Net):
        def forward(self, x: Tensor) -> Tensor:
            both = torch.cat((self.mixed.small(x[:, :2]), self.mixed.large(x[:, 2:])), dim=1)
            return self.last(torch.relu(self.norm(both)))

    check(prepared(Flat()), left=[])


def test_a_norm_that_went_into_the_conv_behind_it_is_not_folded_twice() -> None:
    class Before(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(self.mixed(x)))

    model = Before()
    model.last = nn.Conv2d(8, 2, 1)
    check(prepared(model), left=[])


def part_read_twice(self: Mixed, x: Tensor) -> Tensor:
    small = self.small(x[:, :2])
    return torch.cat([small, self.large(x[:, 2:]) + small.mean()], 1)


def one_twice(self: Mixed, x: Tensor) -> Tensor:
    small = self.small(x[:, :2])
    return torch.cat([small, small, self.small.weight.new_zeros(2, 2, 9, 9)], 1)


def activated(self: Mixed, x: Tensor) -> Tensor:
    return torch.cat([self.small(x[:, :2]), self.large(x[:, 2:]).relu()], 1)


def with_the_input(self: Mixed, x: Tensor) -> Tensor:
    return torch.cat([self.large(x[:, 2:]), x[:, :3]], 1)


def called_twice(self: Mixed, x: Tensor) -> Tensor:
    return torch.cat([self.small(x[:, :2]), self.small(x[:, 2:]), x[:, :2]], 1)


@pytest.mark.parametrize(
    "parts", [part_read_twice, one_twice, activated, with_the_input, called_twice]
)
def test_what_is_not_a_conv_alone_keeps_the_norm(parts: Parts) -> None:
    check(prepared(Net(Mixed(parts))), left=["norm"])


def test_a_concatenation_along_another_axis_keeps_the_norm() -> None:
    def rows(self: Mixed, x: Tensor) -> Tensor:
        return torch.cat([self.large(x[:, :2]), self.large2(x[:, 2:])], 2)

    mixed = Mixed(rows)
    mixed.large2 = nn.Conv2d(2, 5, 3, padding=1)
    check(prepared(Net(mixed, width=5)), left=["norm"])


def test_a_concatenation_that_is_read_elsewhere_too_keeps_the_norm() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            both = self.mixed(x)
            return self.last(torch.relu(self.norm(both)) + both)

    check(prepared(Twice()), left=["norm"])


@pytest.mark.parametrize("place", ["mixed", "mixed.small"])
def test_a_hook_on_what_would_change_keeps_the_norm(place: str) -> None:
    model = prepared(Net())
    seen: list[Tensor] = []
    model.get_submodule(place).register_forward_hook(lambda m, args, output: seen.append(output))
    check(model, left=["norm"])
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-12)


def test_a_recorded_concatenation_is_not_trusted() -> None:
    class Asks(Net):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 100:
                return x
            both = torch.cat([self.mixed.small(x[:, :2]), self.mixed.large(x[:, 2:])], 1)
            return self.last(torch.relu(self.norm(both)))

    model = prepared(Asks())
    assert norms_left(orepa.collapse(model, inputs=(X,))) == ["norm"]


def test_a_pool_before_the_conv_is_joined_with_it_and_the_norm_stays() -> None:
    mixed = Mixed()
    mixed.large = nn.Sequential(nn.AvgPool2d(1), mixed.large)
    check(prepared(Net(mixed)), left=["norm"])


def test_the_plan_and_the_certificate_tell_of_it() -> None:
    model = prepared(Net())
    deploy = orepa.collapse(model)
    (edit,) = recorded_plans(deploy)[-1].edits
    assert (edit.path, edit.before) == ("norm", "2 concatenated convs + BatchNorm2d")
    assert edit.options["within"] == ""
    certificate = certify(model, deploy, (X,))
    assert certificate, certificate.verdict
    with torch.no_grad():
        deploy.mixed.large.weight[0] += 1e-3
    assert not certify(model, deploy, (X,))
