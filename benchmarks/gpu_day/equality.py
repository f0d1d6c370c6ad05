"""Whether a device computes what float64 on a CPU does: kernels, gradients, steps, collapse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from benchmarks.step.variants import build
from orepa_compiler.blocks import ReparamConv
from orepa_compiler.generation.squeezing import squeeze

Figures = dict[str, float | str]

# Kernels are made in float32; a matrix product in TF32 keeps ten bits.
KERNEL_TOLERANCE = {False: 1e-5, True: 5e-3}
# How much larger the error of gradients through a whole net may be than the plain net's own.
NOISE = 4.0


@dataclass(frozen=True)
class Precision:
    """How a device computes."""

    name: str
    tf32: bool = False
    bf16: bool = False
    last: bool = True

    @contextmanager
    def on(self, device: str) -> Iterator[None]:
        before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = self.tf32
        try:
            with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
                yield
        finally:
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before

    def placed(self, module: Any, device: str) -> Any:
        layout = torch.channels_last if self.last else torch.contiguous_format
        return module.to(device=device, memory_format=layout)


PRECISIONS = (
    Precision("fp32"),
    Precision("fp32, channels first", last=False),
    Precision("TF32", tf32=True),
    Precision("bf16", bf16=True),
)


def moved_net(model: str) -> nn.Module:
    """The expanded net in float32, each parameter somewhat away from where it started."""
    torch.manual_seed(0)
    net = orepa.expand(build(model)).train()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net


def kernels(model: str, device: str, precision: Precision, way: str) -> Figures:
    """The largest error of all kernels and of their gradients beside the algebra in float64."""
    net = precision.placed(moved_net(model), device)
    blocks = {n: m for n, m in net.named_modules() if isinstance(m, ReparamConv)}
    with precision.on(device):
        made = _made(net, list(blocks.values()), way)
        seeds = [torch.linspace(-1, 1, w.numel(), device=device).view(w.shape) for w in made]
        torch.autograd.backward(made, [s.to(w) for s, w in zip(seeds, made, strict=True)])
    worst = {"kernel": 0.0, "gradient": 0.0}
    for (path, block), own, seed in zip(blocks.items(), made, seeds, strict=True):
        exact = copy.deepcopy(block).to("cpu", torch.float64)
        exact.zero_grad()
        weight = squeeze(exact.branches.values(), exact.scaling).weight  # type: ignore[arg-type]
        weight.backward(seed.double().cpu())
        worst["kernel"] = max(worst["kernel"], relative(own, weight))
        for name, parameter in exact.named_parameters():
            found = net.get_parameter(f"{path}.{name}").grad
            if parameter.grad is not None and found is not None:
                worst["gradient"] = max(worst["gradient"], relative(found, parameter.grad))
    tolerance = KERNEL_TOLERANCE[precision.tf32]
    verdict = "pass" if max(worst.values()) <= tolerance else "differs"
    return {"verdict": verdict, **worst, "tolerance": tolerance}


def _made(net: nn.Module, blocks: list[ReparamConv], way: str) -> list[Tensor]:
    from orepa_compiler.generation import generate
    from orepa_compiler.generation.graphs import generate_replayed
    from orepa_compiler.generation.together import generate_together

    if way == "alone":
        return [generate(block).weight for block in blocks]
    if way == "graphs":
        generate_replayed(net, blocks)  # recorded here, run again below
        return [operator.weight for operator in generate_replayed(net, blocks)]
    return [operator.weight for operator in generate_together(blocks)]


def step(model: str, device: str, precision: Precision, size: int) -> Figures:
    """The error of the gradients of a whole step, ours over the plain net's, each to its float64.

    A net's own rounding grows with its depth, so the plain net's is the measure.
    """
    nets = {"plain": build(model).train(), "ours": moved_net(model)}
    errors = {}
    for name, net in nets.items():
        for way in ("step",) if name == "plain" else ("step", "kernels_once"):
            found = _gradients(copy.deepcopy(net), device, precision, size, way)
            exact = _gradients(copy.deepcopy(net).double(), "cpu", Precision("fp64"), size, "step")
            pairs = zip(found, exact, strict=True)
            errors[f"{name} {way}"] = _root_mean([relative(a, b) for a, b in pairs])
    worst = max(errors["ours step"], errors["ours kernels_once"])
    verdict = "pass" if worst <= NOISE * errors["plain step"] else "differs"
    return {"verdict": verdict, **errors}


def _gradients(
    net: nn.Module, device: str, precision: Precision, size: int, way: str
) -> list[Tensor]:
    dtype = next(net.parameters()).dtype
    net = precision.placed(net, device)
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1))
    images = precision.placed(images.to(dtype), device)
    once: AbstractContextManager[Any] = nullcontext()
    if way == "kernels_once":
        once = orepa.kernels_once(net)
    with once:
        with precision.on(device):
            loss = net(images).float().square().mean()
        loss.backward()
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None]


def collapsed(model: str, device: str, precision: Precision, size: int) -> Figures:
    """Whether verify finds the collapsed net equal, on the device."""
    net = precision.placed(moved_net(model), device).eval()
    images = precision.placed(torch.randn(4, 3, size, size), device)
    report = orepa.verify(net, orepa.collapse(net), images)
    return {"verdict": "pass" if report else "differs", "says": report.verdict}


CHECKS: dict[str, Callable[..., Figures]] = {"step": step, "collapse": collapsed}


def relative(found: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest number."""
    difference = (found.detach().double().cpu() - exact.detach().double().cpu()).abs().max()
    return float(difference / exact.detach().double().abs().max().cpu().clamp(min=1e-30))


def _root_mean(errors: list[float]) -> float:
    return float(torch.tensor(errors).square().mean().sqrt())
