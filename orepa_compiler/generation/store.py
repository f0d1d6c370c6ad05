"""Keeps the kernel of a block for as long as it is the one that its branches make.

Two reasons to keep one: nothing is trained (eval, torch.no_grad), or several backward passes share
one step (`stepping`). What is kept is no part of the block: not of its state_dict, of a pickle, or
of a copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.errors import ReparamError, TrainingFormWarning
from orepa_compiler.generation import SqueezableBlock, generate, is_watched
from orepa_compiler.generation.stamps import Stamp

# A tensor's bits are read in the widest of these words that it is a whole number of, and summed
# along the rows and the columns of a table as wide as this.
_WORDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
_COLUMNS = 1024

_keeps_none: ContextVar[bool] = ContextVar("_keeps_none", default=False)


@contextmanager
def no_kernel_kept() -> Iterator[None]:
    """Keeps no kernel from here on: each is made for one call and dropped.

    Where models are only tried, kernels that are kept outlive the trial, and weigh as much as the
    blocks.
    """
    token = _keeps_none.set(True)
    try:
        yield
    finally:
        _keeps_none.reset(token)


class KernelStore:
    """Where a block looks for its kernel before it makes one."""

    def __init__(self) -> None:
        self._kept: _Kept | None = None
        self.leaf: KernelLeaf | None = None
        self.prepared: Prepared | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> KernelStore:
        return KernelStore()

    def __reduce__(self) -> tuple[type[KernelStore], tuple[()]]:
        return KernelStore, ()

    @property
    def is_empty(self) -> bool:
        """Whether no kernel is kept."""
        return self._kept is None

    def operator(self, block: SqueezableBlock) -> ConvOperator:
        """The block's operator: kept from before where it is still the same, or made now."""
        if self.leaf is not None:
            return self.leaf.operator(block)
        if is_watched():
            warn_if_exported()
            return generate(block)
        tensors = sources(block)
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            self._kept = None
            made = None if self.prepared is None else self.prepared.operator(tensors)
            return generate(block) if made is None else made
        if self.prepared is not None:
            self.prepared.is_refused = True
        if _keeps_none.get() or not _can_be_kept(block, tensors):
            return generate(block)
        kept = self._kept
        if kept is None or not kept.fits(tensors):
            kept = self._kept = _Kept.of(block, tensors)
        return kept.made


class Prepared:
    """A kernel that was made before the forward which will ask for it, together with others.

    is_open: while that forward runs. is_refused: it was met without gradients, as by a checkpoint
    that will run the block once more in a graph of its own.
    """

    def __init__(self, tensors: Sequence[Tensor], made: ConvOperator) -> None:
        self._made = made
        self._stamp = Stamp(tensors)
        self.is_open, self.is_refused = True, False
        spent: list[bool] = []  # apart from this object, so that the hook does not keep it alive
        made.weight.register_hook(lambda grad: spent.append(True))
        self._spent = spent

    def operator(self, tensors: Sequence[Tensor]) -> ConvOperator | None:
        """The operator where it serves; None where the block is to make its own of its tensors.

        After the forward only a backward pass asks for it, in which a checkpoint runs the block
        again and must find what it found before.
        """
        in_backward = torch._C._current_graph_task_id() != -1
        serves = (self.is_open or in_backward) and not (self.is_refused or self._spent)
        return self._made if serves and self._stamp.fits(tensors) else None


class KernelLeaf:
    """A block's kernel as a leaf of the autograd graph: it gathers the gradients of many passes."""

    def __init__(self, block: SqueezableBlock, path: str, made: ConvOperator) -> None:
        self.path = path
        self._stamp = Stamp(sources(block))
        self._made = made
        self._life = _Life(path)
        bias = None if made.bias is None else self._life.leaf(made.bias)
        self._leaf = replace(made, weight=self._life.leaf(made.weight), bias=bias)

    def operator(self, block: SqueezableBlock) -> ConvOperator:
        """The operator with the leaf as its kernel. Raises ReparamError if it is out of date."""
        if is_watched():
            return self._leaf
        self.check(block)
        if not torch.is_grad_enabled():
            return self._leaf
        made, tensors = self._leaf, sources(block)
        bias = None if made.bias is None else self._life.bridged(made.bias, tensors)
        return replace(made, weight=self._life.bridged(made.weight, tensors), bias=bias)

    def check(self, block: SqueezableBlock) -> None:
        if not self._stamp.fits(sources(block)):
            raise ReparamError(
                "its parameters changed, or were exchanged, while kernels_once kept the kernel "
                "made of them; call optimizer.step() and load weights outside of the with block",
                path=self.path,
            )

    def close(self) -> None:
        """From now on a gradient that arrives is an error: nothing would hand it on."""
        self._life.is_over = True

    def leaves(self) -> list[Tensor]:
        """What gathers: the kernel, and the bias where branches have one."""
        return [leaf for _, leaf in self._pairs()]

    def gathered(self) -> list[tuple[Tensor, Tensor]]:
        """What was made of the parameters, each with the gradient that its leaf gathered."""
        return [(made, leaf.grad) for made, leaf in self._pairs() if leaf.grad is not None]

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        made, leaf = self._made, self._leaf
        pairs = [(made.weight, leaf.weight), (made.bias, leaf.bias)]
        return [(a, b) for a, b in pairs if a is not None and b is not None and a.requires_grad]


