"""Collapse: what becomes a plain conv, what stays and why, and what is kept of the model."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d

import orepa_compiler as orepa
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture import capture
from orepa_compiler.errors import ReparamError
from orepa_compiler.passes import Collapse, is_leaf
from orepa_compiler.planning import Plan, recorded_plans
from tests.compiler_nets import (
    Branches,
    assert_same,
    bare_net,
    batch,
    branch_net,
    conv_norm,
    output,
    same_state,
    stem_net,
    train_a_step,
    untouched,
)
from tests.norms import randomise_norms


def collapse_plan(model: nn.Module) -> Plan:
    return Collapse().plan(capture(model, training=False, is_leaf=is_leaf))


def left(model: nn.Module) -> dict[str, str]:
    return {refusal.path: refusal.reason for refusal in collapse_plan(model).refusals}


def norms_of(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, _BatchNorm)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trained_block_collapses_to_the_same_function(dtype: torch.dtype) -> None:
    x = batch(dtype=dtype)
    expanded = orepa.expand(stem_net(dtype))
    for _ in range(2):
        train_a_step(expanded, x)
    with untouched(expanded):
        deployed = orepa.collapse(expanded)
    assert not deployed.training
    assert not norms_of(deployed)
    assert not any(isinstance(module, ConvBlock) for module in deployed.modules())
    assert_same(deployed(x), output(expanded, x))
    assert not torch.allclose(output(expanded, x), output(stem_net(dtype), x), rtol=1e-3)


def test_the_norms_that_a_collapse_folds_use_running_statistics_in_train_mode() -> None:
    x, net = batch(), stem_net().train()
    assert_same(orepa.collapse(net)(x), output(net, x))
    assert not torch.allclose(output(net, x), output(net, x, training=True), rtol=1e-3)


def test_fold_norm_false_gives_back_the_stock_architecture() -> None:
    x, expanded = batch(), orepa.expand(stem_net())
    train_a_step(expanded, x)
    collapsed = orepa.collapse(expanded, fold_norm=False)
    stock = stem_net()
    stock.load_state_dict(collapsed.state_dict(), strict=True)
    assert_same(output(stock, x), output(expanded, x))
    assert_same(output(stock, x, training=True), output(expanded, x, training=True))
    assert [str(m) for m in collapsed.modules()] == [str(m) for m in stock.eval().modules()]


def test_fold_norm_false_puts_an_inserted_norm_into_the_bias() -> None:
    x, expanded = batch(), orepa.expand(bare_net())
    train_a_step(expanded, x)
    stock = bare_net()
    stock.load_state_dict(orepa.collapse(expanded, fold_norm=False).state_dict(), strict=True)
    assert_same(output(stock, x), output(expanded, x))


def test_fold_norm_false_refuses_an_inserted_norm_where_the_conv_has_no_bias() -> None:
    expanded = orepa.expand(bare_net(bias=False), block=orepa.OREPA)
    with untouched(expanded), pytest.raises(ReparamError) as caught:
        orepa.collapse(expanded, fold_norm=False)
    assert str(caught.value) == (
        "conv1: its inserted norm needs a bias to go to, the original conv has none, and no "
        "BatchNorm is known to be all that reads it; use fold_norm=True"
    )


def test_fold_norm_false_refuses_linearized_blocks() -> None:
    expanded = orepa.expand(branch_net(), block=orepa.OREPA)
    with untouched(expanded), pytest.raises(ReparamError) as caught:
        orepa.collapse(expanded, fold_norm=False)
    assert str(caught.value) == (
        "first.block: its branches were linearized, so the norms they had are gone; "
        "use fold_norm=True"
    )


@pytest.mark.parametrize("build", [stem_net, bare_net, branch_net])
@pytest.mark.parametrize("fold_norm", [False, True])
def test_collapse_is_idempotent(build: Callable[[], nn.Module], fold_norm: bool) -> None:
    once = orepa.collapse(orepa.expand(build()), fold_norm=fold_norm)
    twice = orepa.collapse(once, fold_norm=fold_norm)
    assert recorded_plans(twice)[-1].edits == ()
    assert [type(m).__name__ for m in twice.modules()] == [type(m).__name__ for m in once.modules()]
    assert same_state(once, twice)
    assert twice is not once


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_is_kept_and_the_cast_is_made_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    net = randomise_norms(conv_norm(3, 6, 3)).to(dtype).eval()
    deployed = orepa.collapse(net)
    conv = deployed.get_submodule("conv")
    assert isinstance(conv, nn.Conv2d)
    exact = orepa.collapse(net.double()).get_submodule("conv")
    assert conv.bias is not None
    assert conv.weight.dtype == conv.bias.dtype == dtype
    assert torch.equal(conv.weight, exact.weight.to(dtype))  # type: ignore[operator, arg-type]


@pytest.mark.parametrize("expands", [False, True])
def test_channels_last_is_kept(expands: bool) -> None:
    net = stem_net().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    net = orepa.expand(net) if expands else net
    deployed = orepa.collapse(net)
    for name in ("stem", "conv"):
        weight = deployed.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    plain = orepa.collapse(stem_net()).get_submodule("stem").weight
    assert isinstance(plain, Tensor)
    assert plain.is_contiguous()


@pytest.mark.parametrize("expands", [False, True])
def test_requires_grad_is_kept(expands: bool) -> None:
    net = stem_net()
    for module in (net.conv, net.norm2):
        module.requires_grad_(False)
    net = orepa.expand(net) if expands else net  # type: ignore[assignment]
    deployed = orepa.collapse(net)
    frozen = {name for name, p in deployed.named_parameters() if not p.requires_grad}
    assert frozen == {"conv.weight", "conv.bias"}
    assert all(p.is_leaf for p in deployed.parameters())


def test_no_buffers_are_left_over() -> None:
    deployed = orepa.collapse(orepa.expand(stem_net()))
    assert dict(deployed.named_buffers()) == {}


class Owner(nn.Module):
    """A sum of branches, whose owner the user knows by its class and its hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Branches(3, 6), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def test_the_owner_of_a_sum_keeps_its_class_name_and_hooks() -> None:
    net, x = randomise_norms(Owner().double()), batch()
    seen: list[tuple[str, torch.Size]] = []
    net.get_submodule("body").register_forward_hook(
        lambda module, args, y: seen.append((type(module).__name__, y.shape))
    )
    deployed = orepa.collapse(net)
    body = deployed.get_submodule("body")
    assert type(body).__name__ == "Branches"
    assert type(deployed) is Owner
    assert isinstance(body, torch.fx.GraphModule)
    y = deployed(x)
    assert seen == [("Branches", torch.Size([4, 6, 10, 10]))]
    assert_same(y, output(net, x))
    assert sum(isinstance(m, nn.Conv2d) for m in deployed.modules()) == 2


