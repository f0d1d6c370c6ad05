"""Latencies: both files in turn, every backend a row, and what is within noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orepa_compiler.errors import ExportError
from orepa_compiler.export import latency
from orepa_compiler.export.latency import (
    Bench,
    BenchRow,
    Timing,
    bench,
    example_inputs,
    file_contents,
    median_interval,
)
from orepa_compiler.export.onnx.writing import export_onnx
from orepa_compiler.export.run.signature import TensorSpec
from tests.export.nets import SmallNet


@pytest.mark.usefixtures("no_gpu")
def test_each_backend_is_a_row_and_says_why_it_did_not_run(exported: dict[str, Path]) -> None:
    told: list[str] = []
    found = bench(
        exported["fp32"], exported["dict"], batch=3, rounds=6, turn_s=0.001, step=told.append
    )
    assert found
    cpu, cuda, openvino, tensorrt = found.rows
    assert cpu.model is not None
    assert cpu.against is not None
    assert cpu.model.calls >= 6
    assert cpu.model.median_ms <= cpu.model.p95_ms
    assert cpu.model.throughput == pytest.approx(3000 / cpu.model.median_ms)
    assert cuda.verdict.startswith("not run: CUDAExecutionProvider is not in the installed")
    assert tensorrt.verdict.startswith("not run: no engine was given; to time TensorRT too")
    assert told == ["onnxruntime CPU", "onnxruntime CUDA", "OpenVINO CPU", "TensorRT"]
    text = str(found)
    assert "not run: no engine was given" in text
    assert "against" in text
    assert len(json.loads(json.dumps(found.to_dict()))["rows"]) == 4
    assert openvino.model is not None or "openvino" in openvino.verdict


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)

    def forward(self, x: dict[str, Tensor], more: list[Tensor]) -> Tensor:
        return self.conv(x["image"]) + more[0]  # type: ignore[no-any-return]


def test_nested_inputs_are_timed_as_the_file_has_them(tmp_path: Path) -> None:
    batch = ({"image": torch.randn(1, 3, 8, 8)}, [torch.randn(1, 4, 8, 8)])
    path = export_onnx(Nested().eval(), batch, tmp_path / "nested.onnx")
    row = bench(path, path, batch=2, rounds=6, turn_s=0.001).rows[0]
    assert row.model is not None
    assert row.reason == ""


@pytest.mark.usefixtures("no_gpu")
def test_an_engine_without_a_gpu_is_not_run(exported: dict[str, Path], tmp_path: Path) -> None:
    engine = tmp_path / "net.engine"
    engine.write_bytes(b"engine")
    found = bench(
        exported["fp32"],
        exported["fp32"],
        engine=engine,
        against_engine=engine,
        rounds=6,
        turn_s=0.001,
    )
    assert "net.engine: device numerics: not run; torch sees no CUDA GPU" in found.rows[3].verdict
    with pytest.raises(ExportError, match=r"^--against-engine is missing; give the"):
        latency._engines(engine, None)


def test_the_files_are_timed_in_turn_and_the_slower_is_seen(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []

    def seconds(runner: Any, inputs: Any) -> float:
        side = 0 if "fp32" in str(runner.path) else 1
        order.append(side)
        return (2e-3 if side == 0 else 1e-3) * (1 + 0.01 * (len(order) % 3))

    monkeypatch.setattr(latency, "_seconds", seconds)
    found = bench(exported["fp32"], exported["dict"], rounds=6, turn_s=0.0)
    row = found.rows[0]
    assert row.verdict == "slower"
    assert row.ratio == pytest.approx(2, rel=0.05)
    # After the warm-up of both: model first, then against first, and so on.
    assert order[-12:] == [0, 1, 1, 0] * 3


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.9, 1.1, "within noise"), (0.8, 0.99, "faster"), (1.01, 1.2, "slower")],
)
def test_within_noise_is_an_interval_that_holds_one(low: float, high: float, verdict: str) -> None:
    timing = Timing.of([1.0], 1)
    row = BenchRow("cpu", timing, timing, (low + high) / 2, low, high)
    assert row.verdict == verdict


def test_another_node_count_and_a_slower_backend_are_problems(exported: dict[str, Path]) -> None:
    timing, file = Timing.of([1.0], 1), file_contents(exported["fp32"])
    rows = tuple(
        BenchRow(name, timing, timing, (low + high) / 2, low, high)
        for name, low, high in (("cpu", 0.9, 1.1), ("cuda", 0.5, 0.6), ("trt", 1.01, 1.2))
    )
    found = Bench((file, replace(file, nodes=file.nodes + 2)), rows, 1, 6)
    nodes = f"the files have {file.nodes} and {file.nodes + 2} nodes: not the same architecture"
    assert found.problems == (nodes, "trt: slower")
    assert nodes in str(found)
    assert found.to_dict()["problems"] == [nodes, "trt: slower"]
    assert Bench((file, file), rows[:2], 1, 6).problems == ()


def test_nothing_that_ran_is_no_bench() -> None:
    assert not Bench((), (BenchRow("cpu", reason="not here"),), 1, 6)


def test_the_interval_of_the_median_is_by_order_statistics() -> None:
    # P(Bin(6, 1/2) < 1) = 1/64, and P(Bin(20, 1/2) < 6) = 0.0207: tables of the sign test.
    assert median_interval([3, 1, 2, 6, 5, 4]) == (1, 6)
    assert median_interval(range(1, 21)) == (6, 15)


def test_too_few_rounds_and_open_shapes_are_refused(exported: dict[str, Path]) -> None:
    with pytest.raises(ExportError, match=r"rounds=5: an interval for the median needs 6 rounds"):
        bench(exported["fp32"], exported["fp32"], rounds=5)
    spec = TensorSpec("x", ("batch", 3, "h", 8), torch.float32)
    with pytest.raises(ExportError, match=r"x: float32 \(batch, 3, h, 8\): its shape is open"):
        example_inputs([spec], 2)


def test_inputs_are_of_the_files_types() -> None:
    specs = [
        TensorSpec("x", ("batch", 3), torch.float16),
        TensorSpec("n", (-1,), torch.int64),
        TensorSpec("fixed", (1, 2), torch.float32),
    ]
    tensors = example_inputs(specs, 4)
    assert [tuple(tensor.shape) for tensor in tensors] == [(4, 3), (4,), (1, 2)]
    assert [tensor.dtype for tensor in tensors] == [torch.float16, torch.int64, torch.float32]


def test_the_contents_of_a_file_are_counted(exported: dict[str, Path], net: SmallNet) -> None:
    found = file_contents(exported["fp32"])
    assert (found.convs, found.norms) == (3, 0)
    assert found.nodes > 5
    assert found.size == exported["fp32"].stat().st_size
