"""The verbs: what plan, expand and collapse promise about the user's model, and their errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture.skeleton import meta_copy
from orepa_compiler.errors import ReparamError
from orepa_compiler.planning import Plan, recorded_plans
from tests.compiler_nets import (
    assert_same,
    bare_net,
    batch,
    branch_net,
    output,
    stem_net,
    train_a_step,
    untouched,
)

BUILDERS = [stem_net, bare_net, branch_net]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("block", ["auto", orepa.OREPA], ids=["auto", "OREPA"])
def test_planning_touches_nothing(build: Callable[[], nn.Module], block: Any) -> None:
    net = build()
    seed = torch.random.get_rng_state()
    with untouched(net):
        first = orepa.plan(net, block=block, inputs=batch())
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert orepa.plan(net, block=block, inputs=batch()) == first
    assert first.edits


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("block", ["auto", orepa.OREPA], ids=["auto", "OREPA"])
def test_a_model_without_values_is_planned_alike(
    build: Callable[[], nn.Module], block: Any
) -> None:
    net = build()
    assert orepa.plan(meta_copy(net), block=block) == orepa.plan(net, block=block)


@pytest.mark.parametrize("build", BUILDERS)
def test_what_was_planned_is_what_is_done(build: Callable[[], nn.Module]) -> None:
    for block in ("auto", orepa.OREPA):
        planned = orepa.plan(build(), block=block)  # type: ignore[arg-type]
        (done,) = recorded_plans(orepa.expand(build(), block=block))  # type: ignore[arg-type]
        assert done.refusals == planned.refusals
        assert [(e.done_by, e.path, e.before, e.after, e.options) for e in done.edits] == [
            (e.done_by, e.path, e.before, e.after, e.options) for e in planned.edits
        ]


@pytest.mark.parametrize("build", BUILDERS)
def test_the_plan_counts_the_parameters(build: Callable[[], nn.Module]) -> None:
    expanded = orepa.expand(build())
    for edit in recorded_plans(expanded)[0].of("expand").edits:
        own = sum(p.numel() for p in expanded.get_submodule(edit.path).parameters())
        assert edit.parameters[1] == own
        assert edit.parameters[0] == sum(
            p.numel() for p in build().get_submodule(edit.path).parameters()
        )
    deployed = orepa.collapse(expanded)
    for edit in recorded_plans(deployed)[-1].edits:
        conv = deployed.get_submodule(edit.path)
        assert edit.parameters[1] == sum(p.numel() for p in conv.parameters())


@pytest.mark.parametrize("verb", [orepa.expand, orepa.collapse])
def test_the_verbs_copy_by_default(verb: Callable[..., nn.Module]) -> None:
    net = stem_net()
    with untouched(net):
        result = verb(net)
    ours = {id(tensor) for tensor in (*net.parameters(), *net.buffers())}
    assert not ours & {id(tensor) for tensor in (*result.parameters(), *result.buffers())}
    pointers = {p.data_ptr() for p in net.parameters()}
    assert not pointers & {p.data_ptr() for p in result.parameters()}


@pytest.mark.parametrize("build", BUILDERS)
def test_in_place(build: Callable[[], nn.Module]) -> None:
    net, x = build(), batch()
    expected = output(net, x)
    expanded = orepa.expand(net, inplace=True)
    assert expanded is net
    assert any(isinstance(module, ConvBlock) for module in net.modules())
    assert_same(output(net, x), expected)
    assert orepa.collapse(net, inplace=True) is net
    assert not any(isinstance(module, ConvBlock) for module in net.modules())
    assert_same(output(net, x), expected)


class Integer(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        weight = torch.ones(3, 3, 1, 1, dtype=dtype)
        self.conv.weight = nn.Parameter(weight, requires_grad=False)


class Uncopyable(nn.Conv2d):
    def __deepcopy__(self, memo: object) -> nn.Module:
        raise TypeError("not me")


NEITHER = "neither a name nor a Block such as orepa.OREPA"
LOAD = "the weights are on the meta device: "
ERRORS: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "no module": (lambda: {"conv": 1}, {}, "the model is a dict, not a torch.nn.Module"),
    "no conv": (
        lambda: nn.Sequential(nn.Linear(3, 3)),
        {},
        "Sequential has no conv, so there is nothing to re-parameterize",
    ),
    "exported": (
        lambda: torch.export.export(nn.Conv2d(3, 3, 1), (torch.ones(1, 3, 2, 2),)).module(),
        {},
        "GraphModule has no conv, so there is nothing to re-parameterize; it is a graph of "
        "torch.export: pass the nn.Module that was exported",
    ),
    "integer": (
        lambda: Integer(torch.int8),
        {},
        "conv: its weight is torch.int8; only floating-point convs can be rewritten",
    ),
    "complex": (
        lambda: Integer(torch.complex64),
        {},
        "conv: its weight is torch.complex64; only floating-point convs can be rewritten",
    ),
    "meta": (
        lambda: meta_copy(stem_net()),
        {},
        f"stem.weight: {LOAD}no kernel to preserve; load weights or use init='paper'",
    ),
    "init": (stem_net, {"init": "zero"}, "init='zero' is neither 'preserve' nor 'paper'"),
    "post_norm": (stem_net, {"post_norm": True}, "post_norm=True is neither 'auto' nor 'none'"),
    "block": (stem_net, {"block": 3}, f"block=3 is {NEITHER}"),
    "name of a block": (
        stem_net,
        {"block": "OREPE"},
        "block='OREPE': choose one of auto, OREPA, OREPA_1X1, DEEP_STEM, OREPA_3X3_REPVGG, "
        "OREPA_VGG, DBB, REPVGG, ACNET, EXPAND_NET, DO_CONV, MOBILEONE_4, DILATED, or a Block of "
        "yours",
    ),
    "where": (
        stem_net,
        {"where": []},
        "where=() selects nothing; give a glob such as 'layer1.*', a list of globs "
        "('!stem.*' excludes), or a function of (path, module)",
    ),
    "where a number": (
        stem_net,
        {"where": 3},
        "where=3 selects nothing; give a glob such as 'layer1.*', a list of globs "
        "('!stem.*' excludes), or a function of (path, module)",
    ),
    "inputs": (stem_net, {"inputs": []}, "inputs: an empty list; give at least one batch"),
    "compiled": (
        lambda: torch.compile(stem_net(), backend="eager"),
        {},
        "the model is wrapped in OptimizedModule; pass the model before torch.compile",
    ),
    "data parallel": (
        lambda: nn.DataParallel(stem_net()),
        {},
        "the model is wrapped in DataParallel; pass model.module",
    ),
    "uncopyable": (
        lambda: nn.Sequential(Uncopyable(3, 3, 1)),
        {},
        "Sequential cannot be copied (TypeError: not me); remove what copy.deepcopy cannot copy",
    ),
}


@pytest.mark.parametrize(("build", "options", "message"), ERRORS.values(), ids=ERRORS)
def test_what_expand_raises(
    build: Callable[[], Any], options: dict[str, Any], message: str
) -> None:
    net = build()
    with untouched(net if isinstance(net, nn.Module) else nn.Module()):
        for inplace in (False, True):
            with pytest.raises(ReparamError) as caught:
                orepa.expand(net, **options, inplace=inplace)
            assert str(caught.value) == message


def test_a_model_in_which_nothing_is_expanded_is_no_silent_success() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 2, stride=2), nn.ReLU(), nn.Conv2d(3, 3, 3))
    expected = (
        "nothing was expanded, so the model trains as it was. Layers left alone: "
        "1 because: a patch embedding (kernel = stride); ask for it with where=; "
        "1 because: no norm follows: its output is the model's; ask for it with where="
    )
    with pytest.warns(orepa.NothingExpandedWarning) as caught:
        orepa.expand(net)
    assert [str(warning.message) for warning in caught] == [expected]
    assert caught[0].filename == __file__
    orepa.expand(net, where="0")  # a warning is an error here


def test_what_collapse_and_plan_raise() -> None:
    meta = meta_copy(stem_net())
    with pytest.raises(ReparamError) as caught:
        orepa.collapse(meta)
    message = f"stem.weight: {LOAD}there is nothing to fold; load the weights first"
    assert str(caught.value) == message
    for verb in (orepa.plan, orepa.collapse):
        for name in ("no module", "no conv", "integer", "complex", "compiled", "data parallel"):
            build, _, text = ERRORS[name]
            with pytest.raises(ReparamError) as caught:
                verb(build())
            assert str(caught.value) == text


def test_paper_init_needs_no_values() -> None:
    expanded = orepa.expand(meta_copy(stem_net()), init="paper")
    assert any(isinstance(module, ConvBlock) for module in expanded.modules())
    assert all(p.is_meta for p in expanded.parameters())


def fails(conv: object) -> nn.Module:
    raise ZeroDivisionError("a branch that cannot be made")


def test_a_failure_in_the_middle_leaves_the_users_model_alone() -> None:
    net = stem_net()
    made = 0

    def late(conv: orepa.ConvOperator) -> None:
        nonlocal made
        made += 1
        if made > 6:  # after planning, with some blocks in place
            fails(conv)

    block = orepa.Block("late", {**orepa.OREPA.branches, "late": late}, orepa.OREPA.scaling)
    with untouched(net), pytest.raises(ZeroDivisionError):
        orepa.expand(net, block=block)


def test_a_generator_of_globs_is_read_once_for_all_passes() -> None:
    made = orepa.plan(branch_net(), block=orepa.OREPA, where=(p for p in ["first*"]))
    assert {edit.path.split(".")[0] for edit in made.edits} == {"first"}


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("block", ["auto", orepa.OREPA], ids=["auto", "OREPA"])
def test_a_plan_is_replayed_on_a_fresh_model(build: Callable[[], nn.Module], block: Any) -> None:
    plan = Plan.from_json(orepa.plan(build(), block=block).to_json())
    net, x = build(), batch()
    wanted = orepa.expand(net, block=block)
    for options in ({}, {"block": block}):
        expanded = orepa.expand(net, plan=plan, **options)
        assert [str(m) for m in expanded.modules()] == [str(m) for m in wanted.modules()]
        assert_same(output(expanded, x), output(net, x))


def other_kernels() -> nn.Module:
    net = stem_net()
    net.conv = nn.Conv2d(8, 8, 1)
    return net


def hooked() -> nn.Module:
    net = stem_net()
    net.conv.register_forward_hook(lambda module, args, y: y)
    return net


WRONG: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another net": (bare_net, "stem: the plan does not fit: the model has no such module"),
    "other kernels": (
        other_kernels,
        "conv: the plan asks for the branches ['origin', 'pointwise', 'pointwise_kernel', "
        "'average', 'frequency', 'depthwise_pointwise'], block OREPA gives ['origin']",
    ),
    "a hook": (
        hooked,
        "conv: the plan does not fit: it has a hook, which a rewrite would no longer call; remove "
        "the hook first",
    ),
    "expanded already": (
        lambda: orepa.expand(stem_net()),
        "stem: the plan does not fit this model: ReparamConv2d is no conv of torch.nn with one "
        "kernel, so no block can stand for it",
    ),
}


@pytest.mark.parametrize(("build", "message"), WRONG.values(), ids=WRONG)
def test_a_plan_for_another_model(build: Callable[[], nn.Module], message: str) -> None:
    plan, net = orepa.plan(stem_net()), build()
    with untouched(net), pytest.raises(ReparamError) as caught:
        orepa.expand(net, plan=plan)
    assert str(caught.value) == message


class Root(nn.Module):
    """A net whose own forward holds the sum, so that it becomes a GraphModule itself."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.small = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.norm1, self.norm2, self.relu = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm1(self.large(x)) + self.norm2(self.small(x)))


