"""Whatever a file holds, its reader gives a value or one of our errors, and touches nothing else.

READER_EXAMPLES sets how many inputs each reader is given: few in a run of all tests.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.checkpoints.reading import has_plan
from orepa_compiler.checkpoints.weights import load_weights
from orepa_compiler.errors import ReparamError
from orepa_compiler.export.gates.counting import Counts
from orepa_compiler.export.int8.dithering import rounding_steps
from orepa_compiler.export.int8.integers import file_layers
from orepa_compiler.export.manifest import Manifest
from orepa_compiler.export.onnx.external_data import check_external, external_files, load_external
from orepa_compiler.export.onnx.inspection import conv_nodes, foldable_norms_in_file, parallel_convs
from orepa_compiler.export.onnx.reading import load_graph, values_of
from orepa_compiler.export.onnx.weight_record import check_weights
from orepa_compiler.export.run.signature import Interface
from orepa_compiler.export.run.tapping import boundary_values
from orepa_compiler.planning import Edit, Plan, Refusal
from orepa_compiler.proving.certificate import Certificate
from orepa_compiler.verification import take_samples
from orepa_compiler.verification.sample_file import load_samples, save_samples

fuzz = settings(
    max_examples=int(os.environ.get("READER_EXAMPLES", "60")),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

SCALARS: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["", "..", "/etc/hostname", "a/../../b", "float32", "conv", "0/input/0"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested JSON."""
    found = [path]
    if isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            found += places(value, (*path, key))
    return found


@st.composite
def spoilt(draw: Any, text: str) -> str:
    """A JSON text with some values replaced, removed or added, or with its characters changed."""
    data = json.loads(text)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(data)))
        if not path:
            continue
        parent = data
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.booleans()):
            parent[path[-1]] = draw(VALUES)
        elif isinstance(parent, dict):
            parent.pop(path[-1], None)
        else:
            parent.append(draw(VALUES))
    written = json.dumps(data)
    how = draw(st.integers(0, 9))
    if how == 0:
        return written[: draw(st.integers(0, len(written)))]
    if how == 1:
        at = draw(st.integers(0, len(written)))
        return written[:at] + draw(st.text(max_size=3)) + written[at:]
    return "[" * 3000 + written if how == 2 else written


EDIT = Edit(
    "expand", "a.b", "Conv2d", "OREPA", (3, 9), (4, 4), "note", {"block": "OREPA", "n": [1]}
)
PLAN = Plan((EDIT,), (Refusal("expand", "c", "Conv2d", "why"),)).to_json()
MANIFEST = json.dumps(
    {
        "orepa_manifest": 1,
        "created": "now",
        "files": [{"role": "onnx", "name": "a/net.onnx", "bytes": 3, "sha256": "00"}],
        "options": {"precision": "fp32", "keep": ["a"]},
        "checks": [{"name": "check onnx", "verdict": "pass", "error": 1e-7, "note": ""}],
        "versions": {"torch": "2"},
    }
)


def only_our_errors(read: Callable[[], Any]) -> Any:
    """What `read` gives; None for one of our errors. All else comes out, and fails the test."""
    try:
        return read()
    except ReparamError:
        return None


@fuzz
@given(spoilt(PLAN))
def test_plans(text: str) -> None:
    plan = only_our_errors(lambda: Plan.from_json(text))
    if plan is not None:  # what was read is whole: it can be shown and written
        assert str(plan)
        assert Plan.from_json(plan.to_json()) == plan


@fuzz
@given(spoilt(MANIFEST))
def test_manifests(text: str) -> None:
    manifest = only_our_errors(lambda: Manifest.from_json(text, Path("x.manifest.json")))
    for file in manifest.files if manifest else ():
        assert ".." not in Path(file.name).parts
        assert not Path(file.name).is_absolute()


@fuzz
@given(spoilt(json.dumps([{"path": "a", "kind": "b"}])))
def test_certificates(text: str) -> None:
    only_our_errors(lambda: Certificate.from_json(text))


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        y = self.conv(x["image"])
        return {"map": y, "mask": y > 0, "class": y.flatten(1).argmax(1)}


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))


@cache
def checkpoint() -> bytes:
    torch.manual_seed(0)
    return _written(lambda path: orepa.save(orepa.expand(net(), where="**"), path))


@cache
def samples() -> bytes:
    batch = ({"image": torch.randn(1, 1, 2, 2)},)
    return _written(lambda path: save_samples(take_samples(Tiny().eval(), batch), path))


