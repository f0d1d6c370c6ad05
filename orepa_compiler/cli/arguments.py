"""What the words of a command line stand for: options, shapes, inputs, models and exit codes."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor, nn

from orepa_compiler.blocks import Block
from orepa_compiler.blocks.catalogue import BLOCKS
from orepa_compiler.checkpoints import load
from orepa_compiler.checkpoints.weights import has_plan, load_weights
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.progress import announced
from orepa_compiler.model_source import FORMS, load_model
from orepa_compiler.report import check_extra

# The seed of a model's own random weights and of the inputs: the same command, the same numbers.
SEED = 0


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
    list[str],
    typer.Option("--input-shape", metavar="CxHxW", help="Without the batch; once for each input."),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="safetensors, torch.save, or what orepa.save wrote."),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", metavar="FILE", help="Write all numbers here, as JSON."),
]
Report = Annotated[
    Path | None,
    typer.Option(metavar="FILE.html", help="Write a page with charts; any other ending: as JSON."),
]
Junit = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Write the checks here, as JUnit XML.")
]
Inputs = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="Your own data: .npy, .npz (one array per input), a folder."),
]
Pickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read checkpoints that run code. Only files you trust."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def shape(text: str, *, option: str = "--input-shape") -> tuple[int, ...]:
    """(3, 224, 224) from `3x224x224`. Raises ReparamError for anything else."""
    sizes = text.lower().split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ReparamError(f"{option} {text}: write it as sizes with x between, as 3x224x224")
    return tuple(int(size) for size in sizes)


def named_block(name: str) -> Block | Literal["auto"]:
    """The block of that name, or "auto". Raises ReparamError, with the names, for any other."""
    if name == "auto":
        return "auto"
    if name.upper() not in BLOCKS:
        raise ReparamError(f"--block {name}: choose one of auto, {', '.join(BLOCKS)}")
    return BLOCKS[name.upper()]


def check_folder(path: Path | None) -> None:
    """Raises ReparamError when the folder that `path` would be written into is not there."""
    if path is not None and not path.parent.is_dir():
        raise ReparamError(f"{path}: there is no folder {path.parent}; create it first")


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
    check_extra()
    return report, json


def random_inputs(shapes: Sequence[tuple[int, ...]], batch: int) -> tuple[Tensor, ...]:
    """One normally distributed tensor of shape (batch, *shape) for each shape; always the same."""
    generator = torch.Generator().manual_seed(SEED)
    return tuple(torch.randn((batch, *shape), generator=generator) for shape in shapes)


def load_source(
    source: str,
    checkpoint: Path | None,
    *,
    inputs: tuple[Tensor, ...] | None,
    allow_pickle: bool = False,
) -> nn.Module:
    """The model that `source` names with the weights of `checkpoint`, in eval mode.

    A checkpoint that orepa.save wrote also rebuilds the expanded model.
    Raises ReparamError for any mistake in the names or in the file, and when the model does not run
    on `inputs`.
    """
    with announced(f"loading {source}"):
        torch.manual_seed(SEED)
        model = load_model(source)
        if checkpoint is not None and has_plan(checkpoint):
            model = load(model, checkpoint)
        elif checkpoint is not None:
            load_weights(model, checkpoint, allow_pickle=allow_pickle)
        model.eval()
        if inputs is not None:
            _check_it_runs(source, model, inputs)
    return model


def _check_it_runs(source: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    try:
        with torch.no_grad():
            model(*inputs)
    except Exception as error:
        shapes = " and ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise ReparamError(
            f"{source}: does not run on inputs of shape {shapes} ({' '.join(str(error).split())}); "
            f"give the right --input-shape, once for each input"
        ) from error