@dataclass
class _Life:
    """Whether a leaf still gathers; apart from it, so that its hooks do not keep it alive."""

    path: str
    is_over: bool = False

    def leaf(self, made: Tensor) -> Tensor:
        leaf = made.detach().requires_grad_(made.requires_grad)
        if leaf.requires_grad:
            leaf.register_hook(self.refuse)
        return leaf

    def bridged(self, leaf: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The leaf, behind a step of autograd that reads what its kernel is made of too.

        So a pass that is asked for their gradients alone comes by, and can be told.
        """
        if not leaf.requires_grad:
            return leaf
        trained = [tensor for tensor in tensors if tensor.requires_grad]
        passed: Tensor = _Bridge.apply(leaf, self, *trained)
        return passed

    def check_gathers(self, leaf_node: Any) -> None:
        """Raises ReparamError where the running backward pass leaves the leaf out."""
        self.refuse()
        if not torch._C._will_engine_execute_node(leaf_node):
            raise ReparamError(
                "autograd.grad, or backward(inputs=...), asks for the gradients of its parameters "
                "inside kernels_once, where they gather on the kernel that is made of them; call "
                "backward() without inputs, or take an ordinary step",
                path=self.path,
            )

    def refuse(self, grad: Tensor | None = None) -> None:
        if self.is_over:
            raise ReparamError(
                "a backward pass came after the with block of kernels_once, whose kernel it goes "
                "through: the branches would get no gradient; call backward inside",
                path=self.path,
            )


class _Bridge(torch.autograd.Function):
    """Gives a leaf on; its gradient is the leaf's, and the parameters beside it get none."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, life: _Life, *parameters: Tensor) -> Tensor:
        ctx.life, ctx.node = life, torch.autograd.graph.get_gradient_edge(leaf).node
        ctx.count = len(parameters)
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.life.check_gathers(ctx.node)
        return grads[0], None, *(None,) * ctx.count


def sources(block: SqueezableBlock) -> list[Tensor]:
    """The tensors that a block's kernel is made of."""
    branches: nn.Module = block.branches
    found: dict[int, Tensor] = {}
    if block.scaling is not None:
        found[id(block.scaling)] = block.scaling
    for module in branches.modules():  # parameters() would take three times as long, at each step
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found[id(tensor)] = tensor
    return list(found.values())


@dataclass(frozen=True)
class _Kept:
    """An operator whose kernel needs no gradient, and what it was made of."""

    made: ConvOperator
    stamp: Stamp
    sums: list[list[Tensor]]

    @classmethod
    def of(cls, block: SqueezableBlock, tensors: Sequence[Tensor]) -> _Kept:
        # outside of inference mode, so that a later pass may save the kernel for backward
        with torch.inference_mode(False), torch.no_grad():
            return cls(generate(block), Stamp(tensors), [bit_sums(t) for t in tensors])

    def fits(self, tensors: Sequence[Tensor]) -> bool:
        return self.stamp.fits(tensors) and all(
            all(map(torch.equal, sums, bit_sums(tensor)))
            for sums, tensor in zip(self.sums, tensors, strict=True)
        )


@torch.no_grad()
def bit_sums(tensor: Tensor) -> list[Tensor]:
    """The sums of the tensor's bits along rows and columns, and the bits that fill no row.

    They show an edit that torch does not count. To hide, it must leave all the rows' and all the
    columns' sums as they are; one or two changed numbers never do.
    """
    words = _words(tensor)
    rows = words.numel() // _COLUMNS
    table = words[: rows * _COLUMNS].view(rows, _COLUMNS)
    return [table.sum(0), table.sum(1), words[rows * _COLUMNS :].clone()]


def _words(tensor: Tensor) -> Tensor:
    """The tensor's bits, as numbers in the order of memory."""
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    flat = tensor.detach().permute(order).flatten()
    for word in _WORDS:
        if flat.numel() * flat.itemsize % word.itemsize == flat.storage_offset() % word.itemsize:
            return flat.view(word)
    raise AssertionError("a byte fits everything")


def _can_be_kept(block: SqueezableBlock, tensors: Sequence[Tensor]) -> bool:
    """Whether a change would be seen.

    On a GPU, to look costs as much as a new kernel. What a user's branch depends on is not known.
    """
    ours = (__name__.split(".")[0], "torch")
    modules = block.branches.modules()
    return all(
        type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and not t.is_inference()
        for t in tensors
    ) and all(type(module).__module__.split(".")[0] in ours for module in modules)


def warn_if_exported() -> None:
    """Warn where torch.jit.trace, torch.export or torch.onnx.export records the branches.

    torch.compile, torch.func and forward-mode differentiation are tools of training: no word there.
    """
    if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
        warnings.warn(
            "a model in training form is being exported: the file will make every kernel of its "
            "blocks anew at each call; export orepa.collapse(model) instead",
            TrainingFormWarning,
            stacklevel=2,
        )
