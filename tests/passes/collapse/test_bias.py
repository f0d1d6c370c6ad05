"""A bias for which a conv has no place, given to the norm behind it: or left, with the reason."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler import ReparamError
from orepa_compiler.passes import Collapse, Pipeline
from orepa_compiler.passes.collapse.bias import give_bias
from tests.norms import randomise_norms


class ReadsTheMean(nn.Module):
    """A net that looks at the statistics of its norm, beside running it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.norm.running_mean
        return torch.relu(self.norm(self.conv(x))) + mean.reshape(1, -1, 1, 1)


class Noisy(nn.BatchNorm2d):
    """A norm with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.abs())


def row(norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> nn.Module:
    conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
    return nn.Sequential(nn.Sequential(conv), nn.Sequential(norm(3), nn.ReLU()))


def hooked(place: str) -> nn.Module:
    model = row()
    model.get_submodule(place).register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    return model


def watched(place: str) -> nn.Module:
    model = row()
    model.get_submodule(place).register_forward_hook(lambda _, args, y: y * 2)
    return model


def expanded(model: nn.Module) -> tuple[nn.Module, Tensor]:
    grown = orepa.expand(model.double(), where="**", block=orepa.REPVGG)
    return randomise_norms(grown).eval(), torch.randn(2, 3, 9, 9).double()


NEEDS = "the norms of its branches need a bias to go to, the original conv has none, and "
HOOK = "it has a hook, which a rewrite would no longer call; remove the hook first"
KEPT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "hook on the norm": (lambda: hooked("1.0"), f"1.0, the norm that reads it, stays: {HOOK}"),
    "hook on what holds the norm": (
        lambda: hooked("1"),
        f"1, between it and the norm 1.0, stays: {HOOK}",
    ),
    "hook on what holds the conv": (
        lambda: watched("0"),
        f"0, between it and the norm 1.0, stays: {HOOK}",
    ),
    "statistics that are read": (
        ReadsTheMean,
        "norm, the norm that reads it, is read by the model too",
    ),
    "a norm with a forward of its own": (lambda: row(Noisy), "Noisy has a forward of its own"),
}


@pytest.mark.parametrize(("build", "reason"), KEPT.values(), ids=KEPT)
def test_a_norm_that_may_not_change_is_named(build: Callable[[], nn.Module], reason: str) -> None:
    model, x = expanded(build())
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    with pytest.raises(ReparamError) as error:
        orepa.collapse(model, fold_norm=False, inplace=True)
    assert NEEDS + reason + "; use fold_norm=True" in str(error.value)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    deploy = orepa.collapse(model)
    torch.testing.assert_close(deploy(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("place", ["", "1.1"])
def test_a_hook_around_both_or_behind_is_none_of_its_business(place: str) -> None:
    model, x = expanded(watched(place))
    kept = orepa.collapse(model, fold_norm=False)
    torch.testing.assert_close(kept(x), model(x), rtol=0, atol=1e-12)


def test_the_mean_is_a_new_tensor() -> None:
    conv, norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    mean, before = norm.running_mean, norm.running_mean.clone()
    bias = conv.bias.detach()
    give_bias(conv, norm)
    assert torch.equal(mean, before)
    assert torch.equal(norm.running_mean, before - bias)
    assert conv.bias is None


class KeepsANorm(nn.Module):
    """Its second norm works with the statistics of each batch, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.batch = nn.BatchNorm2d(4)

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.batch.train()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv(x)))
        return self.batch(torch.relu(self.left(x) + self.right(x)))


@pytest.mark.parametrize("training", [False, True])
def test_what_the_models_own_eval_leaves_in_train_mode_stays_so(training: bool) -> None:
    model, x = randomise_norms(KeepsANorm()).double(), torch.randn(2, 3, 9, 9).double()
    expected = model.eval()(x)
    with torch.no_grad():
        deploy, _ = Pipeline((Collapse(),)).run(model.train(training))
    assert deploy.batch.training
    assert not deploy.conv.training
    assert isinstance(deploy.norm, nn.Identity)
    torch.testing.assert_close(deploy(x), expected, rtol=0, atol=1e-12)