def _written(write: Callable[[Path], Any]) -> bytes:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"orepa-readers-{os.getpid()}"
    try:
        write(path)
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


def header_of(content: bytes) -> tuple[str, bytes]:
    (size,) = struct.unpack("<Q", content[:8])
    return content[8 : 8 + size].decode(), content[8 + size :]


def with_header(text: str, body: bytes, draw: Any) -> bytes:
    header = text.encode("utf-8", "replace")
    size = draw(st.sampled_from([len(header)] * 8 + [0, 1, 2**63, len(header) + 7]))
    return struct.pack("<Q", size) + header + body


def read_as_checkpoint(path: Path) -> None:
    model = net()
    only_our_errors(lambda: has_plan(path))
    only_our_errors(lambda: orepa.load(model, path))
    only_our_errors(lambda: load_weights(model, path))


FILES = {"checkpoint": (checkpoint, read_as_checkpoint), "samples": (samples, load_samples)}


@pytest.mark.parametrize("kind", FILES)
@fuzz
@given(st.data())
def test_safetensors(tmp_path_factory: pytest.TempPathFactory, kind: str, data: Any) -> None:
    make, read = FILES[kind]
    text, body = header_of(make())
    parts = json.loads(text)
    if data.draw(st.booleans()):  # the header of the file
        written = data.draw(spoilt(text))
    else:  # the JSON of ours inside it
        key = data.draw(st.sampled_from(sorted(parts["__metadata__"])))
        parts["__metadata__"][key] = data.draw(spoilt(parts["__metadata__"][key]))
        written = json.dumps(parts)
    if kind == "checkpoint" and data.draw(st.booleans()):  # a plan, which is JSON within JSON
        about = json.loads(json.loads(text)["__metadata__"]["orepa"])
        about["plans"][0] = data.draw(spoilt(about["plans"][0]))
        parts["__metadata__"]["orepa"] = json.dumps(about)
        written = json.dumps(parts)
    folder = tmp_path_factory.mktemp("reader")
    path = folder / "file.safetensors"
    path.write_bytes(with_header(written, body, data.draw))
    only_our_errors(lambda: read(path))
    assert os.listdir(folder) == ["file.safetensors"]


LOCATIONS = st.one_of(
    st.sampled_from(
        ["w.bin", "a/b.bin", "../w.bin", "/etc/hostname", "", "a/../../w.bin", ".", "a"]
    ),
    st.text(max_size=6),
)
SIZES = st.one_of(st.integers(-9, 99).map(str), st.text(max_size=4), st.just("9" * 40))


@fuzz
@given(LOCATIONS, SIZES, SIZES, st.booleans())
def test_external_data(
    tmp_path_factory: pytest.TempPathFactory, location: str, offset: str, length: str, inner: bool
) -> None:
    folder = tmp_path_factory.mktemp("outer") / "inner"
    (folder / "a").mkdir(parents=True)
    for name in ("w.bin", "a/b.bin", "../w.bin"):
        (folder / name).write_bytes(bytes(64))
    tensor = onnx.TensorProto(name="w", data_type=onnx.TensorProto.FLOAT, dims=[2])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=value.encode("utf-8", "replace").decode())
    held = [onnx.helper.make_node("Constant", [], ["w"], value=tensor)] if inner else []
    nodes = [*held, onnx.helper.make_node("Relu", ["w"], ["y"])]
    graph = onnx.helper.make_graph(nodes, "g", [], [], [] if inner else [tensor])
    path = folder / "net.onnx"
    path.write_bytes(onnx.helper.make_model(graph).SerializeToString())
    model = only_our_errors(lambda: load_graph(path))
    if model is not None:
        for name in external_files(model):
            assert (folder / name).resolve().is_relative_to(folder)
        only_our_errors(lambda: check_external(path, model))
        only_our_errors(lambda: check_weights(path, model))
        only_our_errors(lambda: load_external(path, model))
    assert sorted(os.listdir(folder)) == ["a", "net.onnx", "w.bin"]


@cache
def graphs() -> tuple[bytes, bytes]:
    """A file in float32 and one in int8."""
    torch.manual_seed(0)
    model, batch = (
        nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1)),
        torch.randn(2, 2, 4, 4),
    )
    options: Any = {"precision": "int8", "calibration": [batch]}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        plain = orepa.export_onnx(model.eval(), batch, path).read_bytes()
        return plain, orepa.export_onnx(model, batch, path, **options).read_bytes()


