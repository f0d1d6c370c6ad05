"""Kernels made once: for several backward passes, and for as long as nothing is trained."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orepa_compiler.algebra.operators import ConvOperator
from orepa_compiler.blocks import Block, LinearBlock, ReparamConv, squeezed
from orepa_compiler.blocks.catalogue import OREPA, OREPA_VGG
from orepa_compiler.branches import SequenceBranch
from orepa_compiler.compiler import collapse, expand
from orepa_compiler.errors import ReparamError
from orepa_compiler.generation import generate
from orepa_compiler.generation import store as kernel_store
from orepa_compiler.generation.store import bit_sums
from orepa_compiler.generation.together import generate_together
from orepa_compiler.training import stepping
from orepa_compiler.training.stepping import kernels_once
from tests.convolution_reference import assert_same
from tests.norms import randomise_norms
from tests.operator_factories import random_tensor


def make_net() -> nn.Module:
    torch.manual_seed(0)
    stem = (nn.Conv2d(3, 4, 7, 2, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())
    body = (nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8), nn.ReLU())
    tail = (nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    return expand(
        randomise_norms(nn.Sequential(*stem, *body, *tail)).double(), post_norm="none"
    ).train()


@pytest.fixture
def net() -> nn.Module:
    return make_net()


@pytest.fixture
def generations(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The blocks whose kernels were made, in order."""
    made: list[Any] = []

    def counted(block: Any) -> ConvOperator:
        made.append(block)
        return generate(block)

    def counted_together(blocks: Any) -> list[ConvOperator]:
        made.extend(blocks)
        return generate_together(blocks)

    monkeypatch.setattr(kernel_store, "generate", counted)
    monkeypatch.setattr(stepping, "generate_together", counted_together)
    return made


def micro_batches(count: int = 3) -> list[Tensor]:
    return [random_tensor(4, 3, 12, 12, seed=seed) for seed in range(count)]


def loss(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x) - 1).square().mean()


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in net.named_parameters()}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module) -> None:
    """Relative to the largest of all: some gradients are zero but for rounding."""
    expected = gradients(theirs)
    scale = max(float(grad.abs().max()) for grad in expected.values() if grad is not None)
    assert scale > 0
    for name, grad in gradients(ours).items():
        other = expected[name]
        assert (grad is None) == (other is None), name
        if grad is not None and other is not None:
            assert float((grad - other).abs().max()) <= 1e-12 * scale, name


def test_micro_batches_give_the_gradients_of_ordinary_passes(
    net: nn.Module, generations: list[Any]
) -> None:
    ordinary = copy.deepcopy(net)
    for x in micro_batches():
        loss(ordinary, x).backward()
    generations.clear()
    with kernels_once(net):
        for x in micro_batches():
            loss(net, x).backward()
        inside = gradients(net)
    assert len(generations) == 3, "each of three blocks once"
    assert all(grad is None for name, grad in inside.items() if "branches" in name)
    assert_same_gradients(net, ordinary)


