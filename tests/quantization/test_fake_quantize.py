"""Layers that round in training: which ones, their ranges, and what a collapse keeps of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.quantization.layers import rounded_layers
from orepa_compiler.quantization.quantizers import Quantizer
from tests.quantization.nets import FORMS, images, kernels, linear_blocks, plain, trained

LAYERS = {"stem.0", "body.0", "deep", "head.1", "head.3"}
Form = Callable[[], nn.Module]
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())


@every_form
def test_every_layer_that_multiplies_rounds_to_int8(form: Form) -> None:
    float_model = form()
    model = orepa.fake_quantize(float_model, inputs=images())
    assert rounded_layers(model).keys() == LAYERS
    assert not rounded_layers(float_model)
    expected, found = float_model.eval()(images()), model.eval()(images())
    error = (found - expected).abs().max() / expected.abs().max()
    assert 1e-4 < error < 0.1
    for layer in rounded_layers(model).values():
        steps = layer.weight_quantizer.scale.reshape(-1, *(1,) * (layer.kernel().dim() - 1))
        kernel = layer.weight_quantizer(layer.kernel())
        assert layer.integers().int().abs().amax() == 127
        torch.testing.assert_close(kernel, layer.integers() * steps)


@every_form
def test_a_collapse_keeps_every_integer_and_what_the_model_gives(form: Form) -> None:
    model = trained(orepa.fake_quantize(form(), inputs=images())).double()
    assert all(parameter.grad is not None for parameter in model.parameters())
    deploy = orepa.collapse(model, inputs=images().double())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in deploy.modules())
    before, after = kernels(model), kernels(deploy)
    assert before.keys() == after.keys() == LAYERS
    for path, integers in before.items():
        signs = torch.ones(len(integers))
        if path == "stem.0" and isinstance(model.stem[1], nn.BatchNorm2d):
            signs = model.stem[1].weight.detach().sign()
        assert torch.equal(integers * signs.reshape(-1, *(1,) * (integers.dim() - 1)), after[path])
    expected, found = model(images().double()), deploy(images().double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_deployed_kernel_is_integers_times_steps() -> None:
    deploy = orepa.collapse(trained(orepa.fake_quantize(plain(), inputs=images())))
    for path, layer in rounded_layers(deploy).items():
        steps = layer.weight_quantizer.scale.reshape(-1, *(1,) * (layer.kernel().dim() - 1))
        torch.testing.assert_close(layer.weight, layer.integers() * steps, rtol=1e-6, atol=0)
        assert not layer.input_quantizer.is_observing, path


def test_eval_mode_and_frozen_ranges_do_not_move() -> None:
    model = orepa.fake_quantize(linear_blocks(), inputs=images())

    def ranges() -> list[Tensor]:
        parts = [m for m in model.modules() if isinstance(m, Quantizer)]
        return [part.scale.clone() for part in parts]

    first = ranges()
    model.eval()(10 * images())
    assert all(map(torch.equal, first, ranges()))
    trained(model)
    moved = ranges()
    assert not any(map(torch.equal, first, moved))
    orepa.freeze_ranges(model)
    trained(model)
    assert all(map(torch.equal, moved, ranges()))


def test_ranges_are_the_mean_over_the_batches_and_norms_stay_as_they_are() -> None:
    model = linear_blocks().eval()
    batches = [images(seed=seed) for seed in range(3)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    orepa.fake_quantize(model, inputs=batches, inplace=True)
    largest = sum(batch.max() for batch in batches) / 3
    torch.testing.assert_close(
        model.stem[0].input_quantizer.activation_post_process.max_val, largest
    )
    now = model.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in state.items())


def test_in_place_the_optimizer_goes_on() -> None:
    model = linear_blocks()
    parameters = {id(parameter) for parameter in model.parameters()}
    same = orepa.fake_quantize(model, inplace=True)
    assert same is model
    assert {id(parameter) for parameter in model.parameters()} == parameters


def test_expand_does_it_too() -> None:
    model = orepa.expand(plain(), quantize="int8", inputs=images())
    assert rounded_layers(model).keys() == LAYERS
    with pytest.raises(orepa.ReparamError, match="quantize='int4' is neither 'int8' nor None"):
        orepa.expand(plain(), quantize="int4")  # type: ignore[arg-type]


def test_kernels_once_gives_the_gradients_of_the_ordinary_step() -> None:
    one = orepa.fake_quantize(linear_blocks().double(), inputs=images().double()).train()
    two = copy.deepcopy(one)
    batches = [images(seed=seed).double() for seed in (1, 2)]
    for batch in batches:
        one(batch).square().mean().backward()
    with orepa.kernels_once(two):
        for batch in batches:
            two(batch).square().mean().backward()
    hooks = orepa.step_hooks(one)
    for first, second in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad)
    hooks.remove()


def test_under_autocast_the_steps_are_the_same() -> None:
    model = orepa.fake_quantize(linear_blocks(), inputs=images()).train()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images())
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())
    assert model.stem[0].input_quantizer.scale.dtype == torch.float32
    torch.testing.assert_close(y.float(), model(images()), rtol=0.1, atol=0.1)


def test_an_average_of_the_weights_keeps_its_ranges_and_collapses() -> None:
    model = orepa.fake_quantize(linear_blocks(), inputs=images())
    average = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    trained(model)
    average.update_parameters(model)
    average.update_parameters(model)
    deploy = orepa.collapse(average.module.eval())
    torch.testing.assert_close(deploy(images()), average(images()), rtol=1e-4, atol=1e-4)


@every_form
def test_saved_and_loaded_it_is_the_same_model(form: Form, tmp_path: Path) -> None:
    model = trained(orepa.fake_quantize(form(), inputs=images()))
    deploy = orepa.collapse(model)
    for number, made in enumerate((model, deploy, orepa.drop_ranges(model))):
        path = orepa.save(made, tmp_path / f"{number}.safetensors")
        again = orepa.load(plain(), path, block=_block_of(form)).eval()
        assert torch.equal(again(images()), made.eval()(images()))
        assert again.state_dict().keys() == made.state_dict().keys()


def _block_of(form: Form) -> orepa.Block:
    from dataclasses import replace

    scaling = {"scaled_blocks": "scalar", "offline_blocks": "norm"}.get(form.__name__, "vector")
    name = "OFFLINE" if scaling == "norm" else "OREPA"
    return replace(orepa.OREPA, name=name, scaling_layer=scaling)


def test_without_its_ranges_it_is_the_float_model() -> None:
    float_model = linear_blocks().eval()
    model = orepa.fake_quantize(float_model, inputs=images())
    assert torch.equal(orepa.drop_ranges(model)(images()), float_model(images()))
    assert rounded_layers(model)


def test_a_block_that_rounds_says_what_conv_it_is_in_float() -> None:
    model = orepa.fake_quantize(linear_blocks())
    expected = linear_blocks().body[0]
    assert torch.equal(model.body[0].weight, expected.weight)
    with pytest.raises(orepa.NotLinear, match="it rounds its kernel and its maps to int8"):
        model.body[0].fuse()