SPOILT_SIZES = st.lists(st.sampled_from([-1, 0, 1, 3, 2**40, 2**62]), max_size=5)


def spoil_graph(model: onnx.ModelProto, data: Any) -> None:
    """Changes one thing in a model: its types, sizes, names, attributes, edges or versions."""
    node, weight = (data.draw(st.sampled_from(list(held))) for held in parts_of(model.graph))
    attribute = node.attribute[0] if node.attribute else node.attribute.add(name="axis")
    names = [w.name for w in model.graph.initializer] + ["", "x", model.graph.input[0].name]
    name, how = data.draw(st.sampled_from(names)), data.draw(st.integers(0, 10))
    if how == 0:
        attribute.type = data.draw(st.integers(0, 14))
    elif how == 1:
        attribute.ints[:] = data.draw(SPOILT_SIZES)
    elif how == 2:
        del node.input[: data.draw(st.integers(0, 3))]
    elif how == 3:
        weight.dims[:] = data.draw(SPOILT_SIZES)
    elif how == 4:
        weight.data_type = data.draw(st.sampled_from([-3, 0, 2, 7, 8, 10, 16, 22, 99]))
    elif how == 5:
        weight.name = name
    elif how == 6:
        weight.raw_data = weight.raw_data[: data.draw(st.integers(0, 9))]
    elif how == 7:
        model.opset_import[0].version = data.draw(st.sampled_from([-1, 0, 99, 2**40]))
    elif how == 8:
        node.op_type = data.draw(st.sampled_from(["Conv", "Add", "BatchNormalization", "If"]))
    elif how == 9:
        node.output[:] = data.draw(st.sampled_from([[], [""], ["a", "a"], [name]]))
    else:
        model.graph.output.add(name=name)


def parts_of(graph: onnx.GraphProto) -> tuple[Any, Any]:
    return graph.node, graph.initializer


def read_all(path: Path) -> None:
    """All that reads a file without running it, each part on its own."""
    model = only_our_errors(lambda: load_graph(path))
    if model is not None:
        only_our_errors(lambda: parallel_convs(model, conv_nodes(model)))
        only_our_errors(lambda: foldable_norms_in_file(model))
        only_our_errors(lambda: Counts.of_graph(model))
        only_our_errors(lambda: Interface.of(model))
        only_our_errors(lambda: boundary_values(model.graph))
        only_our_errors(lambda: check_weights(path, model))
        only_our_errors(lambda: list(file_layers(path)))
        only_our_errors(lambda: rounding_steps(path))


@fuzz
@given(st.data())
def test_onnx_graphs(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    content = data.draw(st.sampled_from(graphs()))
    if data.draw(st.booleans()):
        model = onnx.load_from_string(content)
        for _ in range(data.draw(st.integers(1, 3))):
            spoil_graph(model, data)
        content = model.SerializeToString()
    else:
        spoilt_bytes = bytearray(content)
        for _ in range(data.draw(st.integers(1, 4))):
            spoilt_bytes[data.draw(st.integers(0, len(content) - 1))] = data.draw(
                st.integers(0, 255)
            )
        content = bytes(spoilt_bytes[: data.draw(st.sampled_from([len(content)] * 4 + [99]))])
    folder = tmp_path_factory.mktemp("graph")
    path = folder / "net.onnx"
    path.write_bytes(content)
    read_all(path)
    assert os.listdir(folder) == ["net.onnx"]


def test_two_weights_of_one_name_are_refused(tmp_path: Path) -> None:
    model = onnx.load_from_string(graphs()[0])
    model.graph.initializer[1].name = name = model.graph.initializer[0].name
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(orepa.ExportError, match=rf"net.onnx: two weights have the name '{name}'"):
        load_graph(tmp_path / "net.onnx")


def test_a_weight_with_fewer_values_than_its_shape_is_refused(tmp_path: Path) -> None:
    model = onnx.load_from_string(graphs()[1])
    model.graph.initializer[0].dims[:] = [2**40]
    onnx.save(model, tmp_path / "net.onnx")
    held = load_graph(tmp_path / "net.onnx").graph.initializers.tensors()
    with pytest.raises(orepa.ExportError, match=r"its values are no \w+ of shape \[10995"):
        values_of(next(iter(held)))
