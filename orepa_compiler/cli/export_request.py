"""What orepa-export was asked for, and the data that it names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from orepa_compiler.cli.arguments import random_inputs
from orepa_compiler.cli.calibration import BATCH, load_calibration
from orepa_compiler.cli.inputs import load_inputs
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.flavors import Flavor
from orepa_compiler.export.precision import Precision
from orepa_compiler.export.profiles import Shape
from orepa_compiler.export.quantization import calibration_batches


@dataclass(frozen=True)
class ExportRequest:
    """What orepa-export was asked for.

    shapes: of the inputs, without the batch. batch: of the inputs compared; None is 1 where the
    artifacts keep it, and 2 where it is free, so that more than one image is really compared.
    data: the user's own inputs, to be compared beside random ones of their shape. calibration:
    where the data for int8 comes from. profile: the shapes that the engine takes. report: where a
    page goes, for which the models are measured.
    """

    model: str
    onnx: Path
    checkpoint: Path | None = None
    engine: Path | None = None
    shapes: tuple[tuple[int, ...], ...] = ((3, 224, 224),)
    batch: int | None = None
    precision: Precision = "fp32"
    static_batch: bool = False
    simplify: bool = False
    flavor: Flavor = "auto"
    compute_capability: str | None = None
    allow_pickle: bool = False
    data: Path | None = None
    keep_fp32: tuple[str, ...] = ()
    calibration: str | None = None
    profile: dict[str, tuple[Shape, ...]] | tuple[Shape, ...] | None = None
    workspace_gb: float | None = None
    tf32: bool = False
    timing_cache: Path | None = None
    report: Path | None = None
    command: str = ""

    def inputs(self) -> list[tuple[Tensor, ...]]:
        batch = self.batch or (1 if self.static_batch else 2)
        if self.data is None:
            return [random_inputs(self.shapes, batch)]
        batches = load_inputs(self.data, batch)
        # A file with a fixed batch takes no smaller one.
        full = [given for given in batches if len(given[0]) == batch]
        if self.static_batch and not full:
            raise ReparamError(f"--inputs {self.data}: holds fewer than {batch} samples")
        return full if self.static_batch else batches


def calibration_of(request: ExportRequest, *, is_trained: bool) -> list[tuple[Tensor, ...]]:
    """The batches of calibration data; none where none are named.

    is_trained: the model has the ranges that it was trained with, so int8 needs none.
    Raises ReparamError for int8 without any, and for batches of other shapes than the inputs.
    """
    if request.calibration is None and request.precision == "int8" and not is_trained:
        raise ReparamError(
            "--precision int8 takes the ranges of the values from your data: give --calibration "
            "FOLDER of .npy files, or path/to/file.py:function that gives batches"
        )
    if request.calibration is None:
        return []
    like = request.inputs()[0]
    size = len(like[0]) if request.static_batch else BATCH
    batches = calibration_batches(load_calibration(request.calibration, size), like)
    if not request.static_batch:
        return batches
    full = [batch for batch in batches if len(batch[0]) == size]
    if not full:
        raise ReparamError(
            f"--calibration {request.calibration}: gives no batch of {size}, which --static-batch "
            "asks for"
        )
    return full
