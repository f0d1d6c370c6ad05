"""Faults in files: each is caught, and the message names the module, the file or the provider."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.errors import ExportError, NotRun
from orepa_compiler.export import OnnxRunner
from orepa_compiler.export.gates.artifact import check_collapsed, check_precision
from orepa_compiler.export.onnx import writing as exporting
from orepa_compiler.export.onnx.inspection import MODULE_KEY, conv_nodes
from orepa_compiler.export.onnx.reading import load_graph
from orepa_compiler.export.onnx.weight_record import check_weights
from orepa_compiler.proving.locating import explain_report
from orepa_compiler.verification.divergence import Divergence
from tests.export.graphs import module_of
from tests.mutation.artifacts import CONV, RESNET, STRIDED, images, trained

pytestmark = pytest.mark.zoo

X = images()

Change = Callable[[onnx.ModelProto], None]


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return trained(RESNET)


@pytest.fixture(scope="module")
def file(resnet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("right") / "net.onnx"
    return orepa.export_onnx(orepa.collapse(resnet), X, path)


def changed(source: Path, folder: Path, change: Change) -> Path:
    model = onnx.load(source)
    change(model)
    onnx.save(model, folder / source.name)
    return folder / source.name


def conv(model: onnx.ModelProto, module: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.op_type == "Conv" and module_of(n) == module)


def on_array(module: str, number: int, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """A change of the weight (1) or bias (2) that one conv reads."""

    def apply(model: onnx.ModelProto) -> None:
        name = conv(model, module).input[number]
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))

    return apply


def attribute(module: str, name: str, value: list[int]) -> Change:
    def apply(model: onnx.ModelProto) -> None:
        node = conv(model, module)
        kept = [a for a in node.attribute if a.name != name]
        del node.attribute[:]
        node.attribute.extend([*kept, helper.make_attribute(name, value)])

    return apply


def flip_lowest_bit(array: np.ndarray) -> np.ndarray:
    bits = array.copy().view(np.int32)
    bits[1, 2, 1, 1] ^= 1
    return bits.view(np.float32)


def operator(module: str, old: str, new: str) -> Change:
    def apply(model: onnx.ModelProto) -> None:
        (node,) = (n for n in model.graph.node if module_of(n) == module and n.op_type == old)
        node.op_type = new

    return apply


def drop_sum(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "Add" and module_of(n) == "layer2.0")
    node.input[1] = node.input[0]


WRONG: dict[str, tuple[str, Change]] = {
    "bias dropped": (CONV, on_array(CONV, 2, lambda a: a * 0)),
    "kernel flipped": (CONV, on_array(CONV, 1, lambda a: a[..., ::-1].copy())),
    "kernel transposed": (CONV, on_array(CONV, 1, lambda a: a.swapaxes(2, 3).copy())),
    "channels swapped": (CONV, on_array(CONV, 1, lambda a: np.roll(a, 1, 0))),
    "all zero": (CONV, on_array(CONV, 1, lambda a: a * 0)),
    "NaN": (CONV, on_array(CONV, 1, lambda a: a * np.float32("nan"))),
    "bfloat16 passed off as float32": (
        CONV,
        on_array(CONV, 1, lambda a: torch.from_numpy(a.copy()).bfloat16().float().numpy()),
    ),
    "padding off by one": (CONV, attribute(CONV, "pads", [0, 1, 2, 1])),
    "stride begins one late": (STRIDED, attribute(STRIDED, "pads", [0, 0, 2, 2])),
    "another activation": ("layer2.0.act1", operator("layer2.0.act1", "Relu", "Softplus")),
    "no activation": ("layer2.0.act1", operator("layer2.0.act1", "Relu", "Identity")),
    "the shortcut forgotten": ("layer2.0.act2", drop_sum),
}


@pytest.mark.parametrize(("module", "change"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_graph_is_caught_and_placed(
    resnet: nn.Module, file: Path, tmp_path: Path, module: str, change: Change
) -> None:
    runner = OnnxRunner(changed(file, tmp_path, change))
    report = orepa.verify(resnet, runner, X)
    assert not report
    found = explain_report(resnet, runner, X, report)
    assert str(found).startswith(f"first diverging module: {module} (")
    if module == STRIDED:
        assert isinstance(found, Divergence)
        assert len(found.error_map) == 8
        assert found.border is not None


def test_the_right_file_passes_every_check(resnet: nn.Module, file: Path) -> None:
    runner = OnnxRunner(file)
    assert orepa.verify(resnet, runner, X, stress=True)
    graph = load_graph(file)
    assert check_weights(file, graph) == len(graph.graph.initializers)
    check_collapsed(graph, conv_nodes(graph))
    check_precision(conv_nodes(graph), "FLOAT")
    assert sum(runner.placement.values()) > 15
    assert set(runner.placement) == {"CPUExecutionProvider"}


def test_a_bit_below_the_noise_is_seen_by_the_hash_alone(
    resnet: nn.Module, file: Path, tmp_path: Path
) -> None:
    bad = changed(file, tmp_path, on_array(CONV, 1, flip_lowest_bit))
    assert orepa.verify(resnet, OnnxRunner(bad), X)
    with pytest.raises(
        ExportError, match=rf"^{CONV}: .*its weight {CONV}.weight has changed since"
    ):
        check_weights(bad, load_graph(bad))


def test_a_weight_that_is_gone_or_new_is_named(file: Path, tmp_path: Path) -> None:
    def rename(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == f"{CONV}.bias")
        tensor.name = conv(model, CONV).input[2] = "zzz.bias"

    bad = changed(file, tmp_path, rename)
    with pytest.raises(ExportError, match=rf"its weight {CONV}.bias is gone since the export"):
        check_weights(bad, load_graph(bad))


def test_outputs_that_are_missing_extra_or_renamed_are_named(
    resnet: nn.Module, file: Path, tmp_path: Path
) -> None:
    def add_output(model: onnx.ModelProto) -> None:
        name = conv(model, CONV).output[0]
        model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))

    report = orepa.verify(resnet, OnnxRunner(changed(file, tmp_path, add_output)), X)
    assert "the reference has no output" in str(report)


def insert_norm(model: onnx.ModelProto) -> None:
    node, ones = conv(model, CONV), np.ones(48, np.float32)
    model.graph.initializer.append(numpy_helper.from_array(ones, "ones"))
    norm = helper.make_node(
        "BatchNormalization", ["raw", "ones", "ones", "ones", "ones"], [node.output[0]], "norm"
    )
    norm.metadata_props.add(key=MODULE_KEY, value="layer2.0.bn2")
    node.output[0] = "raw"
    model.graph.node.insert([*model.graph.node].index(node) + 1, norm)


def test_a_file_that_was_not_collapsed_is_refused_by_its_place(file: Path, tmp_path: Path) -> None:
    model = load_graph(changed(file, tmp_path, insert_norm))
    with pytest.raises(ExportError, match=r"^layer2.0.bn2: not collapsed: a BatchNormalization"):
        check_collapsed(model, conv_nodes(model))


def test_a_conv_in_another_precision_is_refused_by_its_place(file: Path, tmp_path: Path) -> None:
    def cast(model: onnx.ModelProto) -> None:
        node = conv(model, CONV)
        on_array(CONV, 1, lambda a: a.astype(np.float16))(model)
        on_array(CONV, 2, lambda a: a.astype(np.float16))(model)
        index = [*model.graph.node].index(node)
        up = helper.make_node("Cast", ["half"], [node.output[0]], "up", to=TensorProto.FLOAT)
        down = helper.make_node("Cast", [node.input[0]], ["low"], "down", to=TensorProto.FLOAT16)
        node.input[0], node.output[0] = "low", "half"
        model.graph.node.insert(index + 1, up)
        model.graph.node.insert(index, down)
        del model.graph.value_info[:]

    model = load_graph(changed(file, tmp_path, cast))
    with pytest.raises(ExportError, match=rf"^{CONV}: the conv's input is FLOAT16 .*FLOAT was"):
        check_precision(conv_nodes(model), "FLOAT")


def test_float32_passed_off_as_float16_is_refused_by_its_place(file: Path) -> None:
    with pytest.raises(ExportError, match=r"^conv1.0: the conv's input is FLOAT .*FLOAT16 was"):
        check_precision(conv_nodes(load_graph(file)), "FLOAT16")


def test_a_provider_that_is_not_there_is_named(file: Path) -> None:
    with pytest.raises(NotRun, match="CUDAExecutionProvider is not in the installed onnxruntime"):
        OnnxRunner(file, provider="CUDAExecutionProvider")


@pytest.mark.parametrize("share", [0.3, 0.999])
def test_a_truncated_file_is_named(file: Path, tmp_path: Path, share: float) -> None:
    content = file.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ExportError, match=r"cut.onnx: "):
        OnnxRunner(tmp_path / "cut.onnx")


def test_the_weights_of_another_run_are_placed_in_the_first_conv(
    file: Path, resnet: nn.Module
) -> None:
    other, runner = trained(RESNET, seed=1), OnnxRunner(file)
    report = orepa.verify(other, runner, X)
    assert str(explain_report(other, runner, X, report)).startswith(
        "first diverging module: conv1.0 (Conv2d + BatchNorm2d)"
    )


@pytest.fixture
def pair(
    resnet: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path
) -> tuple[Path, Path]:
    """An ONNX file with its weights beside it."""
    monkeypatch.setattr(exporting, "EMBED_LIMIT_BYTES", 0)
    shared = file.with_name("pair")
    if not shared.is_dir():
        shared.mkdir()
        orepa.export_onnx(orepa.collapse(resnet), X, shared / "net.onnx")
    folder = Path(shutil.copytree(shared, tmp_path / "pair"))
    (data,) = folder.glob("*.data")
    return folder / "net.onnx", data


def test_external_weights_that_are_changed_cut_or_gone_are_named(pair: Any) -> None:
    path, data = pair
    OnnxRunner(path)
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    with pytest.raises(
        ExportError, match=rf"{data.name}: its content has changed since the export"
    ):
        OnnxRunner(path)
    data.write_bytes(content[:1000])
    with pytest.raises(ExportError, match=rf"{data.name}: has 1000 bytes, and net.onnx reads"):
        OnnxRunner(path)
    data.unlink()
    with pytest.raises(ExportError, match=rf"its weights lie in {data.name}, and there is no such"):
        OnnxRunner(path)
