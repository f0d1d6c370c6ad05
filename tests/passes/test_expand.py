"""Expand: which convs get a block, what they start from, and why the others are left alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrizations, prune

import orepa_compiler as orepa
from orepa_compiler import DEEP_STEM, OREPA, OREPA_1X1, Block
from orepa_compiler.blocks import ConvBlock, ReparamConv, ReparamConv1d, ReparamConv3d
from orepa_compiler.branches import Pointwise
from orepa_compiler.errors import ReparamError
from orepa_compiler.planning import recorded_plans
from tests.compiler_nets import (
    CONVS,
    Stem,
    assert_same,
    bare_net,
    batch,
    output,
    stem_net,
    train_a_step,
    untouched,
)


def blocks_of(model: nn.Module) -> dict[str, str]:
    return {p: m.block_name for p, m in model.named_modules() if isinstance(m, ConvBlock)}


def reason(model: nn.Module, path: str, **options: object) -> str:
    """Why the conv at `path` is left alone; every other conv must be spoken of too."""
    made = orepa.plan(model, **options)  # type: ignore[arg-type]
    return next(refusal.reason for refusal in made.refusals if refusal.path == path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("training", [False, True])
def test_preserve_keeps_the_outputs_of_both_modes(dtype: torch.dtype, training: bool) -> None:
    net, x = stem_net(dtype), batch(dtype=dtype)
    expanded = orepa.expand(net)
    assert blocks_of(expanded) == {
        "stem": "DEEP_STEM",
        "conv": "OREPA",
        "depthwise": "OREPA",
        "pointwise": "OREPA_1X1",
    }
    assert_same(output(expanded, x, training=training), output(net, x, training=training))


def test_preserve_keeps_how_running_statistics_move() -> None:
    net, x = stem_net(), batch()
    expanded = orepa.expand(net)
    for model in (net, expanded):
        model.train()(x)
    for name in ("norm1", "norm2", "norm3", "norm4"):
        for state in ("running_mean", "running_var"):
            ours, theirs = (getattr(m.get_submodule(name), state) for m in (expanded, net))
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_the_branches_of_a_preserved_block_all_take_part() -> None:
    expanded = orepa.expand(stem_net())
    for name in CONVS:
        block = expanded.get_submodule(name)
        assert isinstance(block, ReparamConv)
        kernels = block.branch_operators()
        assert kernels["origin"].weight.norm() > 0
        assert block.scaling is not None
        rows = dict(zip(block.branches, block.scaling, strict=True))
        assert (rows["origin"] == 1).all()
        for branch, row in rows.items():
            # the frequency filter starts at zero in the paper, and so it does here
            assert (row.abs().max() > 0) == (branch != "frequency"), (name, branch)


def test_the_plan_applied_says_how_large_each_origin_became() -> None:
    (made,) = recorded_plans(orepa.expand(stem_net()))
    notes = {edit.path: edit.note for edit in made.of("expand").edits}
    for note in notes.values():
        assert note.startswith("|origin| / |W| = ")
        assert 0.2 < float(note.rpartition(" ")[2]) < 3


def test_paper_init_has_the_scalings_of_the_paper() -> None:
    expanded = orepa.expand(stem_net(), init="paper")
    wanted = {
        "conv": {
            "origin": 0.25,
            "pointwise": 1.0,
            "pointwise_kernel": 0.5,
            "average": 0.5,
            "frequency": 0.0,
            "depthwise_pointwise": 0.5,
        },
        "pointwise": {"origin": 1.0, "pointwise_pointwise": 0.5},
    }
    for path, factors in wanted.items():
        block = expanded.get_submodule(path)
        assert isinstance(block, ConvBlock)
        assert block.scaling is not None
        assert list(block.branches) == list(factors)
        expected = torch.tensor(list(factors.values()), dtype=torch.float64)
        assert torch.equal(block.scaling, expected[:, None].expand_as(block.scaling))
    stem = expanded.get_submodule("stem")
    assert isinstance(stem, ConvBlock)
    assert list(stem.branches) == ["deep_stem"]


def test_paper_init_forgets_the_kernel_and_keeps_the_bias() -> None:
    net = stem_net()
    expanded = orepa.expand(net, init="paper")
    block = expanded.get_submodule("depthwise")
    assert isinstance(block, ConvBlock)
    assert not torch.allclose(block.weight, net.depthwise.weight)
    assert block.bias is not None
    assert torch.equal(block.bias, net.depthwise.bias)


@pytest.mark.parametrize("block", [OREPA, OREPA_1X1, DEEP_STEM])
def test_an_explicit_block_is_used_where_it_applies(block: Block) -> None:
    net, x = stem_net(), batch()
    expanded = orepa.expand(net, block=block)
    fits = {
        "OREPA": {"stem", "conv", "depthwise"},
        "OREPA_1X1": {"pointwise"},
        "DEEP_STEM": {"stem"},
    }[block.name]
    assert blocks_of(expanded) == dict.fromkeys(fits, block.name)
    assert_same(output(expanded, x), output(net, x))
    text = f"block {block.name} has no branch beside the kernel of a Conv2d "
    left = {r.path: r.reason for r in orepa.plan(net, block=block).refusals}
    assert left.keys() == set(CONVS) - fits
    assert all(why.startswith(text) for why in left.values())


class Corner(Pointwise):
    """A branch of the user's own: a second 1 x 1."""


