"""Train a small residual net twice on handwritten digits: plain, and expanded with OREPA."""

from __future__ import annotations

from pathlib import Path

import torch
from digits import digits_net, output_folder, remember, train
from rich import print

import orepa_compiler as orepa


def main(folder: Path) -> None:
    torch.manual_seed(0)
    plain = digits_net()
    print(orepa.plan(plain, inputs=torch.zeros(1, 1, 8, 8)))

    expanded = orepa.expand(plain)  # starts at the same weights: a paired comparison
    accuracy = {"plain": train(plain, "plain"), "orepa": train(expanded, "OREPA")}

    orepa.save(plain, folder / "plain.safetensors")
    orepa.save(expanded, folder / "orepa.safetensors")
    remember(folder, accuracy=accuracy)
    print(f"test accuracy: plain {accuracy['plain']:.2f} %, OREPA {accuracy['orepa']:.2f} %")


if __name__ == "__main__":
    main(output_folder())
