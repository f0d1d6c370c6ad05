"""The table at the end of the demo: what each form of the net costs, how exact each step was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
from digits import digits_net
from rich.table import Table

import orepa_compiler as orepa
from orepa_compiler.planning.cost import conv_macs

FORMS = (
    ("plain", "plain.safetensors"),
    ("OREPA in training", "orepa.safetensors"),
    ("OREPA collapsed", "deploy.safetensors"),
    ("ONNX", "digits.onnx"),
    ("TensorRT engine", "digits.engine"),
)


def table(folder: Path, facts: dict[str, Any]) -> Table:
    """One row for each form of the net; errors are those of the step that made it."""
    written = ", ".join(name for _, name in FORMS)
    caption = f"device numerics: {facts['engine_error']}\nwritten to {folder}: {written}"
    result = Table(box=None, pad_edge=False, caption=caption, caption_justify="left")
    for column in ("form", "accuracy", "parameters", "conv MACs", "error", "bytes"):
        justify = "left" if column == "form" else "right"
        result.add_column(column, justify=justify, no_wrap=True)
    errors = {"deploy": "collapse_error", "digits": "onnx_error"}
    for form, name in FORMS:
        file = folder / name
        stem = {"digits": "onnx"}.get(file.stem, file.stem)
        accuracy, error = f"{facts['accuracy'][stem]:.2f} %", errors.get(file.stem)
        shown = f"{facts[error]:.1e}" if error else "-"
        if file.suffix == ".engine":
            accuracy, shown = "-", facts["engine_error"].split(" (")[0]
        parameters, macs = cost(file)
        result.add_row(form, accuracy, parameters, macs, shown, f"{file.stat().st_size:,}")
    return result


def cost(file: Path) -> tuple[str, str]:
    """Parameters, and the convs' multiply-accumulates for one image."""
    if file.suffix == ".onnx":
        return onnx_cost(onnx.load(file))
    if file.suffix != ".safetensors":
        return "-", "-"
    model = orepa.load(digits_net, file)
    macs = sum(conv_macs(model, torch.zeros(1, 1, 8, 8)).values())
    return f"{sum(p.numel() for p in model.parameters()):,}", f"{macs:,}"


def onnx_cost(model: onnx.ModelProto) -> tuple[str, str]:
    graph = onnx.shape_inference.infer_shapes(model).graph
    sizes = {w.name: torch.Size(w.dims).numel() for w in graph.initializer}
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.value_info}
    convs = [node for node in graph.node if node.op_type == "Conv"]
    places = [torch.Size(shapes[node.output[0]][2:]).numel() for node in convs]
    macs = sum(sizes[node.input[1]] * n for node, n in zip(convs, places, strict=True))
    floats = sum(sizes[w.name] for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT)
    return f"{floats:,}", f"{macs:,}"
