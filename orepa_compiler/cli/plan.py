"""orepa plan: what expand would do to a model."""

from __future__ import annotations

from typing import Annotated

import typer

from orepa_compiler.cli.given.options import (
    Checkpoint,
    Classes,
    Debug,
    ExitCode,
    Model,
    Shapes,
    Which,
    check_there,
    has_no_effect,
)


def plan_command(
    model: Model,
    checkpoint: Checkpoint = None,
    weights: Which = None,
    num_classes: Classes = None,
    input_shape: Shapes = None,
    block: Annotated[str, typer.Option(help="The block for every conv, or auto.")] = "auto",
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only convs on these paths; '!layer4.*' excludes some."),
    ] = None,
    summary: Annotated[
        bool, typer.Option("--summary", help="Print one row per stage of the net.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    debug: Debug = False,
) -> int:
    """Show what expand would do to a model, what it would leave alone, and why. Changes nothing.

    Examples:

      orepa plan torchvision:resnet50 --summary
      orepa plan timm:mobilenetv3_small_100 --input-shape 3x224x224
      orepa plan nets.py:build --block OREPA --where 'layer1.*' --json
    """
    has_no_effect("--summary", summary and json, "--json prints the whole plan")
    has_no_effect("--weights", weights is not None and not checkpoint, "there is no --checkpoint")
    check_there(checkpoint=checkpoint)
    # Only now torch and what the rest needs: a mistake above is told at once.
    from orepa_compiler.cli.given.models import check_it_runs, inputs_for, load_source, named_block
    from orepa_compiler.cli.given.paths import check_where
    from orepa_compiler.cli.shown.plan_table import plan_text, summary_text
    from orepa_compiler.compiler import plan
    from orepa_compiler.model_source import check_options
    from orepa_compiler.progress import announced

    chosen = named_block(block)
    check_options(model, False, num_classes)
    net = load_source(
        model, checkpoint, inputs=None, num_classes=num_classes, weights=weights, is_quiet=True
    )
    inputs = inputs_for(model, net, input_shape, 1) if input_shape else None
    if inputs is not None:
        check_it_runs(model, net, inputs)
    with announced("planning"):
        found = plan(net, block=chosen, where=where or None, inputs=inputs)
    check_where(where or (), net, found)
    if json:
        typer.echo(found.to_json())
    else:
        typer.echo(summary_text(found) if summary else plan_text(found))
    return ExitCode.PASS
