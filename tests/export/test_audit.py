"""The audit of half precision: what overflows, what goes subnormal, and what to keep."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from orepa_compiler.errors import ExportError
from orepa_compiler.export.audit import Tally, audit_half
from tests.export.nets import SmallNet, images


class Hot(nn.Module):
    """Two convs whose product is harmless, and whose first result is not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        with torch.no_grad():
            self.up.weight.fill_(3e5)
            self.down.weight.fill_(1e-7)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


@pytest.fixture(scope="module")
def hot() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), Hot(), nn.ReLU()).eval()


def test_a_net_of_moderate_values_has_no_problem(net: SmallNet) -> None:
    found = audit_half(net, images())
    assert found, found
    assert found.keep == ()
    places = {(row.module, row.what) for row in found.rows}
    assert {("conv1", "weight"), ("conv1", "convolution"), ("", "relu"), ("", "input")} <= places
    assert "fp16: nothing overflows or goes subnormal (largest magnitude" in str(found)


def test_weights_and_activations_are_named_with_their_numbers(hot: nn.Module) -> None:
    found = audit_half(hot, images())
    problems = {(row.module, row.what): row for row in found.problems}
    assert problems.keys() == {("1.up", "weight"), ("1.up", "convolution"), ("1.down", "weight")}
    assert problems["1.up", "weight"].problem == "overflow"
    assert problems["1.up", "weight"].largest == pytest.approx(3e5)
    assert problems["1.up", "convolution"].largest > 65504
    down = problems["1.down", "weight"]
    assert (down.problem, down.subnormal) == ("subnormal", 1.0)
    assert down.loss == pytest.approx(abs(float(torch.tensor(1e-7).half()) / 1e-7 - 1), rel=1e-3)
    assert not found


def test_the_advice_is_the_module_whose_own_output_fits_and_it_helps(hot: nn.Module) -> None:
    found = audit_half(hot, images())
    # 1.up alone would not do: what leaves it is cast to half again.
    assert found.keep == ("1",)
    assert found.verdict.endswith("keep in float32: --keep-fp32 1")
    assert audit_half(hot, images(), keep_fp32=found.keep)
    still = audit_half(hot, images(), keep_fp32="1.up")
    assert ("1.up", "output") in {(row.module, row.what) for row in still.problems}
    assert still.keep == ("1",)


def test_where_no_module_helps_another_precision_is_named(hot: nn.Module) -> None:
    found = audit_half(hot[:1], 1e6 * images())
    assert found.keep == ("",)
    assert found.verdict.endswith("no module's own output fits fp16: export in bf16 or fp32")
    assert audit_half(hot[:1], 1e6 * images(), precision="bf16")


def test_the_model_and_its_hooks_are_left_as_they_were(hot: nn.Module) -> None:
    hot.train()
    before = {name: tensor.clone() for name, tensor in hot.state_dict().items()}
    audit_half(hot, images())
    assert hot.training
    hot.eval()
    assert all(not module._forward_hooks for module in hot.modules())
    assert all(not module._forward_pre_hooks for module in hot.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in hot.state_dict().items())


def test_all_batches_count(hot: nn.Module) -> None:
    assert audit_half(hot[:1], [images(), images()])
    assert not audit_half(hot[:1], [images(), 1e6 * images()])


def test_the_table_and_the_data_say_the_same(hot: nn.Module) -> None:
    found = audit_half(hot, images())
    lines = str(found).splitlines()
    assert lines[0] == found.verdict
    assert lines[1].split() == ["module", "what", "largest", "subnormal", "loss"]
    assert [line.split()[-1] for line in lines[2:5]] == ["overflow", "overflow", "subnormal"]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["keep"] == ["1"]
    assert len(data["rows"]) == len(found.rows)


def test_zeros_and_what_was_never_finite_do_not_count() -> None:
    tally = Tally()
    tally.add(torch.tensor([0.0, float("inf"), float("nan"), 1.0]), torch.float16)
    tally.add(torch.empty(0), torch.float16)
    assert (tally.largest, tally.count, tally.small) == (1.0, 1, 0)
    assert tally.problem(torch.float16) == ""


def test_a_mistake_is_told(net: SmallNet) -> None:
    with pytest.raises(ExportError, match=r"precision='int8' is not one of fp16, bf16"):
        audit_half(net, images(), precision="int8")
    with pytest.raises(ExportError, match=r"an audit of the activations needs inputs"):
        audit_half(net, [])
    with pytest.raises(ExportError, match=r"'layer4' matches none of the 6 modules"):
        audit_half(net, images(), keep_fp32="layer4")
