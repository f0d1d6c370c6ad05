"""Export the collapsed net to ONNX and TensorRT, check what can be checked, and sum it all up."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch
from digits import accuracy, digits, digits_net, output_folder, remember
from rich import print
from summary import table

import orepa_compiler as orepa
from orepa_compiler.export import OnnxRunner, TensorRTRunner


def main(folder: Path) -> None:
    if not (folder / "deploy.safetensors").exists():
        import_module("02_collapse_and_verify").main(folder)
    deploy = orepa.load(digits_net, folder / "deploy.safetensors").eval()
    images = digits()[2]

    onnx = orepa.export_onnx(deploy, images[:2], folder / "digits.onnx")
    runner = OnnxRunner(onnx)
    report = orepa.verify(deploy, runner, images)
    print(report)
    assert report
    facts = remember(folder, onnx_error=report.max_error)
    remember(folder, accuracy={**facts["accuracy"], "onnx": accuracy(runner)})

    # Without a GPU the engine is built ahead of time, for a GPU that is named: here an RTX 40.
    capability = None if torch.cuda.is_available() else "8.9"
    engine = orepa.build_engine(onnx, folder / "digits.engine", compute_capability=capability)
    device = f"not run (no GPU here; the engine is for compute capability {capability})"
    if capability is None:
        on_gpu = orepa.verify(deploy.cuda(), TensorRTRunner(engine), images.cuda()[:32])
        assert on_gpu, on_gpu
        device = f"{on_gpu.max_error:.1e}"
    facts = remember(folder, engine_error=device)
    print(table(folder, facts))


if __name__ == "__main__":
    main(output_folder())
