"""Makes a branch of given layers: convs of any kind, one after the other."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.branches import Kernel, SequenceBranch


class FixedKernel(SequenceBranch):
    """A kernel that is not trained, such as average pooling: (C_out, C_in / groups, *K)."""

    kernel: Tensor

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        self.register_buffer("kernel", conv.weight.detach().clone())

    def layers(self) -> tuple[ConvOperator, ...]:
        return (self.spatial(self.kernel, self.groups),)


class LayerSequence(SequenceBranch):
    """1 x 1 - k x k, 1 x k - k x 1, 1 x 1 - average, ...: the given layers, the innermost first.

    Each layer has the geometry of its own; a scaling layer between two convs is a depthwise 1 x 1.
    """

    def __init__(self, conv: ConvOperator, stack: Sequence[SequenceBranch]) -> None:
        super().__init__(conv)
        self.stack = nn.ModuleList(stack)

    def layers(self) -> tuple[ConvOperator, ...]:
        return tuple(layer for part in self.stack for layer in part.layers())  # type: ignore[operator]


def trained_kernel(conv: ConvOperator, *, trains: bool) -> Kernel:
    """A k x k branch that starts at the operator's kernel."""
    branch = Kernel(conv)
    branch.weight = nn.Parameter(conv.weight.detach().clone(), requires_grad=trains)
    return branch
