"""With inputs, what a verb made is run beside the model: what is wrong is found and left alone."""

from __future__ import annotations

import copy
import itertools
import queue
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import orepa_compiler as orepa
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.capture import Capture
from orepa_compiler.capture.beside import Beside
from orepa_compiler.passes import Pipeline
from orepa_compiler.passes.retracing import Retracing
from orepa_compiler.planning import Edit, Plan, recorded_plans
from tests.compiler_nets import assert_same, output, untouched
from tests.norms import randomise_norms
from tests.validation_nets import Above, Link, Swap, chain, images, with_wrong

DISAGREES = "its rewrite did not agree with it on the inputs: "


def reasons(model: nn.Module) -> dict[str, str]:
    """Path -> reason of what was left alone, in the last plan of the model."""
    return {refusal.path: refusal.reason for refusal in recorded_plans(model)[-1].refusals}


def norms_in(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]


def by_the_trial_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trace sees none of it, so that what runs has to show it."""

    def planned(self: Retracing, step: Any, model: nn.Module, captured: Any) -> Any:
        return captured, step.plan(captured)

    monkeypatch.setattr(Retracing, "planned", planned)
    monkeypatch.setattr("orepa_compiler.passes.hold_new", lambda model, holdings: None)
    monkeypatch.setattr("orepa_compiler.capture.beside_graphs", lambda *args: Beside())


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_edit_is_found_and_left_alone(inplace: bool, dtype: torch.dtype) -> None:
    net, x = chain().to(dtype), images().to(dtype)
    expected = output(net, x)
    pipeline = with_wrong("1.conv")
    made = orepa.collapse(net, inputs=x, pipeline=pipeline, inplace=inplace)
    assert_same(output(made, x), expected)
    plan = recorded_plans(made)[-1]
    assert [edit.path for edit in plan.of("swap").edits] == ["0.conv", "2.conv"]
    assert norms_in(made) == ["1.norm"]  # the neighbours are folded all the same
    assert reasons(made)["1.conv"].startswith(f"{DISAGREES}0.")
    assert reasons(made)["1.conv"].endswith((" at 1", " at 1.conv"))
    assert plan.checked == "checked on 1 batch"
    assert (made is net) == inplace


def test_without_inputs_nothing_is_run_and_the_plan_says_so() -> None:
    net, x = chain(), images()
    made = orepa.collapse(net, pipeline=with_wrong("1.conv"))
    assert (output(made, x) - output(net, x)).abs().max() > 0.01
    assert recorded_plans(made)[-1].checked == "not checked: give inputs="


def test_several_wrong_edits_are_found_one_after_the_other() -> None:
    net, x = chain(), images()
    made = orepa.collapse(net, inputs=x, pipeline=with_wrong("0.conv", "2.conv"))
    assert_same(output(made, x), output(net, x))
    assert norms_in(made) == ["0.norm", "2.norm"]


def test_every_batch_is_given() -> None:
    net, batches = chain(), [images(), images(100.0)]
    pipeline = with_wrong("1.conv", by=Above)
    seen = orepa.collapse(net, inputs=batches[:1], pipeline=pipeline)
    assert isinstance(seen.get_submodule("1.conv"), Above)
    made = orepa.collapse(net, inputs=batches, pipeline=pipeline)
    assert_same(output(made, batches[1]), output(net, batches[1]))
    assert "1.conv" in reasons(made)
    assert recorded_plans(made)[-1].checked == "checked on 2 batches"


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_disagrees_is_never_handed_out(inplace: bool) -> None:
    net = chain()
    pipeline = with_wrong("1.conv", says=False)  # it does more than its plan says
    message = (
        r"^the rewritten model does not do what the model does on the inputs: 0\.\d+ at output"
    )
    with untouched(net), pytest.raises(orepa.ReparamError, match=message):
        orepa.collapse(net, inputs=images(), pipeline=pipeline, inplace=inplace)


def test_what_the_rewrite_raises_is_a_disagreement() -> None:
    net, x = chain(), images()
    pipeline = with_wrong("1.conv", by=lambda conv: nn.Conv2d(7, 5, 3))
    made = orepa.collapse(net, inputs=x, pipeline=pipeline)
    assert_same(output(made, x), output(net, x))
    assert "1.conv" in reasons(made)


class FromList(nn.Module):
    """Convs that are registered, and run from a list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = Link(3, 4), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.outs = [self.out]

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.outs[0](self.stem(x)))


