"""Norms that stand right before a conv, with the border of a module between the two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.planning import recorded_plans
from orepa_compiler.proving.certifying import certify
from tests.passes.collapse.test_concatenation import norms_left, prepared

X = torch.randn(2, 4, 9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


class Mlp(nn.Module):
    """Reads the shape of its input, as attention does, and begins with a conv."""

    def __init__(self, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first or nn.Conv2d(4, 8, 1)
        self.last = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        y = self.last(torch.relu(self.first(x)))
        return y.reshape(batch, -1, height, width)


class PreNorm(nn.Module):
    """x + mlp(norm(x)), as in nets of attention and convs."""

    def __init__(self, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)
        self.mlp = mlp or Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Between(PreNorm):
    """Runs `between` on the input and its norm, before the convs run."""

    def __init__(self, between: Callable[[PreNorm, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        return self.between(self, x, self.norm(x))


def check(model: nn.Module, *, left: list[str]) -> nn.Module:
    """The collapsed model, which leaves these norms and computes what the model does."""
    expected = model(X.clone())
    deploy = orepa.collapse(model)
    assert norms_left(deploy) == left
    torch.testing.assert_close(deploy(X.clone()), expected, rtol=0, atol=1e-12)
    return deploy


@pytest.mark.parametrize(
    "first",
    [
        nn.Conv2d(4, 8, 1, bias=False),
        nn.Conv2d(4, 8, 1, groups=2),
        nn.Conv2d(4, 8, 3, padding="same", groups=4),
        nn.Sequential(nn.Identity(), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)),
    ],
    ids=["pointwise", "grouped", "padded", "with its own norm"],
)
@pytest.mark.parametrize("expand_first", [False, True])
def test_an_unpadded_conv_takes_the_norm(first: nn.Module, expand_first: bool) -> None:
    model = prepared(PreNorm(Mlp(first)))
    if expand_first:
        model = orepa.expand(model, where="**").eval()
    is_padded = isinstance(first, nn.Conv2d) and first.padding == "same"
    check(model, left=["norm"] if is_padded else [])


def test_what_the_norm_stands_in_may_be_a_container() -> None:
    model = PreNorm()
    model.norm = nn.Sequential(nn.Identity(), nn.BatchNorm2d(4), nn.Dropout(0.5))
    check(prepared(model), left=[])


def test_what_does_nothing_may_stand_between() -> None:
    class Net(PreNorm):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(self.drop(input=self.norm(x)))

    check(prepared(Net()), left=[])


@pytest.mark.parametrize("conv", [nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 4, 3)])
def test_a_norm_that_follows_a_conv_goes_there(conv: nn.Module) -> None:
    model = prepared(nn.Sequential(conv, nn.BatchNorm2d(4), Mlp()))
    deploy = check(model, left=[])
    torch.testing.assert_close(deploy[2].first.weight, model[2].first.weight)


def test_a_norm_with_an_activation_stays() -> None:
    layers = pytest.importorskip("timm.layers")
    model = PreNorm()
    model.norm = layers.BatchNormAct2d(4)
    check(prepared(model), left=["norm"])


class Attends(nn.Module):
    """A conv on one input, and others by name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, y: Tensor, x: Tensor | None = None, scale: float = 1.0) -> Tensor:
        z = self.conv(y) * scale
        return z if x is None else z + x


@pytest.mark.parametrize("twice", [False, True])
def test_the_other_inputs_may_be_given_by_name(twice: bool) -> None:
    class Net(PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return self.mlp(y, scale=2.0, x=y if twice else x)

    check(prepared(Net(Attends())), left=["norm"] if twice else [])


def read_twice(self: PreNorm, x: Tensor, y: Tensor) -> Tensor:
    return self.mlp(y) + y


def written_over(self: PreNorm, x: Tensor, y: Tensor) -> Tensor:
    x.add_(1)
    return self.mlp(y) + x


def written_over_by_index(self: PreNorm, x: Tensor, y: Tensor) -> Tensor:
    x[:, 0] = 0
    return self.mlp(y) + x


def written_over_through_a_view(self: PreNorm, x: Tensor, y: Tensor) -> Tensor:
    x.view(-1).mul_(2)
    return self.mlp(y) + x


class Activates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu, self.conv = nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.relu(x))


def written_over_inside_a_module(self: PreNorm, x: Tensor, y: Tensor) -> Tensor:
    z = self.other(x)
    return self.mlp(y) + z


def written_over_afterwards(self: PreNorm, x: Tensor, y: Tensor) -> Tensor:
    x += self.mlp(y)
    return x


@pytest.mark.parametrize(
    "between",
    [
        read_twice,
        written_over,
        written_over_by_index,
        written_over_through_a_view,
        written_over_inside_a_module,
    ],
)
def test_a_norm_whose_input_the_conv_may_not_read_stays(
    between: Callable[[PreNorm, Tensor, Tensor], Tensor],
) -> None:
    model = Between(between)
    model.other = Activates()
    check(prepared(model), left=["norm"])


def test_its_input_may_be_written_over_when_the_conv_has_read_it() -> None:
    check(prepared(Between(written_over_afterwards)), left=[])


def test_two_inputs_of_a_module_may_be_one_tensor() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            x = x.mul_(2)
            return self.conv(y) + x

    class Net(PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            return self.mlp(self.norm(x), x)

    check(prepared(Net(Both())), left=["norm"])


@pytest.mark.parametrize("place", ["mlp", "norm", "mlp.first"])
def test_a_hook_on_what_would_change_keeps_the_norm(place: str) -> None:
    model = prepared(PreNorm())
    seen: list[Tensor] = []
    model.get_submodule(place).register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    check(model, left=["norm"])
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-12)


def test_a_recorded_norm_is_not_trusted() -> None:
    class Asks(PreNorm):
        def forward(self, x: Tensor) -> Tensor:
            return x if len(x) > 100 else x + self.mlp(self.norm(x))

    model = prepared(Asks())
    deploy = orepa.collapse(model, inputs=(X,))
    assert norms_left(deploy) == ["norm"]


def test_the_plan_and_the_certificate_tell_of_it() -> None:
    model = prepared(PreNorm())
    deploy = orepa.collapse(model)
    (edit,) = recorded_plans(deploy)[-1].edits
    assert (edit.path, edit.before) == ("mlp.first", "BatchNorm2d + Conv2d")
    assert edit.options["before"] == "norm"
    certificate = certify(model, deploy, (X,))
    assert certificate, certificate.verdict
    with torch.no_grad():
        deploy.mlp.first.weight[0] += 1e-3
    assert not certify(model, deploy, (X,))
