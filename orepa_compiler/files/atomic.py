"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from orepa_compiler.errors import ExportError, ReparamError

_PREFIX = ".orepa-"

# A folder this old was left by a process that was killed: no export lasts a day.
_ABANDONED_AFTER_S = 24 * 3600

# What a disk says that takes no more; EFBIG is a limit on the size of one file.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Where to write `target` meanwhile: a file in a new folder beside it, moved when all is done.

    Whatever else lies in that folder (external weights) moves too, the target itself last. After
    an error inside, nothing beside the target has changed. A process that is killed at any moment
    leaves the old target or the new one; a companion must bear a name that the old target does not
    use (see external_data), or the old target would change with it. A symlink stays one: what it
    points to is written.
    Raises ExportError, before anything slow, when `target` cannot be written or is no file (a pipe,
    a device, a folder); and when the disk is full.
    """
    real = real_target(target)
    folder = _new_folder(real)
    _remove_abandoned(real.parent)
    try:
        yield folder / real.name
        _publish(folder, real)
    except Exception as found:
        if isinstance(found, ReparamError) or not _is_full(found):
            raise
        raise ExportError(
            f"{target}: cannot be written whole ({' '.join(str(found).split())}); what was there "
            "is as it was. Free some space, or choose another path"
        ) from found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def real_target(target: Path) -> Path:
    """The file that is written where `target` is: what a symlink points to.

    Raises ExportError for what is no file.
    """
    real = Path(os.path.realpath(target))
    try:
        mode = real.lstat().st_mode
    except FileNotFoundError:
        return real
    except OSError as found:
        raise ExportError(
            f"{target}: cannot be written ({found.strerror}); choose another path"
        ) from found
    if stat.S_ISDIR(mode):
        raise ExportError(f"{target}: this is a folder; give the path of the file to write")
    if not stat.S_ISREG(mode):
        kind = _KINDS.get(stat.S_IFMT(mode), "no file")
        raise ExportError(
            f"{target}: this is {kind}, and would be replaced; give the path of a file"
        )
    return real


_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symlink to itself",
}


def _new_folder(target: Path) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=target.parent))
    except OSError as found:
        raise ExportError(
            f"{target}: cannot write into the folder {target.parent} ({found.strerror}); "
            "create it or choose another path"
        ) from found


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        try:
            is_old = time.time() - folder.stat().st_mtime > _ABANDONED_AFTER_S
        except OSError:
            continue  # another export has just removed it
        if is_old and folder.is_dir():
            shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    files = sorted(folder.iterdir(), key=lambda file: file.name == target.name)
    for file in files:
        _flush(file)
    with locked(target.parent):
        for file in files:
            try:
                os.replace(file, target.parent / file.name)
            except OSError as found:
                raise ExportError(
                    f"{target}: cannot move {file.name} into place ({found.strerror}); "
                    "choose another path"
                ) from found


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time, of those that move files into a folder or remove them from it.

    Two exports to one path would else take each other's weights for stale. Where a file system has
    no locks, it goes without.
    """
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows opens no folder
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _flush(file: Path) -> None:
    """Puts the content on the disk: a rename may reach it first, and a power cut come between."""
    file.chmod(_mode(file))
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def _is_full(found: BaseException | None) -> bool:
    """Whether an error is that of a full disk: some libraries tell it in words alone."""
    while found is not None:
        if isinstance(found, OSError) and found.errno in _FULL:
            return True
        text = str(found)
        words = (os.strerror(errno.ENOSPC), os.strerror(errno.EFBIG), "PytorchStreamWriter failed")
        if any(word in text for word in words):
            return True
        found = found.__cause__ or found.__context__
    return False


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
