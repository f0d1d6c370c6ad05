"""Branches over the epochs: how large each one's kernel is, and which of them agree."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks import BranchSum, ConvBlock
from orepa_compiler.capture.skeleton import is_sharded
from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ReparamError
from orepa_compiler.files.atomic import staged

# A branch with a smaller part of its block's norms than this does nothing; one with more is alone.
DEAD, DOMINANT = 0.01, 0.95
# Two branches whose kernels are nearer than this do the work of one.
ALIKE = 0.95
# A block starts with a branch that is zero (the frequency filter): one snapshot is no finding.
_SNAPSHOTS = 2

_TRAINER = "lightning"


@dataclass(frozen=True)
class BlockSnapshot:
    """The scaled branch kernels v_m W_m of one block.

    norms: |v_m W_m|. similarity: <v_m W_m, v_n W_n> / (|v_m W_m| |v_n W_n|), 0 for a kernel of
    zeros (Hu et al. 2022, Fig. 7).
    """

    path: str
    branches: tuple[str, ...]
    norms: tuple[float, ...]
    similarity: tuple[tuple[float, ...], ...]

    @property
    def shares(self) -> dict[str, float]:
        """Each branch's part of the sum of the norms; NaN where a kernel is not finite."""
        total = sum(self.norms)
        return {
            n: v / total if total else 0.0 for n, v in zip(self.branches, self.norms, strict=True)
        }

    @property
    def closest(self) -> tuple[float, str, str]:
        """The two branches that agree most (or oppose most), and their cosine."""
        pairs = [
            (self.similarity[i][j], self.branches[i], self.branches[j])
            for i in range(len(self.branches))
            for j in range(i)
        ]
        return max(pairs, key=lambda pair: abs(pair[0]), default=(0.0, "", ""))


class BranchHistory:
    """Snapshots of a model's blocks, epoch by epoch: a table, findings, a plot.

        history = orepa.BranchHistory()
        for epoch in range(epochs):
            train(model)
            history.record(model, epoch)
        print(history)                       # with rich.print: in colour
        history.plot("branches.png")

    In Lightning, Trainer(callbacks=[history.callback()]). Where several processes train, record in
    one of them. state_dict and load_state_dict carry it through a training checkpoint.
    """

    def __init__(self) -> None:
        self.epochs: dict[int, tuple[BlockSnapshot, ...]] = {}  # in their order

    def record(self, model: nn.Module, epoch: int) -> list[str]:
        """Takes the snapshots of this epoch; gives the findings so far.

        Raises ReparamError for a model without blocks, or whose parameters are sharded.
        """
        self.epochs = dict(sorted({**self.epochs, epoch: branch_snapshots(model)}.items()))
        return self.findings()

    def findings(self) -> list[str]:
        """What to look at, a line each: branches that are dead, dominant, alike, or not finite."""
        return [f"{path}: {text}" for path, text in self._found()]

    def callback(self) -> Any:
        """A Lightning callback that records after each epoch of training, in process 0.

        Raises MissingPackage without lightning.
        """
        callbacks = import_extra("lightning.pytorch.callbacks", extra=_TRAINER)
        return callbacks.LambdaCallback(on_train_epoch_end=self._record_module)

    def plot(self, path: str | Path) -> Path:
        """The path of a picture: each branch's share by block and epoch, and the mean similarity.

        Raises MissingPackage without matplotlib, ReparamError when nothing was recorded, and
        ExportError when the path cannot be written.
        """
        figures = import_extra("matplotlib.figure", extra="plots")
        path, last = Path(path), self._last()
        names = list(dict.fromkeys(name for block in last for name in block.branches))
        figure = figures.Figure((3 * len(names) + 4, 3 + 0.15 * len(last)), layout="constrained")
        axes = figure.subplots(1, len(names) + 1, squeeze=False)[0]
        for axis, name in zip(axes, names, strict=False):
            rows = [[_shares(b, name) for b in self._over_time(block.path)] for block in last]
            image = axis.imshow(rows, aspect="auto", vmin=0, vmax=1, interpolation="nearest")
            axis.set(title=name, xlabel="epoch", yticks=[])
            axis.set_xticks(range(len(self.epochs)), [str(epoch) for epoch in self.epochs])
        axes[0].set_yticks(range(len(last)), [block.path for block in last], fontsize=6)
        figure.colorbar(image, ax=axes[-2], label="share")
        image = axes[-1].imshow(_mean_similarity(last, names), vmin=-1, vmax=1, cmap="coolwarm")
        axes[-1].set(title="similarity", xticks=[], yticks=range(len(names)), yticklabels=names)
        figure.colorbar(image, ax=axes[-1], label="cosine")
        with staged(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:] or "png")
        return path

    def state_dict(self) -> dict[int, list[dict[str, Any]]]:
        """Plain numbers and names, for a training checkpoint."""
        return {epoch: [asdict(block) for block in blocks] for epoch, blocks in self.epochs.items()}

    def load_state_dict(self, state: dict[int, list[dict[str, Any]]]) -> None:
        self.epochs = {
            epoch: tuple(BlockSnapshot(**block) for block in blocks)
            for epoch, blocks in sorted(state.items())
        }

    def __rich__(self) -> RenderableType:
        last, notes = self._last(), dict(self._found())
        names = list(dict.fromkeys(name for block in last for name in block.branches))
        epochs = list(self.epochs)
        title = f"Share of each branch, epoch {epochs[0]} -> {epochs[-1]}, in %"
        table = Table(title=title, box=None, pad_edge=False, title_justify="left")
        for column in ("block", *names, "closest pair"):
            table.add_column(column, justify="left" if column == "block" else "right")
        table.add_column("note", style="yellow")
        for block in last:
            first = self._over_time(block.path)[0]
            cells = [_cell(first, block, name) for name in names]
            cosine, left, right = block.closest
            pair = f"{cosine:+.2f} {right} {left}" if left else "-"
            table.add_row(block.path, *cells, pair, notes.get(block.path, ""))
        return table

    def __str__(self) -> str:
        console = Console(width=200, no_color=True)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().splitlines())

    def _record_module(self, trainer: Any, module: nn.Module) -> None:
        if trainer.is_global_zero:
            self.record(module, trainer.current_epoch)

    def _last(self) -> tuple[BlockSnapshot, ...]:
        if not self.epochs:
            raise ReparamError("nothing was recorded yet; call record(model, epoch) first")
        return list(self.epochs.values())[-1]

    def _over_time(self, path: str) -> list[BlockSnapshot]:
        return [b for epoch in self.epochs.values() for b in epoch if b.path == path]

    def _found(self) -> Iterator[tuple[str, str]]:
        for block in self._last():
            recent = self._over_time(block.path)[-_SNAPSHOTS:]
            if not all(norm < float("inf") for norm in block.norms):
                yield block.path, "a kernel is not finite: lower the learning rate, or clip"
            elif len(recent) == _SNAPSHOTS and (texts := list(_findings(recent))):
                yield block.path, "; ".join(texts)


