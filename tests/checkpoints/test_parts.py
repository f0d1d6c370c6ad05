"""A model of which a part is expanded, and wrappers, come back; a block without a plan does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import orepa_compiler as orepa
from orepa_compiler.errors import CheckpointError
from tests.compiler_nets import batch, output, same_state, stem_net, train_a_step
from tests.norms import randomise_norms

X = batch()


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = stem_net(), nn.Sequential(nn.Linear(5, 4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))  # type: ignore[no-any-return]


class Lit(nn.Module):
    """As a LightningModule holds a net, its average, and a loss with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.ema = stem_net(), stem_net()
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.ema(x) + self.net(x)  # type: ignore[no-any-return]


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]


def trained(model: nn.Module) -> nn.Module:
    train_a_step(model, X)
    return model


def expanded_part() -> nn.Module:
    model = Detector()
    model.backbone = orepa.expand(model.backbone)
    return trained(model)


def both_averaged() -> nn.Module:
    model = Lit()
    model.net = orepa.expand(model.net)
    model.ema = copy.deepcopy(model.net)
    trained(model.net)
    return model


def part_of_a_collapsed_whole() -> nn.Module:
    return orepa.collapse(expanded_part(), inputs=X)


def part_collapsed_in_an_expanded_whole() -> nn.Module:
    model = trained(orepa.expand(Detector()))
    model.backbone = orepa.collapse(model.backbone, fold_norm=False)
    return model


def all_but_the_backbone_then_it() -> nn.Module:
    model = orepa.expand(Detector(), where="backbone.*")
    model.backbone = orepa.cut(model.backbone, where="*conv1")
    return trained(model)


def averaged() -> nn.Module:
    return AveragedModel(trained(orepa.expand(Detector())))


def twice_wrapped() -> nn.Module:
    return Wrapper(AveragedModel(expanded_part()))


@pytest.mark.parametrize(
    ("make", "stock"),
    [
        (expanded_part, Detector),
        (both_averaged, Lit),
        (part_of_a_collapsed_whole, Detector),
        (part_collapsed_in_an_expanded_whole, Detector),
        (averaged, Detector),
        (averaged, lambda: AveragedModel(Detector())),
        (lambda: Wrapper(trained(orepa.expand(stem_net()))), stem_net),
        (twice_wrapped, Detector),
        (twice_wrapped, lambda: AveragedModel(Detector())),
        (twice_wrapped, lambda: Wrapper(AveragedModel(Detector()))),
    ],
)
def test_a_planned_part_comes_back(
    make: Callable[[], nn.Module], stock: Callable[[], nn.Module], tmp_path: Path
) -> None:
    made = make()
    randomise_norms(made)
    read = orepa.load(stock, orepa.save(made, tmp_path / "model"))
    assert type(read).__name__ == type(stock()).__name__
    inner = next(m for m in made.modules() if type(m).__name__ == type(read).__name__)
    assert same_state(read, inner)
    assert torch.equal(output(read.eval(), X), output(made.eval(), X))


def test_the_part_itself_may_be_asked_for(tmp_path: Path) -> None:
    made = expanded_part()
    read = orepa.load(stem_net, orepa.save(made, tmp_path / "model"))
    assert same_state(read, made.backbone)
    # and what was read is saved again as what it is
    again = orepa.load(stem_net, orepa.save(read, tmp_path / "again"))
    assert same_state(again, read)


def test_of_two_parts_none_is_guessed(tmp_path: Path) -> None:
    path = orepa.save(both_averaged(), tmp_path / "model")
    assert {key.split(".")[0] for key in load_file(path)} == {"net", "ema", "loss"}
    with pytest.raises(CheckpointError, match=r"does not fit Stem.* rewritten are net, ema; name"):
        orepa.load(stem_net, path)


def test_a_block_that_no_plan_covers_is_named(tmp_path: Path) -> None:
    expanded = orepa.expand(Detector())
    other = Detector()
    other.backbone = expanded.backbone
    for model, path in ((expanded.backbone, ""), (other, "backbone.")):
        with pytest.raises(
            CheckpointError, match=rf"^{path}\S+: no plan tells how this block was m"
        ):
            orepa.save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
