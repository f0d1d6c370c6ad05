"""OpenVINO as a side: its file, its runner, and the commands that know it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.cli import export_main, main
from orepa_compiler.export.run.openvino import OpenVINORunner, write_openvino
from tests.norms import randomise_norms

NETS = """
import torch
from torch import nn

def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)


def test_its_files_have_one_ending(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(orepa.ExportError, match=r"net.bin: OpenVINO's files end in \.xml"):
        write_openvino("net.onnx", "net.bin")
    for line, said in (
        ("--openvino net.bin", "--openvino net.bin: its name ends in .xml; name it so"),
        ("--openvino a.xml --precision bf16", "takes fp32, fp16 and int8; export bf16 without it"),
    ):
        assert export_main(["nets.py:tiny", *line.split()]) == 2
        assert said in capsys.readouterr().err


def test_without_the_package_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    assert export_main(["nets.py:tiny", "--openvino", "net.xml"]) == 2
    assert "orepa-compiler[openvino]" in capsys.readouterr().err
    assert not Path("net.onnx").exists(), "told before any work"


def test_the_runner_is_a_side() -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    net = orepa.collapse(randomise_norms(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))))
    x = torch.randn(2, 3, 8, 8)
    orepa.export_onnx(net, x, "net.onnx")
    path = write_openvino("net.onnx", "net.xml")
    assert Path("net.bin").is_file()
    runner = OpenVINORunner(path)
    assert [tuple(spec.shape) for spec in runner.inputs] == [("batch", 3, 8, 8)]
    assert orepa.verify(net, runner, x)
    assert orepa.verify(net, "net.xml", x)
    with torch.no_grad():
        net[0].weight.mul_(1.01)
    assert not orepa.verify(net, runner, x)
    with pytest.raises(orepa.ExportError, match=r"input .* has shape \(2, 4, 8, 8\), but the file"):
        runner(torch.randn(2, 4, 8, 8))
    Path("net.xml").write_text("<net/>")
    with pytest.raises(orepa.ExportError, match=r"net\.xml: OpenVINO cannot read it"):
        OpenVINORunner("net.xml")


def test_an_export_checks_it_and_verify_and_bench_know_it() -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    line = "nets.py:tiny --input-shape 3x16x16 --openvino net.xml --json net.json"
    assert export_main(line.split()) == 0
    steps = {step["step"]: step for step in json.loads(Path("net.json").read_text())["steps"]}
    assert steps["check openvino"]["verdict"] == "pass"
    assert main(["verify", "net.onnx", "net.xml"]) == 0
    assert main(["verify", "nets.py:tiny", "net.onnx@openvino"]) == 0
    assert (
        main(
            ["bench", "net.onnx", "--against", "net.onnx", "--rounds", "6", "--json", "bench.json"]
        )
        == 0
    )
    rows = {row["backend"]: row for row in json.loads(Path("bench.json").read_text())["rows"]}
    assert rows["OpenVINO CPU"]["ratio"] > 0


def test_a_manifest_runs_it_again_where_the_package_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    line = "nets.py:tiny --input-shape 3x16x16 --openvino net.xml --dynamic-size --output-names y"
    assert export_main(line.split()) == 0

    def rechecked() -> tuple[int, dict[str, dict]]:
        code = main(["verify", "net.onnx.manifest.json", "--json", "again.json"])
        steps = json.loads(Path("again.json").read_text())["steps"]
        return code, {step["step"]: step for step in steps}

    code, steps = rechecked()
    assert code == 0
    assert steps["openvino file"]["verdict"] == "pass"
    rows = steps["openvino"]["report"]["rows"]
    assert {tuple(row["shape"]) for row in rows} == {(2, 4, 14, 14), (2, 4, 46, 78)}
    with monkeypatch.context() as without:
        without.setitem(__import__("sys").modules, "openvino", None)
        code, steps = rechecked()
        assert (code, steps["openvino"]["verdict"]) == (0, "not run")
        assert "orepa-compiler[openvino]" in steps["openvino"]["note"]
    weights = bytearray(Path("net.bin").read_bytes())
    weights[2] ^= 64
    Path("net.bin").write_bytes(weights)
    code, steps = rechecked()
    assert code == 1
    assert steps["weights file"]["verdict"] == "mismatch"
    assert steps["openvino"]["verdict"] == "mismatch"
