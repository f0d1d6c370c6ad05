"""Tests what expand leaves in memory, and what it holds at most, storage by storage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import orepa_compiler as orepa
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.blocks.offline import OfflineBlock
from orepa_compiler.blocks.sums import SqueezedSum
from orepa_compiler.generation.store import KernelStore, no_kernel_kept

WIDTH = 32
OFFLINE = replace(orepa.OREPA, name="offline", scaling_layer="norm")


class Peak(TorchDispatchMode):
    """Counts the bytes of the tensors that live at once, beside those in float64.

    The models are in float32: float64 are the temporaries of one conv at a time.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.total = self.most = 0
        for tensor in known:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if tensor.dtype == torch.float64 or tensor.is_meta or storage._cdata in self.live:
            return
        self.live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.total += storage.nbytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        if self.total > self.most:  # at most this: what is gone is still counted
            self.live = {key: own for key, own in self.live.items() if not own[0].expired()}
            self.total = sum(size for _, size in self.live.values())
            self.most = max(self.most, self.total)
        return out


def tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def net(convs: int) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(convs):
        conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(WIDTH), nn.ReLU()]
    return nn.Sequential(*layers)


def stores(model: nn.Module) -> Iterator[KernelStore]:
    """Those of the blocks, and of the sums inside them."""
    for module in model.modules():
        if isinstance(module, ConvBlock | SqueezedSum):
            yield module.store


@pytest.mark.parametrize("has_inputs", [False, True])
@pytest.mark.parametrize("block", ["auto", "OREPA", "REPVGG", OFFLINE])
def test_no_kernel_is_left_in_a_block(block: Any, has_inputs: bool) -> None:
    images = torch.randn(2, WIDTH, 4, 4) if has_inputs else None
    expanded = orepa.expand(net(2), block=block, inputs=images)
    found = list(stores(expanded))
    assert len(found) >= 2
    assert all(store.is_empty for store in found)


@pytest.mark.parametrize("block", ["auto", "OREPA"])
def test_no_kernel_is_left_in_a_block_that_rounds(block: str) -> None:
    images = torch.randn(2, WIDTH, 4, 4)
    expanded = orepa.expand(net(2), block=block, inputs=images, quantize="int8")
    found = list(stores(expanded))
    assert len(found) >= 2
    assert all(store.is_empty for store in found)


def test_collapse_leaves_no_kernel_in_the_model_that_it_is_given() -> None:
    expanded = orepa.expand(net(2)).eval()
    orepa.collapse(expanded, inputs=torch.randn(2, WIDTH, 4, 4))
    assert all(store.is_empty for store in stores(expanded))


def test_a_kernel_is_kept_in_evaluation_but_where_none_shall_be() -> None:
    expanded, images = orepa.expand(net(1)).eval(), torch.randn(2, WIDTH, 4, 4)
    with torch.no_grad():
        with no_kernel_kept():
            first = expanded(images)
        assert all(store.is_empty for store in stores(expanded))
        assert torch.equal(expanded(images), first)
    assert not all(store.is_empty for store in stores(expanded))


def test_the_most_that_expansion_in_place_holds() -> None:
    model = net(12)
    with Peak(tensors(model)) as peak:
        expanded = orepa.expand(model, inputs=torch.randn(1, WIDTH, 4, 4), inplace=True)
    size = sum(tensor.untyped_storage().nbytes() for tensor in tensors(expanded))
    assert size <= peak.most <= 1.5 * size


@torch.no_grad()
def test_a_new_block_holds_no_kernel() -> None:
    block = OfflineBlock(nn.Conv2d(WIDTH, WIDTH, 3), orepa.OREPA_VGG)
    found = list(stores(block))
    assert len(found) > 1
    assert all(store.is_empty for store in found)
