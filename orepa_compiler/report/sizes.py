"""What one form of a model holds and costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from orepa_compiler.blocks import LinearBlock
from orepa_compiler.cost import conv_macs
from orepa_compiler.errors import ReparamError
from orepa_compiler.layers import is_conv_like


@dataclass(frozen=True)
class ModelSize:
    """One form. macs: of its convs, for one image; bytes: of parameters and buffers, or of a file.

    A block counts as the one conv that it computes. None: not counted.
    """

    form: str
    convs: int | None
    macs: int | None
    parameters: int | None
    bytes: int

    @classmethod
    def of_file(cls, form: str, path: Path) -> ModelSize:
        """Of a file only the bytes are known."""
        return cls(form, None, None, None, path.stat().st_size)


def measure_model(form: str, model: nn.Module, inputs: Any) -> ModelSize:
    """The size of a model; without MACs where it does not run on the inputs."""
    kinds = [m for m in model.modules() if is_conv_like(m) or isinstance(m, LinearBlock)]
    tensors = [*model.parameters(), *model.buffers()]
    try:
        macs = sum(conv_macs(model, inputs).values())
    except ReparamError:
        macs = None
    return ModelSize(
        form,
        len(kinds),
        macs,
        sum(parameter.numel() for parameter in model.parameters()),
        sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )
