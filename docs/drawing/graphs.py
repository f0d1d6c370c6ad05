"""Nodes and edges of a module as it runs: its layers, and the branches of its blocks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, fx, nn

from orepa_compiler.algebra.classifiers import is_norm
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks import ConvBlock, ReparamConv
from orepa_compiler.blocks.offline import OfflineBranch
from orepa_compiler.branches import SequenceBranch
from orepa_compiler.passes import is_leaf

# What runs on feature maps (a conv, a norm, the rest), and what runs on kernels alone.
Kind = Literal["conv", "norm", "other", "kernel"]


@dataclass(frozen=True)
class Node:
    """A box: its text, what it works on, and the boxes before it."""

    text: str
    kind: Kind
    inputs: tuple[int, ...]


@dataclass
class Graph:
    """Boxes, each after those that it reads."""

    nodes: list[Node] = field(default_factory=list)

    def add(self, text: str, kind: Kind, *inputs: int) -> int:
        self.nodes.append(Node(text, kind, inputs))
        return len(self.nodes) - 1


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return is_leaf(m)


def graph_of(model: nn.Module) -> Graph:
    """The boxes of a model: each leaf module and function of its forward, blocks in full."""
    drawn, places = Graph(), dict[fx.Node, int]()
    for node in _Tracer().trace(model).nodes:
        if node.op == "output":
            continue
        read = [places[value] for value in node.all_input_nodes]
        if node.op == "placeholder":
            places[node] = drawn.add("x", "other")
        elif node.op == "call_module":
            places[node] = _module(drawn, model.get_submodule(str(node.target)), read[0])
        else:
            name = "+" if "add" in str(node.target) else str(node.name)
            places[node] = drawn.add(name, "other", *read)
    return drawn


def _module(drawn: Graph, module: nn.Module, x: int) -> int:
    if not isinstance(module, ConvBlock):
        return drawn.add(_text(module), _kind(module), x)
    if isinstance(module, ReparamConv):
        y = _squeezed(drawn, module, x)
    else:
        y = drawn.add("+", "other", *_on_maps(drawn, module, x))
    return y if module.norm is None else drawn.add(_text(module.norm), "norm", y)


def _on_maps(drawn: Graph, block: ConvBlock, x: int) -> Iterable[int]:
    """Each branch on feature maps, with its norms or its scaling layer."""
    for branch in block.branches.values():
        place = x
        norms = list(branch.norms) if isinstance(branch, OfflineBranch) else []
        for number, layer in enumerate(_layers(branch)):
            place = drawn.add(_shape(layer), "conv", place)
            if norms:
                place = drawn.add(_text(norms[number]), "norm", place)
        if block.scaling is not None:
            place = drawn.add("scaling", "other", place)
        yield place


def _squeezed(drawn: Graph, block: ReparamConv, x: int) -> int:
    """The branches as kernels, their sum, and the one conv on the feature map."""
    scaled = []
    for branch in block.branches.values():
        place: int | None = None
        for layer in _layers(branch):
            place = drawn.add(_shape(layer), "kernel", *() if place is None else (place,))
        assert place is not None
        scaled.append(drawn.add("scaling", "kernel", place) if block.scaling is not None else place)
    kernel = drawn.add("W_e = sum", "kernel", *scaled)
    return drawn.add(f"Conv {_size(block.weight)}", "conv", x, kernel)


def _layers(branch: nn.Module) -> tuple[ConvOperator, ...]:
    if isinstance(branch, SequenceBranch | OfflineBranch):
        return branch.layers()
    return (branch.operator(),)  # type: ignore[operator]


def _shape(layer: ConvOperator) -> str:
    depthwise = layer.groups > 1 and layer.weight.shape[1] == 1
    return f"{_size(layer.weight)}{' depthwise' if depthwise else ''}"


def _size(weight: Tensor) -> str:
    return " x ".join(map(str, weight.shape[2:])) or "1"


def _kind(module: nn.Module) -> Kind:
    if is_norm(module):
        return "norm"
    return "conv" if isinstance(module, nn.Conv2d) else "other"


def _text(module: nn.Module) -> str:
    if isinstance(module, nn.Conv2d):
        return f"Conv {_size(module.weight)}{'' if module.bias is None else ' + bias'}"
    return type(module).__name__