class TwoSums(nn.Module):
    """Two sums of branches in one forward, the second reading the first."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([conv_norm(3, 3, k, padding=k // 2) for k in (3, 1, 3, 1)])
        self.relu = nn.ReLU()
        self.note = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d = self.parts
        x = self.relu(a(x) + b(x)) * self.note
        return self.relu(c(x) + d(x) + x)


def test_a_copy_of_the_collapsed_model_keeps_them_too() -> None:
    net = randomise_norms(Owner().double())
    seen: list[str] = []
    body = net.get_submodule("body")
    body.register_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    twice = orepa.collapse(copy.deepcopy(orepa.collapse(net)))
    twice(batch())
    assert seen == ["Branches"]


def test_the_collapsed_model_can_be_pickled() -> None:
    deployed = orepa.collapse(branch_net())
    restored = pickle.loads(pickle.dumps(deployed))
    assert torch.equal(restored(batch()), deployed(batch()))


def test_two_sums_in_one_forward() -> None:
    net, x = randomise_norms(TwoSums().double()), batch()
    deployed = orepa.collapse(net)
    assert sum(isinstance(m, nn.Conv2d) for m in deployed.modules()) == 2
    assert not norms_of(deployed)
    assert "note" in dict(deployed.named_parameters())
    assert_same(deployed(x), output(net, x))


class Dropping(nn.Module):
    """A sum of branches in a forward that asks for its mode."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = conv_norm(3, 6, 3, padding=1), conv_norm(3, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.large(x) + self.small(x), 0.5, self.training)
        return y * 100 if self.training else y


