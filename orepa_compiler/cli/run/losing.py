"""orepa int8, once its options are known to be right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from orepa_compiler.cli.given.export_request import CALIBRATION_BATCH
from orepa_compiler.cli.given.inputs import check_source, load_inputs
from orepa_compiler.cli.given.models import (
    check_it_runs,
    inputs_for,
    load_told,
    typed_shape,
    warn_of_random_weights,
)
from orepa_compiler.compiler import collapse
from orepa_compiler.export.int8.quantization import calibration_batches
from orepa_compiler.int8.analysis import int8_loss
from orepa_compiler.model_source.preprocessing import preprocessing_of
from orepa_compiler.progress import announced


def show_int8_loss(
    source: str,
    checkpoint: Path | None,
    calibration: str,
    shapes: Sequence[str] | None,
    worst: int,
    options: Mapping[str, Any],
) -> None:
    """Prints what int8 loses by module, on the user's calibration data."""
    check_source(calibration, "--calibration")
    net, told = load_told(source, checkpoint, **options)
    warn_of_random_weights(source, told)
    inputs = inputs_for(source, net, shapes, 1)
    check_it_runs(source, net, inputs)
    images = preprocessing_of(source, net)
    images = images.at(typed_shape(shapes[0])[0]) if shapes else images
    given = load_inputs(
        calibration, CALIBRATION_BATCH, option="--calibration", images=images, model=net
    )
    batches = calibration_batches(given, inputs)
    with announced("measuring each module in int8"):
        found = int8_loss(collapse(net, inputs=inputs), batches, worst=worst)
    console = Console()
    # A pipe has no width; the text of a report has one of its own.
    console.print(found) if console.is_terminal else typer.echo(str(found))
