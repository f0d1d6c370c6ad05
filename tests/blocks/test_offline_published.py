"""Offline blocks against the papers' own: torch's layers, padded as DBB's code pads."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orepa_compiler.blocks import Block, BranchSum
from orepa_compiler.blocks.catalogue import DBB, OREPA, OREPA_VGG, REPVGG, mobileone
from orepa_compiler.blocks.offline import OfflineBlock
from orepa_compiler.branches import (
    AveragePool,
    DepthwisePointwise,
    Identity,
    Kernel,
    Pointwise,
    PointwiseKernel,
)
from tests.blocks.test_offline import CONVS, image, trained
from tests.convolution_reference import assert_same
from tests.operator_factories import random_tensor


class Published(nn.Module):
    """The block of a paper on feature maps, in torch's own layers, padded as DBB's code pads."""

    def __init__(self, block: OfflineBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        outputs = [self.branch(branch, x) for branch in self.block.branches.values()]
        own = self.block.own_bias()
        bias = 0 if own is None else own.reshape(1, -1, 1, 1)
        return sum(outputs) + bias  # type: ignore[return-value]

    def branch(self, offline: Any, x: Tensor) -> Tensor:
        norms, kind = list(offline.norms), offline.branch
        options = {"stride": self.block.stride, "groups": self.block.groups}
        padding: Any = self.block.padding
        if isinstance(kind, Kernel):
            return norms[0](F.conv2d(x, kind.weight, padding=padding, **options))
        if isinstance(kind, Pointwise):
            return norms[0](F.conv2d(x, kind.weight, **options))
        if isinstance(kind, Identity):
            return norms[0](x)
        if isinstance(kind, BranchSum):
            return norms[0](F.conv2d(x, kind.operator().weight, padding=padding, **options))
        if isinstance(kind, DepthwisePointwise):
            stride, channels = self.block.stride, x.shape[1]
            y = F.conv2d(x, kind.depthwise, None, stride, padding, groups=channels)
            return norms[1](F.conv2d(norms[0](y), kind.pointwise, groups=self.block.groups))
        if isinstance(kind, PointwiseKernel):
            first = kind.pointwise.clone()
            for t in range(len(first)):
                first[t, t % first.shape[1], 0, 0] += 1
            y = norm_and_pad(F.conv2d(x, first, groups=self.block.groups), norms[0], padding)
            return norms[1](F.conv2d(y, kind.kernel, **options))
        y = norm_and_pad(F.conv2d(x, kind.weight, groups=self.block.groups), norms[0], padding)
        if isinstance(kind, AveragePool):
            return norms[1](F.avg_pool2d(y, self.block.kernel_size, self.block.stride))
        filters = kind.prior
        return norms[1](F.conv2d(y, filters, stride=self.block.stride, groups=len(filters)))


def norm_and_pad(x: Tensor, norm: Any, padding: tuple[int, int]) -> Tensor:
    """Padded with bias - running_mean * weight / sqrt(running_var + eps), in train mode too."""
    y = norm(x)
    with torch.no_grad():
        border = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
    (top, left), (height, width) = padding, y.shape[2:]
    padded = border.reshape(1, -1, 1, 1).expand(len(y), -1, height + 2 * top, width + 2 * left)
    padded = padded.clone()
    padded[:, :, top : top + height, left : left + width] = y
    return padded


PUBLISHED = {
    "REPVGG": REPVGG,
    "OREPA_VGG": OREPA_VGG,
    "DBB": DBB,
    "two repeats": mobileone(2),
    "all of OREPA": replace(OREPA, scaling_layer="norm"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["3x3", "3x3 stride 2", "groups"])
@pytest.mark.parametrize("block", PUBLISHED.values(), ids=PUBLISHED)
def test_feature_maps_are_those_of_the_paper(block: Block, name: str, training: bool) -> None:
    made = trained(CONVS[name](), block)
    assert made is not None
    made.train(training)
    twin = Published(copy.deepcopy(made))
    x, z = image(made, 5).requires_grad_(), image(made, 5).requires_grad_()
    y, expected = made(x), twin(z)
    assert_same(y, expected)
    for module, out in ((made, y), (twin, expected)):
        (out * random_tensor(*out.shape, seed=9)).sum().backward()
        assert all(p.grad is not None for p in module.parameters())
    assert x.grad is not None
    assert z.grad is not None
    assert float((x.grad - z.grad).abs().max()) <= 1e-10 * float(z.grad.abs().max())
    buffers = dict(twin.block.named_buffers())
    for key, buffer in made.named_buffers():
        assert torch.allclose(buffer.double(), buffers[key].double(), rtol=1e-12), key
    theirs = dict(twin.block.named_parameters())
    for key, parameter in made.named_parameters():
        # their code stops the gradient at the border, which the inner norms' parameters reach
        if parameter.dim() > 1 or key.endswith((".norms.1.weight", ".norms.1.bias")):
            grad, other = parameter.grad, theirs[key].grad
            assert grad is not None
            assert other is not None
            scale = max(float(other.abs().max()), 1e-3)
            assert float((grad - other).abs().max()) <= 1e-9 * scale, key
