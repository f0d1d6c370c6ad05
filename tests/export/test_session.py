"""onnxruntime runs the file where it was told to, or says why not; every type comes through."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from orepa_compiler.errors import ExportError, MissingPackage
from orepa_compiler.export.run.session import (
    check_provider,
    from_ortvalue,
    open_session,
    spec_of,
    to_numpy,
    to_ortvalue,
)

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"

onnxruntime = pytest.importorskip("onnxruntime")


def session(providers: list[str], assignment: dict[str, list[tuple[str, str]]]) -> SimpleNamespace:
    """What check_provider asks of a session. assignment: provider -> (node, operator)."""
    parts = [
        SimpleNamespace(
            ep_name=provider,
            get_nodes=lambda nodes=nodes: [SimpleNamespace(name=n, op_type=o) for n, o in nodes],
        )
        for provider, nodes in assignment.items()
    ]
    return SimpleNamespace(
        get_providers=lambda: providers, get_provider_graph_assignment_info=lambda: parts
    )


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = [SimpleNamespace(metadata={"Name": name}) for name in names]
    monkeypatch.setattr(metadata, "distributions", lambda: found)


def test_the_cpu_is_accepted(exported: dict[str, Path]) -> None:
    check_provider(open_session(exported["fp32"], CPU), CPU)


def test_an_absent_provider_is_refused_with_those_that_are_there(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, "onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    message = rf"{CUDA} is not in the installed onnxruntime \({CPU}\).*orepa-compiler\[gpu\]"
    with pytest.raises(ExportError, match=message):
        open_session(exported["fp32"], CUDA)
    with pytest.raises(ExportError, match=rf"NoSuchProvider is not in.*\({CPU}\)$"):
        open_session(exported["fp32"], "NoSuchProvider")


def test_both_packages_at_once_are_told(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CPU])
    with pytest.raises(
        ExportError, match=r"both installed and overwrite each other: pip uninstall"
    ):
        open_session(exported["fp32"], CUDA)


def test_a_session_that_fell_back_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "onnxruntime-gpu")
    with pytest.raises(ExportError, match=rf"fell back from {CUDA} to {CPU}"):
        check_provider(session([CPU], {}), CUDA)


def test_convs_on_another_provider_are_refused_and_shape_nodes_are_not() -> None:
    shapes = {CUDA: [("conv1", "Conv")], CPU: [("n1", "Shape")]}
    check_provider(session([CUDA, CPU], shapes), CUDA)
    strays = {CUDA: [("conv1", "Conv")], CPU: [("conv2", "FusedConv"), ("n1", "Shape")]}
    message = rf"runs 1 convs or matrix products on {CPU}, not on {CUDA}: conv2"
    with pytest.raises(ExportError, match=message):
        check_provider(session([CUDA, CPU], strays), CUDA)


def test_a_session_that_cannot_tell_is_refused() -> None:
    mute = SimpleNamespace(get_providers=lambda: [CUDA, CPU])
    with pytest.raises(ExportError, match=r"cannot tell which nodes ran on CUDA.*newer one"):
        check_provider(mute, CUDA)


def test_bfloat16_that_the_cpu_cannot_run_is_not_run(exported: dict[str, Path]) -> None:
    message = r"bf16.onnx: not run: CPUExecutionProvider lacks bfloat16 kernels.*precision='fp32'"
    with pytest.raises(ExportError, match=message):
        open_session(exported["bf16"], CPU)


def test_a_file_that_cannot_be_loaded_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(exported["fp32"])
    model.graph.node[0].op_type = "Convolve"
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(ExportError, match=r"onnxruntime cannot load the file: .*Convolve"):
        open_session(tmp_path / "odd.onnx", CPU)


def test_a_truncated_file_is_refused(exported: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(exported["fp32"].read_bytes()[:1000])
    with pytest.raises(ExportError, match=r"cut.onnx: not a whole ONNX file \(1000 bytes"):
        open_session(path, CPU)


def test_without_onnxruntime_the_extra_is_named(
    exported: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingPackage, match=r"orepa-compiler\[cpu\]"):
        open_session(exported["fp32"], CPU)


def test_an_input_that_torch_does_not_know_is_refused() -> None:
    item = SimpleNamespace(name="labels", type="tensor(string)", shape=[None])
    with pytest.raises(ExportError, match=r"labels is a tensor\(string\)"):
        spec_of(Path("net.onnx"), item)


@pytest.mark.parametrize(
    ("dtype", "onnx_type"),
    [
        (torch.float32, TensorProto.FLOAT),
        (torch.float16, TensorProto.FLOAT16),
        (torch.bfloat16, TensorProto.BFLOAT16),
        (torch.float64, TensorProto.DOUBLE),
        (torch.int64, TensorProto.INT64),
        (torch.uint8, TensorProto.UINT8),
        (torch.bool, TensorProto.BOOL),
    ],
)
def test_every_type_goes_in_and_out_unchanged(
    tmp_path: Path, dtype: torch.dtype, onnx_type: int
) -> None:
    infos = [helper.make_tensor_value_info(name, onnx_type, ["n", None]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["y"])], "same", infos[:1], infos[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "same.onnx")
    opened = open_session(tmp_path / "same.onnx", CPU)
    spec = spec_of(tmp_path, opened.get_inputs()[0])
    assert (spec.shape, spec.dtype) == (("n", "?"), dtype)
    # A transposed tensor: its memory is not in the order of its axes.
    tensor = torch.tensor([[0.0, 1.0, 3.5], [2.0, 65504.0, 7.0]]).T.to(dtype)
    array = to_numpy(tensor)
    (value,) = opened.run_with_ort_values(None, {"x": to_ortvalue(array, dtype)})
    result = from_ortvalue(value, dtype)
    assert result.dtype == dtype
    assert torch.equal(result, tensor)
