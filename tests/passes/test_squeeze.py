"""Squeeze: branches on feature maps become one conv with the same parameters and outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orepa_compiler.blocks import LinearBlock, ReparamConv2d
from orepa_compiler.blocks.catalogue import OREPA
from orepa_compiler.errors import ReparamError
from orepa_compiler.passes import Expand, Linearize, Pipeline, Squeeze
from orepa_compiler.planning import Plan
from tests.compiler_nets import assert_same, batch, branch_net, output, stem_net, untouched


def linear_blocks() -> nn.Module:
    model, _ = Pipeline((Expand(),)).run(stem_net())
    return model


@pytest.mark.parametrize("training", [False, True])
def test_the_outputs_and_gradients_stay_the_same(training: bool) -> None:
    x, plain = batch(), linear_blocks()
    assert_same(output(plain, x, training=training), output(stem_net(), x, training=training))
    expected = output(plain, x, training=training)
    plain.train(training)(x).square().sum().backward()
    before = {name: p.grad.clone() for name, p in plain.named_parameters() if p.grad is not None}
    plain.zero_grad()
    squeezed, _ = Pipeline((Squeeze(),)).run(plain)
    assert_same(output(squeezed, x, training=training), expected)
    squeezed(x).square().sum().backward()
    after = {name: p.grad for name, p in squeezed.named_parameters() if p.grad is not None}
    assert after.keys() == before.keys()
    for name, gradient in after.items():
        torch.testing.assert_close(gradient, before[name], rtol=1e-8, atol=1e-10)


def test_the_parameters_are_the_same_objects() -> None:
    plain = linear_blocks()
    before = {name: id(p) for name, p in plain.named_parameters()}
    with untouched(plain.get_submodule("conv")):
        squeezed, made = Pipeline((Squeeze(),)).run(plain)
    assert {name: id(p) for name, p in squeezed.named_parameters()} == before
    assert isinstance(squeezed.get_submodule("conv"), ReparamConv2d)
    assert [edit.path for edit in made.edits] == ["stem", "conv", "depthwise", "pointwise"]
    for edit in made.edits:
        assert edit.before.endswith(" branches on features")
        assert edit.after == "one conv"
        assert edit.parameters[0] == edit.parameters[1] > 0


def test_a_squeezed_block_is_not_squeezed_again() -> None:
    model, _ = Pipeline((Expand(), Squeeze())).run(stem_net())
    assert Pipeline((Squeeze(),)).run(model)[1] == Plan()


def test_branches_with_an_inserted_norm() -> None:
    x, net = batch(), branch_net()
    model, _ = Pipeline((Linearize(), Expand(block=OREPA))).run(branch_net())
    assert any(type(module) is LinearBlock for module in model.modules())
    assert_same(output(model, x), output(net, x))
    model, _ = Pipeline((Squeeze(),)).run(model)
    assert_same(output(model, x), output(net, x))


def test_a_plan_for_another_model() -> None:
    _, made = Pipeline((Squeeze(),)).run(linear_blocks())
    with pytest.raises(ReparamError) as caught:
        Pipeline((Squeeze(),)).run(stem_net(), plan=made)
    message = "stem: the plan does not fit: it squeezes a block, here is a Conv2d"
    assert str(caught.value) == message
