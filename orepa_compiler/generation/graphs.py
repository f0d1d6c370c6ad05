"""Makes kernels of many blocks, and their gradients, by two CUDA graphs: one launch each.

A graph is recorded once and runs again on the same addresses. So it serves while parameters stand
still in memory and change in place, as an optimizer changes them; where they have moved, it is
recorded anew. What it gives is copied out, since the next run writes over it. The reference is
`together`, whose operations it records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.branches import FrequencyFilter
from orepa_compiler.errors import ReparamError
from orepa_compiler.generation import SqueezableBlock, generate, is_watched
from orepa_compiler.generation.squeezing import full_precision
from orepa_compiler.generation.stacking import Layout, in_memory
from orepa_compiler.generation.together import Members, eager_backward, groups_of, operator_of

# Runs before recording, in which libraries choose and constants are made.
_WARM_UPS = 3


class Graph(Protocol):
    """Work that was recorded. run() does it again and gives the memory that it writes to."""

    def run(self) -> Tensor: ...


class CudaGraph:
    """The work as a CUDA graph."""

    def __init__(self, work: Callable[[], Tensor]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._made = work()

    def run(self) -> Tensor:
        self._graph.replay()
        return self._made


# Which graphs a device has.
GRAPHS: dict[str, Callable[[Callable[[], Tensor]], Graph]] = {"cuda": CudaGraph}


def generate_replayed(model: nn.Module, blocks: Sequence[SqueezableBlock]) -> list[ConvOperator]:
    """The operators of the blocks, as `generate` gives them, by a graph where one was recorded.

    Blocks that are not made together with others are made by themselves, as ever.
    Raises ReparamError where their device has no graphs.
    """
    if is_watched():
        return [generate(block) for block in blocks]
    devices = {p.device.type for block in blocks for p in block.branches.parameters()}
    if others := devices - GRAPHS.keys():
        raise ReparamError(
            f"graphs=True needs parameters on {' or '.join(GRAPHS)}, these are on "
            f"{', '.join(sorted(others))}; leave it out"
        )
    made: dict[int, ConvOperator] = {}
    known = _recordings.setdefault(model, {})
    for key, (members, group) in groups_of(blocks).items():
        values = [value for recipe in members.recipes for value in recipe.values()]
        places = _places(members, values)
        if key not in known or known[key].places != places:
            known[key] = _Recording(members, places)
        weights = _Replay.apply(known[key], *values)
        for number, recipe, weight in zip(group, members.recipes, weights, strict=True):
            made[number] = operator_of(blocks[number], recipe, weight)
    return [made.get(number) or generate(block) for number, block in enumerate(blocks)]


class _Recording:
    """The two graphs of some blocks, each recorded where it is first wanted.

    places: where all that they read lies.
    """

    def __init__(self, members: Members, places: list[Any]) -> None:
        self.members, self.places = members, places
        self._record = GRAPHS[members.forms[0].device.type]
        self._forward: Graph | None = None
        self._backward: Graph | None = None
        self._grads: Tensor | None = None

    def kernels(self, values: Sequence[Tensor]) -> list[Tensor]:
        """W_e of each block, in new memory."""
        own = _still(values)
        if self._forward is None:
            self._forward = self._record(lambda: _joined(self.members.kernels(own)))
        return _split(self._forward.run().clone(), [form.kernel for form in self.members.forms])

    def gradients(self, values: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of all values, in new memory, where every kernel was reached."""
        kernels = [form.kernel for form in self.members.forms]
        pieces = [_in_order(g, place) for g, place in zip(grads, kernels, strict=True)]
        if self._backward is None or self._grads is None:
            own, given = _still(values), torch.cat(pieces)
            self._grads = given

            def work() -> Tensor:
                found = self.members.gradients(own, _split(given, kernels))
                return _joined([g for block in found if block is not None for g in block])

            self._backward = self._record(work)
        torch.cat(pieces, out=self._grads)
        places = [place for form in self.members.forms for place in form.places()]
        return _split(self._backward.run().clone(), places)


_recordings: WeakKeyDictionary[nn.Module, dict[Any, _Recording]] = WeakKeyDictionary()


class _Replay(torch.autograd.Function):
    """`_SqueezeTogether` by graphs."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, *values: Tensor) -> tuple[Tensor, ...]:
        ctx.recording = recording
        ctx.save_for_backward(*values)
        ctx.set_materialize_grads(False)
        with full_precision():
            return tuple(recording.kernels(values))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        values: tuple[Tensor, ...] = ctx.saved_tensors
        reached = [grad for grad in grads if grad is not None]
        if torch.is_grad_enabled() or len(reached) < len(grads):
            return None, *eager_backward(ctx.recording.members, values, grads)
        with full_precision():
            return None, *ctx.recording.gradients(values, reached)


def _places(members: Members, values: Sequence[Tensor]) -> list[Any]:
    """What a graph depends on: forms, where values lie in memory, and the filters' edits."""
    branches = [branch for recipe in members.recipes for branch in recipe.branches]
    priors = [b.prior for b in branches if isinstance(b, FrequencyFilter)]
    return [
        *members.forms,
        *((value.data_ptr(), value.shape, value.stride()) for value in values),
        *((prior.data_ptr(), prior._version) for prior in priors),
    ]


def _still(values: Sequence[Tensor]) -> list[Tensor]:
    """The same memory, held so that nothing else comes to lie there."""
    return [value.detach() for value in values]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([in_memory(tensor) for tensor in tensors])


def _in_order(grad: Tensor, place: Layout) -> Tensor:
    """A gradient's numbers in the order in which those of its kernel lie."""
    return in_memory((grad.movedim(1, -1) if place.last else grad).contiguous())


def _split(flat: Tensor, places: Sequence[Layout]) -> list[Tensor]:
    rows = flat.split([place.shape.numel() for place in places])
    pairs = zip(rows, places, strict=True)
    return [row.as_strided(place.shape, place.strides) for row, place in pairs]