def test_a_users_own_branch_is_trained_and_collapsed() -> None:
    mine = replace(OREPA, name="mine", branches={**OREPA.branches, "corner": Corner})
    net, x = stem_net(), batch()
    expanded = orepa.expand(net, block=mine)
    block = expanded.get_submodule("conv")
    assert isinstance(block, ConvBlock)
    assert block.block_name == "mine"
    corner = block.branches["corner"]
    assert isinstance(corner, Corner)
    assert_same(output(expanded, x), output(net, x))
    before = corner.weight.detach().clone()
    train_a_step(expanded, x)
    assert not torch.equal(corner.weight, before)
    assert_same(output(orepa.collapse(expanded), x), output(expanded, x))


@pytest.mark.parametrize(("layer", "shape"), [("scalar", (6, 1)), ("none", None)])
def test_other_scaling_layers(layer: str, shape: tuple[int, int] | None) -> None:
    net, x = stem_net(), batch()
    expanded = orepa.expand(net, block=replace(OREPA, scaling_layer=layer))  # type: ignore[arg-type]
    block = expanded.get_submodule("conv")
    assert isinstance(block, ConvBlock)
    assert (None if block.scaling is None else tuple(block.scaling.shape)) == shape
    assert_same(output(expanded, x, training=True), output(net, x, training=True))
    train_a_step(expanded, x)
    assert_same(output(orepa.collapse(expanded), x), output(expanded, x))


def test_a_frozen_conv_stays_frozen() -> None:
    net = stem_net()
    net.conv.requires_grad_(False)
    expanded = orepa.expand(net)
    assert not any(p.requires_grad for p in expanded.get_submodule("conv").parameters())
    assert all(p.requires_grad for p in expanded.get_submodule("stem").parameters())


def test_a_conv_bias_is_kept_beside_the_branches() -> None:
    net = stem_net()
    block = orepa.expand(net).get_submodule("depthwise")
    assert isinstance(block, ConvBlock)
    assert block.norm is None
    assert block.bias is not None
    assert torch.equal(block.bias, net.depthwise.bias)
    assert block.bias is not net.depthwise.bias


def test_a_norm_is_inserted_where_only_an_activation_follows() -> None:
    net, x = bare_net(), batch()
    made = orepa.plan(net, block=OREPA)
    assert {edit.path: edit.note for edit in made.of("expand").edits} == dict.fromkeys(
        ("conv1", "conv2"), "a BatchNorm is inserted: no norm follows"
    )
    expanded = orepa.expand(net, block=OREPA)
    block = expanded.get_submodule("conv1")
    assert isinstance(block, ConvBlock)
    assert isinstance(block.norm, nn.BatchNorm2d)
    assert block.own_bias() is None
    assert torch.equal(block.norm.bias, net[0].bias)
    assert_same(output(expanded, x), output(net, x))


