"""What a capture sees of a model, what it refuses, and that it leaves the model alone."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from orepa_compiler.capture import Call, Capture, ancestors, capture, join
from orepa_compiler.capture.skeleton import meta_copy
from orepa_compiler.capture.tracing.forward import trace
from orepa_compiler.capture.tracing.tracer import ChildrenAreLeaves
from orepa_compiler.errors import ReparamError
from orepa_compiler.passes import is_leaf
from tests.compiler_nets import Inline


class Counting(nn.Module):
    """Counts its forwards in an attribute and in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.forwards = 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        self.seen += 1
        return self.norm(self.conv(x))


def captured(model: nn.Module, training: bool = True) -> Capture:
    return capture(model, training=training, is_leaf=is_leaf)


def conv() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 1)


@pytest.mark.parametrize("training", [True, False])
def test_capturing_leaves_the_model_alone(training: bool) -> None:
    model = Counting().train(not training)
    before = copy.deepcopy(model.state_dict())
    tensors = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    random = torch.get_rng_state()
    found = captured(model, training)
    assert model.forwards == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {n: id(t) for n, t in model.state_dict(keep_vars=True).items()} == tensors
    assert all(module.training is (not training) for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(module.training is training for module in found.skeleton.modules())
    assert all(tensor.is_meta for tensor in found.skeleton.state_dict().values())
    assert found.skeleton is not model


def test_meta_copy_keeps_sharing_and_flags() -> None:
    model: Any = nn.Sequential(conv(), conv(), nn.ReLU())
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    model[1].alias = model[0]
    model[2].table = model[0].weight  # registered twice
    plain = torch.ones(3)
    model[2].__dict__["first"] = model[1].__dict__["again"] = plain
    twin: Any = meta_copy(model)
    assert twin[1].weight is twin[0].weight is twin[2].table
    assert twin[1].alias is twin[0]
    assert twin[2].first is twin[1].again
    assert twin[2].first.is_meta
    assert isinstance(twin[0].weight, nn.Parameter)
    assert (twin[0].weight.requires_grad, twin[0].bias.requires_grad) == (True, False)
    assert twin[0].weight.shape == (4, 4, 1, 1)
    assert twin[0].weight.dtype == torch.float32
    assert not model[0].weight.is_meta


def test_meta_copy_keeps_dtype_memory_format_and_lazy_layers() -> None:
    model: Any = nn.Sequential(nn.Conv2d(4, 4, 3).half().to(memory_format=torch.channels_last),
                               nn.LazyConv2d(4, 3))  # fmt: skip
    twin: Any = meta_copy(model)
    assert twin[0].weight.dtype == torch.float16
    assert twin[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert type(twin[1]) is nn.LazyConv2d


def test_a_model_that_cannot_be_copied_is_named() -> None:
    model = Counting()
    model.lock = threading.Lock()
    with pytest.raises(ReparamError) as caught:
        captured(model)
    assert str(caught.value) == (
        "Counting cannot be copied (TypeError: cannot pickle '_thread.lock' object); "
        "remove what copy.deepcopy cannot copy"
    )


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("DistributedDataParallel", "model.module"),
        ("DataParallel", "model.module"),
        ("FullyShardedDataParallel", "the model before wrapping it"),
        ("OptimizedModule", "the model before torch.compile"),
    ],
)
def test_a_wrapped_model_is_refused(name: str, advice: str) -> None:
    wrapper = type(name, (nn.Sequential,), {})(conv())
    with pytest.raises(ReparamError) as caught:
        captured(wrapper)
    assert str(caught.value) == f"the model is wrapped in {name}; pass {advice}"


def test_the_wrappers_of_torch_are_known_by_these_names() -> None:
    for wrap in (nn.DataParallel, partial(torch.compile, backend="eager")):
        with pytest.raises(ReparamError, match="the model is wrapped in"):
            captured(wrap(nn.Sequential(conv())))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript_is_refused_whole_and_in_part() -> None:
    scripted = torch.jit.script(nn.Sequential(conv()))
    with pytest.raises(ReparamError) as caught:
        captured(scripted)
    assert str(caught.value) == (
        "the model is TorchScript; pass the nn.Module it was scripted from"
    )
    assert trace(scripted) == "it is TorchScript"


def refusal(model: nn.Module, path: str = "conv") -> str | None:
    return captured(model).refusal(path)


