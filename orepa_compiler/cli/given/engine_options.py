"""Defines the options of orepa-export for engines and precisions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from orepa_compiler.choices import Flavor, Precision, Preset
from orepa_compiler.cli.given.options import has_no_effect, shape
from orepa_compiler.errors import ReparamError

Shape = tuple[int, ...]
Profile = dict[str, tuple[Shape, ...]] | tuple[Shape, ...]

KeepFp32 = Annotated[
    list[str] | None,
    typer.Option(
        "--keep-fp32",
        metavar="GLOB",
        help="Modules to keep in float32 (or out of int8).",
    ),
]
Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Data for int8, or the audit of fp16 and bf16; as for --inputs.",
    ),
]
Int8Preset = Annotated[
    Preset | None,
    typer.Option(
        help="What will run the int8: tensorrt (default), or cpu (onnxruntime, OpenVINO)."
    ),
]
TrtFlavor = Annotated[
    Flavor, typer.Option(help="trt: TensorRT, on this GPU. rtx: TensorRT for RTX, needs no GPU.")
]
ComputeCapability = Annotated[
    str | None, typer.Option(metavar="8.9", help="Build for such a GPU; this machine needs none.")
]
MinShapes = Annotated[
    list[str] | None,
    typer.Option(metavar="[NAME:]NxCxHxW", help="Smallest shape of the engine; else a batch of 1."),
]
OptShapes = Annotated[
    list[str] | None,
    typer.Option(metavar="[NAME:]NxCxHxW", help="Shape it is tuned for; else a batch of 8."),
]
MaxShapes = Annotated[
    list[str] | None,
    typer.Option(metavar="[NAME:]NxCxHxW", help="Largest shape of the engine; else a batch of 32."),
]
Workspace = Annotated[
    float | None,
    typer.Option("--workspace-gb", help="GiB of memory that the engine's kernels may use."),
]
Tf32 = Annotated[
    bool, typer.Option("--tf32", help="Allow TF32: float32 convs round inputs to 10 bits.")
]
TimingCache = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Keep kernel timings in this file (trt only)."),
]


def check_engine_options(
    has_engine: bool,
    *,
    shapes: Profile | None,
    workspace: float | None,
    tf32: bool,
    timing_cache: Path | None,
    compute_capability: str | None,
    flavor: Flavor,
) -> None:
    """Raises ReparamError for an option of an engine that is not built, or that it cannot have."""
    given = {
        "--min-shapes": shapes is not None,
        "--workspace-gb": workspace is not None,
        "--tf32": tf32,
        "--timing-cache": timing_cache is not None,
        "--compute-capability": compute_capability is not None,
        "--trt-flavor": flavor != "auto",
    }
    for option, is_given in given.items():
        has_no_effect(option, is_given and not has_engine, "without --trt no engine is built")
    if workspace is not None and not workspace > 0:
        raise ReparamError(f"--workspace-gb {workspace:g}: give a positive number of GiB")
    if compute_capability is not None and not re.fullmatch(r"\d+\.\d", compute_capability):
        raise ReparamError(f"--compute-capability {compute_capability}: write it as 8.9")
    if timing_cache is not None and flavor == "rtx":
        raise ReparamError("--timing-cache: TensorRT for RTX times no kernels; leave it out")


def check_preset_option(preset: Preset | None, *, precision: Precision, has_engine: bool) -> None:
    """Raises ReparamError for a preset without int8, and for CPUs' where an engine is built."""
    has_no_effect("--int8-preset", preset is not None and precision != "int8", "it is for int8")
    if preset == "cpu" and has_engine:
        raise ReparamError(
            "--int8-preset cpu: TensorRT refuses its zero points and quantized biases; leave out "
            "--trt, or export the engine separately"
        )


def profile(
    smallest: Sequence[str] | None, tuned: Sequence[str] | None, largest: Sequence[str] | None
) -> Profile | None:
    """The shapes that an engine takes, by input name, or alone where none is named.

    None where no option was given. Raises ReparamError where one of the three is missing for an
    input, where they do not contain each other, and for a shape that cannot be read.
    """
    given = {
        "--min-shapes": _named("--min-shapes", smallest or ()),
        "--opt-shapes": _named("--opt-shapes", tuned or ()),
        "--max-shapes": _named("--max-shapes", largest or ()),
    }
    names = list(dict.fromkeys(name for shapes in given.values() for name in shapes))
    if not names:
        return None
    ranges = {}
    for name in names:
        missing = [option for option, shapes in given.items() if name not in shapes]
        if missing:
            of = f" of {name}" if name else ""
            raise ReparamError(f"{' and '.join(missing)}{of}: missing; give all three, or none")
        ranges[name] = tuple(shapes[name] for shapes in given.values())
        _check_rising(name, ranges[name])
    if "" in ranges and len(ranges) > 1:
        raise ReparamError(f"--min-shapes: give a name to every input, not to {names} only")
    return ranges.get("") or ranges


def _named(option: str, texts: Sequence[str]) -> dict[str, Shape]:
    shapes = {}
    for text in texts:
        name, _, sizes = text.rpartition(":")
        if name in shapes:
            raise ReparamError(f"{option} {text}: given twice for {name or 'the only input'}")
        shapes[name] = shape(sizes, option=option)
    return shapes


def _check_rising(name: str, shapes: tuple[Shape, ...]) -> None:
    low, opt, high = shapes
    rises = len({len(entry) for entry in shapes}) == 1 and all(
        a <= b <= c for a, b, c in zip(low, opt, high, strict=True)
    )
    if not rises:
        raise ReparamError(
            f"--min-shapes, --opt-shapes and --max-shapes{f' of {name}' if name else ''} are "
            f"{low}, {opt} and {high}; each must be at most the next"
        )
