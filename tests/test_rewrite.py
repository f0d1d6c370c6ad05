"""Swapping children and rewriting the graph of one owner."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from orepa_compiler.capture.tracing.forward import trace
from orepa_compiler.rewriting.swapping import edit_graph, free_name, replace_regions, set_module


class Residual(nn.Module):
    """(conv + pointwise), then a second such sum, with a parameter and a buffer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.c, self.d = nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1)
        self.act = nn.ReLU()
        self.gain = nn.Parameter(torch.tensor(3.0))
        self.register_buffer("shift", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x) + self.b(x)
        second = self.c(first) + self.d(first)
        return self.act(second) * self.gain + self.shift


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


def graph_of(module: nn.Module) -> fx.Graph:
    graph = trace(module)
    assert isinstance(graph, fx.Graph)
    return graph


def rewritten(owner: Residual) -> fx.GraphModule:
    parts = [
        (["a", "b", "add"], "x", "left", Times(2.0)),
        (["c", "d", "add_1"], "add", "right", Times(5.0)),
    ]
    return replace_regions(owner, graph_of(owner), parts)


def test_set_module_swaps_a_child_anywhere() -> None:
    root = nn.Sequential(nn.Sequential(nn.ReLU(), nn.Tanh()), nn.ReLU())
    new = nn.GELU()
    assert set_module(root, "0.1", new) is root
    assert root[0][1] is new
    assert [type(m) for m in root[0]] == [nn.ReLU, nn.GELU]
    assert set_module(root, "", new) is new


def test_regions_become_one_module_each() -> None:
    owner = Residual()
    x = torch.randn(1, 2, 3, 3)
    new = rewritten(owner)
    assert torch.equal(new(x), (10 * x).relu() * 3 + 0.5)
    assert sorted(dict(new.named_children())) == ["act", "left", "right"]
    assert {name for name, _ in new.named_parameters()} == {"gain"}
    assert {name for name, _ in new.named_buffers()} == {"shift"}
    assert new.gain is owner.gain


def test_the_owner_and_its_graph_stay_as_they_are() -> None:
    owner = Residual()
    graph = graph_of(owner)
    code, names = str(graph), sorted(dict(owner.named_modules()))
    x = torch.randn(1, 2, 3, 3)
    expected = owner(x)
    replace_regions(owner, graph, [(["a", "b", "add"], "x", "left", Times(2.0))])
    assert (str(graph), sorted(dict(owner.named_modules()))) == (code, names)
    assert torch.equal(owner(x), expected)


@pytest.mark.parametrize("training", [True, False])
def test_class_name_and_mode_survive(training: bool) -> None:
    new = rewritten(Residual().train(training))
    assert type(new).__name__ == "Residual"
    assert all(module.training == training for module in new.modules())


def test_attributes_survive_in_copies_too() -> None:
    owner = Residual()
    owner.out_channels, owner.sizes, owner.meta_of_mine = 2, [1, 2], {"a": owner.act}
    owner.forward = owner.forward
    new = rewritten(owner)
    copied, read = copy.deepcopy(new), pickle.loads(pickle.dumps(new))
    for module in (new, copied, read):
        assert module.out_channels == 2
        assert module.sizes == [1, 2]
        assert module(torch.ones(1, 2, 1, 1)).shape == (1, 2, 1, 1)
    assert copied.sizes is not new.sizes
    assert copied.meta_of_mine["a"] is copied.act


