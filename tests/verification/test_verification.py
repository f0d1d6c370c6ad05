"""The contract of verify: which outputs it matches, and what fails with which words."""

from __future__ import annotations

import json
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor, nn

from orepa_compiler.errors import ReparamError
from orepa_compiler.verification import NOISE_FACTOR, verify_callables
from tests.verification_nets import Returning, X, changed, folded, net, poke, reasons

Pair = namedtuple("Pair", "features scores")
Other = namedtuple("Other", "features logits")


@dataclass
class Result:
    features: Tensor
    scores: Tensor
    loss: Tensor | None = None


class ModelOutput(OrderedDict[str, Tensor]):
    """As transformers has it: a dict and a dataclass in one."""


def as_dict(features: Tensor, scores: Tensor) -> dict[str, Tensor]:
    return {"features": features, "scores": scores}


def test_a_folded_net_agrees() -> None:
    report = verify_callables(net(), folded(net()), [X, X[:1]])
    assert report
    assert [(row.name, row.batch, row.shape) for row in report.rows] == [
        ("output", 0, (4, 5)),
        ("output", 1, (1, 5)),
    ]
    for row in report.rows:
        assert row.ok
        assert row.reason == ""
        assert row.dtype == "float32"
        assert row.top1 == 1.0
        assert 0 < row.error <= row.tolerance == NOISE_FACTOR * max(row.noise, 2**-23)
    assert report.max_error == max(row.error for row in report.rows)
    assert str(report).startswith("PASS: 1 output on 2 batches in float32; the worst error is ")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y * 1.001, "is above the tolerance"),
        (poke(9.0), "largest at (1, 2): 9, the truth is "),
        (lambda y: y * 0, "constant 0 in all 20 values, where the reference varies from -"),
        (lambda y: y * 0 + y[0, 0], "constant "),
        (poke(float("nan")), "the candidate is not finite: 1 NaN in 20 values"),
        (poke(float("inf")), "the candidate is not finite: 1 inf in 20 values"),
        (lambda y: y[:2], "shape (2, 5), the reference's is (4, 5)"),
        (lambda y: y[:, :, None], "shape (4, 5, 1), the reference's is (4, 5)"),
        (lambda y: y.half(), "dtype float16 where float32 is due; precision= says where"),
        (lambda y: y.double(), "dtype float64 where float32 is due"),
        (lambda y: y.flip(1), "is above the tolerance"),
        (lambda y: y.to_sparse(), "the candidate returned a torch.sparse_coo or quantized tensor"),
        (lambda y: y.numpy(), "the candidate returned a numpy.ndarray, which cannot be compared"),
        (lambda y: "done", "the candidate returned a str, which cannot be compared; return dense"),
        (lambda y: None, "the candidate has no output output; it returned nothing"),
        (lambda y: [y], "the reference has no output output_0; its outputs are output"),
        (lambda y: {"a": y, "b": y}, "the candidate has no output output; its outputs are a, b"),
    ],
)
def test_what_differs_fails_with_a_reason(change: Callable[[Tensor], Any], reason: str) -> None:
    report = verify_callables(net(), changed(change), X)
    assert not report
    assert reason in reasons(report)
    assert str(report).startswith("FAIL: ")


@pytest.mark.parametrize(
    ("reference", "candidate", "reason"),
    [
        (as_dict, lambda f, s: {"features": f}, "scores: the candidate has no output scores; its"),
        (
            as_dict,
            lambda f, s: {"features": f, "logits": s},
            "scores: the candidate has no output scores; its outputs are features, logits | "
            "logits: the reference has no output logits; its outputs are features, scores",
        ),
        (as_dict, lambda f, s: {**as_dict(f, s), "aux": s}, "aux: the reference has no output aux"),
        (as_dict, lambda f, s: (f, s), "features: the candidate has no output features; its"),
        (lambda f, s: (f, s), lambda f, s: (f,), "output_1: the candidate has no output output_1"),
        (lambda f, s: [f], lambda f, s: [f, s], "output_1: the reference has no output output_1"),
        (Pair, Other, "scores: the candidate has no output scores"),
        (Pair, lambda f, s: (f, s, s), "output_2: the reference has no output output_2"),
        (Result, lambda f, s: Result(f, s, s), "loss: the reference has no output loss"),
        (Pair, lambda f, s: Pair(s, f), "features: shape (4, 5), the reference's is (4, 6, 8, 8)"),
        (lambda f, s: None, lambda f, s: None, "nothing to compare: no side returned a tensor"),
        (lambda f, s: [], lambda f, s: {}, "nothing to compare: no side returned a tensor"),
        (lambda f, s: s[:0], lambda f, s: s[:0], "nothing to compare: shape (0, 5) holds no value"),
        (lambda f, s: "done", lambda f, s: "done", "the reference returned a str, which cannot"),
        (lambda f, s: {"a": {"b": s}}, lambda f, s: {"a": {"c": s}}, "no output a.b; its outputs"),
    ],
)
def test_outputs_must_have_their_matches(
    reference: Callable[..., Any], candidate: Callable[..., Any], reason: str
) -> None:
    report = verify_callables(Returning(reference), Returning(candidate), X)
    assert not report
    assert reason in reasons(report)


