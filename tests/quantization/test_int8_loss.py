"""What int8 would lose is said before a file is written, by module and by way out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.cli import main
from orepa_compiler.export.int8.integers import file_layers
from orepa_compiler.int8.analysis import EACH_CHANNEL, EQUALIZED, ONE_STEP
from orepa_compiler.int8.training import observe
from orepa_compiler.quantization.layers import rounded_layers
from tests.quantization.nets import images, plain
from tests.quantization.test_equalizing import spread


def test_the_module_behind_far_apart_channels_is_the_worst_and_each_way_out_helps() -> None:
    loss = orepa.int8_loss(spread(), [images(), images(seed=1)])
    worst = loss.modules[0]
    assert worst.path == "two.0"
    assert worst.by_form[EACH_CHANNEL] + 10 < worst.by_form[EQUALIZED]
    signals = {whole.form: whole.signal for whole in loss.wholes}
    kept = "a step per channel, keep_fp32=['two.0', " + signals_end(loss.worst)
    assert list(signals) == [ONE_STEP, EACH_CHANNEL, EQUALIZED, kept]
    assert signals[EACH_CHANNEL] < signals[EQUALIZED]
    assert signals[EACH_CHANNEL] < signals[kept]
    assert all(0 <= (whole.top1 or 0) <= 1 for whole in loss.wholes)
    assert str(loss).startswith("the whole net in int8")
    assert loss.to_dict()["modules"][0]["path"] == "two.0"


def signals_end(worst: tuple[str, ...]) -> str:
    return ", ".join(map(repr, worst[1:])) + "]"


def test_one_step_for_a_kernel_with_far_apart_rows_is_worse() -> None:
    net = spread()
    loss = orepa.int8_loss(net, images())
    first = next(one for one in loss.modules if one.path == "one.0")
    # its large rows carry the signal: what is lost are the small ones, which two.0 reads
    assert first.by_form[ONE_STEP] <= first.by_form[EACH_CHANNEL] + 1


def test_the_ranges_are_those_that_an_export_takes(tmp_path: Path) -> None:
    net, batches = orepa.collapse(plain()), [images(), 3 * images(seed=1), images(seed=2)]
    model = orepa.fake_quantize(net).eval()
    observe(model, [(batch,) for batch in batches], widest=True)
    path = tmp_path / "net.onnx"
    orepa.export_onnx(net, images(), path, precision="int8", calibration=batches)
    found = {layer.place: layer.layer for layer in file_layers(path)}
    for place, layer in rounded_layers(model).items():
        # onnxruntime's steps span -127..127, ours -128..127
        ratio = float(found[place].step) / layer.input_quantizer.scale.item()
        assert ratio == pytest.approx(127.5 / 127, rel=1e-4)
        steps = layer.weight_quantizer.scale.numpy()
        alive = steps > 1e-6  # a channel of zeros has any step
        np.testing.assert_allclose(found[place].steps[alive], steps[alive], rtol=1e-4)


def test_a_net_that_cannot_be_equalized_has_a_note() -> None:
    loss = orepa.int8_loss(spread(activation=nn.GELU), images())
    assert list(loss.modules[0].by_form) == [ONE_STEP, EACH_CHANNEL]
    assert loss.notes[0].startswith("not equalized: Spread has no two layers")
    assert "note: not equalized" in str(loss)


def test_the_command_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "images.npy", images(6).numpy())
    arguments = ["int8", "tests/quantization/nets.py:Net", "--input-shape", "3x12x12"]
    assert main([*arguments, "--calibration", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "the whole net in int8" in said
    assert "body.0" in said
    assert main([*arguments, "--calibration", str(tmp_path / "none")]) == 2
    assert torch.is_grad_enabled()
