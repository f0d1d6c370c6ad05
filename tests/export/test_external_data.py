"""The weights' file beside an ONNX file: named by its content, removed when nothing names it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn

from orepa_compiler.errors import ExportError
from orepa_compiler.export import OnnxRunner, export_onnx
from orepa_compiler.export.onnx import writing as exporting
from orepa_compiler.export.onnx.external_data import external_files, own_companions
from orepa_compiler.export.onnx.reading import load_graph
from orepa_compiler.files.atomic import staged
from tests.export.nets import SmallNet, images


@pytest.fixture(autouse=True)
def _beside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "EMBED_LIMIT_BYTES", 0)


def test_the_same_weights_have_the_same_name_and_others_another(
    net: nn.Module, tmp_path: Path
) -> None:
    path = export_onnx(net, images(), tmp_path / "net.onnx")
    (first,) = external_files(load_graph(path))
    export_onnx(net, images(), path)
    assert external_files(load_graph(path)) == [first]
    torch.manual_seed(7)
    export_onnx(SmallNet().eval(), images(), path)
    (second,) = external_files(load_graph(path))
    assert first != second
    # The old weights are gone, the new ones are there, and nothing else was touched.
    assert sorted(os.listdir(tmp_path)) == ["net.onnx", second]
    OnnxRunner(path)(images())


def test_weights_of_other_files_are_left_alone(net: nn.Module, tmp_path: Path) -> None:
    others = ["other.onnx.0123456789abcdef.data", "net.onnx.data", "net.onnx.0123.data"]
    for name in others:
        (tmp_path / name).touch()
    stale = tmp_path / "net.onnx.0123456789abcdef.data"
    stale.touch()
    assert own_companions(tmp_path / "net.onnx") == {stale}
    export_onnx(net, images(), tmp_path / "net.onnx")
    assert not stale.exists()
    assert all((tmp_path / name).exists() for name in others)


def test_the_folder_of_a_process_that_was_killed_long_ago_is_removed(tmp_path: Path) -> None:
    old, new = tmp_path / ".orepa-old", tmp_path / ".orepa-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "half.onnx").touch()
    long_ago = time.time() - 2 * 24 * 3600
    os.utime(old, (long_ago, long_ago))
    with staged(tmp_path / "net.onnx") as draft:
        draft.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == [".orepa-new", "net.onnx"]


def test_a_file_in_a_folder_beside_is_read(net: nn.Module, tmp_path: Path) -> None:
    path = export_onnx(net, images(), tmp_path / "net.onnx")
    expected = OnnxRunner(path)(images())
    (name,) = external_files(load_graph(path))
    (tmp_path / "weights").mkdir()
    (tmp_path / name).rename(tmp_path / "weights" / "all.bin")
    model = onnx.load(path, load_external_data=False)
    relocate(model, "location", "weights/all.bin")
    path.write_bytes(model.SerializeToString())
    assert external_files(load_graph(path)) == ["weights/all.bin"]
    found = OnnxRunner(path)(images())
    assert isinstance(found, torch.Tensor)
    assert isinstance(expected, torch.Tensor)
    assert torch.equal(found, expected)


def relocate(model: Any, key: str, value: str) -> None:
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("location", "/etc/hostname", "external data lies in the folder of the ONNX file"),
        ("location", "../net.bin", "no absolute path, and none through"),
        ("location", "", "lies in ''"),
        ("offset", "-4", "its offset is '-4', and no size in bytes"),
        ("length", "many", "its length is 'many', and no size in bytes"),
        ("length", "9" * 5000, "its length is '999"),
    ],
)
def test_external_data_that_is_none_is_refused(
    net: nn.Module, tmp_path: Path, key: str, value: str, said: str
) -> None:
    path = export_onnx(net, images(), tmp_path / "net.onnx")
    model = onnx.load(path, load_external_data=False)
    relocate(model, key, value)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError) as caught:
        OnnxRunner(path)
    assert said in str(caught.value)


def test_a_symlink_with_weights_beside_its_target_is_written_and_read(
    net: nn.Module, tmp_path: Path
) -> None:
    link, real = tmp_path / "link.onnx", tmp_path / "far" / "net.onnx"
    real.parent.mkdir()
    link.symlink_to(real)
    for seed in (0, 1):
        torch.manual_seed(seed)
        export_onnx(SmallNet().eval(), images(), link)
        OnnxRunner(link)(images())
    assert link.is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["far", "link.onnx"]
    assert sorted(os.listdir(real.parent)) == ["net.onnx", *external_files(load_graph(real))]