def test_steps_stay_on_the_ordinary_path() -> None:
    nets = [make_net(), make_net()]
    start = copy.deepcopy(nets[0])
    for net, once in zip(nets, (True, False), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
        for _ in range(3):
            optimizer.zero_grad()
            passes(net, once)
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
    for ours, theirs, began in zip(*(n.parameters() for n in (*nets, start)), strict=True):
        assert float((ours - theirs).detach().abs().max()) < 1e-12
        assert not torch.equal(ours, began)


def passes(net: nn.Module, once: bool) -> None:
    if once:
        with kernels_once(net):
            return passes(net, False)
    for x in micro_batches(2):
        loss(net, x).backward()
    return None


def test_gradients_add_to_those_that_were_there(net: nn.Module) -> None:
    ordinary = copy.deepcopy(net)
    for model, once in ((net, True), (ordinary, False)):
        passes(model, once)
        passes(model, once)
    assert_same_gradients(net, ordinary)


def test_zero_grad_may_be_the_first_thing_inside(net: nn.Module) -> None:
    ordinary = copy.deepcopy(net)
    passes(ordinary, False)
    passes(net, True)
    with kernels_once(net):
        net.zero_grad()
        passes(net, False)
    assert_same_gradients(net, ordinary)


def test_a_scaled_loss_gives_scaled_gradients(net: nn.Module) -> None:
    """What a GradScaler does: its factor passes through the kernel's backward."""
    ordinary = copy.deepcopy(net)
    scale = 2.0**16
    loss(ordinary, micro_batches(1)[0]).backward()
    with kernels_once(net):
        (scale * loss(net, micro_batches(1)[0])).backward()
    for parameter in net.parameters():
        assert parameter.grad is not None
        parameter.grad /= scale
    assert_same_gradients(net, ordinary)


def test_an_infinite_gradient_reaches_every_branch(net: nn.Module) -> None:
    """So that a GradScaler finds it in the optimizer's parameters and skips the step."""
    with kernels_once(net):
        (torch.inf * loss(net, micro_batches(1)[0])).backward()
    block = first_block(net)
    assert all(not bool(p.grad.isfinite().all()) for p in block.branches.parameters())  # type: ignore[union-attr]


def first_block(net: nn.Module) -> ReparamConv:
    return next(module for module in net.modules() if isinstance(module, ReparamConv))


def test_an_error_inside_leaves_all_gradients_as_they_were(net: nn.Module) -> None:
    passes(net, False)
    before = {name: grad.clone() for name, grad in gradients(net).items() if grad is not None}
    net[-1].bias.grad = None  # type: ignore[index]
    del before["9.bias"]
    expected = loss(net, micro_batches(1)[0])

    def fail() -> None:
        with kernels_once(net):
            loss(net, micro_batches(1)[0]).backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    found = {name: grad for name, grad in gradients(net).items() if grad is not None}
    assert list(found) == list(before)
    for name in found:
        assert torch.equal(found[name], before[name]), name
    assert first_block(net).store.leaf is None
    assert_same(loss(net, micro_batches(1)[0]), expected)
    passes(net, True)


def test_a_block_that_no_pass_reaches_gets_no_gradient(net: nn.Module) -> None:
    with kernels_once(net):
        net[-1](random_tensor(2, 144)).sum().backward()  # type: ignore[index]
    found = gradients(net)
    assert {name for name, grad in found.items() if grad is not None} == {"9.weight", "9.bias"}


def test_an_optimizer_may_not_step_inside(net: nn.Module) -> None:
    other = nn.Parameter(torch.ones(1))
    elsewhere, own = torch.optim.SGD([other]), torch.optim.AdamW(net.parameters())

    def step_inside() -> None:
        with kernels_once(net):
            passes(net, False)
            elsewhere.step()
            own.step()

    with pytest.raises(ReparamError) as error:
        step_inside()
    assert str(error.value) == (
        "AdamW.step() inside kernels_once: the gradients of the blocks are there only after the "
        "with block; call it there"
    )
    own.step()


def clear(net: nn.Module) -> None:
    torch.optim.SGD(net.parameters()).zero_grad()


def zero(net: nn.Module) -> None:
    net.zero_grad(set_to_none=False)


def clip(net: nn.Module) -> None:
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1e-3)


@pytest.mark.parametrize("change", [clear, zero, clip])
def test_gradients_may_not_be_changed_after_a_backward_pass_inside(
    net: nn.Module, change: Callable[[nn.Module], None]
) -> None:
    def change_inside() -> None:
        with kernels_once(net):
            passes(net, False)
            change(net)
            passes(net, False)

    with pytest.raises(ReparamError) as error:
        change_inside()
    assert str(error.value) == (
        "1.weight: its gradient was cleared or changed inside kernels_once, after a backward pass, "
        "and those that the kernels gathered were not; call zero_grad before the first backward "
        "pass, clip and unscale after the with block"
    )
    assert all(grad is None for grad in gradients(net).values())
    with kernels_once(net):
        change(net)
        passes(net, False)
    assert all(not p._post_accumulate_grad_hooks for p in net.parameters())


