"""What a run writes of its progress: a CSV row and a printed line for each epoch."""

from __future__ import annotations

import csv
import os
from datetime import timedelta
from pathlib import Path
from typing import Any

COLUMNS = ("epoch", "lr", "train_loss", "train_top1", "val_loss", "val_top1", "val_top5", "seconds")


class Log:
    """The rows of a run, one for each epoch, in log.csv; in TensorBoard too if asked for."""

    def __init__(self, folder: Path, *, epochs: int, tensorboard: bool) -> None:
        self.file, self.epochs = folder / "log.csv", epochs
        self.rows: list[dict[str, Any]] = []
        self.board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / "tensorboard"))

    def keep(self, rows: list[dict[str, Any]]) -> None:
        """The rows of the checkpoint that a run goes on from."""
        self.rows = list(rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        temporary = self.file.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(temporary, self.file)
        if self.board is not None:
            for name in COLUMNS[1:]:
                self.board.add_scalar(name, row[name], row["epoch"])
            self.board.flush()
        print(self._line(row), flush=True)

    def _line(self, row: dict[str, Any]) -> str:
        left = (self.epochs - row["epoch"] - 1) * row["seconds"]
        return (
            f"epoch {row['epoch'] + 1}/{self.epochs}  loss {row['train_loss']:.3f}  "
            f"val {row['val_loss']:.3f}  top-1 {row['val_top1']:.2f} %  "
            f"top-5 {row['val_top5']:.2f} %  {row['seconds']:.1f} s/epoch, "
            f"{timedelta(seconds=round(left))} left"
        )