@pytest.mark.parametrize("inplace", [False, True])
def test_what_never_runs_is_found(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    by_the_trial_alone(monkeypatch)
    net, x = randomise_norms(FromList()), images()
    expected = output(net, x)
    made = orepa.collapse(net, inputs=x, inplace=inplace, pipeline=Pipeline((Swap(()),)))
    assert [edit.path for edit in recorded_plans(made)[-1].edits] == ["stem.conv"]
    assert made.outs[0] is made.out
    assert reasons(made)["out"] == (
        f"{DISAGREES}what was put in its place never ran: the forward reaches it by another way "
        "than its name"
    )
    assert_same(output(made, x), expected)


class Decoder(nn.Module):
    """Reads the weight of a module that it holds in a list: a plain tensor for all that asks."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.held, self.gain = {"kernel": conv}, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, vars(self.held["kernel"])["_parameters"]["weight"]) * self.gain


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Link(3, 4)
        self.decoder = Decoder(self.encoder.conv)

    def forward(self, x: Tensor) -> Any:
        return self.decoder(self.encoder(x))


def test_what_would_be_trained_is_a_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    by_the_trial_alone(monkeypatch)
    net, x = randomise_norms(Tied()), images()
    with pytest.warns(orepa.NothingExpandedWarning):
        made = orepa.expand(net, inputs=x, pipeline=Pipeline((Swap(()),)))
    assert reasons(made) == {
        "encoder.conv": f"{DISAGREES}1 tensors would be trained that are no parameters of the "
        "model, as what was encoder.conv.weight"
    }


class Detached(nn.Conv2d):
    """Computes the same, and trains nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.detach(), self.bias, padding=1)


def detached(conv: nn.Module) -> nn.Module:
    made = copy.deepcopy(conv)
    made.__class__ = Detached
    return made


def test_a_parameter_that_gets_no_gradient_any_more_is_found() -> None:
    net, x = chain(), images()
    pipeline = Pipeline((Swap(("1.conv",), by=detached),))
    with pytest.warns(orepa.NothingExpandedWarning):
        made = orepa.expand(net, inputs=x, pipeline=pipeline)
    assert reasons(made) == {
        "1.conv": f"{DISAGREES}1 parameters get no gradient any more, as 1.conv.weight"
    }
    assert len(recorded_plans(made)[-1].edits) == 2


class Noisy(nn.Module):
    """Random by intent, by three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.link = Link(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.link(x) + torch.rand(1) + random.random() + numpy.random.rand()


def test_a_random_model_is_compared_with_the_same_numbers() -> None:
    net, x = randomise_norms(Noisy()).eval(), images()
    made = orepa.collapse(net, inputs=x)
    assert norms_in(made) == []
    assert recorded_plans(made)[-1].checked == "checked on 1 batch"


COUNTER = (number for number in itertools.count())  # which nobody can put back


class Unsteady(Link):
    """No two calls are alike, whatever is put back."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (next(COUNTER) + 1)


@pytest.mark.parametrize("inplace", [False, True])
def test_a_model_that_differs_from_itself_is_not_checked(inplace: bool) -> None:
    net = randomise_norms(nn.Sequential(Unsteady(3, 4))).eval()
    made = orepa.collapse(net, inputs=images(), inplace=inplace)
    checked = recorded_plans(made)[-1].checked
    assert checked.startswith("not checked: the model differs from itself on the same inputs")


