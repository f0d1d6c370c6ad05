"""Train the expanded net in Lightning, and see what its branches do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digits import BATCH, EPOCHS, accuracy, digits, digits_net, output_folder
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import orepa_compiler as orepa
from orepa_compiler.model_source import declare_torchvision_operators

declare_torchvision_operators()  # for a torchvision that was built for another torch

import lightning.pytorch as lightning  # noqa: E402


class Digits(lightning.LightningModule):
    """A module as any other: only the net inside is expanded."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        groups = orepa.param_groups(self.net, weight_decay=1e-4)
        optimizer = torch.optim.SGD(groups, 0.1, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


def main(folder: Path) -> None:
    torch.manual_seed(0)
    module, history = Digits(orepa.expand(digits_net())), orepa.BranchHistory()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        callbacks=[history.callback()],
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    x, y, images, _ = digits()
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True, drop_last=True)
    trainer.fit(module, loader)
    print(history)

    deploy = orepa.collapse(module.net)
    assert orepa.verify(module.net, deploy, images)
    orepa.save(module.net, folder / "lightning.safetensors")
    print(f"Lightning: test accuracy of the collapsed net {accuracy(deploy):.2f} %")


if __name__ == "__main__":
    main(output_folder())
