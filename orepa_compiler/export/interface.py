"""What an ONNX file says that it takes and gives, and by which operator set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from orepa_compiler.dependencies import import_extra
from orepa_compiler.export.signature import text_of

# Where an element type has another name in torch.
_TYPES = {"FLOAT": "float32", "DOUBLE": "float64"}


@dataclass(frozen=True)
class Interface:
    """inputs, outputs: name, type and shape of each, as image: float32 (batch, 3, 64, 64)."""

    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, model: Any) -> Interface:
        """Of an ONNX ModelProto; opset 0 where it names none."""
        known = {entry.domain: entry.version for entry in model.opset_import}
        weights = {tensor.name for tensor in model.graph.initializer}
        taken = [value for value in model.graph.input if value.name not in weights]
        return cls(
            known.get("", known.get("ai.onnx", 0)),
            tuple(map(_said, taken)),
            tuple(map(_said, model.graph.output)),
        )


def _said(value: Any) -> str:
    types = import_extra("onnx", extra="onnx").TensorProto.DataType
    tensor = value.type.tensor_type
    name = types.Name(tensor.elem_type)
    shape = (axis.dim_param or axis.dim_value or "?" for axis in tensor.shape.dim)
    return f"{value.name}: {_TYPES.get(name, name.lower())} {text_of(shape)}"
