"""Adopt: modules that collapse by a method of their own are believed after a check."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler import compiler
from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.errors import ReparamError
from orepa_compiler.passes.adopt import own_method
from tests.compiler_nets import assert_same, batch, conv_norm, output, untouched
from tests.norms import randomise_norms
from tests.own_way_nets import (
    Broken,
    Copies,
    Fuses,
    Heads,
    Nothing,
    OwnWay,
    Reparameterizes,
    Rounds,
    Switches,
    Wider,
    Wrong,
    net_of,
)


@pytest.mark.parametrize("given", [False, True], ids=["a random map", "inputs"])
@pytest.mark.parametrize("kind", [Switches, Reparameterizes, Fuses, Rounds, Copies])
def test_what_a_method_makes_is_taken_where_it_agrees(kind: type[OwnWay], given: bool) -> None:
    net, x = net_of(kind), batch()
    with untouched(net):
        deploy = orepa.collapse(net, inputs=x if given else None)
    assert not any(map(is_batch_norm, deploy.modules()))
    assert sum(isinstance(m, nn.Conv2d) for m in deploy.modules()) == 2
    assert all(p.dtype == torch.float64 and p.requires_grad for p in deploy.parameters())
    assert_same(output(deploy, x), output(net, x), 1e-6 if kind is Rounds else 1e-12)
    method = {Fuses: "fuse", Reparameterizes: "reparameterize"}.get(kind, "switch_to_deploy")
    (made,) = orepa.recorded_plans(deploy)
    edit = made.edits[0]
    assert [edit.path for edit in made.of("collapse").edits] == ["0"]
    assert (edit.done_by, edit.path, edit.before) == ("adopt", "2.0", kind.__name__)
    assert edit.after.endswith(f"by its {method}()")
    assert edit.parameters == (384, 330)
    assert not made.refusals


@pytest.mark.parametrize("given", [False, True], ids=["a random map", "inputs"])
def test_a_method_that_does_nothing_is_not_taken_and_asked_once(
    given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, asked = net_of(Nothing), []
    run = compiler.Pipeline.run

    def counted(pipeline: Any, *args: Any, **options: Any) -> Any:
        asked.append(options.get("retraces", True))
        return run(pipeline, *args, **options)

    monkeypatch.setattr(compiler.Pipeline, "run", counted)
    deploy = orepa.collapse(net, inputs=batch() if given else None)
    (made,) = orepa.recorded_plans(deploy)
    (refusal,) = made.of("adopt").refusals
    assert refusal.reason == "its switch_to_deploy() changes nothing"
    # what the passes would leave, the pass adopt, the passes
    assert asked == [False, True, True]


@pytest.mark.parametrize("given", [False, True], ids=["a random map", "inputs"])
def test_plain_tensors_have_the_type_they_had(given: bool) -> None:
    net, x = net_of(Heads).float(), batch().float()
    deploy = orepa.collapse(net, inputs=x if given else None)
    assert "adopt" in {edit.done_by for edit in orepa.recorded_plans(deploy)[0].edits}
    head = deploy.get_submodule("2.0")
    assert (head.stride.dtype, head.grid.dtype) == (torch.float32, torch.float32)
    assert given or head.grid.shape == (0,)  # what the check made is not handed out
    assert orepa.verify(net, deploy, x, stress=True)


@pytest.mark.parametrize("kind", [Copies, Broken])
def test_the_default_dtype_is_what_it_was(kind: type[OwnWay]) -> None:
    orepa.collapse(net_of(kind))
    assert torch.get_default_dtype() == torch.float32


def test_frozen_modules_stay_frozen() -> None:
    net = net_of(Switches).requires_grad_(False)
    assert not any(p.requires_grad for p in orepa.collapse(net).parameters())


REFUSED: dict[type[OwnWay], str] = {
    Broken: "its switch_to_deploy() raised ValueError: no kernel at all",
    Wider: "after its switch_to_deploy() it raises RuntimeError: Given groups=1",
}


@pytest.mark.parametrize(("kind", "text"), REFUSED.items())
def test_a_method_that_fails_is_refused(kind: type[OwnWay], text: str) -> None:
    net = net_of(kind)
    deploy = orepa.collapse(net)
    assert_same(output(deploy, batch()), output(net, batch()), 1e-12)
    (refusal,) = [r for r in orepa.recorded_plans(deploy)[-1].refusals if r.done_by == "adopt"]
    assert refusal.path == "2.0"
    assert refusal.reason.startswith(text)


@pytest.mark.parametrize("given", [False, True], ids=["a random map", "inputs"])
def test_a_method_that_gives_other_outputs_is_refused_with_the_numbers(given: bool) -> None:
    net, x = net_of(Wrong), batch()
    deploy = orepa.collapse(net, inputs=x if given else None)
    assert isinstance(deploy.get_submodule("2.0"), Wrong)
    assert_same(output(deploy, x), output(net, x), 1e-12)
    (refusal,) = [r for r in orepa.recorded_plans(deploy)[-1].refusals if r.done_by == "adopt"]
    head, _, tail = refusal.reason.partition("relative error ")
    assert head == "its switch_to_deploy() gives other outputs: "
    assert 1e-3 < float(tail.partition(",")[0]) < 10
    assert tail.partition(", ")[2] == "allowed 1e-05; kept as it is"


class FoldsAhead(nn.Module):
    """Its norm goes into the conv behind it, by a method that writes into that conv's tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.mlp = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(self.norm(x))
        return x.mean() + y

    def reparameterize(self) -> None:
        scale = self.norm.weight / (self.norm.running_var + self.norm.eps).sqrt()
        shift = self.norm.bias - self.norm.running_mean * scale
        conv = self.mlp[0]
        conv.bias.data += conv.weight.data[..., 0, 0] @ shift
        conv.weight.data *= scale.reshape(1, -1, 1, 1)
        self.norm = nn.Identity()


