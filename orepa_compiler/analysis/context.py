"""Answers what a rule asks of the forward it is in, and of the other forwards of the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import fx, nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.analysis.forms import MapForm
from orepa_compiler.analysis.inference import Forms
from orepa_compiler.analysis.values import LinearValue
from orepa_compiler.capture.forwards import Forwards, Read

Own = TypeVar("Own", bound="Interpretation")


@dataclass
class Interpretation(Forwards, ABC):
    """What the forwards of a capture compute, as far as they are linear.

    at_any_cost: joins also where one conv costs more than two. reasons: call node -> why it was
    not joined with what comes before it; (path, "") -> why a module is no layer. operators: of the
    layers, by their path and the channels that they see; what is left to do after each.
    """

    at_any_cost: bool = False
    reasons: dict[tuple[str, str], str] = field(default_factory=dict)
    operators: dict[tuple[str, int | None], tuple[ConvOperator, nn.Module | None]] = field(
        default_factory=dict
    )
    _freely: Interpretation | None = None

    @abstractmethod
    def values(self, owner: str) -> dict[fx.Node, LinearValue]:
        """The linear value of each node of the owner's forward that has one."""

    @abstractmethod
    def value_of(self, owner: str, nodes: Sequence[str], paths: Sequence[str] = ()) -> LinearValue:
        """The value of a region that a plan found, by the names of its nodes."""

    @abstractmethod
    def whole(self, path: str) -> LinearValue | None:
        """A module's forward as one linear value from its first input to its output, if it is."""

    @cached_property
    def forms(self) -> Forms:
        """What the forwards tell of the form of their maps."""
        return Forms(Forwards(self.capture, self.capture.module))

    @cached_property
    def device(self) -> torch.device:
        """Where the values that are read lie: operators without any are made there."""
        for path, module in self.capture.skeleton.named_modules():
            if not module._parameters and not module._buffers:
                continue
            try:
                found = self.read(path)
            except AttributeError:  # an edit before this one took it away
                continue
            for tensor in (*found.parameters(False), *found.buffers(False)):
                return tensor.device
        return torch.device("cpu")

    @property
    def freely(self) -> Interpretation:
        """The same forwards, joined at any cost: what a sum may come to as a whole."""
        if self._freely is None:
            self._freely = self.reading(self.read)
        return self._freely

    def reading(self: Own, read: Read) -> Own:
        """Makes another one of its kind, with other values for the modules, that joins freely."""
        other = type(self)(self.capture, read, at_any_cost=True)
        other.__dict__["forms"] = self.forms
        other._constants, other._reading = self._constants, self._reading  # they hang on no values
        if read is self.read:
            other.operators = self.operators
        return other


class Context(Protocol):
    """One forward, as far as it was gone over. values: node -> what it computes."""

    interpreter: Interpretation
    owner: str
    values: dict[fx.Node, LinearValue]

    @property
    def constants(self) -> frozenset[fx.Node]:
        """The nodes that hang on no input."""
        ...

    def form(self, node: fx.Node) -> MapForm:
        """What is known of the form of a map."""
        ...

    def keep_apart(self, node: fx.Node, reason: str) -> None:
        """Refuses to join a node with what comes before it."""
        ...

    def is_in_place(self, node: fx.Node) -> bool:
        """Whether a node writes over its first operand."""
        ...

    def is_overwritten(self, value: LinearValue, last: fx.Node) -> bool:
        """Whether what a value reads is written over before its last node."""
        ...
