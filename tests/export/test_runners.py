"""Exported files run on torch tensors; an engine, where there is no GPU, on a stand-in."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from orepa_compiler.errors import ExportError
from orepa_compiler.export import OnnxRunner, TensorRTRunner
from orepa_compiler.export.run import runners
from tests.export.nets import images


def test_a_lone_tensor_comes_back_as_a_tensor(exported: dict[str, Path]) -> None:
    runner = OnnxRunner(exported["fp32"])
    assert str(runner.inputs[0]) == "image: float32 (batch, 3, 16, 16)"
    assert str(runner.outputs[0]) == "output: float32 (batch, 5)"
    by_position, by_name = runner(images()), runner(image=images())
    assert isinstance(by_position, Tensor)
    assert torch.equal(by_position, by_name)  # type: ignore[arg-type]


def test_several_outputs_come_back_by_name(exported: dict[str, Path]) -> None:
    found = OnnxRunner(exported["dict"])(images(3))
    assert isinstance(found, dict)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "logits": (3, 5),
        "features": (3, 8, 8, 8),
    }


def test_a_dict_of_one_comes_back_as_a_dict(tmp_path: Path) -> None:
    from orepa_compiler.export import export_onnx
    from tests.export.nets import Returns

    model = Returns(lambda x, y: {"out": y}).eval()
    found = OnnxRunner(export_onnx(model, images(), tmp_path / "net.onnx"))(images())
    assert isinstance(found, dict)
    assert found.keys() == {"out"}


def test_half_precision_goes_in_and_out(exported: dict[str, Path]) -> None:
    found = OnnxRunner(exported["fp16"])(images().half())
    assert isinstance(found, Tensor)
    assert found.dtype == torch.float16


def test_gradients_do_not_stand_in_the_way(exported: dict[str, Path]) -> None:
    OnnxRunner(exported["fp32"])(images().requires_grad_())


def test_inputs_that_do_not_fit_are_refused(exported: dict[str, Path]) -> None:
    runner = OnnxRunner(exported["fp32"])
    with pytest.raises(ExportError, match=r"fp32.onnx: input image is float16, but the file takes"):
        runner(images().half())
    with pytest.raises(ExportError, match=r"image has shape \(2, 3, 17, 17\)"):
        runner(images(2, 17))


def test_a_failing_run_is_told(exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    runner = OnnxRunner(exported["fp32"])

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(runner._session, "run_with_ort_values", fail)
    with pytest.raises(ExportError, match=r"fp32.onnx: onnxruntime failed: out of memory$"):
        runner(images())


class Context:
    """An execution context of an engine that computes y = 2 x from addresses, as TensorRT would."""

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.output_shape: tuple[int, ...] | None = None
        self.succeeds = True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return 1 <= shape[0] <= 4

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.output_shape or self.shape

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == 7
        count = self.shape[0] * self.shape[1]
        x, y = ((ctypes.c_float * count).from_address(self.addresses[n]) for n in "xy")
        for index in range(count):
            y[index] = 2 * x[index]
        return self.succeeds


class Engine:
    num_io_tensors = 2
    dtype = "FLOAT"

    def __init__(self) -> None:
        self.context: Any = Context()

    def get_tensor_name(self, index: int) -> str:
        return "xy"[index]

    def get_tensor_mode(self, name: str) -> str:
        return {"x": "in", "y": "out"}[name]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, 3)

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.dtype)

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(1, 3), (2, 3), (4, 3)]

    def create_execution_context(self) -> Any:
        return self.context


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    stand_in, tensorrt = (
        Engine(),
        SimpleNamespace(TensorIOMode=SimpleNamespace(INPUT="in", OUTPUT="out")),
    )

    @contextmanager
    def stream(device: torch.device):  # type: ignore[no-untyped-def]
        yield 7

    monkeypatch.setattr(runners, "load_engine", lambda path, content: (tensorrt, stand_in))
    monkeypatch.setattr(runners, "_gpu", lambda path: torch.device("cpu"))
    monkeypatch.setattr(runners, "_stream", stream)
    (tmp_path / "net.engine").write_bytes(b"plan")
    return stand_in


def test_an_engine_runs_on_the_addresses_of_tensors(engine: Engine, tmp_path: Path) -> None:
    runner = TensorRTRunner(tmp_path / "net.engine")
    assert [str(spec) for spec in (*runner.inputs, *runner.outputs)] == [
        "x: float32 (-1, 3)",
        "y: float32 (-1, 3)",
    ]
    x = torch.randn(3, 2).T  # its memory is not in the order of its axes
    found = runner(x)
    assert isinstance(found, dict)
    torch.testing.assert_close(found["y"], 2 * x)


def test_a_lone_output_of_an_engine_is_a_tensor(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "get_tensor_name", lambda index: ("x", "output")[index])
    monkeypatch.setattr(engine, "get_tensor_mode", lambda name: "in" if name == "x" else "out")
    monkeypatch.setattr(engine.context, "execute_async_v3", lambda handle: True)
    assert isinstance(TensorRTRunner(tmp_path / "net.engine")(torch.zeros(1, 3)), Tensor)


def test_a_shape_outside_the_range_of_the_engine_is_refused(engine: Engine, tmp_path: Path) -> None:
    message = r"x has shape \(5, 3\), outside the engine's range \(1, 3\) to \(4, 3\).*shapes="
    with pytest.raises(ExportError, match=message):
        TensorRTRunner(tmp_path / "net.engine")(torch.zeros(5, 3))


def test_an_output_whose_shape_depends_on_values_is_refused(engine: Engine, tmp_path: Path) -> None:
    engine.context.output_shape = (-1, 4)
    with pytest.raises(ExportError, match=r"shape of output y depends on values"):
        TensorRTRunner(tmp_path / "net.engine")(torch.zeros(1, 3))


def test_a_type_that_torch_lacks_is_refused(engine: Engine, tmp_path: Path) -> None:
    engine.dtype = "FP4"
    with pytest.raises(ExportError, match=r"x has type FP4, which torch does not know"):
        TensorRTRunner(tmp_path / "net.engine")


def test_a_failing_engine_is_told(engine: Engine, tmp_path: Path) -> None:
    engine.context.succeeds = False
    with pytest.raises(ExportError, match=r"TensorRT could not run the engine"):
        TensorRTRunner(tmp_path / "net.engine")(torch.zeros(1, 3))


def test_an_engine_without_memory_is_told(engine: Engine, tmp_path: Path) -> None:
    engine.context = None
    with pytest.raises(ExportError, match=r"TensorRT has no memory to run the engine"):
        TensorRTRunner(tmp_path / "net.engine")


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_an_engine_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "net.engine").write_bytes(b"plan")
    message = r"net.engine: device numerics: not run; torch sees no CUDA GPU here"
    with pytest.raises(ExportError, match=message):
        TensorRTRunner(tmp_path / "net.engine")


def test_no_such_engine(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"net.engine: no such file; write it with"):
        TensorRTRunner(tmp_path / "net.engine")