@pytest.mark.parametrize(
    ("reference", "candidate", "names"),
    [
        (as_dict, as_dict, ["features", "scores"]),
        (as_dict, lambda f, s: ModelOutput(scores=s, features=f), ["features", "scores"]),
        (Pair, lambda f, s: (f, s), ["features", "scores"]),
        (Result, Pair, ["features", "scores"]),
        (lambda f, s: (f, s), lambda f, s: [f, s], ["output_0", "output_1"]),
    ],
)
def test_outputs_are_matched_by_name_and_by_order_where_there_is_none(
    reference: Callable[..., Any], candidate: Callable[..., Any], names: list[str]
) -> None:
    report = verify_callables(Returning(reference), Returning(candidate), X)
    assert report, str(report)
    assert [row.name for row in report.rows] == names


@pytest.mark.parametrize(
    ("reference", "candidate", "names", "reason"),
    [
        (
            lambda f, s: (f, s),
            lambda f, s: {"map": f, "logits": s},
            ["output_0", "output_1"],
            "output_0: the candidate has no output output_0; its outputs are map, logits",
        ),
        (
            lambda f, s: s,
            lambda f, s: {"logits": s},
            ["output"],
            "output: the candidate has no output output; its outputs are logits",
        ),
        (
            lambda f, s: {"out": s},
            lambda f, s: s,
            None,
            "out: the candidate has no output out; its outputs are output",
        ),
        (
            lambda f, s: {"a": [f, {"b": s}]},
            lambda f, s: {"a.0": f, "a.1.b": s},
            ["a.0", "a.1.b"],
            "a.1.b: the candidate returns a.1.b under ['a.1.b'], the reference under ['a'][1]['b']",
        ),
    ],
)
def test_a_file_may_flatten_and_name_what_it_returns_and_a_model_may_not(
    reference: Callable[..., Any],
    candidate: Callable[..., Any],
    names: list[str] | None,
    reason: str,
) -> None:
    model, other = Returning(reference), Returning(candidate)
    report = verify_callables(model, other, X)
    assert not report
    assert reason in reasons(report)
    report = verify_callables(model, lambda x: other(x), X)  # as a session does
    assert bool(report) is (names is not None)
    if names:
        assert [row.name for row in report.rows] == names


def test_no_inputs_are_no_pass() -> None:
    report = verify_callables(net(), net(), [])
    assert not report
    assert report.rows == ()
    assert report.max_error == float("inf")
    assert repr(report) == "<Report FAIL: nothing was compared, the list of inputs is empty>"
    assert json.loads(json.dumps(report.to_dict()))["max_error"] is None


def test_every_positional_argument_arrives() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor, extra: dict[str, list[Tensor]], gain: float) -> Tensor:
            return x * gain + extra["more"][0]

    inputs = (X, {"more": [X + 1, X]}, 2.0)
    assert verify_callables(Two(), Two(), inputs)
    text = reasons(verify_callables(Two(), lambda x, extra, gain: x * gain, inputs))
    assert "is above the tolerance" in text


def test_one_object_on_both_sides_is_noted() -> None:
    model = net()
    assert verify_callables(model, model, X).notes == (
        "reference and candidate are one object: it was compared with itself",
    )


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("a.onnx", net()), {}, "the reference is a str; give an nn.Module or a function"),
        ((net(), 3), {}, "the candidate is a int; give an nn.Module or a function"),
        ((net().to("meta"), net()), {}, "no values to compare; 0.weight of the reference is on"),
        ((net(), net().to("meta")), {}, "0.weight of the candidate is on the meta device. Load"),
        ((net(), nn.LazyConv2d(3, 1)), {}, "weight of the candidate has no shape yet. Load the"),
        ((net(), net()), {"precision": "int8"}, "precision='int8' is not one of fp32, fp16, bf16"),
        ((net(), net()), {"factor": 0}, "factor=0: give a number from 1 up, in multiples of the"),
        ((net(), net()), {"truth": net}, "truth is a function; it is evaluated in float64, so"),
        ((net(), net()), {"truth": net().to("meta")}, "0.weight of the truth is on the meta"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    arguments: tuple[Any, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ReparamError, match=message):
        verify_callables(*arguments, X, **options)
