"""orepa int8: what int8 without training would lose, before anything is written."""

from __future__ import annotations

from typing import Annotated

import typer

from orepa_compiler.cli.arguments import (
    Checkpoint,
    Debug,
    ExitCode,
    Model,
    Pickle,
    Shapes,
    load_source,
    random_inputs,
    shape,
)
from orepa_compiler.cli.calibration import BATCH, load_calibration
from orepa_compiler.cli.plan import show
from orepa_compiler.compiler import collapse
from orepa_compiler.export.progress import announced
from orepa_compiler.export.quantization import calibration_batches
from orepa_compiler.int8_analysis import WORST, int8_loss


def int8_command(
    model: Model,
    calibration: Annotated[
        str,
        typer.Option(metavar="DATA", help="Real inputs: a folder of .npy, or FILE.py:FUNCTION."),
    ],
    checkpoint: Checkpoint = None,
    input_shape: Shapes = ["3x224x224"],  # noqa: B006
    worst: Annotated[int, typer.Option(min=1, help="How many modules to keep in float32.")] = WORST,
    allow_pickle: Pickle = False,
    debug: Debug = False,
) -> int:
    """What int8 without training would lose: by module, and what each way out gives.

    Examples:

      orepa int8 torchvision:resnet18 --calibration images/
      orepa int8 nets.py:build --checkpoint net.safetensors --calibration data.py:batches
    """
    inputs = random_inputs([shape(text) for text in input_shape], 1)
    net = load_source(model, checkpoint, inputs=inputs, allow_pickle=allow_pickle)
    batches = calibration_batches(load_calibration(calibration, BATCH), inputs)
    with announced("measuring each module in int8"):
        found = int8_loss(collapse(net, inputs=inputs), batches, worst=worst)
    show(found)
    return ExitCode.PASS
