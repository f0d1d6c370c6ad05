"""Train the expanded net with Accelerate: mixed precision, accumulated gradients, kernels once."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from digits import BATCH, EPOCHS, accuracy, digits, digits_net, output_folder
from torch.utils.data import DataLoader, TensorDataset

import orepa_compiler as orepa

MICRO_BATCHES = 2


def main(folder: Path) -> None:
    torch.manual_seed(0)
    accelerator = Accelerator(mixed_precision="bf16", cpu=not torch.cuda.is_available())
    x, y, images, _ = digits()
    net = orepa.expand(digits_net())
    optimizer = torch.optim.SGD(orepa.param_groups(net), 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    loader = DataLoader(TensorDataset(x, y), BATCH, shuffle=True, drop_last=True)
    # the schedule is left out: Accelerate would step it once for each process
    model, optimizer, loader = accelerator.prepare(net, optimizer, loader)

    for _ in range(EPOCHS):
        model.train()
        for images_of_step, labels in loader:
            optimizer.zero_grad()
            parts = zip(
                images_of_step.chunk(MICRO_BATCHES), labels.chunk(MICRO_BATCHES), strict=True
            )
            # what accumulate() does, with each kernel made once: gradients are averaged on leaving
            with orepa.kernels_once(model):
                for part, label in parts:
                    with accelerator.autocast():
                        loss = F.cross_entropy(model(part), label) / MICRO_BATCHES
                    accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
        schedule.step()

    accelerator.save_state(folder / "accelerate")  # model, optimizer, random states: to go on with
    trained = accelerator.unwrap_model(model, keep_fp32_wrapper=False).cpu()
    orepa.save(trained, folder / "accelerate.safetensors")
    deploy = orepa.collapse(trained)
    assert orepa.verify(trained, deploy, images)
    print(f"Accelerate: test accuracy of the collapsed net {accuracy(deploy):.2f} %")


if __name__ == "__main__":
    main(output_folder())
