"""The table at the end of the demo: what each form of the net costs, and how exact each step was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from digits import digits_net
from rich.table import Table

import orepa_compiler as orepa
from orepa_compiler.cost import conv_macs


def table(folder: Path, facts: dict[str, Any]) -> Table:
    """One row for each form of the net."""
    image = torch.zeros(1, 1, 8, 8)
    result = Table(title="Handwritten digits", title_justify="left")
    for column in ("form", "accuracy", "parameters", "conv MACs", "largest error", "bytes", "file"):
        result.add_column(column, justify="left" if column in ("form", "file") else "right")
    accuracy = facts["accuracy"]
    rows = (
        ("plain", "plain.safetensors", f"{accuracy['plain']:.2f} %", "-"),
        ("OREPA, in training", "orepa.safetensors", f"{accuracy['OREPA']:.2f} %", "-"),
        ("OREPA, collapsed", "deploy.safetensors", "same", f"{facts['collapse_error']:.1e}"),
        ("ONNX", "digits.onnx", "same", f"{facts['onnx_error']:.1e}"),
        ("TensorRT engine", "digits.engine", "not run", facts["engine_error"]),
    )
    for form, name, percent, error in rows:
        size = f"{(folder / name).stat().st_size:,}"
        parameters = macs = ""
        if name.endswith("safetensors"):
            model = orepa.load(digits_net, folder / name)
            parameters = f"{sum(p.numel() for p in model.parameters()):,}"
            macs = f"{sum(conv_macs(model, image).values()):,}"
        result.add_row(form, percent, parameters, macs, str(error), size, str(folder / name))
    return result
