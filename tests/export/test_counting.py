"""Convs, sums and norms are counted alike everywhere, and a file that holds more is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from orepa_compiler.errors import ExportError
from orepa_compiler.export import export_onnx
from orepa_compiler.export.gates.artifact import check_collapsed
from orepa_compiler.export.gates.counting import Counts, check_counts
from orepa_compiler.export.onnx.inspection import conv_nodes
from orepa_compiler.export.onnx.program import trace_program
from orepa_compiler.export.onnx.reading import load_graph
from tests.export.graphs import WIDE, add, conv, model, norm, read
from tests.export.nets import Returns, SmallNet, images

Change = Callable[[onnx.ModelProto], None]


def of_program(net: nn.Module, *inputs: Tensor) -> Counts:
    return Counts.of_program(trace_program(net.eval(), inputs or (images(),), dynamic_batch=False))


def returned(function: Callable[[Tensor, Tensor], object]) -> Counts:
    return of_program(Returns(function))


def test_sums_of_two_feature_maps_are_counted_in_a_program() -> None:
    assert of_program(SmallNet()) == Counts(3, 1, 0)
    assert returned(lambda x, y: y + y.relu() + y.sigmoid()).sums == 2
    assert returned(lambda x, y: y.relu_().add_(y.abs())).sums == 1
    # One addend, a number, a parameter, a vector: no second feature map.
    assert returned(lambda x, y: (y + 1, y + torch.ones(4, 1, 1), y.mean((2, 3)) * 2)).sums == 0
    assert returned(lambda x, y: y.mean((2, 3)) + y.amax((2, 3))).sums == 0
    assert returned(lambda x, y: y.relu() + y.relu()).sums == 1
    assert returned(lambda x, y: functional.gelu(y, approximate="tanh")).sums == 1
    assert returned(lambda x, y: functional.gelu(y)).sums == 0
    attention = functional.scaled_dot_product_attention
    assert returned(lambda x, y: attention(y, y, y)).sums == 0
    assert returned(lambda x, y: attention(y, y, y, torch.ones(14, 14))).sums == 0
    assert returned(lambda x, y: attention(y, y, y, y @ y.mT)).sums == 1
    assert of_program(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3))) == Counts(0, 0, 1)


@pytest.mark.parametrize("opset", [18, 20])
def test_what_onnx_writes_as_several_nodes_is_no_fault(opset: int, tmp_path: Path) -> None:
    attention = functional.scaled_dot_product_attention
    made = [
        Returns(lambda x, y: functional.gelu(y, approximate="tanh")),
        Returns(lambda x, y: attention(y, y, y, y @ y.mT)),
        Returns(lambda x, y: torch.lerp(y, y.relu(), 0.3) + functional.mish(y)),
    ]
    for net in made:
        export_onnx(net.eval(), images(), tmp_path / "net.onnx", opset=opset)


def test_a_graph_is_counted_like_its_program(exported: dict[str, Path]) -> None:
    for file in exported.values():
        graph = load_graph(file)
        assert Counts.of_graph(graph) == Counts(3, 1, 0)
        assert Counts.recorded(graph.metadata_props) == Counts(3, 1, 0)


def test_what_is_added_to_a_feature_map_must_depend_on_the_input() -> None:
    made = model(conv("x", "a", **WIDE), add("a", "x", "b"), norm("b", "c"))
    assert Counts.of_graph(read(made)) == Counts(1, 1, 1)
    constant = model(conv("x", "a", **WIDE), add("a", "bn.0", "b"))
    assert Counts.of_graph(read(constant)) == Counts(1, 0, 0)
    vectors = model(
        helper.make_node("GlobalAveragePool", ["x"], ["p"]),
        helper.make_node("Flatten", ["p"], ["v"]),
        add("v", "v", "w"),
        outputs=("p",),
    )
    assert Counts.of_graph(read(vectors)).sums == 0


def shortcut(graph: onnx.ModelProto) -> None:
    """A conv's result, and the same once more, as an identity branch would give."""
    first = graph.graph.node[0]
    plus = helper.make_node("Add", ["raw", "same"], [first.output[0]], "plus")
    same = helper.make_node("Identity", ["raw"], ["same"], "same")
    first.output[0] = "raw"
    for node in (plus, same):
        graph.graph.node.insert(1, node)


def norm_behind_an_activation(graph: onnx.ModelProto) -> None:
    """Folded into no conv, so only the count tells."""
    index, node = next((i, n) for i, n in enumerate(graph.graph.node) if n.op_type == "Relu")
    graph.graph.initializer.append(numpy_helper.from_array(np.ones(8, np.float32), "ones"))
    made = helper.make_node("BatchNormalization", ["raw", *["ones"] * 4], [node.output[0]], "bn")
    node.output[0] = "raw"
    graph.graph.node.insert(index + 1, made)