def test_a_forward_that_asks_for_its_mode_is_collapsed_as_it_is_in_eval_mode() -> None:
    net, x = randomise_norms(Dropping().double()).train(), batch()
    deployed = orepa.collapse(net)
    assert sum(isinstance(m, nn.Conv2d) for m in deployed.modules()) == 1
    assert_same(deployed(x), output(net, x))


def test_a_norm_with_an_activation_leaves_its_activation() -> None:
    norm = BatchNormAct2d(6, act_layer=nn.SiLU)
    net = randomise_norms(nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 4, 1)).double())
    x, deployed = batch(), orepa.collapse(net)
    assert [type(module).__name__ for module in deployed.children()] == [  # type: ignore[attr-defined]
        "Conv2d",
        "SiLU",
        "Conv2d",
    ]
    assert_same(deployed(x), output(net, x))


class SumAndActivation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.norm = BatchNormAct2d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.large(x) + self.small(x))


def test_a_norm_with_an_activation_behind_a_sum() -> None:
    net, x = randomise_norms(SumAndActivation().double()), batch()
    deployed = orepa.collapse(net)
    assert [type(m).__name__ for m in deployed.modules()][2:] == ["Conv2d", "ReLU"]
    assert_same(deployed(x), output(net, x))


FOLDED: dict[str, Callable[[], nn.Module]] = {
    "SyncBatchNorm": lambda: nn.SyncBatchNorm(6),
    "frozen": lambda: FrozenBatchNorm2d(6),
    "not affine": lambda: nn.BatchNorm2d(6, affine=False),
    "large eps": lambda: nn.BatchNorm2d(6, eps=0.3),
    "no momentum": lambda: nn.BatchNorm2d(6, momentum=None),
}


@pytest.mark.parametrize("norm", FOLDED.values(), ids=FOLDED)
def test_norms_that_are_folded(norm: Callable[[], nn.Module]) -> None:
    net, x = randomise_norms(nn.Sequential(nn.Conv2d(3, 6, 3), norm()).double().eval()), batch()
    expected = output(net, x)
    assert not torch.allclose(expected, net[0](x), rtol=1e-2)  # type: ignore[index]
    deployed = orepa.collapse(net)
    assert [type(m).__name__ for m in deployed.children()] == ["Conv2d", "Identity"]
    assert_same(deployed(x), expected)


@pytest.mark.parametrize(("rank", "conv"), [(1, nn.Conv1d), (3, nn.Conv3d)])
def test_a_synchronized_norm_has_the_rank_of_its_conv(rank: int, conv: type[nn.Module]) -> None:
    net = randomise_norms(nn.Sequential(conv(3, 6, 3), nn.SyncBatchNorm(6)).double().eval())
    x = torch.randn(2, 3, *(6,) * rank, dtype=torch.float64)
    deployed = orepa.collapse(net)
    assert [type(m).__name__ for m in deployed.children()] == [conv.__name__, "Identity"]
    assert_same(deployed(x), output(net, x))


class Shared(nn.Module):
    """Two convs whose outputs meet in one norm, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.norm = (
            nn.Conv2d(3, 3, 1),
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv2(self.norm(self.conv1(x)).relu())).relu()


def hooked(name: str) -> nn.Module:
    net = conv_norm(3, 6, 3)
    net.get_submodule(name).register_forward_hook(lambda module, args, y: None)
    return net


class TwoReaders(nn.Module):
    """A conv whose output another layer reads beside the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.norm(y) + y.relu()


def norm_first() -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, padding=1))


def untracked() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False))


def made_weight() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.BatchNorm2d(6))


HOOK = "it has a hook, which a rewrite would no longer call; remove the hook first"
LEFT: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "hook on the norm": (lambda: hooked("norm"), "norm", HOOK),
    "hook on the conv": (lambda: hooked("conv"), "norm", f"conv, which feeds it, stays: {HOOK}"),
    "made weight": (
        made_weight,
        "1",
        "0, which feeds it, stays: its weight is parametrized; call "
        "torch.nn.utils.parametrize.remove_parametrizations first",
    ),
    "shared": (
        Shared,
        "norm",
        "it is called 2 times, so what follows it is not one thing",
    ),
    "two readers": (
        TwoReaders,
        "norm",
        "no conv alone feeds it: what conv gives is read elsewhere too",
    ),
    "no running statistics": (
        untracked,
        "1",
        "BatchNorm2d keeps no running statistics (track_running_stats=False), "
        "so it is not affine in eval mode",
    ),
}


