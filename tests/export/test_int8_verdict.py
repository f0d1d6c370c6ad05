"""An int8 file beside the model, or the float32 file, that it was made of."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.cli import main
from orepa_compiler.export import OnnxRunner, export_onnx
from orepa_compiler.export.int8.verdict import lost_in_file
from orepa_compiler.testing import assert_equivalent
from tests.export.nets import SmallNet, far_apart, images
from tests.norms import randomise_norms


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("int8")


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    return orepa.expand(randomise_norms(SmallNet()).eval(), block=orepa.OREPA).eval()


@pytest.fixture(scope="module")
def files(trained: nn.Module, folder: Path) -> tuple[Path, Path]:
    deploy = orepa.collapse(trained)
    data = [images(8), images(7)]
    float32 = export_onnx(deploy, images(), folder / "net.onnx")
    int8 = export_onnx(deploy, images(), folder / "int8.onnx", precision="int8", calibration=data)
    return float32, int8


def test_it_is_judged_by_its_own_noise_beside_the_model_and_the_file(
    trained: nn.Module, files: tuple[Path, Path]
) -> None:
    float32, int8 = files
    data = [images(8), images(6)]
    for reference in (trained, orepa.collapse(trained), float32):
        report = orepa.verify(reference, int8, data, precision="int8")
        assert report, report
        assert "in int8 with these ranges" in report.verdict
        assert all(row.noise and 1e-4 < row.noise < 2e-2 for row in report.rows)
        (agreement,) = report.agreements
        assert agreement.positions == 14
        assert f"agreement: {agreement}" in str(report)
    assert not trained.training
    # By the noise of float32 it is wrong.
    assert not orepa.verify(float32, int8, data)
    assert assert_equivalent(float32, int8, data, precision="int8")


def test_a_wrong_model_and_wrong_weights_fail(trained: nn.Module, files: tuple[Path, Path]) -> None:
    float32, int8 = files
    wrong = copy.deepcopy(orepa.collapse(trained))
    with torch.no_grad():
        wrong.get_parameter("block.2.weight").mul_(2)
    assert not orepa.verify(wrong, int8, images(8), precision="int8")
    assert not orepa.verify(float32, shuffled(int8), images(8), precision="int8")
    with pytest.raises(AssertionError, match="FAIL"):
        assert_equivalent(float32, shuffled(int8), images(8), precision="int8")


def shuffled(int8: Path) -> Path:
    """The file with the weights of its first conv in another order."""
    model = onnx.load(int8)
    weight = next(t for t in model.graph.initializer if t.name.endswith("weight_quantized"))
    values = onnx.numpy_helper.to_array(weight)
    weight.CopyFrom(onnx.numpy_helper.from_array(np.roll(values, 1, 0), weight.name))
    path = int8.with_name("unlike.onnx")
    onnx.save(model, path)
    return path


def test_what_is_no_int8_file_of_that_model_is_refused(
    trained: nn.Module, files: tuple[Path, Path], folder: Path
) -> None:
    float32, int8 = files
    other = export_onnx(far_apart(1.0), images(), folder / "other.onnx")
    for reference, candidate, said in (
        (float32, float32, r"net.onnx: holds no int8"),
        (other, int8, r"int8.onnx: rounds what .* reads, and .*other.onnx has no such node"),
        (float32, trained, r"the candidate is a SmallNet; its ranges are read from the ONNX"),
        (lambda x: x, int8, r"the reference is a function; give the torch model"),
    ):
        with pytest.raises(orepa.ReparamError, match=said):
            orepa.verify(reference, candidate, images(), precision="int8")
    with pytest.raises(orepa.ReparamError, match="stress=True are beyond them"):
        orepa.verify(float32, int8, images(), precision="int8", stress=True)


@pytest.fixture(scope="module")
def collapsed(folder: Path) -> tuple[Path, Path]:
    """The float32 and the int8 file of a net whose channels are far apart."""
    net, data = far_apart(1e6), [images(4)]
    float32 = export_onnx(net, images(), folder / "far.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", orepa.Int8RangeWarning)
        int8 = export_onnx(net, images(), folder / "far8.onnx", precision="int8", calibration=data)
    return float32, int8


def test_ranges_that_lose_a_layer_are_named_with_what_helps(collapsed: tuple[Path, Path]) -> None:
    float32, int8 = collapsed
    (found,) = lost_in_file(float32, int8, [(images(4),)])
    assert (found.path, found.lost, found.channels) == ("2", 7, 8)
    for reference in (far_apart(1e6), float32):
        report = orepa.verify(reference, int8, images(4), precision="int8")
        assert not report
        assert "int8 with these ranges" in report.verdict
        assert "keep its layers in float32" in report.verdict
        (note,) = [note for note in report.notes if "int8 rounds" in note]
        assert "2: int8 rounds 7 of 8 input channels to 0" in note
        assert "keep_fp32=['2'] keeps them in float32: 56.6% of the weights" in note


def test_the_command(
    files: tuple[Path, Path],
    collapsed: tuple[Path, Path],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    np.save("data.npy", images(8).numpy())
    line = "verify {} {} --precision int8 --inputs data.npy"
    assert main(line.format("net.onnx", "int8.onnx").split()) == 0
    assert "the truth's top-1 at" in capsys.readouterr().out
    assert main(line.format("far.onnx", "far8.onnx").split()) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "2: int8 rounds 7 of 8 input channels to 0" in out
    assert "float32 is" not in out
    assert main(line.format("net.onnx", "net.onnx").split()) == 4
    assert "holds no int8" in capsys.readouterr().err
    assert main(["verify", "net.onnx", "int8.onnx", "--precision", "int8"]) == 2
    assert "--precision int8 is judged on your own data" in capsys.readouterr().err


def test_runners_are_sides(files: tuple[Path, Path]) -> None:
    float32, int8 = map(OnnxRunner, files)
    assert orepa.verify(float32, int8, images(8), precision="int8")
