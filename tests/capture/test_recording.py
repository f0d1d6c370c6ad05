"""Recording: graphs of forwards that cannot be traced, and what they may be used for."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.capture.recording import Recording, record
from orepa_compiler.errors import ReparamError
from tests.norms import randomise_norms

with warnings.catch_warnings():  # torch.jit is deprecated, and still there in models
    warnings.simplefilter("ignore", DeprecationWarning)

    @torch.jit.script
    def _half(x: Tensor) -> Tensor:
        return x * 0.5

    @torch.jit.script
    def _halve(x: Tensor) -> Tensor:
        return x.mul_(0.5)

    SCRIPTED = torch.jit.script(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())).eval()


class Untraceable(nn.Module):
    """conv, norm, other and relu, joined by a function that no tracer can follow."""

    def __init__(self, run: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.other = nn.Conv2d(4, 4, 1)
        self.relu = nn.ReLU()
        self.run = run
        randomise_norms(self).eval()

    def forward(self, x: Any) -> Any:
        tensor = x if isinstance(x, Tensor) else x[0]
        if tensor.shape[-1] > 1:  # control flow on a shape
            return self.run(self, x)
        return x


def inputs(size: int = 6) -> Tensor:
    return torch.randn(2, 4, size, size, generator=torch.Generator().manual_seed(0))


def recorded(net: nn.Module, *batches: Any) -> Recording:
    with torch.no_grad():
        return record(net, [""], lambda: [net(batch) for batch in batches or (inputs(),)])


def norms_left(net: nn.Module, given: Any = None) -> int:
    """Norms after collapse, which must keep the function."""
    given = inputs() if given is None else given
    deploy = orepa.collapse(net, inputs=given)
    for batch in given if isinstance(given, list) else [given]:
        batch = batch if isinstance(batch, tuple) else (batch,)
        torch.testing.assert_close(deploy(*batch), net(*batch))
    return sum(is_batch_norm(module) for module in deploy.modules())


def plainly(net: Any, x: Any) -> Any:
    return net.relu(net.norm(net.conv(x)))


def test_the_graph_of_one_call() -> None:
    graph = recorded(Untraceable(plainly)).graphs[""]
    calls = [(node.op, str(node.target)) for node in graph.nodes]
    assert calls == [
        ("placeholder", "arg_0"),
        ("call_module", "conv"),
        ("call_module", "norm"),
        ("call_module", "relu"),
        ("output", "output"),
    ]


def test_without_inputs_nothing_is_joined_and_the_reason_says_what_to_do() -> None:
    net = Untraceable(plainly)
    deploy = orepa.collapse(net)
    (refusal,) = orepa.recorded_plans(deploy)[-1].refusals
    assert refusal.path == "norm"
    assert refusal.reason.startswith("the forward of the model cannot be traced (TraceError: ")
    assert refusal.reason.endswith("; give inputs= to record a real forward)")


def test_a_norm_that_alone_follows_its_conv_is_folded() -> None:
    assert norms_left(Untraceable(plainly)) == 0


def skip(net: Any, x: Any) -> Any:
    y = net.conv(x)
    return net.norm(y) + y


def slice_of(net: Any, x: Any) -> Any:
    y = net.conv(x)
    return net.norm(y) + y[:, :1]


def overwrite(net: Any, x: Any) -> Any:
    y = net.conv(x)
    y[:, 0] = 1.0
    return net.norm(y)


def overwrite_a_view(net: Any, x: Any) -> Any:
    y = net.conv(x)
    y.view(-1).add_(1.0)
    return net.norm(y)


def twice(net: Any, x: Any) -> Any:
    return net.norm(net.conv(net.norm(net.conv(x))))


def kept(net: Any, x: Any) -> Any:
    net.seen = net.conv(x)
    return net.norm(net.seen)


def kept_in_a_list(net: Any, x: Any) -> Any:
    net.__dict__.setdefault("log", []).append(y := net.conv(x))
    return net.norm(y)


def returned_with(net: Any, x: Any) -> Any:
    y = net.conv(x)
    return {"features": y, "normed": net.norm(y)}


def raw_forward(net: Any, x: Any) -> Any:
    """The conv is called past its hooks, and so unseen as a module."""
    return net.norm(net.conv.forward(x))


def reads_weight(net: Any, x: Any) -> Any:
    return net.norm(net.conv(x)) + net.conv.weight.mean()


def functional(net: Any, x: Any) -> Any:
    y = net.conv(x)
    return net.norm(y) * torch.sigmoid(y)


class _Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2


def own_function(net: Any, x: Any) -> Any:
    y = net.conv(x)
    return net.norm(y) + _Double.apply(y)


def scripted_function(net: Any, x: Any) -> Any:
    y = net.conv(x)
    return net.norm(y) + _half(y)


def scripted_write(net: Any, x: Any) -> Any:
    y = net.conv(x)
    _halve(y)
    return net.norm(y)


def scripted_child(net: Any, x: Any) -> Any:
    y = net.conv(x)
    return net.norm(y) + net.scripted(y)


def numpy_between(net: Any, x: Any) -> Any:
    y = net.conv(x)
    return net.norm(y) + torch.from_numpy(y.detach().numpy() * 2)


@pytest.mark.parametrize(
    "run",
    [skip, slice_of, overwrite, overwrite_a_view, twice, kept, kept_in_a_list, returned_with,
     raw_forward, reads_weight, functional, own_function, scripted_function, scripted_write,
     scripted_child, numpy_between],
)  # fmt: skip
def test_a_conv_whose_output_goes_elsewhere_too_keeps_its_norm(
    run: Callable[[Any, Any], Any],
) -> None:
    net = Untraceable(run)
    if run is scripted_child:
        net.scripted = copy.deepcopy(SCRIPTED)
    deploy = orepa.collapse(net, inputs=inputs())
    assert sum(is_batch_norm(module) for module in deploy.modules()) == 1
    torch.testing.assert_close(deploy(inputs()), net(inputs()))
    if run is kept:
        torch.testing.assert_close(deploy.seen, net.seen)


def test_a_scripted_child_that_reads_something_else_is_in_nobodys_way() -> None:
    net = Untraceable(lambda net, x: net.scripted(x) + net.relu(net.norm(net.conv(x))))
    net.scripted = copy.deepcopy(SCRIPTED)
    assert norms_left(net) == 0
    calls = [str(node.target) for node in recorded(net).graphs[""].nodes]
    assert {"conv", "norm", "relu", "aten.convolution.default"} <= {*calls}
    assert not torch.nn.modules.module._has_any_global_hook()


def by_value(net: Any, x: Any) -> Any:
    y = net.conv(x)
    return net.norm(y) if x.sum() > 1e9 or x.numel() else y


def shown_number(net: Any, x: Any) -> Any:
    return net.norm(net.conv(x)) * float(x.max())


@pytest.mark.parametrize("run", [by_value, shown_number])
def test_a_forward_that_asks_for_values_is_not_trusted(run: Callable[[Any, Any], Any]) -> None:
    assert norms_left(Untraceable(run)) == 1


def by_size(net: Any, x: Any) -> Any:
    y = net.conv(x)
    return net.norm(y) if x.shape[-1] > 6 else net.norm(net.relu(y))


def test_two_sizes_that_take_two_ways_are_not_trusted() -> None:
    assert norms_left(Untraceable(by_size), [inputs(6), inputs(8)]) == 1
    assert norms_left(Untraceable(by_size), [inputs(8), inputs(10)]) == 0
    seen = recorded(Untraceable(by_size), inputs(6), inputs(8))
    assert seen.refused == {"": "it ran in two different ways on the inputs"}


def test_a_list_of_images() -> None:
    def images(net: Any, batch: Any) -> Any:
        return plainly(net, torch.stack(batch))

    batch = list(inputs())
    assert norms_left(Untraceable(images), [(batch,)]) == 0


class Outer(nn.Module):
    """An untraceable module around a traceable one, which another size would call in part."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        self.dead = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
        randomise_norms(self).eval()

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 64:
            return self.dead(x)
        return self.stem(x)