class Counting(nn.Module):
    """Leaves something behind in each kind of place, and goes another way each second time."""

    def __init__(self) -> None:
        super().__init__()
        self.link = Link(3, 4)
        self.count, self.log, self.of = 0, [0], {"calls": 0}
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.log[0] += 1
        self.log.append(0)
        self.of["calls"] += 1
        self.seen += 1
        y = self.link.conv(x)
        return self.link.norm(y) if self.count % 2 else y


def test_a_model_with_state_is_called_twice_and_put_back() -> None:
    net, x = randomise_norms(Counting()).eval(), images()
    for made in (orepa.collapse(net, inputs=x), orepa.expand(net, inputs=x)):
        for model in (net, made):
            state = (model.count, model.log, model.of, float(model.seen))  # type: ignore[arg-type]
            assert state == (0, [0], {"calls": 0}, 0.0)
        for _ in range(3):
            with torch.no_grad():
                assert_same(made.eval()(x), net(x))
        net.count, net.log, net.of = 0, [0], {"calls": 0}
        net.seen.zero_()  # type: ignore[operator]


def test_random_numbers_and_the_model_are_left_as_they_were() -> None:
    net, x = chain().train(), images()

    def states() -> tuple[Any, ...]:
        return random.getstate(), str(numpy.random.get_state()), torch.get_rng_state().tolist()

    before = states()
    with untouched(net):
        orepa.collapse(net, inputs=x, pipeline=with_wrong("1.conv"))
    assert states() == before
    torch.manual_seed(3)
    orepa.expand(net)
    after = states()
    torch.manual_seed(3)
    with untouched(net):
        orepa.expand(net, inputs=x)
    assert states() == after


class Single(nn.Module):
    """Runs in float32 alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body = chain()

    def forward(self, x: Tensor) -> Any:
        return self.body(x) @ torch.ones(8, 8, dtype=torch.float32)


@pytest.mark.parametrize("is_wrong", [False, True])
def test_a_model_that_does_not_run_in_float64_is_compared_in_its_own(is_wrong: bool) -> None:
    net, x = Single().eval(), images()
    pipeline = with_wrong(*(["body.1.conv"] if is_wrong else []))
    made = orepa.collapse(net, inputs=x, pipeline=pipeline)
    assert_same(output(made, x), output(net, x))
    assert norms_in(made) == (["body.1.norm"] if is_wrong else [])


@dataclass
class Result:
    maps: dict[str, list[Tensor]]
    size: tuple[int, ...]


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.side = chain(), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Any:
        return Result({"all": [self.body(x), self.side(x)]}, tuple(x.shape)), None


def test_nested_outputs_are_compared() -> None:
    net, x = Nested().eval(), images()
    made = orepa.collapse(net, inputs=x, pipeline=with_wrong("side"))
    assert norms_in(made) == []
    assert reasons(made)["side"].startswith(f"{DISAGREES}0.")
    assert torch.equal(made(x)[0].maps["all"][1], net(x)[0].maps["all"][1])


class Flagged(Link):
    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        y = self.conv(x)
        return y if raw else self.norm(y)


def test_flags_are_turned() -> None:
    net, x = randomise_norms(Flagged(3, 4)).eval(), images()
    made = orepa.collapse(net, inputs=x)
    with torch.no_grad():
        assert_same(made(x, raw=True), net(x, raw=True))
    assert norms_in(made) == ["norm"]


def test_paper_init_is_no_disagreement() -> None:
    made = orepa.expand(chain(), inputs=images(), init="paper")
    assert isinstance(made.get_submodule("1.conv"), ConvBlock)
    assert recorded_plans(made)[-1].checked == "checked on 1 batch"


def test_a_plan_of_the_users_is_held_to_it_too() -> None:
    net, x = chain(), images()
    pipeline = with_wrong("1.conv")
    plan = recorded_plans(orepa.collapse(net, pipeline=pipeline))[-1]
    made = orepa.collapse(net, inputs=x, plan=plan, pipeline=pipeline)
    assert_same(output(made, x), output(net, x))
    assert "1.conv" in reasons(made)


def test_the_plan_says_what_was_checked() -> None:
    (plan,) = recorded_plans(orepa.collapse(chain(), inputs=images()))
    assert plan.summary().endswith("; checked on 1 batch")
    assert "checked on 1 batch" in str(plan).splitlines()[0]
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.of("collapse").checked == plan.checked


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_rounded_weight_is_no_disagreement(dtype: torch.dtype) -> None:
    net, x = chain().to(dtype), images().to(dtype)
    made = orepa.collapse(net, inputs=x)
    assert norms_in(made) == []
    wrong = orepa.collapse(net, inputs=x, pipeline=with_wrong("1.conv"))
    assert norms_in(wrong) == ["1.norm"]


def test_a_model_without_state_is_called_once_in_each_way() -> None:
    seen = queue.SimpleQueue[bool]()  # a list would be put back

    class Watched(Link):
        def forward(self, x: Tensor) -> Tensor:
            if not fx._symbolic_trace._is_fx_tracing_flag and not x.is_meta:
                seen.put(torch.is_grad_enabled())
            return super().forward(x)

    net = randomise_norms(nn.Sequential(Watched(3, 4))).eval()
    orepa.collapse(net, inputs=images())
    calls = [seen.get() for _ in range(seen.qsize())]
    assert calls == [True, False] * 2


class NeedsTargets(nn.Sequential):
    """Raises in train mode, as a detector does that is given no targets."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            raise AssertionError("targets should not be none")
        return super().forward(x)  # type: ignore[no-any-return]


