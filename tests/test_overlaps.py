"""Plans that do not fit a model, or whose edits stand in one another's way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler import ReparamError
from orepa_compiler.capture import Capture, capture
from orepa_compiler.passes import COLLAPSE, Expand, Linearize, Pipeline, Squeeze, is_leaf
from orepa_compiler.planning import Edit, Plan, recorded_plans
from orepa_compiler.planning.overlaps import Touched, check_edits
from tests.norms import randomise_norms


class Net(nn.Module):
    """Two convs with norms, the second in a module of its own, and a sum of branches."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.left, self.right = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(torch.relu(self.norm(self.conv(x))))
        return self.left(x) + self.right(x)


def net() -> Net:
    return randomise_norms(Net()).eval()


def captured(model: nn.Module) -> Capture:
    return capture(model, training=False, is_leaf=is_leaf)


def edit(path: str) -> Edit:
    return Edit("mine", path, f"{path} before", f"{path} after", (1, 1))


Given = dict[str, Touched]
CLASH = "stands in two edits of the plan: mine of {} ({} before -> {} after), and mine of {} ("
OVERLAPS: dict[str, tuple[Given, str, str]] = {
    "one module": (
        {"conv": Touched(("conv", "norm")), "norm": Touched(("norm",))},
        "norm",
        CLASH.format("conv", "conv", "conv", "norm"),
    ),
    "a module in another": (
        {"body.1": Touched(("body.1",)), "body": Touched(("body",))},
        "body",
        CLASH.format("body", "body", "body", "body.1"),
    ),
    "a module around another": (
        {"body": Touched(("body",)), "body.1": Touched(("body.1",))},
        "body",
        CLASH.format("body", "body", "body", "body.1"),
    ),
    "one node": (
        {"conv": Touched((), "", ("add",)), "left": Touched((), "", ("add",))},
        "node add in the forward of the model itself",
        CLASH.format("conv", "conv", "conv", "left"),
    ),
    "a node that calls a module": (
        {"": Touched((), "", ("left", "right", "add")), "right": Touched(("right",))},
        "right",
        "mine of the model itself ( before ->  after), and mine of right (",
    ),
    "the owner of a node": (
        {"body.0": Touched((), "body", ("_0",)), "body": Touched(("body",))},
        "body",
        CLASH.format("body", "body", "body", "body.0"),
    ),
}


@pytest.mark.parametrize(("given", "place", "text"), OVERLAPS.values(), ids=OVERLAPS)
def test_two_edits_of_one_thing_are_named(given: Given, place: str, text: str) -> None:
    edits = [(edit(path), touched) for path, touched in given.items()]
    with pytest.raises(ReparamError) as error:
        check_edits(captured(net()), edits)
    assert str(error.value).startswith(f"{place} stands in two edits")
    assert text in str(error.value)
    assert str(error.value).endswith("; leave one of them out")


def test_edits_beside_one_another_pass() -> None:
    touched = {
        "conv": Touched(("conv", "norm"), "", ("conv", "norm")),
        "body": Touched(("body.0", "body.1"), "body", ("_0", "_1")),
        "": Touched(("left", "right"), "", ("left", "right", "add")),
    }
    check_edits(captured(net()), [(edit(path), what) for path, what in touched.items()])


def test_a_module_is_one_under_all_its_names() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    model.add_module("again", model[0])
    edits = [(edit(path), Touched((path,))) for path in ("0", "again")]
    with pytest.raises(ReparamError, match=r"^0 stands in two edits of the plan"):
        check_edits(captured(model), edits)


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(ReparamError, match=r"^body\.7: the plan does not fit: the model has no"):
        check_edits(captured(net()), [(edit("body"), Touched(("body.0", "body.7")))])


HOOKED: dict[str, tuple[str, Touched]] = {
    "on a module": ("norm", Touched(("conv", "norm"))),
    "between the modules": ("body", Touched(("conv", "body.1"))),
}


@pytest.mark.parametrize(("place", "touched"), HOOKED.values(), ids=HOOKED)
def test_a_hook_that_would_see_another_value_refuses_the_plan(place: str, touched: Touched) -> None:
    model = net()
    model.get_submodule(place).register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ReparamError, match=f"^{place}: the plan does not fit: it has a hook"):
        check_edits(captured(model), [(edit("conv"), touched)])
    check_edits(captured(model), [(edit("conv"), replace(touched, stays=True))])


def test_a_plan_with_an_edit_twice_changes_nothing() -> None:
    model, x = net(), torch.randn(1, 3, 8, 8)
    plan = recorded_plans(orepa.collapse(model))[-1]
    twice = Plan.from_json(Plan((*plan.edits, plan.edits[0])).to_json())
    before, expected = str(model), model(x)
    with pytest.raises(ReparamError, match="stands in two edits of the plan: collapse of conv"):
        orepa.collapse(model, plan=twice, inplace=True)
    assert str(model) == before
    assert torch.equal(model(x), expected)


def mixed(model: nn.Module) -> Plan:
    """A plan in which one norm goes with two convs, as no pass makes it."""
    plan = recorded_plans(orepa.collapse(model))[-1]
    first, second, *_ = plan.edits
    options = {**second.options, "modules": [*second.options["modules"], "norm"], "behind": "norm"}
    return Plan((first, replace(second, options=options)))


def test_a_norm_in_two_edits_is_refused() -> None:
    model = net()
    with pytest.raises(ReparamError, match=r"^norm stands in two edits of the plan: collapse of"):
        orepa.collapse(model, plan=mixed(model))


def test_one_conv_in_two_edits_of_expand_is_refused() -> None:
    model = net()
    plan = orepa.plan(model)
    twice = Plan((*plan.edits, plan.of("expand").edits[0]))
    with pytest.raises(ReparamError, match=r"^conv stands in two edits of the plan: expand of"):
        orepa.expand(model, plan=twice)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "stock": net,
    "expanded": lambda: orepa.expand(net(), where="**").eval(),
    "with norms in its branches": lambda: orepa.expand(net(), where="**", block=orepa.REPVGG),
}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_the_plans_of_the_passes_are_whole(build: Callable[[], nn.Module]) -> None:
    growth = Pipeline((Linearize(), Expand(where="**"), Squeeze()))
    with torch.no_grad():
        assert COLLAPSE.run(build())[1].edits
        assert growth.run(net())[1].of("squeeze").edits
