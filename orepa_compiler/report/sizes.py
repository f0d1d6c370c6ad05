"""What one form of a model holds and costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from orepa_compiler.algebra.layers import is_conv_like
from orepa_compiler.blocks import LinearBlock
from orepa_compiler.cost import conv_macs
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.latency import contents_of


@dataclass(frozen=True)
class ModelSize:
    """One form. macs: of its convs, for one image; bytes: of parameters and buffers, or of a file.

    A block counts as the one conv that it computes, and its branches beside it. norms: batch norms.
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
        held = contents_of(path)
        return cls(form, held.convs, 0, held.norms, None, None, held.size)


def measure_model(form: str, model: nn.Module, inputs: Any) -> ModelSize:
    """The size of a model; without MACs where it does not run on the inputs."""
    modules = list(model.modules())
    blocks = [module for module in modules if isinstance(module, LinearBlock)]
    tensors = [*model.parameters(), *model.buffers()]
    try:
        macs = sum(conv_macs(model, inputs).values())
    except ReparamError:
        macs = None
    return ModelSize(
        form,
        len(blocks) + sum(is_conv_like(module) for module in modules),
        sum(len(block.branches) for block in blocks),
        sum(isinstance(module, _BatchNorm) for module in modules),
        macs,
        sum(parameter.numel() for parameter in model.parameters()),
        sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )
