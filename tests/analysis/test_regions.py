"""Which parts of a forward are one convolution, and why others are not."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from orepa_compiler.analysis.regions import Interpreter, Region
from orepa_compiler.capture import capture
from orepa_compiler.errors import ReparamError
from orepa_compiler.passes import is_leaf
from tests.compiler_nets import Inline
from tests.convolution_reference import assert_same, reference
from tests.norms import randomise_norms
from tests.operator_factories import random_tensor


def conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*(args or (4, 4, 3)), **{"padding": 1, "bias": False} | kwargs)


def point(*args: Any, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(*(args or (4, 4)), 1, **{"bias": False} | kwargs)


def norm() -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4)


def interpreted(model: nn.Module) -> Interpreter:
    """The model in float64 with random norms, read with its values."""
    randomise_norms(model.double().eval())
    found = capture(model, training=False, is_leaf=is_leaf)
    return Interpreter(found, model.get_submodule)


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


def names(interpreter: Interpreter) -> list[tuple[str, list[str]]]:
    return [(region.owner, region.node_names) for region in interpreter.regions()]


def reasons(interpreter: Interpreter) -> list[str]:
    interpreter.regions()
    return list(interpreter.reasons.values())


def only(interpreter: Interpreter) -> Region:
    (region,) = interpreter.regions()
    return region


def assert_region_is(model: nn.Module, expected_names: list[str], owner: str = "") -> Region:
    """The model is one region, and its operator computes what the model does."""
    region = only(interpreted(model))
    assert (region.owner, region.node_names) == (owner, expected_names)
    assert region.value.operator is not None
    x = random_tensor(2, region.value.operator.in_channels, 9, 8)
    with torch.no_grad():
        assert_same(reference(region.value.operator, x), model(x))
    return region


def rep(m: Any, x: Tensor) -> Tensor:
    return m.norm3(m.conv3(x)) + m.norm1(m.conv1(x)) + m.norm0(x)


def rep_layers() -> dict[str, nn.Module]:
    return {"conv3": conv(), "norm3": norm(), "conv1": point(), "norm1": norm(), "norm0": norm()}


ONE_REGION: dict[str, tuple[Callable[[], nn.Module], list[str], bool]] = {
    "conv - norm": (lambda: chain(conv(), norm()), ["_0", "_1"], True),
    "with bias, stride": (
        lambda: chain(conv(bias=True, stride=2), norm()),
        ["_0", "_1"],
        True,
    ),
    "idle layers between": (
        lambda: chain(nn.Identity(), conv(), nn.Dropout(), norm()),
        ["_0", "_1", "_2", "_3"],
        True,
    ),
    "norm - unpadded conv": (lambda: chain(norm(), conv(padding=0)), ["_0", "_1"], True),
    "two norms": (lambda: chain(conv(), norm(), norm()), ["_0", "_1", "_2"], True),
    "1x1 - 1x1 that shrinks": (
        lambda: chain(point(8, 2), point(2, 1)),
        ["_0", "_1"],
        True,
    ),
    "a stride that drops most of the first conv's work": (
        lambda: chain(conv(4, 1, 3), point(1, 4, stride=2)),
        ["_0", "_1"],
        True,
    ),
    "1x1 - 3x3 with the same width": (lambda: chain(point(), conv()), ["_0", "_1"], True),
    "three branches": (
        lambda: Inline(rep, **rep_layers()),
        ["conv3", "norm3", "conv1", "norm1", "add", "norm0", "add_1"],
        False,
    ),
    "input first": (
        lambda: Inline(lambda m, x: x + m.conv(x), conv=conv()),
        ["conv", "add"],
        False,
    ),
    "input twice": (
        lambda: Inline(lambda m, x: x + (m.conv(x) + x), conv=conv()),
        ["conv", "add", "add_1"],
        False,
    ),
    "torch.add": (
        lambda: Inline(lambda m, x: torch.add(m.conv(x), x), conv=conv()),
        ["conv", "add"],
        False,
    ),
    "add method": (
        lambda: Inline(lambda m, x: m.conv(x).add(m.point(x)), conv=conv(), point=point()),
        ["conv", "point", "add"],
        False,
    ),
    "sum() begins with 0": (
        lambda: Inline(lambda m, x: sum([m.conv(x), m.point(x), x]), conv=conv(), point=point()),
        ["conv", "point", "add", "add_1", "add_2"],
        False,
    ),
    "norm behind the sum": (
        lambda: Inline(
            lambda m, x: m.norm(m.conv(x) + m.point(x)), conv=conv(), point=point(), norm=norm()
        ),
        ["conv", "point", "add", "norm"],
        False,
    ),
    "a number added": (
        lambda: Inline(lambda m, x: m.conv(x) + 1, conv=conv()),
        ["conv", "add"],
        False,
    ),
    "scaled sum": (
        lambda: Inline(lambda m, x: torch.add(m.conv(x), x, alpha=2), conv=conv()),
        ["conv", "add"],
        False,
    ),
    "the input, scaled": (
        lambda: Inline(lambda m, x: m.conv(x) + m.point(x * 2), conv=conv(), point=point()),
        ["conv", "mul", "point", "add"],
        False,
    ),
    "branches that cost more apart from the sum": (
        lambda: Inline(
            lambda m, x: m.conv(x) + m.point(m.depthwise(x)),
            conv=conv(),
            depthwise=conv(groups=4),
            point=point(),
        ),
        ["conv", "depthwise", "point", "add"],
        False,
    ),
    "input added in place": (
        lambda: Inline(lambda m, x: m.conv(x).add_(x), conv=conv()),
        ["conv", "add_"],
        False,
    ),
}


@pytest.mark.parametrize(("make", "nodes", "is_path"), ONE_REGION.values(), ids=ONE_REGION)
def test_one_region(make: Callable[[], nn.Module], nodes: list[str], is_path: bool) -> None:
    region = assert_region_is(make(), nodes)
    assert region.is_path is is_path
    assert region.value.rest is None


APART: dict[str, tuple[Callable[[], nn.Module], list[list[str]], str]] = {
    "activation before the conv": (lambda: chain(norm(), nn.ReLU(), conv()), [], "ReLU is not"),
    "activation between": (lambda: chain(conv(), nn.ReLU(), norm()), [], "ReLU is not a known"),
    "padded conv behind a norm": (
        lambda: chain(norm(), conv()),
        [],
        "border: the first conv has a bias",
    ),
    "padded conv behind a conv": (lambda: chain(conv(4, 1, 3), conv(1, 4, 3)), [], "border: padd"),
    "conv behind a conv that would cost more": (
        lambda: chain(conv(), conv(padding=0)),
        [],
        "as one conv it would cost 400 MACs for each output position, apart it costs 288; kept",
    ),
    "depthwise - pointwise": (
        lambda: chain(conv(groups=4), point()),
        [],
        "as one conv it would cost 144 MACs for each output position, apart it costs 52; kept",
    ),
    "depthwise - norm - pointwise - norm": (
        lambda: chain(conv(groups=4), norm(), point(), norm()),
        [["_0", "_1"], ["_2", "_3"]],
        "would cost 144 MACs",
    ),
    "bottleneck": (
        lambda: chain(point(4, 1), point(1, 4)),
        [],
        "as one conv it would cost 16 MACs for each output position, apart it costs 8; kept",
    ),
    "conv with two users": (
        lambda: Inline(lambda m, x: m.norm(c := m.conv(x)) * c, conv=conv(), norm=norm()),
        [],
        "",
    ),
    "conv that is returned too": (
        lambda: Inline(lambda m, x: (m.norm(c := m.conv(x)), c), conv=conv(), norm=norm()),
        [],
        "",
    ),
    "added to itself": (lambda: Inline(lambda m, x: (c := m.conv(x)) + c, conv=conv()), [], ""),
    "two inputs": (
        lambda: Inline(lambda m, x: m.conv(x) + m.point(x * x), conv=conv(), point=point()),
        [],
        "",
    ),
    "sum of other strides": (
        lambda: Inline(lambda m, x: m.conv(x) + m.point(x), conv=conv(stride=2), point=point()),
        [],
        "cannot add strides (2, 2) and (1, 1)",
    ),
    "sum of other sizes": (
        lambda: Inline(lambda m, x: m.conv(x) + m.point(x), conv=conv(padding=0), point=point()),
        [],
        "cannot add outputs that differ by 2 pixels",
    ),
    "sum of a narrow map": (
        lambda: Inline(lambda m, x: m.conv(x) + m.point(x), conv=conv(), point=point(4, 1)),
        [],
        "cannot add convs of 4 -> 4 and 4 -> 1 channels",
    ),
    "a sum that would cost more": (
        lambda: Inline(
            lambda m, x: m.point2(x) + m.point(m.depthwise(x)),
            depthwise=conv(groups=4),
            point=point(),
            point2=point(),
        ),
        [],
        "as one conv it would cost 144 MACs for each output position, apart it costs 52; kept",
    ),
    "two branches that would cost more": (
        lambda: Inline(
            lambda m, x: m.left(x) + m.right(x),
            left=chain(conv(groups=4), point()),
            right=chain(conv(groups=4), point()),
        ),
        [],
        "as one conv it would cost 144 MACs for each output position, apart it costs 52; kept",
    ),
    "sum written over the input": (
        lambda: Inline(lambda m, x: x.add_(m.conv(x)), conv=conv()),
        [],
        "",
    ),
    "norm without statistics": (
        lambda: chain(conv(), nn.BatchNorm2d(4, track_running_stats=False)),
        [],
        "BatchNorm2d keeps no running statistics",
    ),
    "a group norm": (lambda: chain(conv(), nn.GroupNorm(2, 4)), [], "GroupNorm is not a known"),
    "called twice": (
        lambda: Inline(lambda m, x: m.norm(m.conv(m.conv(x))), conv=conv(), norm=norm()),
        [],
        "it is called 2 times",
    ),
    "the same without a stride": (
        lambda: chain(conv(4, 1, 3), point(1, 4)),
        [],
        "as one conv it would cost 144 MACs for each output position, apart it costs 40; kept",
    ),
}


@pytest.mark.parametrize(("make", "nodes", "reason"), APART.values(), ids=APART)
def test_kept_apart(make: Callable[[], nn.Module], nodes: list[list[str]], reason: str) -> None:
    interpreter = interpreted(make())
    assert names(interpreter) == [("", part) for part in nodes]
    assert any(reason in text for text in ["", *reasons(interpreter)])
    if not reason:
        assert not interpreter.reasons or "called" not in str(interpreter.reasons)


def test_a_hook_on_a_norm_keeps_it() -> None:
    model = chain(conv(), norm(), norm())
    model[2].register_forward_hook(lambda *args: None)
    interpreter = interpreted(model)
    assert names(interpreter) == [("", ["_0", "_1"])]
    assert interpreter.reasons["", "_2"].startswith("it has a hook")


def test_a_container_of_nothing_is_no_layer() -> None:
    assert not interpreted(chain(conv(), chain(nn.Identity()))).regions()
    assert interpreted(chain(conv(), chain(norm()))).regions()


def test_dropout_in_train_mode_is_not_idle() -> None:
    model = chain(conv(), nn.Dropout(), norm())
    found = capture(model, training=True, is_leaf=is_leaf)
    assert not Interpreter(found, found.module).regions()
    found = capture(model, training=False, is_leaf=is_leaf)
    assert len(Interpreter(found, found.module).regions()) == 1


def test_a_norm_with_activation_ends_its_region() -> None:
    model = chain(conv(), BatchNormAct2d(4), norm())
    region = only(interpreted(model))
    assert region.node_names == ["_0", "_1"]
    assert isinstance(region.value.rest, nn.ReLU)
    x = random_tensor(1, 4, 6, 6)
    with torch.no_grad():
        assert region.value.operator is not None
        assert_same(reference(region.value.operator, x).relu(), model[:2](x))


def test_a_composite_that_is_linear_is_one_layer_outside() -> None:
    model = Inline(
        lambda m, x: m.left(x) + m.right(x),
        left=chain(conv(), norm()),
        right=chain(point(), chain(norm(), nn.Identity())),
    )
    assert_region_is(model, ["left", "right", "add"])


def test_a_composite_alone_is_found_inside() -> None:
    model = chain(chain(conv(), norm()), nn.ReLU(), chain(chain(point(), norm()), nn.ReLU()))
    assert names(interpreted(model)) == [("0", ["_0", "_1"]), ("2.0", ["_0", "_1"])]


def test_a_norm_outside_of_the_convs_composite_joins() -> None:
    assert_region_is(chain(chain(point(), nn.Identity()), norm()), ["_0", "_1"])


def test_a_composite_with_two_inputs_or_an_activation_is_not_linear() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = conv()

        def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
            return self.conv(x) if y is None else self.conv(x) + y

    interpreter = interpreted(Inline(lambda m, x: m.norm(m.two(x, x)), two=Two(), norm=norm()))
    assert not interpreter.regions()
    assert interpreter.whole("two") is None
    assert interpreted(chain(Two(), norm())).whole("0") is not None
    assert interpreted(chain(chain(conv(), nn.ReLU()), norm())).whole("0") is None
    whole = interpreted(chain(chain(conv(), norm()), nn.ReLU())).whole("0")
    assert whole is not None
    assert (whole.layers, whole.convs) == (2, 1)


def test_planning_needs_no_values_and_finds_the_same() -> None:
    model = Inline(rep, **rep_layers())
    found = capture(model, training=False, is_leaf=is_leaf)
    planned = Interpreter(found, found.module)
    assert names(planned) == names(interpreted(model))
    operator = only(planned).value.operator
    assert operator is not None
    assert operator.weight.is_meta


def test_cost_and_layers_of_a_region() -> None:
    value = only(interpreted(chain(conv(), nn.Identity(), norm()))).value
    assert (value.macs, value.layers, value.convs) == (144, 2, 1)


def test_value_of_gives_a_region_back_by_name() -> None:
    interpreter = interpreted(Inline(rep, **rep_layers()))
    region = only(interpreter)
    again = interpreter.value_of("", region.node_names)
    assert region.value.operator is not None
    assert again.operator is not None
    assert torch.equal(again.operator.weight, region.value.operator.weight)
    assert again.source.name == "x"
    part = interpreter.value_of("", ["conv3", "norm3"])
    assert [node.name for node in part.nodes] == ["conv3", "norm3"]


@pytest.mark.parametrize("nodes", [["conv3", "norm1"], ["nowhere"], ["norm3"] * 2])
def test_value_of_refuses_a_plan_that_does_not_fit(nodes: list[str]) -> None:
    model = chain(Inline(rep, **rep_layers()))
    with pytest.raises(ReparamError) as caught:
        interpreted(model).value_of("0", nodes)
    assert str(caught.value) == f"0: the plan does not fit: no region {', '.join(nodes)}"


OVERWRITTEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "by a layer": lambda m, x: ((c := m.conv(x)), (t := m.act(x)), c + m.point(x))[2] * t,
    "by a method": lambda m, x: ((c := m.conv(x)), x.mul_(2), c + m.point(x))[2],
    "by a function": lambda m, x: (
        (c := m.conv(x)),
        nn.functional.relu(x, inplace=True),
        c + m.point(x),
    )[2],
    "after its last reader": lambda m, x: ((c := m.conv(x)), (p := m.point(x)), x.mul_(2), c + p)[
        3
    ],
    "by a function that is told so by position": lambda m, x: (
        (c := m.conv(x)),
        nn.functional.relu(x, True),
        c + m.point(x),
    )[2],
    "by a function that is given it to write to": lambda m, x: (
        (c := m.conv(x)),
        torch.add(x, 1, out=x),
        c + m.point(x),
    )[2],
    "by a module": lambda m, x: ((c := m.conv(x)), (t := m.acts(x)), c + m.point(x))[2] * t,
    "by a layer that is not torch's": lambda m, x: (
        (c := m.conv(x)),
        m.halves(x),
        c + m.point(x),
    )[2],
    "through a view": lambda m, x: ((c := m.conv(x)), x.view(-1).mul_(2), c + m.point(x))[2],
    "through a view from before": lambda m, x: (
        (part := x[:, :2]),
        (c := m.conv(x)),
        part.mul_(2),
        c + m.point(x),
    )[3],
    "where it is a view": lambda m, x: (
        (view := x.view(x.shape)),
        (c := m.conv(view)),
        x.mul_(2),
        c + m.point(view),
    )[3],
    "through what a module returns": lambda m, x: (
        (same := m.nothing(x)),
        (c := m.conv(x)),
        same.mul_(2),
        c + m.point(x),
    )[3],
    "through its data": lambda m, x: ((c := m.conv(x)), x.data.mul_(2), c + m.point(x))[2],
}


class Halves(nn.Module):
    """A layer of the user's, without children, that writes over its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5)


