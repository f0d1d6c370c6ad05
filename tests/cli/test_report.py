"""`--report FILE.html` of orepa-export and orepa verify: the page of a real command."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from orepa_compiler.cli import export_main, main
from orepa_compiler.export.latency import file_contents
from orepa_compiler.export.onnx.reading import load_graph

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

NETS = """
import torch
import orepa_compiler as orepa
from torch import nn

def plain(slope=0.0):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(slope),
              nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)]
    net = nn.Sequential(*layers)
    for norm in (net[1], net[4]):
        nn.init.uniform_(norm.running_mean, -1, 1)
    return net

def leaky():
    return plain(0.3)

def expanded():
    return orepa.expand(plain(), block=orepa.OREPA)
"""

SHAPE = "--input-shape 3x8x8"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nets.py, and the export of an expanded model with its page."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        Path("nets.py").write_text(NETS)
        line = f"nets.py:expanded --onnx net.onnx --precision fp16 {SHAPE} --report net.html"
        assert export_main(line.split()) == 0
    return folder


@pytest.fixture(autouse=True)
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return copy


def banner(name: str) -> str:
    text = Path(name).read_text(encoding="utf-8")
    return text[text.index('<div class="banner') : text.index("<main>")]


def section(name: str, part: str) -> str:
    text = Path(name).read_text(encoding="utf-8")
    found = re.search(rf'<section id="{part}">(.*?)</section>', text, re.DOTALL)
    assert found
    return found[1]


def counts(name: str) -> list[tuple[str, ...]]:
    """Convs, branches and norms of each form."""
    found = re.findall(
        r"<td>[^<]*</td>" + r'<td class="n">([^<]*)</td>' * 3, section(name, "sizes")
    )
    return list(found)


def test_the_page_of_an_export_has_all_that_was_found() -> None:
    assert "✓ pass" in banner("net.html")
    chain = section("net.html", "chain")
    for form in ("expanded model", "collapsed model", "ONNX file"):
        assert re.search(rf'<span class="form[^"]*">{form}</span>', chain)
    assert chain.count("✓ pass</span>\nerror") == 2
    assert "TensorRT" not in chain  # no engine was asked for
    assert "certified: 2 blocks" in section("net.html", "layers")
    rows = re.findall(r"<td>([^<]*)</td>", section("net.html", "sizes"))
    assert rows == ["model as loaded", "collapsed model", "ONNX file"]
    assert counts("net.html") == [("2", "12", "2"), ("2", "0", "0"), ("2", "0", "0")]
    assert section("net.html", "branches").count("<svg") == 4
    assert "fp16: " in section("net.html", "audit")
    assert "net.onnx.samples.safetensors" in section("net.html", "manifest")


def facts(name: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for tag, text in re.findall(r"<(dt|dd)>([^<]*)</d", section(name, "facts")):
        if tag == "dt":
            found[text] = []
        else:
            found[list(found)[-1]].append(text)
    return found


def test_the_page_says_what_was_made_and_how() -> None:
    found = facts("net.html")
    line = f"orepa-export nets.py:expanded --onnx net.onnx --precision fp16 {SHAPE}"
    assert found["command"] == [f"{line} --report net.html"]
    assert found["precision"] == ["fp16"]
    assert found["opset"] == ["20"]
    assert found["inputs"] == ["input: float16 (batch, 3, 8, 8)"]
    assert found["outputs"] == ["output: float16 (batch, 4, 8, 8)"]
    assert re.fullmatch(
        r"onnx: median \d+\.\d{3} ms, .* calls, .* samples/s\)", found["latency"][0]
    )
    assert "int8 agreement" not in found


def test_the_counts_are_the_same_wherever_they_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["verify", "net.onnx.manifest.json", "--report", "again.html", "--json", "again.json"])
    (held,) = facts("net.html")["graph"]
    assert held.startswith("2 convs, 0 sums of maps, 0 norms, ")
    assert facts("again.html")["graph"] == [held]
    steps = {s["step"]: s for s in json.loads(Path("again.json").read_text())["steps"]}
    assert steps["onnx gates"]["note"].startswith(held)
    counted = file_contents(Path("net.onnx"))
    assert (
        held
        == f"{counted.convs} convs, 0 sums of maps, {counted.norms} norms, {counted.nodes} nodes"
    )
    graph = load_graph(Path("net.onnx"))
    assert counted.nodes == len(graph.graph)
    assert graph.metadata_props["orepa.convs"] == str(counted.convs)
    shown = {(convs, norms) for convs, _, norms in counts("net.html")[1:]}
    assert shown == {(str(counted.convs), str(counted.norms))}


def test_an_int8_page_shows_how_often_it_decides_alike() -> None:
    np.save("data.npy", np.random.default_rng(0).normal(size=(9, 3, 8, 8)))
    line = f"nets.py:expanded --onnx int8.onnx --precision int8 --calibration data.npy {SHAPE}"
    assert export_main(f"{line} --report int8.html".split()) == 0
    (said,) = facts("int8.html")["int8 agreement"]
    assert re.match(
        r"check onnx: output: the truth's top-1 at \d+\.\d% of 576 ".replace("'", "&#39;"), said
    )
    assert "agreement: output: " in section("int8.html", "chain")


def test_the_charts_of_the_branches_are_folded_in() -> None:
    part = section("net.html", "branches")
    assert part.index("<details>") < part.index("<svg")
    assert part.rindex("<svg") < part.rindex("</details>")


def test_a_manifest_that_is_checked_again_says_what_was_not_run() -> None:
    assert main(["verify", "net.onnx.manifest.json", "--report", "again.html"]) == 0
    assert '<div class="banner pass-in-part">' in banner("again.html")  # and not green
    assert "– pass in part" in banner("again.html")
    assert "not run: onnx on the GPU: " in banner("again.html")
    chain = section("again.html", "chain")
    assert "not computed again" in chain
    assert chain.count('<span class="form open">') == 1
    assert "TensorRT" not in chain  # the manifest names no engine
    assert "a manifest is checked without the model" in section("again.html", "branches")
    assert counts("again.html") == [("2", "0", "0")]


def test_a_file_that_was_changed_is_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    Path("net.onnx").write_bytes(b"cut off")
    assert main(["verify", "net.onnx.manifest.json", "--report", "again.html"]) == 1
    assert "✗ mismatch" in banner("again.html")
    assert "a manifest is checked without the model" in section("again.html", "sizes")


def test_two_sides_that_differ_show_where(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"verify nets.py:plain nets.py:leaky {SHAPE} --report differ.html"
    assert main(line.split()) == 1
    assert "✗ mismatch" in banner("differ.html")
    assert "FAIL: " in banner("differ.html")
    layers = section("differ.html", "layers")
    assert "first diverging module: 2 (LeakyReLU)" in layers
    assert "error over the feature map of 2" in layers
    assert "has no block" in section("differ.html", "branches")


def test_a_file_among_the_two_sides_has_its_bytes() -> None:
    line = f"verify nets.py:expanded net.onnx@cpu --precision fp16 {SHAPE} --report two.html"
    assert main(line.split()) == 0
    assert f"{Path('net.onnx').stat().st_size:,}" in section("two.html", "sizes")
    assert "<svg" in section("two.html", "branches")


def test_a_comparison_that_cannot_be_made_leaves_no_older_page(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy("net.html", "page.html")
    line = f"verify nets.py:plain net.onnx@cuda {SHAPE} --report page.html"
    assert main(line.split()) == 4
    assert "– not run" in banner("page.html")
    assert "CUDAExecutionProvider" in banner("page.html")
    assert "nothing was compared" in section("page.html", "sizes")


def test_any_other_ending_is_json_and_not_twice(capsys: pytest.CaptureFixture[str]) -> None:
    line = f"verify nets.py:plain nets.py:plain {SHAPE}"
    assert main(f"{line} --report r.json".split()) == 0
    assert Path("r.json").read_text().startswith("{")
    assert main(f"{line} --report r.json --json s.json".split()) == 2
    assert "--report r.json: --json s.json writes that; end it in .html" in capsys.readouterr().err


@pytest.mark.parametrize(
    "run", [(export_main, "nets.py:plain --onnx n.onnx"), (main, "verify a b")]
)
def test_a_missing_extra_is_told_before_any_work(
    run: tuple[Callable[..., int], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    command, line = run
    assert command([*line.split(), "--report", "p.html"]) == 2
    assert "pip install 'orepa-compiler[report]'" in capsys.readouterr().err
    assert not Path("n.onnx").exists()