def test_post_norm_none_inserts_nothing() -> None:
    net, x = bare_net(), batch()
    expanded = orepa.expand(net, post_norm="none")
    assert blocks_of(expanded).keys() == {"conv1", "conv2"}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in expanded.modules())
    assert_same(output(expanded, x, training=True), output(net, x, training=True))


EXCLUDED = "excluded by where="
CHOICES: dict[str, tuple[object, set[str]]] = {
    "a glob": ("*conv", {"conv"}),
    "several": (["stem", "point*"], {"stem", "pointwise"}),
    "an exclusion": ("!stem", {"conv", "depthwise", "pointwise"}),
    "both": (["*", "!*wise"], {"stem", "conv"}),
    "a predicate": (lambda path, conv: conv.groups == 1, {"stem", "conv", "pointwise"}),
    "nothing": ("layer9.*", set()),
}


@pytest.mark.filterwarnings("ignore::orepa_compiler.NothingExpandedWarning")
@pytest.mark.parametrize(("where", "chosen"), CHOICES.values(), ids=CHOICES)
def test_where_chooses(where: object, chosen: set[str]) -> None:
    net, x = stem_net(), batch()
    made = orepa.plan(net, where=where)  # type: ignore[arg-type]
    assert {edit.path for edit in made.of("expand").edits} == chosen
    assert {r.path: r.reason for r in made.refusals} == dict.fromkeys(set(CONVS) - chosen, EXCLUDED)
    expanded = orepa.expand(net, where=where)  # type: ignore[arg-type]
    assert set(blocks_of(expanded)) == chosen
    assert_same(output(expanded, x), output(net, x))


