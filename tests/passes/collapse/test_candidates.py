"""A norm that can be found twice, in a region and behind a border, is folded once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.passes.collapse.folds import fold_of
from orepa_compiler.planning import Plan, recorded_plans
from tests.norms import randomise_norms

Make = Callable[[], nn.Module]


class Wrapped(nn.Module):
    """A layer in a class of the user's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class OneOfTwo(nn.Module):
    """The norm that runs stands beside one that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([norm(), norm()])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.norms[1](x))


def conv() -> nn.Module:
    return nn.Conv2d(3, 4, 3, padding=1, bias=False)


def norm(width: int = 4) -> nn.Module:
    return nn.BatchNorm2d(width)


def row(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers)


FORMS: dict[str, Make] = {
    "norm in a container": lambda: row(conv(), row(norm()), nn.ReLU()),
    "norm three containers deep": lambda: row(conv(), row(row(row(norm()))), nn.ReLU()),
    "conv in a container": lambda: row(row(conv()), norm(), nn.ReLU()),
    "each in its container": lambda: row(row(row(conv())), row(row(norm())), nn.ReLU()),
    "identity between": lambda: row(conv(), nn.Identity(), row(norm()), nn.ReLU()),
    "identities inside": lambda: row(
        row(conv(), nn.Identity()), row(nn.Identity(), norm(), nn.Identity()), nn.ReLU()
    ),
    "dropout between": lambda: row(conv(), nn.Dropout(), row(norm()), nn.ReLU()),
    "norm with its activation": lambda: row(conv(), row(norm(), nn.ReLU())),
    "norm, deeper, with its activation": lambda: row(row(conv()), row(row(norm()), nn.ReLU())),
    "norm with an activation in it": lambda: row(conv(), row(timm.layers.BatchNormAct2d(4))),
    "norm in a class": lambda: row(conv(), Wrapped(norm()), nn.ReLU()),
    "conv in a class": lambda: row(Wrapped(conv()), norm(), nn.ReLU()),
    "container in a class": lambda: row(conv(), Wrapped(row(norm())), nn.ReLU()),
    "two norms in a container": lambda: row(conv(), row(norm(), norm()), nn.ReLU()),
    "a norm and one in a container": lambda: row(conv(), norm(), row(norm()), nn.ReLU()),
    "one of two norms": lambda: row(conv(), OneOfTwo()),
    "transposed": lambda: row(nn.ConvTranspose2d(3, 4, 3), row(norm()), nn.ReLU()),
    "between two convs": lambda: row(conv(), row(norm()), row(nn.Conv2d(4, 2, 1)), row(norm(2))),
    "either of two convs": lambda: row(
        nn.ConvTranspose2d(3, 4, 3), row(norm()), row(nn.Conv2d(4, 2, 1))
    ),
    "before and behind": lambda: row(
        nn.ReLU(), row(norm(3)), row(nn.Conv2d(3, 4, 1)), row(norm(), nn.ReLU())
    ),
    "the whole in a class": lambda: Wrapped(row(conv(), row(norm()), nn.ReLU())),
}
GROWN: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "expanded": {"block": orepa.OREPA},
    "norms in branches": {"block": orepa.REPVGG},
}


def prepared(make: Make, grown: dict[str, Any] | None = None) -> tuple[nn.Module, Tensor]:
    model, x = randomise_norms(make()).double().eval(), torch.randn(2, 3, 9, 9).double()
    if grown is not None:
        model = orepa.expand(model, where="**", **grown).eval()
    return model, x


def norms_left(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if is_batch_norm(module)]


def changed(model: nn.Module) -> Iterator[str]:
    for edit in recorded_plans(model)[-1].edits:
        yield from fold_of(edit).modules


@pytest.mark.filterwarnings("ignore::orepa_compiler.errors.NothingExpandedWarning")
@pytest.mark.parametrize("grown", GROWN.values(), ids=GROWN)
@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_it_is_folded_once_and_exactly(make: Make, grown: dict[str, Any] | None) -> None:
    model, x = prepared(make, grown)
    deploy = orepa.collapse(model)
    assert [path for path in norms_left(deploy) if path != "1.norms.0"] == []  # it never runs
    torch.testing.assert_close(deploy(x), model(x), rtol=0, atol=1e-12)
    paths = list(changed(deploy))
    assert len(paths) == len(set(paths))
    assert orepa.certify(model, deploy, x)


@pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
def test_the_saved_plan_folds_it_again(make: Make) -> None:
    model, x = prepared(make)
    deploy = orepa.collapse(model)
    plan = Plan.from_json(recorded_plans(deploy)[-1].to_json())
    again = orepa.collapse(model, plan=plan, inplace=True)
    assert again is model
    assert torch.equal(again(x), deploy(x))


PLACES = ["1", "1.0"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["norm in a container", "norm with its activation"])
def test_a_hook_on_the_norm_or_its_container_keeps_both(name: str, place: str) -> None:
    model, x = prepared(FORMS[name])
    seen: list[Tensor] = []
    model.get_submodule(place).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    expected, deploy = model(x), orepa.collapse(model)
    assert norms_left(deploy) == ["1.0"]
    assert torch.equal(deploy(x), expected)
    assert torch.equal(seen[0], seen[1])
    reasons = {refusal.path: refusal.reason for refusal in recorded_plans(deploy)[-1].refusals}
    assert "1.0" in reasons
    assert place == "1" or reasons["1.0"].startswith("it has a hook")


def test_planning_changes_nothing() -> None:
    from orepa_compiler.capture import capture
    from orepa_compiler.passes import Collapse, is_leaf

    model, x = prepared(FORMS["norm in a container"])
    expected, text = model(x), str(model)
    captured = capture(model, training=False, is_leaf=is_leaf)
    skeleton = str(captured.skeleton)
    plan = Collapse().plan(captured)
    assert [edit.before for edit in plan.edits] == ["Conv2d + Sequential"]
    assert str(captured.skeleton) == skeleton
    assert str(model) == text
    assert torch.equal(model(x), expected)
