"""Train the expanded net as timm's train.py does: optimizer, schedule, moving average, mixup."""

from __future__ import annotations

from pathlib import Path

import torch
from digits import BATCH, EPOCHS, accuracy, digits, digits_net, output_folder

import orepa_compiler as orepa
from orepa_compiler.model_source import declare_torchvision_operators

declare_torchvision_operators()  # for a torchvision that was built for another torch

from timm.data import Mixup  # noqa: E402
from timm.loss import SoftTargetCrossEntropy  # noqa: E402
from timm.optim import create_optimizer_v2  # noqa: E402
from timm.scheduler import create_scheduler_v2  # noqa: E402
from timm.utils import ModelEmaV3, NativeScaler  # noqa: E402


def main(folder: Path) -> None:
    torch.manual_seed(0)
    x, y, images, _ = digits()
    model = orepa.expand(digits_net()).train()
    groups = orepa.param_groups(model, weight_decay=0.02)
    optimizer = create_optimizer_v2(groups, opt="adamw", lr=4e-3)
    steps = len(x) // BATCH
    schedule, epochs = create_scheduler_v2(
        optimizer, num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=1e-4, updates_per_epoch=steps
    )
    average = ModelEmaV3(model, decay=0.95)
    mixup = Mixup(mixup_alpha=0.1, label_smoothing=0.05, num_classes=10)
    loss_of, scaler = SoftTargetCrossEntropy(), NativeScaler(device="cpu")

    for epoch in range(epochs):
        for step, batch in enumerate(torch.randperm(len(x))[: steps * BATCH].split(BATCH)):
            mixed, targets = mixup(x[batch], y[batch])
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model(mixed), targets)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=model.parameters())
            average.update(model, step=epoch * steps + step)
            schedule.step_update(epoch * steps + step + 1)
        schedule.step(epoch + 1)

    trained = average.module.eval()  # the average of branches is a net in training form as well
    orepa.save(trained, folder / "timm.safetensors")
    deploy = orepa.collapse(trained)
    assert orepa.verify(trained, deploy, images)
    print(f"timm: test accuracy of the collapsed net {accuracy(deploy):.2f} %")


if __name__ == "__main__":
    main(output_folder())