class Sequence(nn.Module):
    """`conv` inside a net whose forward the test gives."""

    def __init__(self, conv: nn.Module, run: Callable[[Sequence, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = conv, nn.BatchNorm2d(4), nn.ReLU()
        self.other = nn.Conv2d(4, 4, 3, padding=1)
        self.pool, self.gate = nn.AdaptiveAvgPool2d(1), nn.Sigmoid()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv3(**options: object) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **options)  # type: ignore[arg-type]


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias, padding=1)


def plainly(net: Sequence, x: Tensor) -> Tensor:
    return net.relu(net.norm(net.conv(x)))


def twice(net: Sequence, x: Tensor) -> Tensor:
    return net.norm(net.conv(net.conv(x)))


def by_value(net: Sequence, x: Tensor) -> Tensor:
    return net.norm(net.conv(x)) if x.sum() > 0 else x


def hooked() -> Sequence:
    net = Sequence(conv3(), plainly)
    net.conv.register_forward_hook(lambda module, args, y: None)
    return net


def registered_twice() -> Sequence:
    net = Sequence(conv3(), plainly)
    net.again = net.conv
    return net


def tied() -> Sequence:
    net = Sequence(conv3(), lambda net, x: net.other(plainly(net, x)))
    net.other.weight = net.conv.weight  # type: ignore[union-attr, assignment]
    return net


ASK = "; ask for it with where="
MADE = (
    "its weight is made at each call by {}; make it a parameter again first "
    "(torch.nn.utils.remove_weight_norm, remove_spectral_norm, torch.nn.utils.prune.remove)"
)
SOUND = {  # these hold whatever where= says
    "hook": (
        hooked,
        "it has a hook, which a rewrite would no longer call; remove the hook first",
    ),
    "parametrized": (
        lambda: Sequence(parametrizations.weight_norm(conv3()), plainly),
        "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first",
    ),
    "weight norm": (
        lambda: Sequence(nn.utils.weight_norm(conv3()), plainly),
        MADE.format("WeightNorm"),
    ),
    "spectral norm": (
        lambda: Sequence(nn.utils.spectral_norm(conv3()), plainly),
        MADE.format("SpectralNorm"),
    ),
    "pruned": (
        lambda: Sequence(prune.random_unstructured(conv3(), "weight", 0.5), plainly),
        MADE.format("RandomUnstructured"),
    ),
    "tied": (tied, "its weight is shared with other"),
    "read": (
        lambda: Sequence(conv3(), lambda net, x: plainly(net, x) * net.conv.weight.mean()),
        "the forward of the model reads its weight directly",
    ),
    "not called": (
        lambda: Sequence(conv3(), lambda net, x: net.norm(x)),
        "no forward calls it",
    ),
    "lazy": (
        lambda: Sequence(nn.LazyConv2d(4, 3, padding=1), plainly),
        "its shape is not known yet (lazy); run the model once first",
    ),
}
HANDLED = {  # convs that are hard to join with a neighbour, but not to replace
    "transposed": lambda: Sequence(nn.ConvTranspose2d(4, 4, 3, padding=1), plainly),
    "own forward": lambda: Sequence(Standardized(4, 4, 3), plainly),
    "registered twice": registered_twice,
    "called twice": lambda: Sequence(conv3(), twice),
    "not traced": lambda: Sequence(conv3(), by_value),
}
DEFAULTS = {  # these give way to where=
    "pooled": (
        lambda: Sequence(conv3(), lambda net, x: x * net.relu(net.conv(net.pool(x)))),
        "on maps pooled to one pixel its kernel costs more to make than to apply" + ASK,
    ),
    "patches": (
        lambda: Sequence(nn.Conv2d(4, 4, 2, 2), plainly),
        "a patch embedding (kernel = stride)" + ASK,
    ),
    "head": (
        lambda: Sequence(conv3(), lambda net, x: net.conv(x)),
        "no norm follows: its output is the model's" + ASK,
    ),
    "gate": (
        lambda: Sequence(conv3(), lambda net, x: x * net.gate(net.conv(x))),
        "no norm follows: followed by the gate Sigmoid" + ASK,
    ),
    "conv": (
        lambda: Sequence(conv3(), lambda net, x: net.norm(net.other(net.conv(x)))),
        "no norm follows: followed by a conv" + ASK,
    ),
    "sum": (
        lambda: Sequence(conv3(), lambda net, x: net.relu(net.conv(x) + x)),
        "no norm follows: followed by add" + ASK,
    ),
    "several": (
        lambda: Sequence(conv3(), lambda net, x: net.norm(y := net.conv(x)) + net.relu(y)),
        "no norm follows: several consumers: activation, norm" + ASK,
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(("build", "text"), SOUND.values(), ids=SOUND)
def test_what_cannot_be_sound_is_refused_even_when_asked_for(
    build: Callable[[], nn.Module], text: str
) -> None:
    net = build()
    with untouched(net) if text.find("lazy") < 0 else torch.no_grad():
        assert reason(net, "conv") == text
        assert reason(net, "conv", where="conv") == text


@pytest.mark.parametrize("build", HANDLED.values(), ids=HANDLED)
def test_what_is_hard_to_join_is_expanded_when_asked_for(build: Callable[[], nn.Module]) -> None:
    net = build().eval()
    x = torch.rand(2, 4, 5, 5)
    with untouched(net):
        expanded = orepa.expand(net, where="conv").eval()
    assert isinstance(expanded.conv, ConvBlock)
    assert expanded.conv.norm is None
    for given in (expanded, orepa.collapse(expanded), orepa.collapse(expanded, fold_norm=False)):
        torch.testing.assert_close(given(x), net(x), rtol=1e-4, atol=1e-5)
    kept = orepa.collapse(expanded, fold_norm=False)
    assert kept.state_dict().keys() == net.state_dict().keys()


def test_a_layer_that_computes_its_kernel_is_named() -> None:
    net = nn.Sequential(
        timm.layers.CondConv2d(4, 4, 3, num_experts=2), nn.BatchNorm2d(4), conv3(), nn.ReLU()
    )
    (refusal,) = orepa.plan(net).refusals
    assert (refusal.path, refusal.layer) == ("0", "CondConv2d")
    assert refusal.reason == (
        "CondConv2d is no conv of torch.nn with one kernel, so no block can stand for it"
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_a_scripted_part_stays_as_it_is() -> None:
    inner = torch.jit.script(nn.Sequential(conv3(), nn.BatchNorm2d(4)))
    net = nn.Sequential(conv3(), nn.BatchNorm2d(4), inner, conv3(), nn.BatchNorm2d(4)).eval()
    expanded = orepa.expand(net).eval()
    assert blocks_of(expanded) == {"0": "OREPA_VGG", "3": "OREPA_VGG"}
    (refusal,) = recorded_plans(expanded)[-1].refusals
    assert (refusal.path, refusal.layer) == ("2", "TorchScript")
    assert refusal.reason == "put the nn.Module that it was scripted from in its place"
    x = torch.rand(2, 4, 9, 9)
    deploy = orepa.collapse(expanded)
    for found in (expanded(x), deploy(x)):
        torch.testing.assert_close(found, net(x), rtol=1e-4, atol=1e-5)


def test_a_conv_under_two_names_stays_one() -> None:
    expanded = orepa.expand(registered_twice())
    assert expanded.conv is expanded.again
    assert isinstance(expanded.again, ConvBlock)


@pytest.mark.parametrize(("build", "text"), DEFAULTS.values(), ids=DEFAULTS)
def test_what_does_not_pay_is_left_alone_unless_asked_for(
    build: Callable[[], nn.Module], text: str
) -> None:
    net, x = build().double(), torch.randn(2, 4, 8, 8, dtype=torch.float64)
    assert reason(net, "conv") == text
    expanded = orepa.expand(net, where="conv")
    assert set(blocks_of(expanded)) == {"conv"}
    assert_same(output(expanded, x), output(net, x))


def test_an_exclusion_alone_does_not_ask_for_what_is_left_alone_by_default() -> None:
    build, text = DEFAULTS["gate"]
    assert reason(build(), "conv", where="!other") == text


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_every_conv_is_spoken_of_exactly_once() -> None:
    for build, _ in (*SOUND.values(), *DEFAULTS.values()):
        net = build()
        made = orepa.plan(net)
        convs = [p for p, m in net.named_modules() if isinstance(m, _ConvNd)]
        spoken = [edit.path for edit in made.of("expand").edits] + [r.path for r in made.refusals]
        assert sorted(spoken) == sorted(convs)


class Volume(nn.Module):
    def __init__(self, rank: int) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 3: nn.Conv3d}[rank]
        norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[rank]
        self.conv1, self.norm1 = conv(3, 4, 3, padding=1, stride=2), norm(4)
        self.conv2 = conv(4, 4, 3, padding="same", dilation=2, padding_mode="circular")
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv2(self.relu(self.norm1(self.conv1(x)))))


@pytest.mark.parametrize(("rank", "kind"), [(1, ReparamConv1d), (3, ReparamConv3d)])
def test_other_ranks(rank: int, kind: type) -> None:
    net = Volume(rank).double()
    x = torch.randn(2, 3, *(9,) * rank, dtype=torch.float64)
    expanded = orepa.expand(net, block=OREPA)
    assert [type(m) for m in expanded.modules() if isinstance(m, ConvBlock)] == [kind, kind]
    assert_same(output(expanded, x), output(net, x))
    train_a_step(expanded, x)
    assert_same(output(orepa.collapse(expanded), x), output(expanded, x))


def test_a_root_that_is_itself_a_conv() -> None:
    net, x = nn.Conv2d(3, 4, 3, padding=1).double(), batch()
    (refusal,) = orepa.plan(net).refusals
    assert refusal.path == ""
    assert refusal.layer == "Conv2d 3 -> 4 3x3"
    expanded = orepa.expand(net, block=OREPA, where="*")
    assert isinstance(expanded, ReparamConv)
    assert_same(output(expanded, x), output(net, x))
    collapsed = orepa.collapse(expanded)
    assert type(collapsed) is nn.Conv2d
    assert_same(output(collapsed, x), output(net, x))


def test_expanding_twice_changes_nothing_the_second_time() -> None:
    net, x = stem_net(), batch()
    once = orepa.expand(net)
    again = orepa.expand(once)
    assert blocks_of(again) == blocks_of(once)
    assert_same(output(again, x), output(net, x))
    assert recorded_plans(again)[1].edits == ()


def test_expanding_in_two_parts() -> None:
    net, x = stem_net(), batch()
    half = orepa.expand(net, where="stem")
    whole = orepa.expand(half)
    assert set(blocks_of(whole)) == set(CONVS)
    assert_same(output(whole, x), output(net, x))
    assert_same(output(orepa.collapse(whole), x), output(net, x))


def test_the_user_keeps_class_state_and_mode() -> None:
    net = stem_net()
    net.norm2.eval()
    with untouched(net):
        expanded = orepa.expand(net)
    assert type(expanded) is Stem
    assert expanded.training
    assert not expanded.get_submodule("norm2").training
    block = expanded.get_submodule("conv")
    assert (block.kernel_size, block.groups, block.padding) == ((3, 3), 1, (1, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_block_has_the_dtype_of_its_conv(dtype: torch.dtype) -> None:
    expanded = orepa.expand(bare_net(dtype))
    assert {value.dtype for value in (*expanded.parameters(),)} == {dtype}
    assert output(expanded, batch(dtype=dtype)).dtype == dtype


def test_a_plan_for_a_block_that_is_not_known() -> None:
    mine = replace(OREPA, name="mine")
    made = orepa.plan(stem_net(), block=mine)
    with pytest.raises(ReparamError) as caught:
        orepa.expand(stem_net(), plan=made)
    assert str(caught.value) == (
        "the plan asks for block 'mine', which is none of OREPA, OREPA_1X1, DEEP_STEM, "
        "OREPA_3X3_REPVGG, OREPA_VGG, DBB, REPVGG, ACNET, EXPAND_NET, DO_CONV, MOBILEONE_4, "
        "DILATED; give yours with block="
    )
    assert set(blocks_of(orepa.expand(stem_net(), plan=made, block=mine)).values()) == {"mine"}


def test_a_trainable_bias_beside_a_frozen_kernel_stays_trainable() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    net[0].weight.requires_grad_(False)
    block = orepa.expand(net)[0]
    assert block.bias.requires_grad
    assert not block.branches["origin"].weight.requires_grad


def test_a_weight_that_is_no_parameter() -> None:
    conv = nn.Conv2d(3, 8, 3).requires_grad_(False)
    torch.nn.utils.parametrizations.weight_norm(conv)
    torch.nn.utils.parametrize.remove_parametrizations(conv, "weight")
    net = nn.Sequential(conv, nn.BatchNorm2d(8))
    (refusal,) = orepa.plan(net).refusals
    assert refusal.reason.startswith("its weight is a tensor and no parameter, as")
    weight = conv.weight
    del conv.weight
    conv.weight = nn.Parameter(weight)  # as the reason says
    assert [edit.path for edit in orepa.plan(net).of("expand").edits] == ["0"]


def test_no_norm_is_inserted_where_maps_are_one_pixel() -> None:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Conv2d(8, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)),
    )
    big = orepa.expand(net, where=("4", "6"))
    assert all(big[at].norm is None for at in (4, 6))
    assert big.train()(torch.randn(1, 3, 5, 5)).shape == (1, 2, 1, 1)
    net[4] = nn.Conv2d(8, 4, 3, padding=1)
    (refusal,) = (r for r in orepa.plan(net, where="4", block=orepa.DBB).refusals if r.path == "4")
    assert refusal.reason.startswith("its maps are one pixel, and of one image no norm")


def test_an_upsampling_without_overlap_is_told_from_a_patch_embedding() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(3, 8, 2, stride=2), nn.BatchNorm2d(8))
    (refusal,) = orepa.plan(net).refusals
    assert (
        refusal.reason == "an upsampling without overlap (kernel = stride); ask for it with where="
    )