class Frozen(Residual):
    """train() leaves one child in eval mode, as people freeze norms; and it can be deployed."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.act.eval()
        return self

    def switch_to_deploy(self) -> None:
        raise AssertionError("of a module whose children are others by now")


def test_the_class_and_its_methods_survive_in_copies_too() -> None:
    new = rewritten(Frozen())
    twice = replace_regions(new, graph_of(new), [(["left", "right"], "x", "both", Times(10.0))])
    x = torch.randn(1, 2, 3, 3)
    copied, read = copy.deepcopy(new), pickle.loads(pickle.dumps(new))
    for module in (new, twice, copied, read, copy.deepcopy(copied), copy.deepcopy(read)):
        assert isinstance(module, Frozen)
        assert type(module).__name__ == "Frozen"
        assert module.train().training
        assert not module.act.training
        assert not hasattr(module, "switch_to_deploy")
        assert torch.equal(module(x), (10 * x).relu() * 3 + 0.5)
    assert copied.left is not new.left
    assert type(Frozen()).switch_to_deploy is Frozen.switch_to_deploy


def test_a_class_in_a_function_is_pickled_without_it() -> None:
    class Local(Residual):
        pass

    new = rewritten(Local())
    read = pickle.loads(pickle.dumps(new))
    x = torch.randn(1, 2, 3, 3)
    assert isinstance(new, Local)
    assert not isinstance(read, Local)
    assert torch.equal(read(x), new(x))


def test_a_sequence_that_is_rewritten_keeps_its_length() -> None:
    owner = nn.Sequential(nn.ReLU(), nn.ReLU(), nn.ReLU())
    new = replace_regions(owner, graph_of(owner), [(["_0", "_1"], "input_1", "one", nn.Tanh())])
    assert isinstance(new, nn.Sequential)
    assert [type(part) for part in new] == [nn.Tanh, nn.ReLU]


def test_every_kind_of_hook_survives() -> None:
    owner, log = Residual(), []

    def note(word: str) -> Any:
        def hook(*args: Any, **kwargs: Any) -> None:
            log.append((word, len(args), sorted(kwargs)))

        return hook

    owner.register_forward_pre_hook(note("pre"))
    owner.register_forward_pre_hook(note("pre kwargs"), with_kwargs=True)
    owner.register_forward_hook(note("forward"))
    owner.register_forward_hook(note("forward kwargs"), with_kwargs=True, always_call=True)
    owner.register_full_backward_pre_hook(note("backward pre"))
    owner.register_full_backward_hook(note("backward"))
    x = torch.randn(1, 2, 3, 3, requires_grad=True)
    owner(x).sum().backward()
    expected, log[:] = list(log), []
    assert [word for word, *_ in expected] == [
        "pre", "pre kwargs", "forward", "forward kwargs", "backward pre", "backward",
    ]  # fmt: skip
    rewritten(owner)(x).sum().backward()
    assert log == expected


def test_a_full_backward_hook_still_sees_the_gradient_of_the_input() -> None:
    owner, seen = Residual(), []
    owner.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append(grad_in))
    x = torch.ones(1, 2, 3, 3, requires_grad=True)
    rewritten(owner)(x).sum().backward()
    assert [grad.shape for (grad,) in seen] == [x.shape]
    assert torch.equal(seen[0][0], torch.full_like(x, 30.0))


def test_hooks_are_copied_and_not_shared() -> None:
    owner = Residual()
    new = rewritten(owner)
    new.register_forward_hook(lambda module, args, y: y + 1)
    assert not owner._forward_hooks


def test_edit_graph_gives_the_edit_a_copy() -> None:
    owner = Residual()
    graph = graph_of(owner)

    def negate(copied: fx.Graph) -> None:
        output = next(iter(reversed(copied.nodes)))
        with copied.inserting_before(output):
            call = copied.call_module("minus", (output.args[0],))
        output.args = (call,)

    x = torch.randn(1, 2, 3, 3)
    new = edit_graph(owner, graph, negate, {"minus": Times(-1.0)})
    assert torch.equal(new(x), -owner(x))
    assert "minus" not in str(graph)
    assert not hasattr(owner, "minus")


def test_free_name_avoids_every_attribute() -> None:
    owner = Residual()
    assert free_name(owner, "conv") == "conv"
    assert free_name(owner, "gain") == "gain2"
    owner.gain2 = nn.ReLU()
    owner.gain3 = 7
    assert free_name(owner, "gain") == "gain4"
    assert free_name(owner, "forward") == "forward2"