FORMS: dict[str, Callable[[], nn.Module]] = {
    "expanded": lambda: orepa.expand(stem_net()),
    "collapsed": lambda: orepa.collapse(orepa.expand(stem_net())),
    "graph, expanded": lambda: orepa.expand(Root().double(), block=orepa.OREPA),
    "graph, collapsed": lambda: orepa.collapse(orepa.expand(Root().double(), block=orepa.OREPA)),
}


@pytest.mark.parametrize("build", FORMS.values(), ids=FORMS)
def test_the_record_survives_copies_and_pickle(build: Callable[[], nn.Module]) -> None:
    model = build()
    plans = recorded_plans(model)
    assert plans
    for other in (
        copy.deepcopy(model),
        copy.deepcopy(copy.deepcopy(model)),
        pickle.loads(pickle.dumps(model)),
    ):
        assert recorded_plans(other) == plans
        assert_same(output(other, batch()), output(model, batch()))
    assert recorded_plans(stem_net()) == ()


def test_a_model_with_an_attribute_called_meta_keeps_it() -> None:
    net = stem_net()
    net.meta = {"mean": 0.5}  # type: ignore[assignment]
    expanded = orepa.expand(net)
    assert expanded.meta == {"mean": 0.5}
    assert recorded_plans(copy.deepcopy(expanded)) == recorded_plans(expanded) != ()


