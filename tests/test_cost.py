"""The multiply-accumulates of each conv, counted without arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.errors import ReparamError
from orepa_compiler.planning.cost import conv_macs
from tests.compiler_nets import batch, stem_net, untouched

# kernel elements x output positions, by hand: 10 x 10 images, 5 x 5 after the stem
MACS = {
    "stem": 8 * 3 * 49 * 25,
    "conv": 8 * 8 * 9 * 25,
    "depthwise": 8 * 9 * 25,
    "pointwise": 12 * 8 * 25,
}


@pytest.mark.parametrize("count", [1, 4])
def test_macs_are_for_one_image(count: int) -> None:
    net = stem_net()
    with untouched(net):
        assert conv_macs(net, batch(count)) == MACS


def test_a_block_costs_what_its_conv_costs() -> None:
    assert conv_macs(orepa.expand(stem_net()), batch()) == MACS
    assert conv_macs(orepa.collapse(orepa.expand(stem_net())), batch()) == MACS


def test_a_list_of_batches_is_counted_once() -> None:
    assert conv_macs(stem_net(), [batch(2), batch(3)]) == MACS


def test_a_transposed_conv_spends_its_kernel_on_each_input_position() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(3, 5, 4, stride=2, bias=False))
    assert conv_macs(net, torch.zeros(2, 3, 6, 6)) == {"0": 3 * 5 * 16 * 36}


@pytest.mark.parametrize("rank", [1, 3])
def test_other_ranks_and_inputs_without_a_batch(rank: int) -> None:
    conv = {1: nn.Conv1d, 3: nn.Conv3d}[rank](4, 6, 3, groups=2)
    net = nn.Sequential(conv)
    for shape in ((4, *(8,) * rank), (5, 4, *(8,) * rank)):
        assert conv_macs(net, torch.zeros(shape)) == {"0": 6 * 2 * 3**rank * 6**rank}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.conv(x))


def test_calls_are_added_up() -> None:
    assert conv_macs(Twice(), torch.zeros(1, 3, 4, 4)) == {"conv": 2 * 9 * 16}


class ByValue(Twice):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else x


def test_a_forward_that_needs_values_runs_once_for_real() -> None:
    assert conv_macs(ByValue(), torch.ones(1, 3, 4, 4)) == {"conv": 9 * 16}
    assert conv_macs(ByValue(), torch.zeros(1, 3, 4, 4)) == {}


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(ReparamError, match=r"^MACs cannot be counted: the model does not run on"):
        conv_macs(ByValue(), torch.zeros(1, 5, 4, 4) + 1)


def test_the_users_hooks_do_not_see_the_count() -> None:
    net, seen = stem_net(), []
    net.register_forward_hook(lambda module, args, y: seen.append(y.device))
    assert conv_macs(net, batch()) == MACS
    assert seen == []


class ByHook(nn.Module):
    """A forward that adds what a hook left on its child."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.stem.seen = None
        self.stem.register_forward_hook(lambda module, args, y: setattr(module, "seen", y))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.stem(x))
        seen, self.stem.seen = self.stem.seen, None
        return y + seen


def test_a_hook_that_the_forward_needs_is_called() -> None:
    net = ByHook()
    assert conv_macs(net, torch.ones(1, 3, 4, 4)) == {"stem": 9 * 16, "conv": 9 * 16}
    assert net.stem.seen is None


def test_the_plan_shows_the_macs() -> None:
    made = orepa.plan(stem_net(), inputs=batch())
    macs = {edit.path: edit.macs for edit in made.of("expand").edits}
    assert macs == {path: (count, count) for path, count in MACS.items()}
    assert "29.4 k" in str(made)
    assert all(edit.macs is None for edit in orepa.plan(stem_net()).edits)