def test_a_loss_on_a_parameter_is_no_change(net: nn.Module) -> None:
    ordinary = copy.deepcopy(net)
    for model in (net, ordinary):
        with kernels_once(model) if model is net else nullcontext():
            for x in micro_batches(2):
                value = loss(model, x) + sum(p.square().sum() for p in model.parameters())
                value.backward()
    assert_same_gradients(net, ordinary)


def asked_by_grad(net: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(loss(net, x), [*net.parameters()], allow_unused=True)


def asked_by_inputs(net: nn.Module, x: Tensor) -> None:
    loss(net, x).backward(inputs=[*net.parameters()])


def asked_with_a_graph(net: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(loss(net, x), net[6].scaling, create_graph=True, allow_unused=True)


@pytest.mark.parametrize("ask", [asked_by_grad, asked_by_inputs, asked_with_a_graph])
def test_gradients_that_are_asked_for_by_name_are_refused_at_once(
    net: nn.Module, ask: Callable[[nn.Module, Tensor], None]
) -> None:
    x = micro_batches(1)[0]
    with pytest.raises(ReparamError) as caught, kernels_once(net):
        ask(net, x)
    assert re.fullmatch(
        r"[046]: autograd\.grad, or backward\(inputs=\.\.\.\), asks for the gradients of its "
        r"parameters inside kernels_once, where they gather on the kernel that is made of them; "
        r"call backward\(\) without inputs, or take an ordinary step",
        str(caught.value),
    )
    assert all(parameter.grad is None for parameter in net.parameters())


def test_gradients_of_maps_and_of_other_layers_may_be_asked_for(net: nn.Module) -> None:
    x = micro_batches(1)[0].requires_grad_()
    with kernels_once(net):
        (slope,) = torch.autograd.grad(net(x).square().mean(), x, create_graph=True)
        slope.square().sum().backward()
        loss(net, x).backward(inputs=[net[-1].weight])
    assert all(p.grad is not None for p in net[6].parameters())


@pytest.mark.parametrize("fails", [False, True])
def test_a_backward_pass_after_the_block_is_an_error(net: nn.Module, fails: bool) -> None:
    value: Tensor | None = None
    with suppress(ZeroDivisionError), kernels_once(net):
        value = loss(net, micro_batches(1)[0])
        if fails:
            raise ZeroDivisionError
    assert value is not None
    with pytest.raises(ReparamError) as error:
        value.backward()
    assert str(error.value) == (
        "6: a backward pass came after the with block of kernels_once, whose kernel it goes "
        "through: the branches would get no gradient; call backward inside"
    )


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "load_state_dict": lambda net: net.load_state_dict(net.state_dict()),
    "to": lambda net: net.float().double(),
    "exchange": lambda net: setattr(
        first_block(net), "scaling", nn.Parameter(first_block(net).scaling.detach().clone())
    ),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("at_exit", [True, False])
def test_parameters_may_not_change_inside(net: nn.Module, change: str, at_exit: bool) -> None:

    def change_inside() -> None:
        with kernels_once(net):
            passes(net, False)
            CHANGES[change](net)
            if not at_exit:
                net(micro_batches(1)[0].to(next(net.parameters()).dtype))
                pytest.fail("the old kernel was used")

    with pytest.raises(ReparamError) as error:
        change_inside()
    assert str(error.value) == (
        "0: its parameters changed, or were exchanged, while kernels_once kept the kernel made of "
        "them; call optimizer.step() and load weights outside of the with block"
    )
    assert all(grad is None for grad in gradients(net).values())


def test_once_inside_once_is_an_error(net: nn.Module) -> None:
    with kernels_once(net):
        leaf = first_block(net).store.leaf
        with pytest.raises(ReparamError) as error, kernels_once(net[3:6]):  # type: ignore[index]
            pytest.fail("entered")
        assert first_block(net).store.leaf is leaf
        passes(net, False)
    assert str(error.value) == (
        "3: kernels_once keeps its kernel already; leave that with block first"
    )
    assert next(net.parameters()).grad is not None


def test_a_model_without_blocks_is_an_error(net: nn.Module) -> None:
    with pytest.raises(ReparamError) as error, kernels_once(collapse(net)):
        pytest.fail("entered")
    assert str(error.value) == (
        "Sequential has no squeezed block, so there is no kernel to keep; "
        "give a model that orepa.expand made"
    )


def test_sharded_parameters_are_an_error(net: nn.Module) -> None:
    class Sharded(Tensor):
        pass

    block = first_block(net)
    assert block.scaling is not None
    block.scaling = nn.Parameter(block.scaling.detach().as_subclass(Sharded))
    with pytest.raises(ReparamError) as error, kernels_once(net):
        pytest.fail("entered")
    assert str(error.value) == (
        "0: its parameters are Shardeds, perhaps sharded; kernels_once needs whole ones: "
        "take an ordinary step"
    )


def test_evaluation_inside_needs_no_gradient(net: nn.Module, generations: list[Any]) -> None:
    x = micro_batches(1)[0]
    net.eval()
    with torch.no_grad():
        expected = net(x)
        generations.clear()
        with kernels_once(net):
            assert_same(net(x), expected)
            assert_same(net(x), expected)
    assert len(generations) == 3
    assert not net(x[:0]).isnan().any()


def test_a_compiled_model_uses_the_leaves(net: nn.Module) -> None:
    torch._dynamo.reset()
    ordinary = copy.deepcopy(net)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    passes(ordinary, False)
    with kernels_once(compiled):
        for x in micro_batches(2):
            loss(compiled, x).backward()
        assert all(g is None for n, g in gradients(net).items() if "branches" in n)
    assert_same_gradients(net, ordinary)
    loss(compiled, micro_batches(1)[0]).backward()


def test_kernels_made_in_one_compiled_function_train_as_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.reset()
    # the same graphs, forward and backward, without half a minute of C++
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    nets = [make_net(), make_net()]
    for net, compiled in zip(nets, (True, False), strict=True):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            with kernels_once(net, compiled=compiled):
                passes(net, False)
            optimizer.step()
    assert_same_gradients(*nets)
    for ours, theirs in zip(*(n.parameters() for n in nets), strict=True):
        assert float((ours - theirs).detach().abs().max()) < 1e-12


def test_the_compiled_function_is_kept_while_the_blocks_are_the_same(
    net: nn.Sequential, monkeypatch: pytest.MonkeyPatch
) -> None:
    compilations: list[Any] = []

    def as_it_is(function: Any, **options: Any) -> Any:
        compilations.append(function)
        return function

    monkeypatch.setattr(torch, "compile", as_it_is)
    for _ in range(2):
        with kernels_once(net, compiled=True):
            passes(net, False)
    assert len(compilations) == 1
    ordinary = copy.deepcopy(net)
    net.zero_grad(), ordinary.zero_grad()
    net[0], ordinary[0] = (copy.deepcopy(net[0]) for _ in range(2))
    passes(ordinary, False)
    with kernels_once(net, compiled=True):
        passes(net, False)
    assert len(compilations) == 2
    assert_same_gradients(net, ordinary)


def test_a_squeezed_branch_beside_explicit_ones_keeps_its_kernel_too() -> None:
    """As in a residual-free net, where each explicit branch has its norm."""
    torch.manual_seed(0)
    convs = (nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    net = expand(nn.Sequential(*convs, nn.BatchNorm2d(4)), block=OREPA_VGG).double().train()
    ordinary = copy.deepcopy(net)
    passes(ordinary, False)
    with kernels_once(net):
        passes(net, False)
        inside = gradients(net)
    waiting = {name for name, grad in inside.items() if grad is None}
    assert waiting == {n for n in inside if ".branches.origin.branch." in n}
    assert_same_gradients(net, ordinary)


# Kept in eval mode


def test_the_kernel_is_made_once_while_nothing_is_trained(
    net: nn.Module, generations: list[Any]
) -> None:
    x = micro_batches(1)[0]
    net.eval()
    with torch.no_grad():
        first, second = net(x), net(x)
    with torch.inference_mode():
        third = net(x)
    assert len(generations) == 3
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert_same(first, net(x))
    assert len(generations) == 6, "with gradients the kernel is made anew"
    with torch.no_grad():
        net(x)
    assert len(generations) == 9, "and the old one was let go"
    net.requires_grad_(False)
    net(x)
    net(x.requires_grad_()).sum().backward()
    assert len(generations) == 9
    assert x.grad is not None


def test_a_kernel_kept_in_inference_mode_serves_a_pass_with_gradients(
    net: nn.Module, generations: list[Any]
) -> None:
    net.eval().requires_grad_(False)
    x = micro_batches(1)[0]
    with torch.inference_mode():
        net(x)
    net(x.requires_grad_()).sum().backward()
    assert len(generations) == 3
    assert x.grad is not None


def edit_numpy(net: nn.Module) -> None:
    array = first_block(net).branches["deep_stem"].stack[1].scaling.detach().numpy()  # type: ignore[index,union-attr]
    array[[0, 1]] = array[[1, 0]] + 1


def step(net: nn.Module, **options: Any) -> None:
    with torch.enable_grad():
        loss(net, micro_batches(1)[0]).backward()
    torch.optim.SGD(net.parameters(), lr=0.1, **options).step()


def parameter(net: nn.Module) -> Tensor:
    return first_block(net).branches["deep_stem"].stack[0].branches["origin"].weight  # type: ignore[index,union-attr,return-value]


EDITS: dict[str, Callable[[nn.Module], Any]] = {
    "in place": lambda net: parameter(net).add_(1),
    "one number": lambda net: parameter(net).view(-1)[5].add_(1e-3),
    "detached": lambda net: parameter(net).detach().mul_(2),
    "data": lambda net: parameter(net).data.mul_(2),
    "data, signs": lambda net: parameter(net).data.neg_(),
    "data, order": lambda net: parameter(net).data.copy_(parameter(net).flip(0)),
    "data, one number": lambda net: parameter(net).data.view(-1)[7].mul_(1 + 1e-9),
    "data, exchanged": lambda net: setattr(parameter(net), "data", 2 * parameter(net)),
    "numpy": edit_numpy,
    "the same bits in another order": lambda net: setattr(
        first_block(net).branches["deep_stem"].stack[0].branches["origin"],
        "weight",
        nn.Parameter(parameter(net).detach().transpose(2, 3)),
    ),
    "scaling": lambda net: first_block(net).scaling.mul_(2),
    "load": lambda net: net.load_state_dict(
        {n: t * 2 for n, t in net.state_dict().items() if t.is_floating_point()}, strict=False
    ),
    "load, assigned": lambda net: net.load_state_dict(
        {n: t * 2 for n, t in net.state_dict().items()}, assign=True
    ),
    "to": lambda net: net.float(),
    "SGD": lambda net: step(net),
    "SGD, foreach": lambda net: step(net, foreach=True),
    "SGD, fused": lambda net: step(net, fused=True),
    "inference": lambda net: torch.inference_mode()(lambda: parameter(net).add_(1))(),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_kept_kernel_is_never_stale(net: nn.Module, edit: str) -> None:
    x = micro_batches(1)[0]
    net.eval()
    with torch.no_grad():
        before = net(x)
        EDITS[edit](net)
        x = x.to(parameter(net).dtype)
        found, expected = net(x), copy.deepcopy(net)(x)
    assert torch.equal(found, expected)
    assert not torch.equal(found, before)


def test_what_is_kept_is_no_part_of_the_model(net: nn.Module) -> None:
    net.eval()
    names, size = list(net.state_dict()), len(pickle.dumps(net))
    with torch.no_grad():
        expected = net(micro_batches(1)[0])
        twin = copy.deepcopy(net)
        assert first_block(net).store._kept is not None
        assert first_block(twin).store._kept is None
        assert list(net.state_dict()) == names
        assert len(pickle.dumps(net)) == size
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        assert first_block(again).store._kept is None
        assert_same(again(micro_batches(1)[0]), expected)


def test_the_weight_that_is_shown_is_not_the_one_that_is_kept(net: nn.Module) -> None:
    x = micro_batches(1)[0]
    net.eval()
    with torch.no_grad():
        expected = net(x)
        with pytest.raises(ReparamError, match="made of its branches at each call"):
            first_block(net).weight.zero_()
        assert torch.equal(net(x), expected)


class Gated(SequenceBranch):
    """A user's branch that depends on more than tensors."""

    def __init__(self, conv: ConvOperator) -> None:
        super().__init__(conv)
        self.weight, self.gate = nn.Parameter(torch.randn_like(conv.weight)), 1.0

    def layers(self) -> tuple[ConvOperator, ...]:
        return (self.spatial(self.gate * self.weight, self.groups),)


def test_kernels_of_users_branches_are_not_kept(generations: list[Any]) -> None:
    block = Block("GATED", {**OREPA.branches, "gated": Gated}, OREPA.scaling)
    conv = squeezed(LinearBlock(nn.Conv2d(4, 6, 3).double(), block))
    x = random_tensor(2, 4, 5, 5)
    with torch.no_grad():
        before = conv(x)
        conv.branches["gated"].gate = 0.0  # type: ignore[assignment]
        assert not torch.equal(conv(x), before)
    assert len(generations) == 2


def test_kernels_on_other_devices_are_not_kept(generations: list[Any]) -> None:
    """To look at what is on a GPU costs as much as a new kernel."""
    conv = squeezed(LinearBlock(nn.Conv2d(4, 6, 3, device="meta"), OREPA))
    with torch.no_grad():
        conv(torch.empty(2, 4, 5, 5, device="meta"))
        conv(torch.empty(2, 4, 5, 5, device="meta"))
    assert len(generations) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3,), (1025,), (64, 3, 3, 3), (70, 70, 3)])
def test_sums_of_bits_show_every_change_of_one_or_two_numbers(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    tensor = random_tensor(*shape).to(dtype)
    before = bit_sums(tensor)
    assert all(map(torch.equal, before, bit_sums(tensor.clone())))
    changed = [tensor.clone() for _ in range(3)]
    changed[0].view(-1)[0] *= -1
    changed[1].view(-1)[-1] *= 1 + 2 * torch.finfo(dtype).eps
    changed[2].view(-1)[[0, -1]] = tensor.view(-1)[[-1, 0]]
    for other in changed:
        assert not torch.equal(other, tensor)
        assert not all(map(torch.equal, before, bit_sums(other)))


@pytest.mark.parametrize("distance", [1, 1024])
def test_sums_of_bits_show_an_exchange_within_a_row_or_a_column(distance: int) -> None:
    tensor = random_tensor(70, 70)
    other = tensor.clone()
    other.view(-1)[[0, distance]] = tensor.view(-1)[[distance, 0]]
    assert not all(map(torch.equal, bit_sums(tensor), bit_sums(other)))


def test_sums_of_bits_read_channels_last_in_the_order_of_memory() -> None:
    tensor = random_tensor(8, 4, 3, 3).to(memory_format=torch.channels_last)
    assert kernel_store._words(tensor).data_ptr() == tensor.data_ptr()