def test_a_real_net_trains_and_comes_back() -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_efficientnet").double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expanded = orepa.expand(net)
    assert_same(output(expanded, x), output(net, x))
    train_a_step(expanded, x)
    assert_same(output(orepa.collapse(expanded), x), output(expanded, x))


@dataclass(frozen=True)
class Told:
    """A pass that changes nothing, and notes what it was told."""

    told: list[Any] = field(default_factory=list)
    where: Any = "not told"
    block: Any = "not told"
    fold_norm: Any = "not told"
    name: str = "told"
    training: bool | None = None
    preserves: frozenset[str] = frozenset({"train", "eval"})

    def plan(self, capture: Any) -> Plan:
        self.told.append((self.where, self.block, self.fold_norm))
        return Plan()

    def apply(self, model: nn.Module, capture: Any, plan: Plan) -> tuple[nn.Module, Plan]:
        return model, plan


def test_the_verbs_run_the_pipeline_that_they_are_given() -> None:
    net, told = stem_net(), Told()
    mine = orepa.Pipeline((told, *orepa.EXPAND.passes))
    expanded = orepa.expand(net, where="conv", block=orepa.OREPA, pipeline=mine)
    assert told.told == [("conv", orepa.OREPA, "not told")]
    assert [p for p, m in expanded.named_modules() if isinstance(m, ConvBlock)] == ["conv"]
    assert orepa.plan(net, where="conv", pipeline=orepa.Pipeline((told,))) == Plan()
    told.told.clear()
    mine = orepa.Pipeline((told, *orepa.COLLAPSE.passes))
    deploy = orepa.collapse(expanded, fold_norm=False, pipeline=mine)
    assert told.told == [("not told", "not told", False)]
    assert deploy.state_dict().keys() == net.state_dict().keys()
    assert str(orepa.collapse(net, pipeline=orepa.Pipeline((Told(),)))) == str(net)


