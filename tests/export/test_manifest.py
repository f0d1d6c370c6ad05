"""The manifest: what is written, and one clear error for each way in which files do not fit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from orepa_compiler.export.manifest import (
    Check,
    Manifest,
    ManifestError,
    is_manifest,
    make_manifest,
    manifest_path,
    read_manifest,
    write_manifest,
)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    onnx = tmp_path / "net.onnx"
    onnx.write_bytes(b"a graph and its weights")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "best.pth").write_bytes(b"trained")
    path = manifest_path(onnx)
    files = [("onnx", onnx), ("checkpoint", tmp_path / "weights" / "best.pth")]
    checks = [Check("check onnx", "pass", 1e-7), Check("check engine", "not run", note="no GPU")]
    options = {"precision": "fp32", "path": Path("net.onnx")}
    write_manifest(path, make_manifest(path, files, options=options, checks=checks))  # type: ignore[arg-type]
    return path


def problems(path: Path) -> list[str]:
    manifest = read_manifest(path)
    return [text for file in manifest.files if (text := file.problem(path.parent))]


def test_it_comes_back_as_it_was_written(written: Path) -> None:
    assert written.name == "net.onnx.manifest.json"
    assert is_manifest(str(written))
    assert not is_manifest("net.onnx")
    manifest = read_manifest(written)
    assert [(file.role, file.name) for file in manifest.files] == [
        ("onnx", "net.onnx"),
        ("checkpoint", "weights/best.pth"),
    ]
    assert manifest.checks[1] == Check("check engine", "not run", None, "no GPU")
    assert manifest.options == {"precision": "fp32", "path": "net.onnx"}
    assert {"python", "torch", "onnx"} <= manifest.versions.keys()
    assert Manifest.from_json(manifest.to_json(), written) == manifest
    assert problems(written) == []


def test_it_can_be_moved_with_its_files(written: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    assert problems(elsewhere / written.name) == []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (Path.unlink, "net.onnx: is not there; copy it beside the manifest"),
        (lambda p: p.write_bytes(b"a graph"), "net.onnx: has 7 bytes of 23: it was cut off; copy"),
        (
            lambda p: p.write_bytes(b"a graph and its Weights"),
            "net.onnx: is another file than the one that was verified (sha256 ",
        ),
        (
            lambda p: p.write_bytes(b"another graph and its weights"),
            "net.onnx: is another file than the one that was verified (sha256 ",
        ),
    ],
)
def test_each_way_in_which_a_file_does_not_fit(
    written: Path, spoil: Callable[[Path], object], said: str
) -> None:
    spoil(written.with_name("net.onnx"))
    (problem,) = problems(written)
    assert problem.startswith("onnx ")
    assert said in problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not whole JSON"),
        ("[1]", "is JSON, but a list and no object"),
        ('{"plan": 1}', "is JSON, but no manifest that orepa-export wrote"),
        ('{"orepa_manifest": 2}', "has manifest format 2, this version reads up to 1; install a"),
        ('{"orepa_manifest": 1}', "created is missing (and 3 more)"),
        (
            '{"orepa_manifest": 1, "created": "now", "files": [{"role": "onnx", "name": 3}], '
            '"options": {}, "checks": [], "versions": {}}',
            "files.0.name is 3: input should be a valid string (and 2 more)",
        ),
        ("[" * 10_000, "is not whole JSON (recursion limit exceeded"),
    ],
)
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.manifest.json"
    path.write_text(text)
    with pytest.raises(ManifestError) as error:
        read_manifest(path)
    assert str(error.value).startswith(str(path))
    assert said in str(error.value)


def test_a_manifest_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such manifest; orepa-export writes one beside"):
        read_manifest(tmp_path / "x.manifest.json")
    (tmp_path / "y.manifest.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ManifestError, match="is no text"):
        read_manifest(tmp_path / "y.manifest.json")


def test_it_is_plain_json(written: Path) -> None:
    data = json.loads(written.read_text(), parse_constant=pytest.fail)
    assert data["orepa_manifest"] == 1
    assert len(data["files"][0]["sha256"]) == 64


@pytest.mark.parametrize(
    "name", ["/etc/hostname", "../net.onnx", "a/../../net.onnx", "C:\\x", "..\\x", "", "a\0b"]
)
def test_a_file_outside_the_folder_is_refused(written: Path, name: str) -> None:
    data = json.loads(written.read_text())
    data["files"][0]["name"] = name
    written.write_text(json.dumps(data))
    with pytest.raises(
        ManifestError, match="a manifest names files in its own folder: no absolute"
    ):
        read_manifest(written)


def test_a_checkpoint_outside_the_folder_goes_by_its_last_name(tmp_path: Path) -> None:
    (tmp_path / "best.pth").write_bytes(b"trained")
    path = tmp_path / "out" / "net.onnx.manifest.json"
    path.parent.mkdir()
    manifest = make_manifest(path, [("checkpoint", tmp_path / "best.pth")], options={}, checks=[])
    write_manifest(path, manifest)
    assert read_manifest(path).files[0].name == "best.pth"
