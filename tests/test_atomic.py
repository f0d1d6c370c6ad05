"""Files appear whole, with what belongs to them, or not at all; what is no file is left alone."""

from __future__ import annotations

import os
import resource
import stat
import threading
from pathlib import Path

import pytest

from orepa_compiler.errors import ExportError
from orepa_compiler.files.atomic import locked, staged


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


def test_a_symlink_stays_one_and_its_target_is_written(tmp_path: Path) -> None:
    real, link = tmp_path / "far" / "real.onnx", tmp_path / "link.onnx"
    real.parent.mkdir()
    for old in ("old", None):  # once it is there, and once it dangles
        real.unlink(missing_ok=True)
        link.unlink(missing_ok=True)
        if old:
            real.write_text(old)
        link.symlink_to(real)
        with staged(link) as draft:
            draft.write_text("new")
        assert link.is_symlink()
        assert real.read_text() == "new"
        assert sorted(os.listdir(tmp_path)) == ["far", "link.onnx"]


def test_a_pipe_and_a_device_are_refused_and_stay(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ExportError, match="this is a pipe, and would be replaced"), staged(pipe):
        pytest.fail("the slow part must not start")
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    for device in ("/dev/full", "/dev/null"):
        with pytest.raises(ExportError, match="this is a device"), staged(Path(device)):
            pytest.fail("the slow part must not start")
        assert stat.S_ISCHR(os.stat(device).st_mode)


def test_a_symlink_to_itself_is_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(ExportError, match="symlink to itself"), staged(loop):
        pytest.fail("the slow part must not start")


def test_a_full_disk_is_told_and_the_old_file_stands(tmp_path: Path) -> None:
    target = tmp_path / "model.onnx"
    target.write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(ExportError, match=r"cannot be written whole .* Free some space"):  # noqa: SIM117
            with staged(target) as draft:
                draft.write_bytes(bytes(1 << 16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert target.read_text() == "old"


def test_a_library_that_tells_a_full_disk_in_words_is_understood(tmp_path: Path) -> None:
    words = "I/O error: No space left on device (os error 28)"
    with pytest.raises(ExportError, match="No space left on device"), staged(tmp_path / "m"):
        raise RuntimeError(words)
    with pytest.raises(RuntimeError, match="another"), staged(tmp_path / "m"):
        raise RuntimeError("another")


def test_one_at_a_time_moves_files_into_a_folder(tmp_path: Path) -> None:
    order: list[str] = []

    def other() -> None:
        with locked(tmp_path):
            order.append("second")

    with locked(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


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
