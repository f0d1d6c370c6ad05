"""Fine-tuning from pretrained weights: no jump at the first step, and frozen norms stay frozen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import resnet18

import orepa_compiler as orepa
from orepa_compiler.blocks import ReparamConv
from tests.norms import randomise_norms

MODELS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: timm.create_model("test_resnet", num_classes=5),
    "mobile": lambda: timm.create_model("mobilenetv3_small_050", num_classes=5),
}
LABELS = torch.tensor([0, 1, 2, 3])


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 64, 64, dtype=torch.float64)


def pretrained(name: str) -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(MODELS[name]()).double()


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), LABELS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_starts_where_the_plain_model_is(
    name: str, training: bool, images: Tensor
) -> None:
    model = pretrained(name)
    expanded = orepa.expand(model)
    expected = loss(model.train(training), images).item()
    assert loss(expanded.train(training), images).item() == pytest.approx(expected, rel=1e-10)


def bare() -> nn.Module:
    """Convs with activations, as in VGG: a norm is inserted behind each."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), *head).double()


def test_inserted_norms_start_where_the_plain_model_is(images: Tensor) -> None:
    """In train mode, too, once they are calibrated on a batch; without one, in eval mode only."""
    model = bare()
    expand = partial(orepa.expand, block=orepa.OREPA)
    expected = loss(model, images).item()
    calibrated, fresh = expand(model, inputs=images), expand(model)
    for each in (calibrated, fresh):
        assert loss(each.eval(), images).item() == pytest.approx(expected, rel=1e-10)
    assert loss(calibrated.train(), images).item() == pytest.approx(expected, rel=1e-6)
    assert abs(loss(fresh.train(), images).item() - expected) > 1e-3


def norms_in(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def step(model: nn.Module, x: Tensor, lr: float = 0.01) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    loss(model, x).backward()
    optimizer.step()


def test_norms_in_eval_mode_stay_frozen(images: Tensor) -> None:
    """As detectors train: the model in train mode, its norms in eval mode and without gradients."""
    model = orepa.expand(pretrained("residual")).train()
    assert norms_in(model)
    for norm in norms_in(model):
        norm.eval().requires_grad_(False)
    before = copy.deepcopy([norm.state_dict() for norm in norms_in(model)])
    start = loss(model, images)
    step(model, images, lr=1e-4)
    assert loss(model, images) < start
    for norm, state in zip(norms_in(model), before, strict=True):
        assert all(torch.equal(tensor, state[name]) for name, tensor in norm.state_dict().items())
    assert orepa.verify(model.eval(), orepa.collapse(model), images)


@pytest.mark.parametrize("before", [True, False])
def test_norms_that_are_replaced_by_frozen_ones(before: bool, images: Tensor) -> None:
    model = pretrained("residual")
    expected = loss(copy.deepcopy(model).eval(), images).item()
    if before:
        model = orepa.expand(freeze_batch_norm_2d(model))
    else:
        model = freeze_batch_norm_2d(orepa.expand(model))
    assert not norms_in(model)
    assert loss(model.train(), images).item() == pytest.approx(expected, rel=1e-10)
    step(model, images)
    deploy = orepa.collapse(model)
    assert orepa.verify(model.eval(), deploy, images)
    kinds = {type(module).__name__ for module in deploy.modules()}
    assert not {kind for kind in kinds if "Frozen" in kind and "Act" not in kind}, kinds


@pytest.fixture(scope="module")
def first_steps() -> dict[str, tuple[float, float]]:
    """Block -> how the first step moves its kernel beside the plain conv's: cosine, length."""
    torch.manual_seed(0)
    model = resnet18(num_classes=5).double()
    images, lr = torch.randn(4, 3, 64, 64, dtype=torch.float64), 1e-4
    expanded = orepa.expand(model)
    paths = [path for path, m in expanded.named_modules() if isinstance(m, ReparamConv)]
    starts = [kernel(each, path) for path in paths for each in (model, expanded)]
    for each in (model, expanded):
        step(each.train(), images, lr)
    moves = {}
    for path, plain, own in zip(paths, starts[::2], starts[1::2], strict=True):
        ours = (kernel(expanded, path) - own).flatten()
        theirs = (kernel(model, path) - plain).flatten()
        cosine = float(F.cosine_similarity(ours, theirs, dim=0))
        moves[path] = cosine, float(ours.norm() / theirs.norm())
    return moves


def kernel(model: nn.Module, path: str) -> Tensor:
    weight: Tensor = model.get_submodule(path).weight  # type: ignore[assignment]
    return weight.detach().clone()


def test_the_first_step_moves_kernels_as_it_moves_the_plain_ones(
    first_steps: dict[str, tuple[float, float]],
) -> None:
    """So the plain net's learning rate is the one to fine-tune with."""
    assert len(first_steps) == 20
    for path, (cosine, length) in first_steps.items():
        if path != "conv1":
            assert cosine > 0.75, path
            assert 1.0 < length < 1.4, path


def test_a_deep_stem_moves_several_times_as_far(
    first_steps: dict[str, tuple[float, float]],
) -> None:
    """So it learns at a tenth of the rate (Hu et al. 2022, supplement Sec. 2.3)."""
    assert 3 < first_steps["conv1"][1] < 10
