"""What the examples share: real handwritten digits, a small residual net, a training loop."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn

EPOCHS = 2 if os.environ.get("OREPA_EXAMPLE_FAST") else 12
BATCH = 64
TRAIN = 1200  # of 1,797 images; the rest is the test set


class Residual(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1:
            conv = nn.Conv2d(width_in, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def digits_net() -> nn.Module:
    """A ResNet-8 for 1 x 8 x 8 images."""
    stem = (nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    body = (Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2))
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train and test images in [-1, 1] with their labels, in a fixed shuffled order."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(data.images, dtype=torch.float32) / 8 - 1).unsqueeze(1)[order]
    labels = torch.tensor(data.target)[order]
    return images[:TRAIN], labels[:TRAIN], images[TRAIN:], labels[TRAIN:]


def train(model: nn.Module, name: str) -> float:
    """Train with SGD and a cosine schedule; gives the accuracy on the test images, in percent."""
    x, y, _, _ = digits()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    generator = torch.Generator().manual_seed(1)
    for _ in track(range(EPOCHS), f"training {name:12}"):
        model.train()
        for batch in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    return accuracy(model.eval())


@torch.no_grad()
def accuracy(model: Callable[[Tensor], Tensor]) -> float:
    """The share of test images that the model gets right, in percent."""
    _, _, x, y = digits()
    return 100 * (model(x).argmax(1) == y).float().mean().item()


def output_folder() -> Path:
    """The folder of --output, made if it is not there."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    folder = parser.parse_args().output
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remember(folder: Path, **facts: Any) -> dict[str, Any]:
    """Everything the examples found out so far, with these facts added."""
    file = folder / "results.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(known | facts, indent=1))
    return known | facts
