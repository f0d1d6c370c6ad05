"""Files appear whole, with what belongs to them, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from orepa_compiler.atomic import staged
from orepa_compiler.errors import ExportError


def test_the_file_and_its_companions_appear_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    with staged(target) as draft:
        draft.write_text("graph")
        draft.with_name("model.onnx.data").write_text("weights")
        assert not target.exists()
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"]
    assert target.read_text() == "graph"


def test_the_file_comes_last_for_it_names_its_companions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[str] = []
    monkeypatch.setattr(os, "replace", lambda source, target: moved.append(target.name))
    with staged(tmp_path / "b") as draft:
        for name in "abc":
            draft.with_name(name).touch()
    assert sorted(moved[:2]) == ["a", "c"]
    assert moved[2:] == ["b"]


def test_after_an_error_the_old_file_stands_and_nothing_is_left_over(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    with pytest.raises(UnicodeEncodeError), staged(target) as draft:
        draft.write_text("new, as far as ASCII goes: \u00e9", encoding="ascii")
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert target.read_text() == "old"


def test_a_missing_folder_is_refused_with_its_name(tmp_path: Path) -> None:
    target = tmp_path / "nowhere" / "model.onnx"
    with pytest.raises(ExportError, match=r"nowhere.*No such file.*create it"), staged(target):
        pytest.fail("the slow part must not start")


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="this is a folder"), staged(tmp_path):
        pytest.fail("the slow part must not start")


def test_a_move_that_fails_is_told(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"

    def write_while_a_folder_appears() -> None:
        with staged(target) as draft:
            draft.write_text("new")
            (target / "in the way").mkdir(parents=True)

    with pytest.raises(ExportError, match=r"cannot move model.onnx into place"):
        write_while_a_folder_appears()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_umask_says_who_may_read_a_new_file(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        with staged(tmp_path / "model") as draft:
            draft.write_text("weights")
            draft.chmod(0o600)  # as safetensors leaves it
    finally:
        os.umask(before)
    assert (tmp_path / "model").stat().st_mode & 0o777 == mode
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_a_file_that_was_private_stays_private(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.write_text("old")
    target.chmod(0o600)
    with staged(target) as draft:
        draft.write_text("new")
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("new", 0o600)
