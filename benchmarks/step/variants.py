"""The forms of a model that are compared, and how each takes a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from benchmarks.step.dbb import with_diverse_branches
from benchmarks.step.naive import naive
from orepa_compiler.training.stepping import kernels_once

MICRO_BATCHES = 4

MODELS = ("resnet18", "resnet50", "resnext50_32x4d", "repvgg_a0", "mobilenet_v2")
# torch 2.13 writes beyond its memory in the backward of a 1x1 conv with stride 2 on three channels
# that lie last; these models have one, so they are measured with the channels first, which inductor
# then has to leave as they are.
CHANNELS_FIRST = ("repvgg_a0",)


@dataclass(frozen=True)
class Variant:
    """A form of the model, and its step.

    passes: micro-batches of a step, each as large as the batch. base: the variant that its time is
    divided by.
    """

    form: Callable[[nn.Module], nn.Module]
    passes: int = 1
    once: bool = False
    compiled: bool = False
    compiled_kernels: bool | str = False
    graphs: bool = False
    base: str = "plain"
    means: str = ""


def _expanded(model: nn.Module) -> nn.Module:
    return orepa.expand(model)


def _hooked(model: nn.Module) -> nn.Module:
    model = orepa.expand(model)
    orepa.step_hooks(model)
    return model


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


VARIANTS = {
    "plain": Variant(_as_it_is, means="the model as it is"),
    "orepa": Variant(_expanded, means="an ordinary step"),
    "two-phase": Variant(_expanded, once=True, means="one pass inside kernels_once"),
    "orepa, hooks": Variant(_hooked, means="kernels made together, with step_hooks"),
    "naive": Variant(lambda m: naive(_expanded(m)), means="the paper's formulas, an einsum each"),
    "dbb": Variant(with_diverse_branches, means="diverse branch blocks on feature maps"),
    "plain x4": Variant(_as_it_is, MICRO_BATCHES, means="gradients of four batches added"),
    "orepa x4": Variant(
        _expanded, MICRO_BATCHES, once=True, base="plain x4", means="four passes in kernels_once"
    ),
    "two-phase, compiled kernels": Variant(
        _expanded, once=True, compiled_kernels=True, means="kernels_once(compiled=True)"
    ),
    "two-phase, reduce-overhead": Variant(
        _expanded,
        once=True,
        compiled_kernels="reduce-overhead",
        means='kernels_once(compiled="reduce-overhead"), on a GPU',
    ),
    "two-phase, graphs": Variant(
        _expanded, once=True, graphs=True, means="kernels_once(graphs=True), on a GPU"
    ),
    "plain compiled": Variant(_as_it_is, compiled=True, means="torch.compile"),
    "orepa compiled": Variant(_expanded, compiled=True, means="torch.compile(fullgraph=True)"),
}


class Stepper:
    """One variant of a model that trains on one random batch."""

    def __init__(
        self, name: str, model: str, *, batch: int, size: int, device: str, amp: bool
    ) -> None:
        torch.manual_seed(0)
        self.variant = VARIANTS[name]
        is_first = model in CHANNELS_FIRST
        layout = torch.contiguous_format if is_first else torch.channels_last
        net = self.variant.form(build(model)).train().to(device)
        self.net = net.to(memory_format=layout)  # type: ignore[call-overload]
        self.forward = self.net
        if self.variant.compiled:
            options = {"layout_optimization": False} if is_first else None
            self.forward = torch.compile(self.net, fullgraph=True, options=options)
        images = torch.randn(batch, 3, size, size, device=device)
        self.images = images.to(memory_format=layout)
        self.targets = torch.randint(1000, (batch,), device=device)
        parameters = self.net.parameters()
        self.optimizer = torch.optim.SGD(
            parameters, lr=1e-3, momentum=0.9, weight_decay=1e-4, foreach=True
        )
        kind = "cpu" if device == "meta" else device.split(":")[0]
        self.autocast = torch.autocast(kind, torch.bfloat16, enabled=amp)

    def step(self) -> None:
        """zero_grad, forward and backward of each pass, and the optimizer."""
        self.optimizer.zero_grad()
        with self._kernels():
            for _ in range(self.variant.passes):
                self.loss().backward()
        self.optimizer.step()

    def _kernels(self) -> AbstractContextManager[None]:
        if not self.variant.once:
            return nullcontext()
        variant = self.variant
        return kernels_once(self.net, compiled=variant.compiled_kernels, graphs=variant.graphs)

    def loss(self) -> Tensor:
        with self.autocast:
            return nn.functional.cross_entropy(self.forward(self.images), self.targets)


def build(model: str) -> nn.Module:
    """A model of torchvision, or else of timm, with fresh weights."""
    from orepa_compiler.model_source import declare_torchvision_operators

    declare_torchvision_operators()
    import torchvision

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if hasattr(torchvision.models, model):
            return torchvision.models.get_model(model)
        import timm

        return timm.create_model(model)