@pytest.mark.parametrize("forward", OVERWRITTEN.values(), ids=OVERWRITTEN)
def test_an_input_that_is_overwritten_meanwhile_is_not_joined(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    layers = {
        "conv": conv(),
        "point": point(),
        "act": nn.ReLU(inplace=True),
        "acts": nn.Sequential(nn.Identity(), nn.Sequential(nn.ReLU(inplace=True))),
        "halves": Halves(),
        "nothing": nn.Sequential(nn.Sequential(), nn.Dropout()),
    }
    model = Inline(forward, **layers)
    interpreter = interpreted(model)
    assert not interpreter.regions()
    assert "its input is overwritten in place before it is done" in reasons(interpreter)


SEEN_WRITTEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "an input": lambda m, x: m.conv(x.mul_(2)),
    "a view": lambda m, x: ((y := torch.relu(x)), (z := m.conv(y.view(y.shape).mul_(2))), y * z)[2],
    "what others read": lambda m, x: ((y := torch.relu(x)), m.conv(y.mul_(2)) * y)[1],
    "what others read under another name": lambda m, x: (
        (y := torch.relu(x)),
        operator.iadd(m.same(y), m.conv(y)) * y,
    )[1],
}


@pytest.mark.parametrize("forward", SEEN_WRITTEN.values(), ids=SEEN_WRITTEN)
def test_a_layer_in_place_whose_work_is_seen_elsewhere_stays(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    assert not interpreted(Inline(forward, conv=conv(), same=nn.Identity())).regions()


def test_a_layer_in_place_whose_work_nobody_else_sees_is_joined() -> None:
    model = Inline(lambda m, x: m.conv(torch.relu(x).mul_(2)), conv=conv())
    assert only(interpreted(model)).value.layers == 2


NOT_OVERWRITTEN: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "a module writes over what it made": lambda m, x: (
        (
            (c := m.conv(x)),
            (t := m.block(x)),
            torch.relu(c + m.point(x)),
        )[2]
        * t
    ),
    "another value is written over": lambda m, x: (
        (y := torch.relu(x)),
        (c := m.conv(y)),
        x.mul_(2),
        c + m.point(y),
    )[3],
    "a part of another value is written over": lambda m, x: (
        (y := torch.relu(x)),
        (z := torch.sigmoid(x).view(-1)),
        (c := m.conv(y)),
        z.mul_(2),
        c + m.point(y),
    )[4],
}


@pytest.mark.parametrize("forward", NOT_OVERWRITTEN.values(), ids=NOT_OVERWRITTEN)
def test_what_is_written_over_elsewhere_is_no_obstacle(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    block = nn.Sequential(conv(), nn.ReLU(inplace=True))
    model = Inline(forward, conv=conv(), point=point(), block=block)
    assert only(interpreted(model)).value.convs == 2


def test_an_input_that_is_overwritten_later_is_no_obstacle() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x) + m.point(x)
        return y * m.act(x)

    model = Inline(forward, conv=conv(), point=point(), act=nn.ReLU(inplace=True))
    assert names(interpreted(model)) == [("", ["conv", "point", "add"])]
