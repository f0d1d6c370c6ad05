"""Train the paper's networks on ImageNet; collapse, verify and export what came out.

    python examples/imagenet/train.py --data /data/imagenet --arch ResNet-18 --form orepa
    torchrun --nproc-per-node 4 examples/imagenet/train.py ...        # on any number of nodes
    python examples/imagenet/train.py --synthetic 512 --size 64 --epochs 2 --batch 32

A run that was killed goes on from its last epoch when the same command is given again.
"""

from __future__ import annotations

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from images import EpochSampler, Images, folder_images, synthetic_images, train_loader, val_loader
from logs import Log
from networks import network
from processes import Place
from settings import IDENTITY, Settings, parse
from steps import Training, evaluate, train_epoch
from torch import Tensor, nn

import orepa_compiler as orepa


def main(arguments: list[str] | None = None) -> None:
    settings, place = parse(arguments), Place.from_environment()
    settings.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(settings.seed)
    images = images_of(settings)
    model = network(settings.arch, settings.form)
    model = model.to(place.device, memory_format=torch.channels_last)
    try:
        train(model, images, settings, place)
        if place.is_first:
            finish(model, images, settings, place)
    finally:
        place.leave()


def images_of(settings: Settings) -> Images:
    """The images; the networks' 1,000 classes serve any set with no more."""
    if settings.data is not None:
        return folder_images(settings.data, settings.size)
    return synthetic_images(settings.synthetic, settings.size)


def train(model: nn.Module, images: Images, settings: Settings, place: Place) -> None:
    share = settings.batch // place.world
    if share * place.world != settings.batch or share % settings.accumulate:
        raise SystemExit(
            f"--batch {settings.batch} does not divide into {place.world} processes of "
            f"{settings.accumulate} micro-batches"
        )
    sampler = EpochSampler(
        len(images.train),  # type: ignore[arg-type]
        share,
        rank=place.rank,
        world=place.world,
        seed=settings.seed,
    )
    training = training_of(model, settings, place, len(sampler))
    log = Log(settings.output, epochs=settings.epochs, tensorboard=settings.tensorboard)
    history = orepa.BranchHistory() if settings.form != "plain" else None
    start = resume(model, training, log, history, settings, place)
    batches = train_loader(images, sampler, settings.workers)
    held_out = val_loader(images, share, settings.workers, rank=place.rank, world=place.world)
    for epoch in range(start, settings.epochs):
        sampler.epoch, begun = epoch, time.monotonic()
        # what augments an image depends on the epoch alone, so a resumed run sees the same
        torch.manual_seed(settings.seed + (epoch * place.world + place.rank) * 1000)
        trained = train_epoch(training, batches, settings, place)
        seen = evaluate(model, held_out, settings, place)
        if place.is_first:
            rate = training.optimizer.param_groups[0]["lr"]
            log.add(row_of(epoch, rate, trained, seen, time.monotonic() - begun))
            if history is not None:
                for finding in history.record(model, epoch):
                    print(f"  {finding}")
            keep(model, training, log, history, settings, epoch)
    if place.is_first and history is not None and history.epochs:
        print(history)


def training_of(model: nn.Module, settings: Settings, place: Place, steps: int) -> Training:
    """What steps, with as many steps to an epoch."""
    groups: Any = model.parameters()
    if settings.groups != "all":
        decay, preset = settings.weight_decay, settings.groups
        groups = orepa.param_groups(model, weight_decay=decay, lr=settings.lr, preset=preset)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(
        groups, settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: settings.rate(s, steps))
    scaler = torch.amp.GradScaler(place.device.type, enabled=settings.amp == "fp16")
    wrapped = place.wrapped(model)
    called = torch.compile(wrapped) if settings.compile else wrapped
    return Training(called, optimizer, schedule, scaler)  # type: ignore[arg-type]


def row_of(
    epoch: int, rate: float, trained: Tensor, seen: Tensor, seconds: float
) -> dict[str, Any]:
    (loss, top1, _, count), (val_loss, val1, val5, held) = trained.tolist(), seen.tolist()
    return {
        "epoch": epoch,
        "lr": rate,
        "train_loss": loss / count,
        "train_top1": 100 * top1 / count,
        "val_loss": val_loss / held,
        "val_top1": 100 * val1 / held,
        "val_top5": 100 * val5 / held,
        "seconds": seconds,
    }


def keep(
    model: nn.Module,
    training: Training,
    log: Log,
    history: orepa.BranchHistory | None,
    settings: Settings,
    epoch: int,
) -> None:
    """All that a run needs to go on, in last.pt: whole or not at all."""
    state = {
        "model": model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "schedule": training.schedule.state_dict(),
        "scaler": training.scaler.state_dict(),
        "history": None if history is None else history.state_dict(),
        "log": log.rows,
        "epoch": epoch,
        "settings": identity_of(settings),
    }
    state["schedule"].pop("lr_lambdas", None)
    temporary = settings.output / "last.tmp"
    torch.save(state, temporary)
    os.replace(temporary, settings.output / "last.pt")


def resume(
    model: nn.Module,
    training: Training,
    log: Log,
    history: orepa.BranchHistory | None,
    settings: Settings,
    place: Place,
) -> int:
    """Go on from last.pt, if there is one; gives the epoch to go on with."""
    file = settings.output / "last.pt"
    if not file.exists():
        return 0
    state = torch.load(file, map_location=place.device, weights_only=True)
    ours, theirs = identity_of(settings), state["settings"]
    if other := [name for name in IDENTITY if ours[name] != theirs[name]]:
        pairs = ", ".join(f"{name} {theirs[name]} and not {ours[name]}" for name in other)
        raise SystemExit(f"{file} was written with {pairs}; give another --output")
    model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.schedule.load_state_dict(state["schedule"] | {"lr_lambdas": [None]})
    training.scaler.load_state_dict(state["scaler"])
    log.keep(state["log"])
    if history is not None:
        history.load_state_dict(state["history"])
    if place.is_first:
        print(f"going on after epoch {state['epoch'] + 1} of {file}", flush=True)
    return int(state["epoch"]) + 1


def identity_of(settings: Settings) -> dict[str, Any]:
    known = asdict(settings)
    return {name: known[name] for name in IDENTITY}


def finish(model: nn.Module, images: Images, settings: Settings, place: Place) -> None:
    """The collapsed network, proven equal, as safetensors and ONNX."""
    folder = settings.output
    orepa.save(model, folder / "trained.safetensors")
    model.eval()
    batch = torch.stack([images.val[index][0] for index in range(4)]).to(place.device)
    deploy = orepa.collapse(model)
    report = orepa.verify(model, deploy, batch)
    print(report)
    if not report:
        raise SystemExit("the collapsed network is not the trained one: nothing was exported")
    orepa.save(deploy, folder / "deploy.safetensors")
    written = orepa.export_onnx(deploy.cpu(), batch.cpu(), Path(folder / "model.onnx"))
    print(f"written: {folder / 'trained.safetensors'}, {folder / 'deploy.safetensors'}, {written}")


if __name__ == "__main__":
    main()