def test_a_plain_conv_is_not_refused() -> None:
    model = Inline(lambda m, x: F.relu(m.conv(x)), conv=conv())
    model.register_forward_hook(lambda *args: None)
    assert refusal(model) is None


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
        "register_full_backward_pre_hook",
    ],
)  # fmt: skip
def test_a_hook_is_refused(register: str) -> None:
    model = Inline(lambda m, x: m.conv(x), conv=conv())
    getattr(model.conv, register)(lambda *args: None)
    assert refusal(model) == (
        "it has a hook, which a rewrite would no longer call; remove the hook first"
    )


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_old_weight_norm_is_a_hook() -> None:
    layer = torch.nn.utils.weight_norm(conv())
    reason = refusal(Inline(lambda m, x: m.conv(x), conv=layer))
    assert reason == "it has a hook, which a rewrite would no longer call; remove the hook first"


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrization_is_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    assert refusal(Inline(lambda m, x: m.conv(x), conv=wrap(conv()))) == (
        "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    )


def test_an_alias_is_refused_under_every_name() -> None:
    layer = conv()
    model = Inline(lambda m, x: m.conv(x), conv=layer, inner=nn.Sequential(layer))
    assert refusal(model) == "it is registered as conv and as inner.0"
    assert captured(model).refusal("inner.0") == "it is registered as conv and as inner.0"


def test_what_hangs_in_a_block_with_two_names_hangs_in_one_place() -> None:
    block = nn.Sequential(conv(), nn.ReLU())
    found = captured(Inline(lambda m, x: m.b(m.a(x)), a=block, b=block))
    assert found.refusal("a.0") is None
    assert found.refusal("b.0") is None
    assert found.refusal("a") == "it is registered as a and as b"
    assert len(found.calls["a"]) == 2


def test_one_layer_twice_in_a_block_with_two_names_is_refused() -> None:
    layer = conv()
    block = nn.Sequential(layer, layer)
    found = captured(Inline(lambda m, x: m.a(x), a=block, b=block))
    assert str(found.refusal("a.0")).startswith("it is registered as a.0 and as a.1")


def test_what_may_be_called_by_another_of_its_names_is_refused() -> None:
    block = nn.Sequential(conv(), nn.ReLU())
    hidden = Inline(lambda m, x: m.b(x) if x.sum() > 0 else x, b=block)
    found = captured(Inline(lambda m, x: m.hidden(m.a(x)), a=block, hidden=hidden))
    assert "the forward of hidden cannot be traced" in str(found.refusal("a.0"))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_tied_parameters_are_refused_on_both_sides(name: str) -> None:
    model: Any = Inline(lambda m, x: m.b(m.conv(x)), conv=conv(), b=conv())
    setattr(model.b, name, getattr(model.conv, name))
    assert refusal(model) == "its weight is shared with b"
    assert refusal(model, "b") == "its weight is shared with conv"


@pytest.mark.parametrize(
    "read",
    [
        lambda m, x: m.conv(x) + m.conv.weight.sum(),
        lambda m, x: F.conv2d(m.conv(x), m.conv.weight),
        lambda m, x: m.conv(x) * m.conv.bias.view(1, -1, 1, 1),
        lambda m, x: F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var),
    ],
)
def test_a_weight_that_a_forward_reads_is_refused(read: Callable[[Any, Tensor], Tensor]) -> None:
    model = Inline(read, conv=conv(), norm=nn.BatchNorm2d(4))
    reason = "the forward of the model reads its weight directly"
    assert refusal(model, "norm" if "norm" in captured(model).reads else "conv") == reason
    nested = nn.Sequential(model)
    path = "0.norm" if "0.norm" in captured(nested).reads else "0.conv"
    assert refusal(nested, path) == "the forward of 0 reads its weight directly"


def test_reading_its_dtype_device_or_shape_is_no_reason() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        weight = m.conv.weight
        x = x.to(weight.dtype).to(weight.device)
        return m.conv(x) * weight.shape[0] + weight.size(1) + weight.dim()

    assert refusal(Inline(forward, conv=conv())) is None


def test_two_calls_are_counted() -> None:
    model = Inline(lambda m, x: m.conv(m.conv(x)), conv=conv())
    assert refusal(model) == "it is called 2 times, so what follows it is not one thing"
    three = Inline(lambda m, x: m.conv(m.conv(m.conv(x))), conv=conv())
    assert refusal(three) == "it is called 3 times, so what follows it is not one thing"


def test_a_layer_without_a_call_is_refused() -> None:
    assert refusal(Inline(lambda m, x: x, conv=conv())) == "no forward calls it"


def test_what_runs_in_train_mode_alone_is_refused_in_eval_mode() -> None:
    model = Inline(lambda m, x: m.conv(x) if m.training else x, conv=conv())
    assert captured(model, training=True).refusal("conv") is None
    assert captured(model, training=False).refusal("conv") == "no forward calls it"


