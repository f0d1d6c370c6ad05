"""The benchmark of a training step: the forms that it compares are what they say they are."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import orepa_compiler as orepa
from benchmarks.step import command, measuring, results, variants
from benchmarks.step.dbb import DiverseBranchBlock, PaddedNorm, with_diverse_branches
from benchmarks.step.measuring import Setting, ratios, saved_bytes
from benchmarks.step.naive import NaiveConv, naive
from benchmarks.step.operations import OperationCount, operations
from benchmarks.step.variants import Stepper
from orepa_compiler.blocks import ReparamConv
from tests.norms import randomise_norms
from tests.operator_factories import random_tensor

MODEL = "test_resnet"  # timm's, of 0.5 million parameters
SETTING = Setting(batch=2, size=32)


def net() -> nn.Module:
    stem = (nn.Conv2d(3, 4, 7, 2, 3), nn.BatchNorm2d(4), nn.ReLU())
    body = (nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    deep = (nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4))
    return nn.Sequential(*stem, *body, *deep)


def test_the_naive_form_is_the_same_function_with_the_same_gradients() -> None:
    ours = orepa.expand(net(), init="paper", post_norm="none")  # no norm in a branch
    ours = randomise_norms(ours).double()
    with torch.no_grad():
        for number, parameter in enumerate(ours.parameters()):
            parameter.add_(random_tensor(*parameter.shape, seed=number) * 0.1)
    theirs = naive(copy.deepcopy(ours))
    assert sum(isinstance(m, NaiveConv) for m in theirs.modules()) == 4
    x = random_tensor(2, 3, 16, 16)
    outputs = [model(x) for model in (ours, theirs)]
    torch.testing.assert_close(outputs[1], outputs[0])
    for y in outputs:
        (y * random_tensor(*y.shape, seed=1)).sum().backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=name)


def test_a_diverse_branch_block_is_one_conv_in_eval_mode_border_included() -> None:
    """A norm before a padded conv must not show at the border."""
    block = randomise_norms(DiverseBranchBlock(nn.Conv2d(4, 6, 3, padding=1))).double().eval()
    conv = nn.Conv2d(4, 6, 3, padding=1).double()
    x = random_tensor(2, 4, 6, 6)
    assert len(block.branches) == 4
    with torch.no_grad():
        still = block(torch.zeros_like(x))
        torch.testing.assert_close(still, still[:1, :, :1, :1].expand_as(still))
        for channel in range(4):
            impulse = torch.zeros(1, 4, 6, 6).double()
            impulse[0, channel, 2, 2] = 1.0
            conv.weight[:, channel] = (block(impulse) - still[:1])[0, :, 1:4, 1:4].flip(1, 2)
        conv.bias.copy_(still[0, :, 0, 0])
        torch.testing.assert_close(block(x), conv(x))


def test_diverse_branches_take_the_place_of_conv_and_norm() -> None:
    model = with_diverse_branches(
        nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU())
    )
    assert isinstance(model[0], DiverseBranchBlock)
    assert len(model[0].branches) == 2
    assert isinstance(model[1], nn.Identity)
    assert sum(isinstance(m, PaddedNorm) for m in model.modules()) == 0


@pytest.mark.parametrize(
    ("name", "kernels"), [("plain", False), ("orepa", False), ("naive", True), ("dbb", False)]
)
def test_saved_bytes_tell_kernels_from_features(name: str, kernels: bool) -> None:
    stepper = Stepper(name, MODEL, batch=2, size=32, device="cpu", amp=False)
    found = saved_bytes(stepper)
    assert found["features"] > 0
    assert (found["kernels"] > 0) == kernels
    blocks = [m for m in stepper.net.modules() if isinstance(m, ReparamConv)]
    assert found["W_e"] == sum(4 * block.weight.numel() for block in blocks)


def small_net(name: str) -> nn.Module:
    """Of two blocks: dynamo takes seconds for each."""
    convs = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    convs += [nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1000))


@pytest.mark.parametrize("name", ["plain compiled", "orepa compiled"])
def test_of_a_compiled_model_the_sum_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(variants, "build", small_net)
    stepper = Stepper(name, MODEL, batch=2, size=32, device="cpu", amp=False)
    assert saved_bytes(stepper).keys() == {"saved"}
    assert saved_bytes(stepper)["saved"] > 0


@pytest.mark.parametrize("name", ["plain x4", "orepa x4", "two-phase", "dbb"])
def test_every_form_takes_steps(name: str) -> None:
    stepper = Stepper(name, MODEL, batch=2, size=32, device="cpu", amp=True)
    before = stepper.loss().detach()
    for _ in range(3):
        stepper.step()
    assert all(p.grad is not None for p in stepper.net.parameters())
    assert not torch.equal(stepper.loss(), before)


def test_ratios_are_taken_round_by_round() -> None:
    found = ratios({"plain": [1.0, 2.0, 4.0], "orepa": [2.0, 3.0, 4.0], "orepa x4": [1.0]})
    assert found["orepa"] == {"seconds": 3.0, "ratio": 1.5, "least": 1.0, "most": 2.0}
    assert found["plain"]["ratio"] == 1.0
    assert found["orepa x4"] == {"seconds": 1.0}


def test_the_command_writes_a_table_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def watched(model: str, names: Any, setting: Setting, repeats: int) -> dict[str, list[float]]:
        measured.extend(names)
        return measuring.times(model, names, setting, repeats)

    def here(model: str, name: str, setting: Setting) -> dict[str, float]:
        return measuring._in_fresh_process({"model": model, "name": name, **asdict(setting)})

    monkeypatch.setattr(command, "times", watched)
    monkeypatch.setattr(command, "memory", here)
    output, page = tmp_path / "new" / "step.json", tmp_path / "page.md"
    page.write_text(f"before\n{command.BEGIN}old\n{command.END}after\n")
    options = ["--models", MODEL, "--batch", "2", "--size", "32", "--repeats", "1"]
    places = ["--output", str(output), "--docs", str(page)]
    for variant in ("orepa", "orepa", "dbb"):
        arguments = [*options, *places, "--variants", variant]
        done = CliRunner().invoke(command.app, arguments, catch_exceptions=False)
        assert done.exit_code == 0
    assert measured == ["plain", "orepa", "plain", "dbb"]
    (case,) = json.loads(output.read_text())["cases"].values()
    assert set(case["variants"]) == {"plain", "orepa", "dbb"}
    assert case["variants"]["orepa"]["kernels"] == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert text.count(f"| {MODEL} | 2 |") == 3


def test_memory_is_that_of_a_process_of_its_own() -> None:
    found = measuring.memory(MODEL, "two-phase", SETTING)
    assert set(found) == {"peak", "parameters", "saved", "features", "W_e", "kernels"}
    assert found["peak"] > 5e7
    assert found["kernels"] == 0


def test_a_wrong_name_is_an_error() -> None:
    done = CliRunner().invoke(command.app, ["--variants", "fast"])
    assert done.exit_code == 2
    assert "no variant 'fast'; there are plain, orepa" in " ".join(done.output.split())
    assert CliRunner().invoke(command.app, ["--amp", "fp8"]).exit_code == 2


def test_a_figure_that_was_not_measured_is_a_dash() -> None:
    case = {
        "model": "resnet18",
        "setting": {"batch": 32, "device": "cpu", "amp": False},
        "variants": {"orepa": {"seconds": 2.0, "ratio": 1.1, "least": 1.0, "most": 1.2}},
    }
    (row,) = results.rows({"cases": {"a": case}})
    assert row[:7] == ("resnet18", "32", "orepa", "2.000", "1.100", "1.00 - 1.20", "1.15")
    assert row[7:] == ("-",) * 8
    case["variants"] |= {"plain": {"seconds": 1.0, "operations": 165}}  # type: ignore[operator]
    case["variants"]["orepa"]["operations"] = 495  # type: ignore[index]
    rows = list(results.rows({"cases": {"a": case}}))
    assert [row[7:9] for row in rows] == [("165", "1.00"), ("495", "3.00")]


def test_operations_are_counted_without_views_and_lists_as_a_gpu_takes_them() -> None:
    a, b = torch.ones(4, 6), torch.ones(6, 4)
    with OperationCount() as count:
        (a.t() @ b.view(4, 6)).unsqueeze(0).add_(1)
        torch.empty(3)
        torch._foreach_add([a, b], [a, b])
    assert count.counts == {"mm": 1, "add_": 1, "_foreach_add": 1}
    with OperationCount() as count:
        torch._foreach_add([a, b], [a, a.t()])
        torch._foreach_mul_([a, b], 2.0)
    assert count.counts == {"_foreach_add": 2, "_foreach_mul_": 1}


def test_the_operations_of_a_step_are_those_of_its_form() -> None:
    """Blocks of one form add none, inside kernels_once; each adds its own in an ordinary step."""
    found = {name: operations(MODEL, name, size=32) for name in ("plain", "orepa", "two-phase")}
    assert found["plain"] < found["two-phase"] < found["orepa"] < 5 * found["plain"]
    assert operations(MODEL, "orepa, hooks", size=32) <= found["two-phase"]
