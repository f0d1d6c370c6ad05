"""Writes and reads the manifest beside an export: the files, what was checked, and how.

Two files are written. NAME.manifest.json holds hashes, versions, options and verdicts.
NAME.samples.safetensors holds inputs with the model's outputs in float64, so that the same
verdict can be reached where neither the model's code nor its checkpoint is.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from orepa_compiler.errors import ReparamError
from orepa_compiler.export.onnx.external_data import sha256
from orepa_compiler.export.onnx.reading import is_beside
from orepa_compiler.files.atomic import staged
from orepa_compiler.files.schemas import parsed, read_json

FORMAT = 1
_SUFFIX = ".manifest.json"
_PACKAGES = (
    *("orepa-compiler", "torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime"),
    *("onnxruntime-gpu", "onnxsim", "tensorrt", "tensorrt-rtx", "openvino", "numpy"),
)
_SHOWN = 12  # digits of a hash in a message

Role = Literal["checkpoint", "onnx", "weights", "engine", "openvino", "samples"]


class ManifestError(ReparamError):
    """A manifest that cannot be read."""


@dataclass(frozen=True)
class FileRecord:
    """One file of an export. name: its path from the manifest's folder, with forward slashes."""

    role: Role
    name: str
    bytes: int
    sha256: str

    @classmethod
    def of(cls, role: Role, path: Path, folder: Path) -> FileRecord:
        """Records a file that is there; one outside the folder goes by its last name."""
        name = Path(os.path.relpath(path, folder)).as_posix()
        name = name if is_beside(name) else path.name
        return cls(role, name, path.stat().st_size, sha256(path))

    def problem(self, folder: Path) -> str:
        """Says what is wrong with the file beside a manifest in `folder`; "" where nothing is."""
        path = folder / self.name
        what = f"{self.role} {path}"
        if not path.is_file():
            return f"{what}: is not there; copy it beside the manifest"
        size = path.stat().st_size
        if size < self.bytes:
            return f"{what}: has {size} bytes of {self.bytes}: it was cut off; copy it again"
        found = sha256(path)
        if found == self.sha256:
            return ""
        return (
            f"{what}: is another file than the one that was verified (sha256 {found[:_SHOWN]}, in "
            f"the manifest {self.sha256[:_SHOWN]}); export again, or bring back the old file"
        )


@dataclass(frozen=True)
class Check:
    """One check and what came of it: pass, mismatch, failed, not run or done."""

    name: str
    verdict: str
    error: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Manifest:
    """What an export wrote. options: what it was asked for; versions: of the packages that ran."""

    created: str
    files: tuple[FileRecord, ...]
    options: Mapping[str, Any]
    checks: tuple[Check, ...]
    versions: Mapping[str, str] = field(default_factory=lambda: versions())

    def of(self, role: Role) -> list[FileRecord]:
        """Lists the files of one role."""
        return [file for file in self.files if file.role == role]

    def to_json(self) -> str:
        data = {"orepa_manifest": FORMAT, **asdict(self)}
        return json.dumps(data, indent=2, default=str, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, path: Path) -> Manifest:
        """Reads the manifest that to_json wrote. Raises ManifestError, naming `path`."""
        what = str(path)
        data = parsed(text, what=what, error=ManifestError)
        written = data.get("orepa_manifest")
        if not isinstance(written, int) or isinstance(written, bool):
            raise ManifestError(f"{path}: is JSON, but no manifest that orepa-export wrote")
        if written > FORMAT:
            raise ManifestError(
                f"{path}: has manifest format {written}, this version reads up to {FORMAT}; "
                "install a newer orepa-compiler"
            )
        manifest = read_json(text, cls, what=what, error=ManifestError)
        for file in manifest.files:
            if not is_beside(file.name):
                raise ManifestError(
                    f"{path}: names the {file.role} {file.name!r}; a manifest names files in its "
                    "own folder: no absolute path, and none through .."
                )
        return manifest


def manifest_path(onnx: Path) -> Path:
    """Says where the manifest of an ONNX file lies: model.onnx.manifest.json."""
    return onnx.with_name(onnx.name + _SUFFIX)


def is_manifest(source: str) -> bool:
    return source.endswith(_SUFFIX)


def make_manifest(
    path: Path,
    files: Iterable[tuple[Role, Path]],
    *,
    options: Mapping[str, Any],
    checks: Iterable[Check],
) -> Manifest:
    """Makes the manifest, to lie at `path`, of files that are there."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    records = tuple(FileRecord.of(role, file, path.parent) for role, file in files)
    return Manifest(now, records, options, tuple(checks))


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Writes it, whole or not at all."""
    with staged(path) as draft:
        draft.write_text(manifest.to_json())


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest at `path`. Raises ManifestError where it is not there, or is none."""
    if not path.is_file():
        raise ManifestError(f"{path}: no such manifest; orepa-export writes one beside the ONNX")
    try:
        return Manifest.from_json(path.read_text(), path)
    except UnicodeDecodeError as error:
        raise ManifestError(f"{path}: is no text ({error.reason}); it is no manifest") from error


def versions() -> dict[str, str]:
    """Collects the versions of Python and of the packages that an export depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
