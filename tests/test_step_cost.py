"""What blocks add to a training step, and what max_cost leaves out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import orepa_compiler as orepa
from orepa_compiler.blocks import ReparamConv
from orepa_compiler.errors import ReparamError
from orepa_compiler.planning.step_cost import kernel_macs, step_cost
from tests.compiler_nets import batch, stem_net, untouched


def block(conv: nn.Module) -> ReparamConv:
    expanded = orepa.expand(nn.Sequential(conv), block=orepa.OREPA, where="*")
    return next(module for module in expanded.modules() if isinstance(module, ReparamConv))


def test_macs_of_a_kernel_by_hand() -> None:
    # k x k, then 1x1 1x1-kxk average frequency depthwise-pointwise, each with its place in the sum
    kernel = 6 * 4 * 9
    products = 4 * kernel + kernel + kernel + 8 * kernel
    assert kernel_macs(block(nn.Conv2d(4, 6, 3))) == products + 5 * kernel + 6 * 4
    # groups share the products among them
    kernel = 6 * 2 * 9
    products = 2 * kernel + kernel + kernel + 8 * kernel
    assert kernel_macs(block(nn.Conv2d(4, 6, 3, groups=2))) == products + 5 * kernel + 6 * 2


def test_the_stem_is_made_of_kernels_and_their_composition() -> None:
    stem = orepa.expand(stem_net()).stem  # 3 -> 8 channels, 7 x 7
    layers = stem.branches["deep_stem"].stack
    composed = 8 * 8 * 9 * 3 * 9 + 8 * 8 * 9 * 3 * 25
    expected = (
        sum(kernel_macs(layer) for layer in layers) + composed + 2 * 8 * 3 * 49
    )  # and the origin
    assert kernel_macs(stem) == expected


def test_the_plan_says_what_each_block_adds_at_the_batch() -> None:
    net = stem_net()
    with untouched(net):
        small, large = (orepa.plan(net, inputs=batch(count)) for count in (1, 4))
    for one, four in zip(small.of("expand").edits, large.of("expand").edits, strict=True):
        assert one.options["added"] == four.options["added"] > 0
        assert one.macs is not None
        ratio = one.options["added"] / (3 * one.macs[0])
        assert one.note.endswith(f"+{ratio:.0%} of its step")
        assert four.note.endswith(f"+{ratio / 4:.0%} of its step")
    assert step_cost(large) == pytest.approx(step_cost(small) / 4)
    assert step_cost(orepa.plan(net)) == 0
    assert orepa.Plan.from_json(large.to_json()) == large


def test_max_cost_leaves_out_the_dearest_first_and_says_why() -> None:
    net = stem_net()
    whole = orepa.plan(net, inputs=batch())
    dearest = max(whole.of("expand").edits, key=lambda edit: edit.options["added"])
    cost = step_cost(whole)
    with untouched(net):
        made = orepa.plan(net, inputs=batch(), max_cost=cost * 0.999)
    assert {e.path for e in whole.edits} - {e.path for e in made.edits} == {dearest.path}
    (refusal,) = set(made.refusals) - set(whole.refusals)
    images = dearest.options["images"]
    assert refusal.path == dearest.path
    assert refusal.reason == (
        f"with it the step is {cost:.1%} dearer at batch {images}, more than "
        f"max_cost={cost * 0.999:g}; its block is the dearest of those left"
    )
    assert orepa.plan(net, inputs=batch(), max_cost=cost).edits == whole.edits


def test_expand_leaves_them_out_too() -> None:
    net = stem_net().eval()
    whole = orepa.plan(net, inputs=batch())
    expanded = orepa.expand(net, inputs=batch(), max_cost=step_cost(whole) * 0.999)
    blocks = [m for m in expanded.modules() if isinstance(m, ReparamConv)]
    assert len(blocks) == len(whole.of("expand").edits) - 1
    torch.testing.assert_close(expanded(batch()), net(batch()))
    assert orepa.verify(expanded, orepa.collapse(expanded), batch())
    by_plan = orepa.expand(net, inputs=batch(), plan=whole, max_cost=step_cost(whole) * 0.999)
    assert list(by_plan.state_dict()) == list(expanded.state_dict())
    with pytest.warns(orepa.NothingExpandedWarning, match="max_cost=0"):
        orepa.expand(net, inputs=batch(), max_cost=0.0)


def test_what_max_cost_needs() -> None:
    with pytest.raises(ReparamError) as error:
        orepa.expand(stem_net(), max_cost=0.1)
    assert str(error.value) == "max_cost= needs inputs=: what a block costs depends on the batch"
    with pytest.raises(ReparamError, match=r"^max_cost=-1 is no ratio: give 0\.15 for 15 %"):
        orepa.plan(stem_net(), inputs=batch(), max_cost=-1)
    offline = orepa.plan(stem_net(), block=orepa.DBB, inputs=batch())
    assert all(e.options["added"] > 3 * e.macs[0] for e in offline.edits if e.macs)  # type: ignore[operator]
