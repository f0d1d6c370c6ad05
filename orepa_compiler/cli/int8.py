"""orepa int8: what int8 without training would lose, before anything is written."""

from __future__ import annotations

from typing import Annotated

import typer

from orepa_compiler.cli.given.options import (
    Checkpoint,
    Debug,
    ExitCode,
    Model,
    Pickle,
    Pretrained,
    Quiet,
    Shapes,
    Which,
    check_there,
    has_no_effect,
)

# How many modules are kept in float32.
WORST = 3


def int8_command(
    model: Model,
    calibration: Annotated[
        str,
        typer.Option(metavar="DATA", help="Real inputs, as for --inputs of orepa export."),
    ],
    checkpoint: Checkpoint = None,
    weights: Which = None,
    pretrained: Pretrained = False,
    input_shape: Shapes = None,
    worst: Annotated[int, typer.Option(min=1, help="How many modules to try in float32.")] = WORST,
    allow_pickle: Pickle = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> int:
    """Show what int8 without training would lose, by module, and what each remedy would give.

    Examples:

      orepa int8 torchvision:resnet18 --pretrained --calibration images/
      orepa int8 nets.py:build --checkpoint best.pth --calibration data.py:f
    """
    check_there(checkpoint=checkpoint)
    has_no_effect("--weights", weights is not None and not checkpoint, "there is no --checkpoint")
    has_no_effect("--pretrained", pretrained and checkpoint is not None, "--checkpoint has them")
    # Only now torch and what the rest needs: a mistake above is told at once.
    from orepa_compiler.cli.run.losing import show_int8_loss

    options = {"pretrained": pretrained, "weights": weights, "allow_pickle": allow_pickle}
    show_int8_loss(model, checkpoint, calibration, input_shape, worst, options)
    return ExitCode.PASS
