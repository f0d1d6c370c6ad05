"""Measures what one form of a model holds and costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from orepa_compiler.algebra.classifiers import is_conv_like
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.latency import file_contents
from orepa_compiler.planning.cost import conv_macs
from orepa_compiler.verification.evaluation import Side, batches_of, evaluate
from orepa_compiler.verification.modes import evaluation_mode, unchanged


@dataclass(frozen=True)
class ModelSize:
    """One form. macs: of its convs, for one image; bytes: of parameters and buffers, or of a file.

    convs, norms: those that run, as the nodes of a file do, transposed ones not counted; norms:
    batch norms. A block counts as the one conv that it computes, and its branches beside it.
    None: not counted.
    """

    form: str
    convs: int | None
    branches: int | None
    norms: int | None
    macs: int | None
    parameters: int | None
    bytes: int

    @classmethod
    def of_file(cls, form: str, path: Path) -> ModelSize:
        """Of an ONNX file what its graph holds; of another one the bytes alone.

        Raises ExportError for an ONNX file that cannot be read.
        """
        if path.suffix != ".onnx":
            return cls(form, None, None, None, None, None, path.stat().st_size)
        held = file_contents(path)
        return cls(form, held.convs, 0, held.norms, None, None, held.size)


def measure_model(form: str, model: nn.Module, inputs: Any) -> ModelSize:
    """The size of a model; without what runs where it does not run on the inputs."""
    blocks = [module for module in model.modules() if isinstance(module, ConvBlock)]
    tensors = [*model.parameters(), *model.buffers()]
    try:
        macs = sum(conv_macs(model, inputs).values())
    except ReparamError:
        macs = None
    calls = _calls(model, inputs)
    return ModelSize(
        form,
        None if calls is None else calls["convs"],
        sum(len(block.branches) for block in blocks),
        None if calls is None else calls["norms"],
        macs,
        sum(parameter.numel() for parameter in model.parameters()),
        sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


@torch.no_grad()
def _calls(model: nn.Module, inputs: Any) -> Counter[str] | None:
    """How often convs and batch norms are called: one that is called twice is two nodes of a file.

    None where the model does not run on the inputs.
    """
    counts: Counter[str] = Counter()
    handles = []
    for module in model.modules():
        if kind := _kind(module):
            handles.append(
                module.register_forward_pre_hook(lambda *_, kind=kind: counts.update([kind]))
            )
    try:
        with evaluation_mode(model), unchanged(model):
            evaluate(Side("model", model), batches_of(inputs)[:1])
    except ReparamError:
        return None
    finally:
        for handle in handles:
            handle.remove()
    return counts


def _kind(module: nn.Module) -> str:
    if isinstance(module, ConvBlock):
        return "convs"
    if is_conv_like(module):
        return "" if getattr(module, "transposed", False) else "convs"
    return "norms" if isinstance(module, _BatchNorm) else ""
