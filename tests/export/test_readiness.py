"""Models and inputs that must not be exported are refused, and the user's model stays as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from orepa_compiler.blocks import LinearBlock
from orepa_compiler.blocks.catalogue import OREPA
from orepa_compiler.errors import ExportError
from orepa_compiler.export.gates.readiness import check_ready, first_batch
from orepa_compiler.export.onnx.precision import cast
from tests.export.nets import SmallNet, images


def test_the_first_batch_of_each_form_of_inputs() -> None:
    x, y = images(), images(3)
    assert first_batch(x) == (x,)
    assert first_batch((x, 2)) == (x, 2)
    assert first_batch([x, y]) == (x,)
    assert first_batch([(x, y), (y, x)]) == (x, y)


@pytest.mark.parametrize("inputs", [[], (), (3,), None, {"image": images()}])
def test_inputs_without_a_batch_are_refused(inputs: object) -> None:
    with pytest.raises(ExportError, match=r"inputs hold no batch.*pass a tensor"):
        first_batch(inputs)  # type: ignore[arg-type]


def test_a_model_in_eval_mode_is_ready() -> None:
    check_ready(SmallNet().eval())


def test_a_model_in_train_mode_is_refused() -> None:
    with pytest.raises(ExportError, match=r"in train mode; call model.eval\(\)"):
        check_ready(SmallNet())


def test_a_model_in_training_form_is_refused_with_the_first_block_and_their_number() -> None:
    model = SmallNet()
    for index in (0, 2):
        model.block[index] = LinearBlock(model.block[index], OREPA)
    message = r"block.0: still in training form \(2 such blocks\); call orepa.collapse\(model\)"
    with pytest.raises(ExportError, match=message):
        check_ready(model.eval())


def test_a_model_without_values_is_refused_with_its_first_tensor() -> None:
    with pytest.raises(ExportError, match=r"conv1.weight: on the meta device.*load its weights"):
        check_ready(SmallNet().eval().to("meta"))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(ExportError, match=r"a function cannot be exported; pass an nn.Module"):
        check_ready(lambda x: x)  # type: ignore[arg-type]


def test_casting_leaves_the_model_alone() -> None:
    model = SmallNet().double().eval()
    before = copy.deepcopy(model.state_dict())
    half = cast(model, torch.float16)
    assert {tensor.dtype for tensor in half.state_dict().values()} == {torch.float16}
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) and after[k].dtype == torch.double for k in before)


def test_a_value_beyond_the_range_of_the_type_is_refused_with_its_name() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)).eval()
    model[2].running_var[1] = 1e5
    message = r"2.running_var: its largest magnitude 1e\+05 is beyond torch.float16.*6.55e\+04"
    with pytest.raises(ExportError, match=message):
        cast(model, torch.float16)
    cast(model, torch.bfloat16)


def test_an_infinity_of_the_models_own_is_kept() -> None:
    model = nn.Conv2d(1, 1, 1).eval()
    model.register_buffer("mask", torch.full((2,), float("-inf")))
    assert cast(model, torch.float16).mask.isinf().all()
