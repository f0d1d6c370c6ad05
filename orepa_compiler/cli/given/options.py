"""Defines options that commands share, and checks them before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from typing import Annotated

import typer

from orepa_compiler.choices import FORMS, Weights
from orepa_compiler.errors import ReparamError

SIDES = (
    f"FILE.onnx, FILE.onnx@cuda, FILE.onnx@openvino, FILE.xml, FILE.engine, {FORMS}, or such a "
    "model with @collapsed"
)


class ExitCode(IntEnum):
    """What the exit code of a command says."""

    PASS = 0
    MISMATCH = 1
    USAGE = 2
    EXPORT_FAILED = 3
    NOT_VERIFIED = 4


EXIT_CODES = """Exit codes

0  pass: everything that was compared agrees
1  mismatch: something differs, and the output says what
2  usage: a mistake in the command, or a model or a file that does not load
3  export failed: the ONNX file or the engine was not written
4  could not verify, or stopped by something unforeseen: not a pass"""


class NotVerified(ReparamError):
    """A comparison that could not be made, which is not a pass."""


Model = Annotated[str, typer.Argument(metavar="MODEL", help=FORMS)]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input-shape",
        metavar="CxHxW",
        help="Shape of an input, without the batch; repeat it for each input; 16:int64 for "
        "integers. Default: the size at which timm or torchvision trained the model, else "
        "3x224x224.",
    ),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Weights, as safetensors, torch.save or orepa.save wrote them."
    ),
]
Which = Annotated[
    Weights | None,
    typer.Option(
        "--weights",
        help="Which to take from a checkpoint that holds both: the model's, or their average.",
    ),
]
Expanded = Annotated[
    str | None,
    typer.Option(
        metavar="BLOCK",
        help="The checkpoint is a plain state_dict of a model expanded with this block.",
    ),
]
Pretrained = Annotated[
    bool,
    typer.Option("--pretrained", help="Download the weights from timm or torchvision."),
]
Classes = Annotated[
    int | None,
    typer.Option("--num-classes", min=1, help="Number of classes of a timm or torchvision model."),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write all results to this file, as JSON."),
]
Report = Annotated[
    Path | None,
    typer.Option(metavar="FILE.html", help="Write a page with charts; any other ending: JSON."),
]
Junit = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the checks to this file, as JUnit XML.")
]
Inputs = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Your own data: .npy, .npz (one array per input), a folder of those or of images, or "
        "file.py:function, which returns batches or a DataLoader.",
    ),
]
Pickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read checkpoints that can run code, if you trust them."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print only warnings and errors, to stderr.")
]
# How images become inputs; by default as timm or torchvision prepared them for the model.
Resize = Annotated[
    int | None, typer.Option(min=1, help="For images: length of the shorter side before the crop.")
]
Crop = Annotated[
    int | None, typer.Option(min=1, help="For images: side of the square cut from the middle.")
]
Mean = Annotated[
    str | None, typer.Option(metavar="R,G,B", help="For images, from 0 to 1: the mean to subtract.")
]
Std = Annotated[
    str | None,
    typer.Option(metavar="R,G,B", help="For images: the deviation to divide by."),
]


def shape(text: str, *, option: str = "--input-shape") -> tuple[int, ...]:
    """(3, 224, 224) from `3x224x224`. Raises ReparamError for anything else."""
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ReparamError(f"{option} {text}: write it as sizes with x between, as 3x224x224")
    return tuple(int(size) for size in sizes)


def check_folder(path: Path | None) -> None:
    """Raises ReparamError when `path` cannot be a file in a folder that is there."""
    if path is not None and not path.parent.is_dir():
        raise ReparamError(f"{path}: there is no folder {path.parent}; create it first")
    if path is not None and path.is_dir():
        raise ReparamError(f"{path}: this is a folder; name a file in it")


def check_writable(**files: Path | None) -> None:
    """Raises ReparamError where a file cannot be written, or two options name the same one.

    files: by the name of its option.
    """
    seen: dict[Path, str] = {}
    for option, path in files.items():
        check_folder(path)
        if path is None:
            continue
        other = seen.setdefault(path.resolve(), option)
        if other != option:
            raise ReparamError(f"--{option} {path}: --{other} writes that file; name another")


def check_ending(option: str, path: Path | None, *endings: str) -> None:
    """Raises ReparamError for a file that nothing would know by its name later."""
    if path is not None and path.suffix not in endings:
        raise ReparamError(f"{option} {path}: its name ends in {' or '.join(endings)}; name it so")


def check_kept(written: Mapping[str, Path | None], *read: str | Path | None) -> None:
    """Raises ReparamError where an option would write over a file that the command reads.

    written: by option. read: a checkpoint, data, or file.py:function.
    """
    texts = [str(source) for source in read if source is not None]
    paths = [text.rpartition(":")[0] if ".py:" in text else text for text in texts]
    kept = {Path(path).resolve() for path in paths if Path(path).is_file()}
    for option, path in written.items():
        if path is not None and path.resolve() in kept:
            raise ReparamError(f"--{option} {path}: the command reads that file; name another")


def check_there(**files: Path | None) -> None:
    """Raises ReparamError for a file to be read that is not there. files: by their option."""
    for path in files.values():
        if path is not None and not path.exists():
            raise ReparamError(f"{path}: there is no such file")


def has_no_effect(option: str, given: bool, reason: str) -> None:
    """Raises ReparamError for an option that was given and that nothing would come of."""
    if given:
        raise ReparamError(f"{option}: {reason}; leave it out")


def report_files(report: Path | None, json: Path | None) -> tuple[Path | None, Path | None]:
    """Where the page goes, and where the JSON.

    Raises ReparamError where --report is JSON beside --json, and MissingPackage, before any work,
    where a page is asked for and cannot be drawn.
    """
    if report is None:
        return None, json
    if report.suffix.lower() not in (".html", ".htm"):
        if json is not None:
            raise ReparamError(f"--report {report}: --json {json} writes that; end it in .html")
        return None, report
    from orepa_compiler.report import check_extra

    check_extra()
    return report, json
