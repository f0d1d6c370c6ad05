"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orepa_compiler.errors import ExportError


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Where to write `target` meanwhile: a file in a new folder beside it, moved when all is done.

    Whatever else lies in that folder (external weights) moves too, the target itself last. After
    an error inside, nothing beside the target has changed.
    Raises ExportError, before anything slow, when `target` cannot be written.
    """
    folder = _new_folder(target)
    try:
        yield folder / target.name
        _publish(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _new_folder(target: Path) -> Path:
    if target.is_dir():
        raise ExportError(f"{target}: this is a folder; give the path of the file to write")
    try:
        return Path(tempfile.mkdtemp(prefix=".orepa-", dir=target.parent))
    except OSError as error:
        raise ExportError(
            f"{target}: cannot write into the folder {target.parent} ({error.strerror}); "
            "create it or choose another path"
        ) from error


def _publish(folder: Path, target: Path) -> None:
    for file in sorted(folder.iterdir(), key=lambda file: file.name == target.name):
        try:
            os.replace(file, target.parent / file.name)
        except OSError as error:
            raise ExportError(
                f"{target}: cannot move {file.name} into place ({error.strerror}); "
                "choose another path"
            ) from error