@torch.no_grad()
def branch_snapshots(model: nn.Module) -> tuple[BlockSnapshot, ...]:
    """The branches of every block as they are now, block by block.

    Raises ReparamError for a model without blocks, or whose parameters are sharded.
    """
    blocks = {p: m for p, m in model.named_modules() if isinstance(m, ConvBlock)}
    if not blocks:
        raise ReparamError(
            f"{type(model).__name__} has no block, so it has no branches to look at; give a model "
            "that orepa.expand made"
        )
    for path, block in blocks.items():
        if any(is_sharded(parameter) for parameter in block.parameters()):
            raise ReparamError(
                "its parameters are sharded (DTensor): look at the branches of a checkpoint, which "
                "orepa.save gathers",
                path=path,
            )
    return tuple(_snapshot(path, block) for path, block in blocks.items())


def _snapshot(path: str, block: BranchSum) -> BlockSnapshot:
    operators = block.branch_operators()
    kernels = _aligned(list(operators.values())).flatten(1).float()
    products = kernels @ kernels.T
    norms = products.diagonal().sqrt()
    sizes = norms.outer(norms)
    cosines = torch.where(sizes > 0, products / sizes, torch.zeros_like(sizes))
    return BlockSnapshot(
        path, tuple(operators), tuple(norms.tolist()), tuple(map(tuple, cosines.tolist()))
    )


def _aligned(operators: list[ConvOperator]) -> Tensor:
    """The kernels on the taps of their sum, (branches, C_out, C_in / groups, *K)."""
    nothing = reduce(lambda total, one: total + one, operators).scale(
        operators[0].weight.new_zeros(1)
    )
    return torch.stack([(nothing + operator).weight for operator in operators])


def _findings(recent: list[BlockSnapshot]) -> Iterator[str]:
    """What holds in all the recent snapshots of one block."""
    last = recent[-1]
    if len(last.branches) < 2:
        return
    for name in last.branches:
        shares = [_shares(block, name) for block in recent]
        if max(shares) < DEAD:
            yield f"{name} is dead ({100 * shares[-1]:.2f} % of the norms)"
        if min(shares) > DOMINANT:
            yield f"{name} is alone ({100 * shares[-1]:.1f} % of the norms)"
    cosine, left, right = last.closest
    if min(abs(block.closest[0]) for block in recent) > ALIKE:
        yield f"{right} and {left} train as one (cosine {cosine:+.2f})"


def _shares(block: BlockSnapshot, name: str) -> float:
    return block.shares.get(name, 0.0)


def _cell(first: BlockSnapshot, last: BlockSnapshot, name: str) -> Text:
    if name not in last.branches:
        return Text("")
    before, after = _shares(first, name), _shares(last, name)
    style = "red" if not DEAD <= after <= DOMINANT else ""
    return Text(f"{100 * before:.0f} -> {100 * after:.0f}", style=style)


def _mean_similarity(blocks: tuple[BlockSnapshot, ...], names: list[str]) -> list[list[float]]:
    """The mean cosine of two branches over the blocks that have both."""
    found: dict[tuple[str, str], list[float]] = {}
    for block in blocks:
        for i, left in enumerate(block.branches):
            for j, right in enumerate(block.branches):
                found.setdefault((left, right), []).append(block.similarity[i][j])
    means = {pair: sum(values) / len(values) for pair, values in found.items()}
    return [[means.get((left, right), float("nan")) for right in names] for left in names]
