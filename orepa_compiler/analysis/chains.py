"""Finds the branches of a sum: what a forward adds up, layer by layer.

The interpretation of `regions`, over operators that remember the layers they were composed of.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import prod
from typing import Any

from torch import Tensor, fx

from orepa_compiler.algebra.classifiers import is_batch_norm, is_tracked_instance_norm
from orepa_compiler.algebra.layers import conv_operator
from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.analysis.regions import Interpreter
from orepa_compiler.analysis.values import LinearValue
from orepa_compiler.analysis.walk import Walk
from orepa_compiler.capture import Call
from orepa_compiler.errors import NotLinear


@dataclass(frozen=True)
class Layer:
    """A linear layer of a branch.

    path: None for arithmetic in the forward. is_fixed: it has nothing to train (average pooling).
    """

    name: str
    operator: ConvOperator
    path: str | None = None
    is_norm: bool = False
    is_fixed: bool = False

    @property
    def has_kernel(self) -> bool:
        """Whether it is more than a norm, a factor for each channel, or padding."""
        is_plain = _is_channelwise(self.operator) and (self.path is None or self.is_fixed)
        return not (self.is_norm or is_plain)

    @property
    def is_scaling(self) -> bool:
        """Whether all it does is to multiply each channel by a factor, and to shift it."""
        return not self.has_kernel and self.operator.is_pointwise


# The layers of one branch, the innermost first.
Chain = tuple[Layer, ...]


@dataclass(frozen=True, eq=False)
class SummedOperator(ConvOperator):
    """An operator that remembers the branches it is the sum of."""

    chains: tuple[Chain, ...] = ()

    def beside(self, other: ConvOperator) -> ConvOperator:
        return _beside(self, other)

    def after(self, inner: ConvOperator) -> ConvOperator:
        return _after(self, inner)

    def __radd__(self, other: ConvOperator) -> ConvOperator:
        return _beside(other, self)

    def __rmatmul__(self, outer: ConvOperator) -> ConvOperator:
        return _after(outer, self)

    def scale(self, factor: Tensor) -> ConvOperator:
        weight = factor.expand(self.out_channels).reshape(-1, 1, *(1,) * self.rank)
        layer = _arithmetic(ConvOperator(weight, groups=self.out_channels))
        return summed(_plain(self).scale(factor), *((*chain, layer) for chain in self.chains))


@dataclass
class _ChainWalk(Walk):
    """A walk whose operators remember their branches."""

    def value(self, node: fx.Node) -> LinearValue | None:
        return _remembering(super().value(node), None)

    def layer(self, path: str, operand: fx.Node) -> LinearValue | None:
        value = super().layer(path, operand)
        if value is None or value.operator is None:
            return value
        module = self.interpreter.read(path)
        if is_tracked_instance_norm(module):
            self.interpreter.reasons[path, ""] = "it normalizes each image in train mode"
            return None
        is_norm = is_batch_norm(module)
        is_fixed = not is_norm and not any(True for _ in module.parameters())
        layer = Layer(type(module).__name__, value.operator, path, is_norm, is_fixed)
        return _remembering(value, layer)


@dataclass
class ChainInterpreter(Interpreter):
    """The Interpreter, with operators that remember their branches."""

    walk = _ChainWalk

    def obstacle(self, owner: str, node: fx.Node) -> str | None:
        """Why what a node gives was not joined with the layers before it; None where it was."""
        value = self.values(owner).get(node)
        if value is not None:
            return self.reasons.get((owner, value.nodes[0].name))
        if node.op != "call_module":
            return None
        path = self.capture.path_of(Call(owner, node))
        if path not in self.capture.graphs:
            handler = conv_operator.dispatch(type(self.capture.module(path)))
            is_known = handler is not conv_operator.dispatch(object)  # linear, but for a setting
            return self.reasons.get((path, "")) if is_known else None
        output = next(iter(reversed(self.capture.graphs[path].nodes))).args[0]
        return self.obstacle(path, output) if isinstance(output, fx.Node) else None


def _remembering(value: LinearValue | None, layer: Layer | None) -> LinearValue | None:
    """Gives the value of one layer an operator that remembers the layer."""
    if value is None or value.operator is None or isinstance(value.operator, SummedOperator):
        return value
    layer = layer or _arithmetic(value.operator)
    return replace(value, operator=summed(value.operator, (layer,)))


def _arithmetic(operator: ConvOperator) -> Layer:
    """What a forward does with its own parameters and numbers, as a layer."""
    name = "conv"
    if _is_channelwise(operator):
        name = "scaling" if operator.is_pointwise else "padding"
    return Layer(name, operator, is_fixed=not operator.weight.requires_grad)


def _is_channelwise(op: ConvOperator) -> bool:
    """Whether each output pixel is one input pixel of the same channel, times a factor."""
    return prod(op.kernel_size) == 1 and op.groups == op.in_channels == op.out_channels


def _beside(left: ConvOperator, right: ConvOperator) -> ConvOperator:
    """Adds two operators; a plain one beside one with branches is the input itself."""
    chains = [op.chains if isinstance(op, SummedOperator) else ((),) for op in (left, right)]
    return summed(_plain(left) + _plain(right), *chains[0], *chains[1])


def _after(outer: ConvOperator, inner: ConvOperator) -> ConvOperator:
    """Composes branch by branch, (A + B) @ C == A @ C + B @ C, where that copies no kernel."""
    chains = [
        op.chains if isinstance(op, SummedOperator) else ((_arithmetic(op),),)
        for op in (outer, inner)
    ]
    for many, single in (chains, chains[::-1]):
        copied = [layer for chain in single for layer in chain if layer.has_kernel]
        if len(many) > 1 and copied:
            raise NotLinear(
                f"{copied[0].name} and a sum of {len(many)} branches stand one behind the other, "
                "and each of these would need a copy of its kernel"
            )
    both = [(*first, *second) for second in chains[0] for first in chains[1]]
    return summed(_plain(outer) @ _plain(inner), *both)


def summed(operator: ConvOperator, *chains: Chain) -> SummedOperator:
    """The operator with the branches that it is the sum of."""
    return SummedOperator(**_fields(operator), chains=chains)


def _plain(operator: ConvOperator) -> ConvOperator:
    return ConvOperator(**_fields(operator))


def _fields(operator: ConvOperator) -> dict[str, Any]:
    return {field.name: getattr(operator, field.name) for field in fields(ConvOperator)}
