"""orepa plan: what expand would do to a model."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from orepa_compiler.cli.arguments import (
    Debug,
    ExitCode,
    Model,
    load_source,
    named_block,
    random_inputs,
    shape,
)
from orepa_compiler.compiler import plan
from orepa_compiler.export.progress import announced


def plan_command(
    model: Model,
    input_shape: Annotated[
        list[str] | None,
        typer.Option(metavar="CxHxW", help="Needed for MACs; once for each input."),
    ] = None,
    block: Annotated[str, typer.Option(help="The block every conv becomes, or auto.")] = "auto",
    where: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB", help="Only convs on these paths; '!layer4.*' excludes."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    debug: Debug = False,
) -> int:
    """What expand would do to a model, and what it would leave alone and why. Changes nothing.

    Examples:

      orepa plan torchvision:resnet50
      orepa plan timm:mobilenetv3_small_100 --input-shape 3x224x224
      orepa plan nets.py:build --block OREPA --where 'layer1.*' --json
    """
    inputs = random_inputs([shape(text) for text in input_shape], 1) if input_shape else None
    net = load_source(model, None, inputs=inputs)
    with announced("planning"):
        found = plan(net, block=named_block(block), where=where or None, inputs=inputs)
    if json:
        typer.echo(found.to_json())
    else:
        show(found)
    return ExitCode.PASS


def show(found: object) -> None:
    """Prints what has a table: as wide as the terminal, or as its own text."""
    console = Console()
    # A pipe has no width; the text of a plan or a report has one of its own.
    console.print(found) if console.is_terminal else typer.echo(str(found))