@pytest.mark.parametrize(("build", "path", "text"), LEFT.values(), ids=LEFT)
def test_norms_that_stay_and_why(build: Callable[[], nn.Module], path: str, text: str) -> None:
    net, x = randomise_norms(build().double().eval()), batch()
    assert left(net) == {path: text}
    deployed = orepa.collapse(net)
    assert norms_of(deployed) == [path]
    assert_same(deployed(x), output(net, x))
    assert recorded_plans(deployed)[-1].refusals[0].reason == text


def test_a_norm_before_a_padded_conv_stays() -> None:
    net, x = randomise_norms(norm_first().double().eval()), batch()
    deployed = orepa.collapse(net)
    assert norms_of(deployed) == ["0"]
    assert_same(deployed(x), output(net, x))
    assert left(net)["0"] == "no conv alone feeds it"  # but the input
    assert left(net)["1"].startswith("border: the first conv has a bias")


def test_convs_are_joined_only_where_that_costs_no_more() -> None:
    cheap = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 64, 1)).double().eval()
    kept = orepa.collapse(cheap)
    assert sum(isinstance(m, nn.Conv2d) for m in kept.modules()) == 2
    narrow = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 4, 1)).double().eval()
    joined = orepa.collapse(narrow)
    assert sum(isinstance(m, nn.Conv2d) for m in joined.modules()) == 1
    x = batch()
    assert_same(joined(x), narrow(x))


def test_a_hook_on_a_block_is_not_lost() -> None:
    expanded, x = orepa.expand(stem_net()), batch()
    seen: list[int] = []
    expanded.get_submodule("conv").register_forward_hook(lambda m, args, y: seen.append(1))
    made = collapse_plan(expanded)
    assert ("conv", HOOK) in [(refusal.path, refusal.reason) for refusal in made.refusals]
    deployed = orepa.collapse(expanded)
    seen.clear()
    deployed(x)
    assert seen == [1]
    assert_same(deployed(x), output(expanded, x))


def test_a_plan_for_another_model_is_refused() -> None:
    made = recorded_plans(orepa.collapse(branch_net()))[0]
    for other in (stem_net(), bare_net()):
        with untouched(other), pytest.raises(ReparamError, match="the plan does not fit"):
            orepa.collapse(other, plan=made)


def test_a_plan_is_replayed_on_its_own_model() -> None:
    x, net = batch(), branch_net()
    made = recorded_plans(orepa.collapse(net))[0]
    assert_same(orepa.collapse(net, plan=Plan.from_json(made.to_json()))(x), output(net, x))


def test_a_real_net_with_a_trained_block() -> None:
    net = timm.create_model("test_resnet").double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expanded = orepa.expand(randomise_norms(net))
    train_a_step(expanded, x)
    deployed = orepa.collapse(expanded)
    assert not norms_of(deployed)
    assert_same(deployed(x), output(expanded, x))
    stock = timm.create_model("test_resnet").double()
    stock.load_state_dict(orepa.collapse(expanded, fold_norm=False).state_dict(), strict=True)
    assert_same(output(stock, x), output(expanded, x))


class AddsInPlace(nn.Module):
    """Another name still holds the input when the sum is written over it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1.0
        before = x
        x += self.norm(self.conv(x))
        return x * before


def test_a_sum_written_over_its_input_keeps_its_meaning() -> None:
    net = randomise_norms(AddsInPlace()).double().eval()
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(orepa.collapse(net)(x), net(x), rtol=0, atol=1e-12)


def test_a_block_under_two_names_collapses_under_both() -> None:
    net = orepa.expand(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    net.add_module("again", net[0])
    deploy = orepa.collapse(net, fold_norm=False)
    assert type(deploy[0]) is nn.Conv2d
    assert deploy[0] is deploy.again


def test_a_hook_on_an_inserted_norm_keeps_the_block() -> None:
    net = orepa.expand(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), block=orepa.OREPA)
    net[0].norm.register_forward_hook(lambda module, args, output: None)
    deploy = orepa.collapse(net)
    assert deploy[0].norm is not None
    assert "it has a hook" in recorded_plans(deploy)[-1].refusals[0].reason