def test_a_model_that_raises_in_train_mode_itself_is_checked_in_eval_mode() -> None:
    model = NeedsTargets(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    expanded = orepa.expand(model, inputs=torch.randn(2, 3, 6, 6))
    (plan,) = recorded_plans(expanded)
    assert len(plan.of("expand").edits) == 1
    checked = str(plan.checked)
    assert checked.startswith("checked on 1 batch, not in train mode: there the model raised")
    assert "targets should not be none" in checked


class Sum(nn.Sequential):
    """The sum of what its parts give."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(x) for part in self]).sum(0)


@dataclass
class Trials:
    """Swaps many convs, a few of them wrongly, where no module shows which; counts the trials."""

    size: int
    wrong: tuple[str, ...]
    count: int = 0

    def collapse(self, *, inplace: bool) -> nn.Module:
        trials = self

        class SwapUnseen(Swap):
            def plan(self, capture: Capture) -> Plan:
                def unseen(edit: Edit) -> Edit:
                    other = trials.size - 1 - int(edit.path.partition(".")[0])
                    return replace(edit, options={"modules": [edit.path, f"{other}.norm"]})

                return Plan(tuple(map(unseen, super().plan(capture).edits)))

            def apply(self, model: nn.Module, *given: Any) -> tuple[nn.Module, Plan]:
                trials.count += next(model.parameters()).dtype == torch.float32
                return super().apply(model, *given)

        net = Sum(*(Link(3, 4) for _ in range(self.size))).eval()
        pipeline = Pipeline((SwapUnseen(self.wrong),))
        return orepa.collapse(net, inputs=images(), inplace=inplace, pipeline=pipeline)


@pytest.mark.parametrize(
    ("size", "wrong", "inplace"), [(60, "41.conv", False), (12, "7.conv 8.conv", True)]
)
def test_a_wrong_edit_among_many_is_found_by_halving(size: int, wrong: str, inplace: bool) -> None:
    torch.manual_seed(2)
    trials = Trials(size, paths := tuple(wrong.split()))
    made = recorded_plans(trials.collapse(inplace=inplace))[-1]
    assert {edit.path for edit in made.edits}.isdisjoint(paths)
    assert len(made.edits) == size - len(paths)
    assert trials.count <= 2 * (1 + 8 * len(paths))  # each is tried without values first