def conv_more(graph: onnx.ModelProto) -> None:
    index, node = next((i, n) for i, n in enumerate(graph.graph.node) if n.op_type == "Conv")
    again = onnx.NodeProto()
    again.CopyFrom(node)
    again.name, again.output[0] = "again", "unread"
    graph.graph.node.insert(index + 1, again)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            shortcut,
            r"not collapsed: the ONNX graph adds up feature maps 2 times, and the coll.* 1 ",
        ),
        (
            norm_behind_an_activation,
            r"not collapsed: the ONNX graph has 1 BatchNorm.*model 0; call",
        ),
        (conv_more, r"the ONNX graph has 4 Conv nodes, but the model runs 3 convs"),
    ],
)
def test_a_file_with_more_than_its_model_is_not_collapsed(
    exported: dict[str, Path], change: Change, message: str
) -> None:
    graph = load_graph(exported["fp32"])
    check_collapsed(graph, conv_nodes(graph))
    changed = onnx.load(exported["fp32"])
    change(changed)
    graph = read(changed)
    with pytest.raises(ExportError, match=message):
        check_collapsed(graph, conv_nodes(graph))


def test_fewer_sums_and_norms_are_fine_and_a_file_without_a_record_is_not_judged() -> None:
    check_counts(Counts(3, 0, 0), Counts(3, 1, 1))
    assert Counts.recorded({"orepa.convs": "3"}) is None


class Standardized(nn.Conv2d):
    """Its kernel is made in the forward, so the file has no weight of its shape."""

    def forward(self, x: Tensor) -> Tensor:
        scale = x.mean() * 0 + 1
        return functional.conv2d(x, self.weight * scale, self.bias)


class Shared(nn.Module):
    """One conv under two names: the exporter writes the one, named_modules tells the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, padding=1)
        self.second = nn.Sequential(self.first, nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x)  # type: ignore[no-any-return]


class Tracked(nn.Sequential):
    """An InstanceNorm in eval form is a BatchNormalization in a file."""

    def __init__(self) -> None:
        norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        super().__init__(nn.Conv2d(3, 4, 3), norm, nn.ReLU())


class Pyramid(nn.Module):
    """torch writes a pooling to a size that does not divide the map's as many sums."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        pooled = functional.adaptive_avg_pool2d(y, 6)
        return self.head(y + functional.interpolate(pooled, size=y.shape[2:]))


class Unreturned(nn.Module):
    """Deep supervision: heads that only training returns, and one that runs twice alike."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.heads = nn.ModuleList(nn.Conv2d(4, 2, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        y = self.body(x)
        made = [functional.relu_(head(y)) + x.mean() for head in self.heads]
        return made if self.training else made[-1] * self.heads[-1](y)


@pytest.mark.parametrize(
    ("net", "counts"),
    [(Tracked(), Counts(1, 0, 1)), (Pyramid(), None), (Unreturned(), Counts(2, 1, 0))],
)
def test_what_torch_writes_otherwise_is_no_fault(
    net: nn.Module, counts: Counts | None, tmp_path: Path
) -> None:
    graph = load_graph(export_onnx(net.eval(), images(), tmp_path / "net.onnx"))
    assert Counts.recorded(graph.metadata_props) == Counts.of_graph(graph)
    assert counts in (None, Counts.of_graph(graph))


def test_a_translation_with_more_than_the_program_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Counts, "of_program", classmethod(lambda cls, program: cls(3, 0, 0)))
        with pytest.raises(ExportError, match=r"adds up feature maps 1 times.* 0 times"):
            export_onnx(SmallNet().eval(), images(), tmp_path / "net.onnx")
    # what stands for another operator is none of the program's sums
    net = Returns(lambda x, y: functional.group_norm(y, 2, torch.rand(4), torch.rand(4))).eval()
    graph = load_graph(export_onnx(net, images(), tmp_path / "net.onnx"))
    assert Counts.of_graph(graph, translated=True).sums == 0


@pytest.mark.parametrize("net", [Standardized(3, 4, 3), Shared()])
def test_a_kernel_made_in_the_forward_and_a_shared_conv_are_no_fault(
    net: nn.Module, tmp_path: Path
) -> None:
    path = export_onnx(net.eval(), images(), tmp_path / "net.onnx")
    assert Counts.of_graph(load_graph(path)).convs == 1