@pytest.mark.parametrize("shared", [False, True])
def test_a_method_finds_plain_convs_in_the_place_of_blocks(shared: bool) -> None:
    net = nn.Sequential(conv_norm(3, 3, 3), FoldsAhead()).double()
    randomise_norms(net)
    if shared:
        net[-1].again = net[-1].mlp[0]
    expanded = orepa.expand(net.eval(), where="**", block=orepa.OREPA_1X1).eval()
    randomise_norms(expanded)
    assert isinstance(expanded[-1].mlp[0], ConvBlock)
    deploy = orepa.collapse(expanded)
    assert not any(isinstance(m, (nn.BatchNorm2d, ConvBlock)) for m in deploy.modules())
    assert not shared or deploy[-1].again is deploy[-1].mlp[0]
    assert_same(output(deploy, batch()), output(expanded, batch()), 1e-12)


class TwoInputs(Switches):
    """No single map is enough to run it."""

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = TwoInputs(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x, gate=x.mean((2, 3), keepdim=True))
        return y


def test_inputs_show_how_a_module_is_called() -> None:
    net, x = randomise_norms(Gated().double()), batch()
    deploy = orepa.collapse(net, inputs=x)
    assert isinstance(deploy.get_submodule("block.one"), nn.Conv2d)
    assert_same(output(deploy, x), output(net, x), 1e-12)
    kept = orepa.collapse(net)
    (refusal,) = [r for r in orepa.recorded_plans(kept)[-1].refusals if r.done_by == "adopt"]
    assert refusal.reason == (
        "its switch_to_deploy() cannot be checked: it runs on no random map; give inputs="
    )


class Single(Switches):
    """A forward that runs in float32 alone."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x, torch.zeros(x.shape[-1], x.shape[-1]))


def test_a_module_that_does_not_run_in_float64() -> None:
    net, x = nn.Sequential(Single(3)), batch(dtype=torch.float32)
    deploy = orepa.collapse(net, inputs=x)
    assert_same(output(deploy, x), output(net, x))
    (refusal,) = [r for r in orepa.recorded_plans(deploy)[-1].refusals if r.done_by == "adopt"]
    assert refusal.reason.startswith("its switch_to_deploy() cannot be checked in float64: ")


def test_inputs_that_the_model_does_not_take() -> None:
    with pytest.raises(ReparamError, match="the model raised at batch 0"):
        orepa.collapse(net_of(Switches), inputs=torch.zeros(1, 5, 4, 4, dtype=torch.float64))


def test_a_module_with_a_hook_keeps_its_method_uncalled() -> None:
    net = net_of(Switches)
    net.get_submodule("2.0.large.conv").register_forward_hook(lambda *_: None)
    deploy = orepa.collapse(net)
    (refusal,) = [r for r in orepa.recorded_plans(deploy)[-1].refusals if r.done_by == "adopt"]
    assert refusal.reason.startswith("it has a hook")


@pytest.mark.parametrize("build", [lambda: net_of(Fuses), lambda: Gated().double()])
def test_a_checkpoint_rebuilds_what_was_adopted(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    net, x = randomise_norms(build()), batch()
    deploy = orepa.collapse(net, inputs=x)
    assert not any(map(is_batch_norm, deploy.modules()))
    restored = orepa.load(build(), orepa.save(deploy, tmp_path / "deploy.safetensors"))
    assert_same(output(restored, x), output(deploy, x), 1e-12)


class Known(nn.Module):
    """RepVGG's sum as the analysis reads it; its own method must not be needed."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = conv_norm(3, 3, 3, padding=1), conv_norm(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.large(x) + self.small(x))

    def switch_to_deploy(self) -> None:
        raise AssertionError("the analysis comes first")


