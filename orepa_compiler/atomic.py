"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orepa_compiler.errors import ExportError

_PREFIX = ".orepa-"

# A folder this old was left by a process that was killed: no export lasts a day.
_ABANDONED_AFTER_S = 24 * 3600


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Where to write `target` meanwhile: a file in a new folder beside it, moved when all is done.

    Whatever else lies in that folder (external weights) moves too, the target itself last. After
    an error inside, nothing beside the target has changed. A process that is killed at any moment
    leaves the old target or the new one; a companion must bear a name that the old target does not
    use (see external_data), or the old target would change with it.
    Raises ExportError, before anything slow, when `target` cannot be written.
    """
    folder = _new_folder(target)
    _remove_abandoned(target.parent)
    try:
        yield folder / target.name
        _publish(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _new_folder(target: Path) -> Path:
    if target.is_dir():
        raise ExportError(f"{target}: this is a folder; give the path of the file to write")
    try:
        return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target.parent))
    except OSError as error:
        raise ExportError(
            f"{target}: cannot write into the folder {target.parent} ({error.strerror}); "
            "create it or choose another path"
        ) from error


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            is_old = time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_S
        except OSError:
            continue  # another export has just removed it
        if is_old and folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    for file in sorted(folder.iterdir(), key=lambda file: file.name == target.name):
        _flush(file)
        try:
            os.replace(file, target.parent / file.name)
        except OSError as error:
            raise ExportError(
                f"{target}: cannot move {file.name} into place ({error.strerror}); "
                "choose another path"
            ) from error


def _flush(file: Path) -> None:
    """Puts the content on the disk: a rename may reach it first, and a power cut come between."""
    file.chmod(_mode(file))
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _mode(file: Path) -> int:
    """What a file written in place would have: the old one's mode, or a new one's, by the umask.

    Some libraries write files that their owner alone can read.
    """
    old = file.parent.parent / file.name
    if old.is_file():
        return stat.S_IMODE(old.stat().st_mode)
    probe = file.with_name(f"{file.name}.mode")  # os.umask tells it only by changing it
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode
