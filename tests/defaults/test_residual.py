"""Which nets have residual connections, and what block="auto" makes of the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture import Capture, capture
from orepa_compiler.defaults.residual import is_summed, residual_reason
from orepa_compiler.passes import is_leaf
from tests.compiler_nets import Branches, Inline, branch_net


def captured(model: nn.Module) -> Capture:
    return capture(model, training=True, is_leaf=is_leaf)


def vision(name: str) -> Callable[[], nn.Module]:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return lambda: torchvision.models.get_model(name, **options)


MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "resnet18": (vision("resnet18"), True),
    "mobilenet_v2": (vision("mobilenet_v2"), True),
    "densenet121": (vision("densenet121"), True),  # its concatenations cross activations
    "shufflenet_v2_x0_5": (vision("shufflenet_v2_x0_5"), True),
    "inception_v3": (vision("inception_v3"), True),  # pooled maps pass by convs that halve
    "ese_vovnet19b_slim": (lambda: timm.create_model("ese_vovnet19b_slim"), True),  # not known
    "vgg11": (vision("vgg11"), False),
    "vgg11_bn": (vision("vgg11_bn"), False),
    "alexnet": (vision("alexnet"), False),
    "squeezenet1_1": (vision("squeezenet1_1"), False),
    "googlenet": (vision("googlenet"), False),  # each path of an inception has its activation
    "mobilenetv1_100": (lambda: timm.create_model("mobilenetv1_100"), False),
    "repvgg_a0": (lambda: timm.create_model("repvgg_a0"), False),
    "mobileone_s0": (lambda: timm.create_model("mobileone_s0"), False),
}


@pytest.mark.parametrize(("build", "is_residual"), MODELS.values(), ids=MODELS)
def test_models(build: Callable[[], nn.Module], is_residual: bool) -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = build()
    assert (residual_reason(captured(model)) is not None) == is_residual


def net(forward: Callable[..., object], **layers: nn.Module) -> Inline:
    given = {name: nn.Conv2d(4, 4, 3, padding=1) for name in ("first", "second", "third")}
    return Inline(forward, **given, relu=nn.ReLU(), norm=nn.BatchNorm2d(4), **layers)


class Swish(nn.Module):
    """An activation that nothing but its forward tells."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.exp()


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, self.conv(x)


SUMS = "adds what passed an activation"
UNKNOWN = "is not known"
NETS: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "a path": (lambda: net(lambda n, x: n.second(n.relu(n.first(x)))), None),
    "a residual": (lambda: net(lambda n, x: x + n.second(n.relu(n.first(x)))), SUMS),
    "by a projection": (
        lambda: net(lambda n, x: n.norm(n.third(x)) + n.second(n.relu(n.first(x)))),
        SUMS,
    ),
    "a difference": (lambda: net(lambda n, x: x - n.relu(n.first(x))), SUMS),
    "in place": (lambda: net(lambda n, x: n.relu(n.first(x)).add_(x)), SUMS),
    "functional": (lambda: net(lambda n, x: torch.add(torch.relu(n.first(x)), x)), SUMS),
    "a concatenation": (lambda: net(lambda n, x: torch.cat([x, n.relu(n.first(x))], 1)), SUMS),
    "branches": (lambda: net(lambda n, x: n.relu(n.norm(n.first(x)) + n.second(x) + x)), None),
    "paths that are active each": (
        lambda: net(lambda n, x: n.relu(n.first(x)) + n.relu(n.second(n.relu(n.third(x))))),
        None,
    ),
    "a gate": (lambda: net(lambda n, x: x * torch.sigmoid(n.first(x))), None),
    "an attention that is added": (
        lambda: net(lambda n, x: x + n.gate(n.first(x)), gate=nn.Sigmoid()),
        SUMS,
    ),
    "an activation in a norm": (
        lambda: net(lambda n, x: x + n.second(n.act(n.first(x))), act=BatchNormAct2d(4)),
        SUMS,
    ),
    "an activation of the user's own": (
        lambda: net(lambda n, x: x + n.second(n.act(n.first(x))), act=Swish()),
        SUMS,
    ),
    "the user's own by the way": (
        lambda: net(lambda n, x: n.act(x) + n.second(n.relu(n.first(x))), act=Swish()),
        SUMS,
    ),
    "a constant is no path": (
        lambda: net(lambda n, x: n.first(n.act(x) + n.first.bias.sum()) * n.second(x), act=Swish()),
        None,
    ),
    "a tuple": (lambda: net(lambda n, x: n.relu((y := n.pair(x))[0] + y[1]), pair=Pair()), UNKNOWN),
    "by the value": (lambda: net(lambda n, x: n.first(x) if x.sum() > 0 else x), UNKNOWN),
    "across modules": (
        lambda: net(lambda n, x: n.tail(x) + x, tail=nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())),
        SUMS,
    ),
    "a size": (
        lambda: net(lambda n, x: n.relu(n.first(x)).reshape(x.size(0) + 0, -1)),
        None,
    ),
}


@pytest.mark.parametrize(("build", "text"), NETS.values(), ids=NETS)
def test_rules(build: Callable[[], nn.Module], text: str | None) -> None:
    reason = residual_reason(captured(build()))
    assert (reason is None) == (text is None), reason
    assert text is None or (reason or "").endswith(text)


def test_where_the_connection_is() -> None:
    (build, _) = NETS["a residual"]
    assert residual_reason(captured(build())) == "add in the model adds what passed an activation"
    (build, _) = NETS["a tuple"]
    assert residual_reason(captured(build())) == "the dataflow in pair is not known"
    assert residual_reason(captured(branch_net())) is None


def test_branches_of_a_linear_sum() -> None:
    model = captured(nn.Sequential(Branches(4, 4), nn.Conv2d(4, 4, 3), nn.ReLU()))
    assert is_summed(model, "0.large.conv")
    assert is_summed(model, "0.small.conv")
    assert not is_summed(model, "1")
    last = captured(NETS["paths that are active each"][0]())
    assert not is_summed(last, "first")


def blocks(model: nn.Module) -> dict[str, str]:
    return {p: m.block_name for p, m in model.named_modules() if isinstance(m, ConvBlock)}


class Path(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
            *(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)),
        )


NOTE = "residual-free net"


def test_auto_gives_a_residual_free_net_explicit_branches_and_says_so() -> None:
    model = Path()
    expected = {"0": "OREPA_VGG", "3": "OREPA_VGG", "5": "OREPA_1X1"}
    assert blocks(orepa.expand(model)) == expected
    notes = {edit.path: edit.note for edit in orepa.plan(model).of("expand").edits}
    assert notes == {"0": NOTE, "3": NOTE, "5": ""}
    named = orepa.plan(model, block=orepa.OREPA_VGG).of("expand").edits
    assert [edit.note for edit in named] == ["", ""]


def test_auto_keeps_kernels_online_where_norms_are_not_wanted_or_do_not_fit() -> None:
    model = Path()
    assert blocks(orepa.expand(model, post_norm="none"))["3"] == "OREPA"
    model[0].weight.requires_grad_(False)  # its norms would go on moving
    assert blocks(orepa.expand(model)) == {"0": "OREPA", "3": "OREPA_VGG", "5": "OREPA_1X1"}
    twice = net(lambda n, x: n.norm(n.first(n.relu(n.norm(n.first(x))))))
    assert blocks(orepa.expand(twice, where="first")) == {"first": "OREPA"}


def test_auto_leaves_the_explicit_branches_of_repvgg_their_own() -> None:
    assert set(blocks(orepa.expand(branch_net())).values()) == {"OREPA", "OREPA_1X1"}