def test_the_analysis_comes_first() -> None:
    net, x = randomise_norms(Known().double()), batch()
    deploy = orepa.collapse(net)
    assert_same(output(deploy, x), output(net, x), 1e-12)
    (plan,) = orepa.recorded_plans(deploy)
    assert [edit.done_by for edit in plan.edits] == ["collapse"]


def test_norms_stay_where_they_are_asked_to() -> None:
    net = orepa.expand(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), Switches(6)))
    kept: Any = orepa.collapse(net, fold_norm=False)
    assert isinstance(kept[2], Switches)
    assert kept[2].one is None


class Inner(nn.Module):
    """A method that leaves a conv and a norm apart, for the analysis to fold."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Leaves(3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.block(x))


class Leaves(OwnWay):
    def fuse(self) -> nn.Module:
        norm = nn.BatchNorm2d(3)
        norm.running_mean.fill_(0.5)  # type: ignore[union-attr]
        conv = self.convert()
        with torch.no_grad():
            conv.weight.mul_((1 + norm.eps) ** 0.5)
            conv.bias.mul_((1 + norm.eps) ** 0.5).add_(0.5)  # type: ignore[union-attr]
        return nn.Sequential(conv, norm, nn.ReLU())


def test_what_a_method_leaves_is_collapsed_then() -> None:
    net, x = randomise_norms(Inner().double()), batch()
    deploy = orepa.collapse(copy.deepcopy(net))
    assert not any(map(is_batch_norm, deploy.modules()))
    assert_same(output(deploy, x), output(net, x), 1e-6)
    assert [edit.done_by for edit in orepa.recorded_plans(deploy)[-1].edits] == [
        "adopt",
        "collapse",
    ]


class Around(nn.Module):
    """A module around one with a method, and a method of its own that is not needed."""

    def __init__(self, kind: type[OwnWay]) -> None:
        super().__init__()
        self.block = kind(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block(x)
        return y

    def switch_to_deploy(self) -> None:
        self.block = nn.Identity()  # type: ignore[assignment]


@pytest.mark.parametrize("kind", [Switches, Wrong])
def test_the_innermost_module_is_asked_and_none_around_one_that_is_refused(
    kind: type[OwnWay],
) -> None:
    net, x = randomise_norms(Around(kind).double()), batch()
    deploy = orepa.collapse(net)
    assert_same(output(deploy, x), output(net, x), 1e-12)
    made = orepa.recorded_plans(deploy)[-1].of("adopt")
    found = [part.path for part in (*made.edits, *made.refusals)]
    assert found == ["block"]


class Half(Around):
    """A method that folds a norm of its own, beside a block that has another method."""

    def __init__(self) -> None:
        super().__init__(Switches)
        self.head: nn.Module = Hidden(3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(super().forward(x))
        return y

    def switch_to_deploy(self) -> None:
        self.head = self.head.plain()  # type: ignore[operator]


class Hidden(OwnWay):
    def plain(self) -> nn.Module:
        return nn.Sequential(self.convert(), nn.ReLU())


def test_modules_around_are_asked_when_work_is_left() -> None:
    net, x = randomise_norms(Half().double()), batch()
    deploy = orepa.collapse(net)
    assert not any(map(is_batch_norm, deploy.modules()))
    assert_same(output(deploy, x), output(net, x), 1e-12)
    made = orepa.recorded_plans(deploy)[-1].of("adopt")
    assert [edit.path for edit in made.edits] == ["block", ""]


class NoMethods(nn.Module):
    """What has the names of such methods, and is none of them: a layer, and one with arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.fuse = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
        self.seen = 0

    def reparameterize(self, weights: Tensor) -> Tensor:
        raise AssertionError("not called")

    def forward(self, x: Tensor) -> Tensor:
        return self.fuse(x)


def test_what_has_the_name_of_a_method_and_is_none_is_not_called() -> None:
    assert own_method(NoMethods()) is None
    assert own_method(Switches(4)) == "switch_to_deploy"
    assert [plan.refusals for plan in orepa.recorded_plans(orepa.collapse(NoMethods().eval()))] == [
        ()
    ]
