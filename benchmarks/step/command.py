"""python -m benchmarks.step: what a training step costs beside the plain model's."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.step.measuring import Setting, memory, ratios, times
from benchmarks.step.operations import operations
from benchmarks.step.results import machine, markdown, read, table, write
from benchmarks.step.variants import MODELS, VARIANTS

ROOT = Path(__file__).parents[2]
EAGER = tuple(
    name
    for name, variant in VARIANTS.items()
    if not (variant.compiled or variant.compiled_kernels or variant.graphs)
)
# What is run without options: every form with small batches, and the goals at a larger one.
BY_DEFAULT = (
    *((model, 8, EAGER) for model in MODELS),
    *((model, 32, ("plain", "orepa", "two-phase")) for model in ("resnet18", "resnet50")),
)
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"

app = typer.Typer(add_completion=False)
console = Console(width=160)


@app.command()
def run(
    models: Annotated[list[str] | None, typer.Option(help="Of torchvision or timm.")] = None,
    variants: Annotated[list[str] | None, typer.Option(help=", ".join(VARIANTS))] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images in a pass.")] = None,
    size: Annotated[int, typer.Option(help="Height and width of an image.")] = 224,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    amp: Annotated[str, typer.Option(help="off or bf16.")] = "off",
    threads: Annotated[int, typer.Option(help="Of the CPU.")] = 1,
    repeats: Annotated[int, typer.Option(help="Rounds; one more goes before them.")] = 3,
    count: Annotated[bool, typer.Option("--count", help="Operations alone, no times.")] = False,
    again: Annotated[bool, typer.Option(help="Also what the results hold already.")] = False,
    output: Annotated[Path, typer.Option(help="The results.")] = ROOT
    / "benchmarks/results/step.json",
    docs: Annotated[Path, typer.Option(help="The page to put the table in.")] = ROOT
    / "docs/performance.md",
) -> None:
    """Measures the variants of each model in turns, prints a table, and writes JSON.

    Without --models, --variants and --batch: every eager variant of five models at batch 8, and the
    goals at batch 32. An interrupted run goes on where it stopped, model by model.
    """
    if amp not in ("off", "bf16"):
        raise typer.BadParameter(f"amp {amp!r} is neither 'off' nor 'bf16'")
    unknown = [name for name in variants or () if name not in VARIANTS]
    if unknown:
        raise typer.BadParameter(f"no variant {unknown[0]!r}; there are {', '.join(VARIANTS)}")
    cases = list(BY_DEFAULT)
    if models or variants or batch:
        names = _with_bases(variants or EAGER)
        cases = [(m, b, names) for b in batch or (8,) for m in models or MODELS]
    if count:
        console.print(counted({(model, name) for model, _, own in cases for name in own}))
        return
    results = read(output)
    results["machine"] = machine()
    for model, images, names in cases:
        setting = Setting(images, size, device, amp == "bf16", threads)
        key = f"{model}, {images} x {size}, {device}, amp {amp}, threads {threads}"
        done = results["cases"].get(key, {"variants": {}})["variants"]
        if not again and all(name in done for name in names):
            continue
        with console.status(f"{key}: time"):
            found = ratios(times(model, list(names), setting, repeats))
        for name in names:
            if VARIANTS[name].passes == 1:
                with console.status(f"{key}: memory of {name}"):
                    found[name] |= memory(model, name, setting)
            if name in EAGER:
                with console.status(f"{key}: operations of {name}"):
                    found[name]["operations"] = operations(model, name)
        results["cases"][key] = {
            "model": model,
            "setting": asdict(setting),
            "repeats": repeats,
            "variants": {**done, **found} if again else {**found, **done},
        }
        write(output, results)
    console.print(table(results))
    _fill(docs, markdown(results))


def counted(wanted: set[tuple[str, str]]) -> Table:
    """The operations of these variants of models, and what they are of the plain model's."""
    made = Table(title="Operations that a step launches, as on a GPU", box=None)
    for column in ("model", "variant", "operations", "/ plain"):
        made.add_column(column, justify="left" if column in ("model", "variant") else "right")
    for model in sorted({model for model, name in wanted if name == "plain"}):
        plain = operations(model, "plain")
        for name in EAGER:
            if (model, name) in wanted:
                found = plain if name == "plain" else operations(model, name)
                made.add_row(model, name, str(found), f"{found / plain:.2f}")
    return made


def _with_bases(names: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """The variants in their order, with those that they are compared to."""
    wanted = {*names, *(VARIANTS[name].base for name in names)}
    return tuple(name for name in VARIANTS if name in wanted)


def _fill(page: Path, text: str) -> None:
    """Put the table between the two marks of the page, where there is such a page."""
    if not page.exists():
        return
    whole = page.read_text()
    begin, end = whole.index(BEGIN) + len(BEGIN), whole.index(END)
    page.write_text(whole[:begin] + text + whole[end:])