def test_modules_around_the_pair_must_be_known_too() -> None:
    net = Outer()
    assert norms_left(net) == 1
    plan = orepa.recorded_plans(orepa.collapse(net, inputs=inputs()))[-1]
    assert [refusal.reason for refusal in plan.refusals] == ["no forward calls it"]


def test_the_model_is_left_as_it_was() -> None:
    net = Untraceable(plainly).train()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    orepa.collapse(net, inputs=inputs())
    assert all(module.training for module in net.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    torch.testing.assert_close(net.state_dict(), state)


def test_inputs_that_the_model_does_not_take() -> None:
    with pytest.raises(
        ReparamError, match=r"^the model raised at batch 0, inputs \(2, 3\) float32"
    ):
        orepa.collapse(Untraceable(plainly), inputs=torch.zeros(2, 3))


def test_a_plan_from_a_recording_is_applied_without_inputs() -> None:
    net = Untraceable(plainly)
    made = orepa.recorded_plans(orepa.collapse(net, inputs=inputs()))[-1]
    again = orepa.collapse(net, plan=made)
    assert not any(is_batch_norm(module) for module in again.modules())
    torch.testing.assert_close(again(inputs()), net(inputs()))


def test_expand_learns_from_a_recording_what_follows_a_conv() -> None:
    net = Untraceable(lambda net, x: net.other(net.norm(net.conv(x))))
    (unknown,) = {r.reason for r in orepa.plan(net).refusals}
    assert unknown.startswith("what follows it is not known: the forward of the model cannot be")
    known = orepa.plan(net, inputs=inputs())
    assert [edit.path for edit in known.of("expand").edits] == ["conv"]
    assert [r.reason for r in known.refusals] == [
        "no norm follows: its output is the model's; ask for it with where="
    ]


class Level(nn.Module):
    """conv, norm and an inner level; the size decides, so it is traced without one alone."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.inner = inner

    def forward(self, x: Tensor, size: tuple[int, ...] | None = None) -> Tensor:
        if size is not None and x.shape[2] != size[0]:
            x = nn.functional.interpolate(x, size=size)
        x = torch.relu(self.norm(self.conv(x)))
        return x if self.inner is None else self.inner(x, size=tuple(x.shape[2:]))


class ByHeight(nn.Module):
    """A model that cannot be traced, and calls what can, in a way in which it cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.level = Level(Level(Level()))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] % 2:
            raise ValueError("even sizes only")
        return self.level(x, size=tuple(x.shape[2:]))


def test_recording_goes_on_until_nothing_new_is_untraced() -> None:
    net = randomise_norms(ByHeight()).eval()
    assert list(orepa.plan(net, inputs=inputs()).of("expand").edits) != []
    flat = orepa.collapse(net, inputs=inputs())
    assert not any(is_batch_norm(module) for module in flat.modules())
    torch.testing.assert_close(flat(inputs()), net(inputs()))
