"""The forwards of a capture as they are read: their graphs, and the constants in them."""

from __future__ import annotations

import copy
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from orepa_compiler.capture import Call, Capture, join
from orepa_compiler.capture.constants import constants_of, evaluated
from orepa_compiler.capture.graphs import Graphs
from orepa_compiler.capture.memory import Memory, is_in_place
from orepa_compiler.errors import NotLinear

# Gives the module at a path, to be read: without values when planning, in float64 when applying.
Read = Callable[[str], nn.Module]


@dataclass
class Forwards(Graphs):
    """Reads the forwards of a capture, each once.

    read: gives the modules whose values are meant.
    """

    read: Read
    _constants: dict[str, frozenset[fx.Node]] = field(default_factory=dict, init=False)
    _reading: dict[str, dict[str, list[fx.Node]]] = field(default_factory=dict, init=False)
    _memory: Memory | None = field(default=None, init=False)

    def constants(self, owner: str) -> frozenset[fx.Node]:
        """The nodes that no input changes, without those whose buffers the forward writes over."""
        if owner not in self._constants:
            graph = self.graph(owner)
            written = self.memory.written_attributes(owner)
            self._constants[owner] = constants_of(graph, written) if graph else frozenset()
        return self._constants[owner]

    def constant(self, owner: str, argument: Any) -> Any:
        """An argument of a node, with the constant nodes in it computed.

        Raises NotLinear where that needs the values of a map.
        """

        def attribute(target: str) -> Any:
            holder, _, name = target.rpartition(".")
            return getattr(self.read(join(owner, holder)), name)

        try:
            return fx.node.map_arg(argument, lambda node: evaluated(node, attribute))
        except NotLinear:
            raise
        except Exception as error:  # the user's code, run here: anything may come out of it
            text = str(error).strip().split("\n")[0]
            raise NotLinear(
                f"what it takes cannot be computed ahead ({type(error).__name__}: {text[:120]})"
            ) from error

    def is_in_place(self, owner: str, node: fx.Node) -> bool:
        """Whether a node writes over its first operand."""
        if node.op == "call_module":
            module = self.capture.module(self.capture.path_of(Call(owner, node)))
            return bool(getattr(module, "inplace", False))
        return is_in_place(node)

    @property
    def memory(self) -> Memory:
        """Which values share memory, and which nodes write over them."""
        if self._memory is None:
            self._memory = Memory(self)
        return self._memory

    def remaining_reads(self, owner: str, nodes: Iterable[fx.Node]) -> str | None:
        """Why the layers that some nodes of a forward call must stay, though the nodes could go.

        The forward itself reads the weight of one of them outside of these nodes; or another
        forward reads what this one holds itself, and uses in these nodes.
        """
        gone = set(nodes)
        uses_own = any(n.op == "get_attr" and "." not in str(n.target) for n in gone)
        for other in self.capture.reads.get(owner, ()) if uses_own else ():
            return f"the forward of {other or 'the model'} reads its weight directly"
        for node in gone:
            if node.op != "call_module":
                continue
            is_read = self.capture.path_of(Call(owner, node)) in self.capture.reads
            if is_read and not gone.issuperset(self.readers(owner).get(str(node.target), ())):
                return f"the forward of {owner or 'the model'} reads its weight directly"
        return None

    def readers(self, owner: str) -> dict[str, list[fx.Node]]:
        """Child -> the nodes of the owner's forward that read a tensor of it."""
        if owner not in self._reading:
            graph, found = self.graph(owner), defaultdict(list)
            for node in graph.nodes if graph else ():
                if node.op == "get_attr":
                    found[str(node.target).rpartition(".")[0]].append(node)
            self._reading[owner] = dict(found)
        return self._reading[owner]


def with_trial_values(capture: Capture) -> Read:
    """Gives modules with random positive values in float64, the same at each call.

    What two formulas give on these, they give alike for all values, or a coincidence of 15 digits.
    """

    def read(path: str) -> nn.Module:
        module = copy.deepcopy(capture.module(path)).to_empty(device="cpu").double().eval()
        tensors = (*module.named_parameters(), *module.named_buffers())
        with torch.no_grad():
            for name, tensor in tensors:
                _fill(tensor, join(path, name))
        return module

    return read


def _fill(tensor: Tensor, name: str) -> None:
    if tensor.is_floating_point():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype))