def test_the_public_pipelines_are_what_the_verbs_run() -> None:
    net = branch_net()
    made = orepa.EXPAND.configured(block=orepa.OREPA).run(copy.deepcopy(net))[1]
    (done,) = recorded_plans(orepa.expand(net, block=orepa.OREPA))
    assert [e.options for e in made.edits] == [e.options for e in done.edits]
    made = orepa.COLLAPSE.run(copy.deepcopy(net))[1]
    (done,) = recorded_plans(orepa.collapse(net))
    assert (made.edits, made.refusals) == (done.edits, done.refusals)


def test_a_plan_beside_another_init_is_an_error() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    made = orepa.plan(net, block=orepa.OREPA)
    with pytest.raises(orepa.ReparamError, match=r"^0: the plan was made with init='preserve'"):
        orepa.expand(net, plan=made, init="paper")
    paper = orepa.plan(net, block=orepa.OREPA, init="paper")
    assert orepa.expand(net, plan=paper, init="paper")[0].scaling is not None


def test_a_plan_that_inserts_a_norm_beside_none_is_an_error() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(orepa.ReparamError, match=r"^0: the plan inserts a norm here"):
        orepa.expand(net, plan=orepa.plan(net, block=orepa.OREPA), post_norm="none")


# making one is what torch warns of; users still bring them
@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")
def test_torchscript_is_named() -> None:
    with pytest.raises(orepa.ReparamError, match="the model is TorchScript"):
        orepa.plan(torch.jit.trace(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8)))