def test_an_untraceable_ancestor_is_named_with_its_error() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return m.inner(x) if x.sum() > 0 else x

    inner = nn.Sequential(conv())
    found = captured(Inline(forward, inner=inner))
    reason = found.refusal("inner.0")
    assert reason is not None
    assert reason.startswith(
        "the forward of the model cannot be traced (TraceError: symbolically traced variables "
        "cannot be used as inputs to control flow"
    )
    assert list(found.graphs) == ["inner"]
    nested = captured(nn.Sequential(Inline(forward, inner=inner))).refusal("0.inner.0")
    assert nested is not None
    assert nested.startswith("the forward of 0 cannot be traced (TraceError: ")


def test_the_error_of_a_forward_is_cut_to_one_line() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        raise ValueError("no\nmore" + 200 * "x")

    assert trace(Inline(forward, conv=conv())) == "ValueError: no"


class Both(nn.Module):
    """Takes a list and a tensor; hands the first of the list to a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, maps: list[Tensor], gate: Tensor) -> tuple[Tensor, Tensor]:
        return self.norm(maps[0]), gate


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Sequential(conv(), nn.ReLU()), conv()
        self.both, self.act = Both(), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.a(x), self.b(x)
        out = self.both([second, first], first)
        return self.act(out[0]) + out[1]


def consumer_names(found: Capture, path: str) -> list[str]:
    (call,) = found.calls[path]
    return [
        "model" if user is None else join(user.owner, user.node.name)
        for user in found.consumers(call)
    ]


def test_consumers_across_borders_and_in_lists() -> None:
    found = captured(Branching())
    assert consumer_names(found, "a.0") == ["a._1"]
    assert consumer_names(found, "b") == ["both.getitem"]
    assert consumer_names(found, "both.norm") == ["both.output"]
    assert consumer_names(found, "act") == ["add"]
    assert consumer_names(found, "a.1") == ["both.getitem"], "a list holds it first"


def test_the_models_output_is_a_consumer() -> None:
    found = captured(nn.Sequential(nn.Sequential(conv()), nn.Sequential(conv())))
    assert consumer_names(found, "0.0") == ["1._0"]
    assert consumer_names(found, "1.0") == ["model"]


def test_a_composite_called_with_keywords_is_itself_the_consumer() -> None:
    inner = nn.Sequential(nn.ReLU())
    found = captured(Inline(lambda m, x: m.inner(input=m.conv(x)), conv=conv(), inner=inner))
    assert consumer_names(found, "conv") == ["inner"]


def producer_name(found: Capture, path: str) -> str | None:
    (call,) = found.calls[path]
    producer = found.producer(call)
    return None if producer is None else join(producer.owner, producer.node.name)


def test_producers_across_borders() -> None:
    model = nn.Sequential(nn.Sequential(conv(), nn.Sequential(nn.ReLU())), nn.Sequential(conv()))
    found = captured(model)
    assert producer_name(found, "0.0") is None
    assert producer_name(found, "1.0") == "0.1._0"
    assert producer_name(found, "0.1.0") == "0._0"


def test_a_producer_behind_two_calls_or_a_list_is_unknown() -> None:
    shared = captured(Inline(lambda m, x: m.inner(m.inner(x + 1)), inner=nn.Sequential(conv())))
    assert producer_name(shared, "inner.0") is None
    joined = captured(Inline(lambda m, x: m.norm(torch.cat([x, x])), norm=nn.BatchNorm2d(4)))
    assert producer_name(joined, "norm") == "cat"
    (call,) = joined.calls["norm"]
    cat = joined.producer(call)
    assert cat is not None
    assert joined.producer(cat) is None


def test_join_and_ancestors() -> None:
    assert (join("", "a"), join("a", ""), join("a", "b.c"), join("", "")) == ("a", "a", "a.b.c", "")
    assert list(ancestors("a.b.c")) == ["a.b", "a", ""]
    assert list(ancestors("")) == []


def test_path_of_a_call_is_the_first_path() -> None:
    layer = conv()
    found = captured(Inline(lambda m, x: m.b(x), a=layer, b=layer))
    (call,) = found.calls["a"]
    assert "b" not in found.calls
    assert found.path_of(Call("", call.node)) == "a"


def test_the_graph_of_a_sequence_is_that_of_its_trace() -> None:
    layers = OrderedDict(conv=nn.Conv2d(3, 4, 3), relu=nn.ReLU(), inner=nn.Sequential())
    for net in (nn.Sequential(layers), nn.Sequential(nn.ReLU(), nn.ReLU()), nn.Sequential()):
        made = trace(net)
        traced = ChildrenAreLeaves().trace(net)
        assert str(made) == str(traced)
        assert [node.name for node in made.nodes] == [node.name for node in traced.nodes]


def test_a_sequence_with_a_forward_of_its_own_is_traced() -> None:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    assert "add" in str(trace(Residual(nn.ReLU())))
