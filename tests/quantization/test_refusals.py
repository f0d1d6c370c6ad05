"""What cannot be rounded, or has no range: left in float32 with the reason, or one clear error."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.quantization.carrying import ranges_of, with_ranges
from orepa_compiler.quantization.layers import rounded_layers
from tests.norms import randomise_norms
from tests.quantization.nets import images, linear_blocks, plain, trained


class Summed(nn.Module):
    """Two convs with a norm each, which a collapse makes one; and a norm before a conv."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(4), nn.BatchNorm2d(4)])
        self.before, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.one(x)) + self.norms[1](self.two(x))
        y = self.last(self.before(torch.relu(y)))
        z: Tensor = self.head(torch.relu(self.up(torch.relu(y))))
        return z


def test_what_is_left_in_float_says_why() -> None:
    model = orepa.fake_quantize(randomise_norms(Summed()).eval(), inputs=images())
    assert rounded_layers(model).keys() == {"head"}
    reasons = {r.path: r.reason for r in orepa.recorded_plans(model)[-1].refusals}
    assert reasons.keys() == {"one", "two", "last", "up"}
    assert reasons["one"].startswith("the collapse makes one kernel of it and two")
    assert reasons["last"] == (
        "the collapse folds before, before it, into its kernel by input channel"
    )
    assert reasons["up"].startswith("ConvTranspose2d: its forward is not torch's")
    deploy = orepa.collapse(trained(model), inputs=images())
    torch.testing.assert_close(deploy(images()), model(images()), rtol=1e-4, atol=1e-4)


def test_where_selects() -> None:
    model = orepa.fake_quantize(plain(), where=["!stem*", "!head.3"])
    assert rounded_layers(model).keys() == {"body.0", "deep", "head.1"}
    refusals = orepa.recorded_plans(model)[-1].refusals
    assert {r.reason for r in refusals} == {"not selected by where"}


def test_a_kernel_that_a_hand_changed_before_the_collapse_is_refused() -> None:
    model = orepa.fake_quantize(plain(), inputs=images())
    ranges, float_model = ranges_of(model), orepa.collapse(plain())
    with torch.no_grad():
        float_model.body[0].weight[3, 0] += 1
    with pytest.raises(
        orepa.ReparamError, match=r"body\.0: its kernel after the collapse is not the"
    ):
        with_ranges(float_model, ranges)
    float_model = orepa.collapse(plain())
    float_model.deep = nn.Identity()
    with pytest.raises(orepa.ReparamError, match=r"deep: it was trained .* has a Identity in its"):
        with_ranges(float_model, ranges)
    float_model.deep = nn.Conv2d(8, 4, 3)
    with pytest.raises(orepa.ReparamError, match=r"deep: its kernel was trained as \(8, 1, 3, 3\)"):
        with_ranges(float_model, ranges)


@pytest.mark.parametrize("verb", [orepa.expand, orepa.plan, orepa.cut, orepa.fake_quantize])
def test_what_rewrites_a_model_asks_for_one_that_does_not_round(verb: object) -> None:
    model = orepa.fake_quantize(linear_blocks())
    said = r"stem\.0: it rounds to int8 \(5 such layers\), and \w+ works on a model that does not"
    with pytest.raises(orepa.ReparamError, match=said):
        verb(model)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (None, "the maps that go into it have no range: none went through in train mode"),
        (images() * float("nan"), r"the maps that go into it were not finite \(from nan to nan\)"),
        (images() * float("inf"), r"the maps that go into it were not finite"),
        (images() * 0, "the maps that go into it were all 0, which gives no range"),
    ],
)
def test_maps_without_a_range_are_named(batch: Tensor | None, said: str) -> None:
    model = orepa.fake_quantize(plain(), inputs=batch)
    with pytest.raises(orepa.ReparamError, match=rf"^stem\.0: {said}"):
        orepa.freeze_ranges(model)


def test_kernels_that_hold_no_integers_are_named() -> None:
    model = orepa.fake_quantize(plain(), inputs=images())
    with pytest.raises(orepa.ReparamError, match=r"stem\.0: its kernel is torch\.bfloat16, which"):
        orepa.collapse(copy.deepcopy(model).bfloat16())
    with torch.no_grad():
        model.stem[1].running_mean[2] = float("nan")
        model.stem[1].running_var[2] = float("nan")
    with pytest.raises(orepa.ReparamError, match=r"stem\.0: its kernel is finite, and not after"):
        orepa.collapse(model)
    with torch.no_grad():
        model.deep.weight[1] = float("nan")
        model.stem[1].running_var[2] = 1.0
    with pytest.raises(orepa.ReparamError, match=r"deep: its kernel holds NaN or infinity, so it"):
        orepa.collapse(model)


def test_a_model_in_half_precision_does_not_round() -> None:
    said = r"stem\.0: its parameters are torch\.bfloat16, which .* train model\.float\(\), under a"
    with pytest.raises(orepa.ReparamError, match=said):
        orepa.fake_quantize(plain().bfloat16())


def test_mistakes_in_the_call_are_errors() -> None:
    with pytest.raises(orepa.ReparamError, match="preset='gpu' is not one of tensorrt, cpu"):
        orepa.fake_quantize(plain(), preset="gpu")  # type: ignore[arg-type]
    with pytest.raises(orepa.ReparamError, match=r"no layer can be rounded to int8: .*not selecte"):
        orepa.fake_quantize(plain(), where="nothing*")
    for verb in (orepa.freeze_ranges, orepa.drop_ranges):
        with pytest.raises(orepa.ReparamError, match="Net has no layer that rounds to int8; call"):
            verb(plain())  # type: ignore[operator]
    with pytest.raises(orepa.ReparamError, match="the model does not run on batch 0 of the"):
        orepa.fake_quantize(plain(), inputs=torch.zeros(1, 2, 12, 12))
    with pytest.raises(orepa.ReparamError, match="on the meta device: there is no kernel to take"):
        orepa.fake_quantize(plain().to("meta"))
