"""What a traced program says about the model: convs, norms, train mode, names of outputs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional
from torch.utils import _pytree as pytree

from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.program import (
    count_convs,
    foldable_norms_in_program,
    output_names,
    returns_mapping,
    trace_program,
    train_mode_modules,
)
from orepa_compiler.verification.nesting import named_leaves
from tests.export.nets import Returns, SmallNet, images


def traced(model: nn.Module, *inputs: Any, dynamic_batch: bool = False) -> ExportedProgram:
    return trace_program(model, inputs or (images(),), dynamic_batch=dynamic_batch)


def returned(function: Callable[[Tensor, Tensor], Any]) -> ExportedProgram:
    return traced(Returns(function).eval())


def test_convs_are_counted_as_often_as_they_run_and_transposed_ones_are_not() -> None:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(conv, nn.ReLU(), conv, nn.ConvTranspose2d(3, 3, 2), nn.Conv2d(3, 4, 1))
    assert count_convs(traced(model.eval())) == 3


class Masked(nn.Module):
    """Makes a mask of lengths, as many positions as the longest has (Conformer of torchaudio)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        longest = int(torch.max(lengths).item())
        places = torch.arange(longest).expand(lengths.shape[0], longest) + 1
        return self.conv(x) * (places <= lengths[:, None])[:, None]


def test_a_forward_that_reads_a_number_out_of_a_tensor_is_traced() -> None:
    net, inputs = Masked().eval(), (torch.randn(2, 3, 9), torch.tensor([9, 4]))
    program = traced(net, *inputs)
    assert count_convs(program) == 1
    torch.testing.assert_close(program.module()(*inputs), net(*inputs))


def test_convs_of_every_rank_and_form_are_counted() -> None:
    class Convs(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            line = functional.conv1d(x, w)
            plane = functional.conv2d(line[..., None], w[..., None], padding="same")
            raw = torch.convolution(line, w, None, [1], [0], [1], False, [0], 1)
            turned = torch.convolution(raw, w, None, [1], [0], [1], True, [0], 1)
            return functional.conv3d(plane[..., None], w[..., None, None]).sum() + turned.sum()

    assert count_convs(traced(Convs().eval(), torch.randn(2, 3, 9), torch.randn(3, 3, 1))) == 4


def norm_after(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers).eval()


def test_norms_straight_after_a_conv_are_named() -> None:
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = norm_after(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), inner)
    assert foldable_norms_in_program(traced(model)) == ["1", "3.1"]


def test_norms_that_no_collapse_folds_are_left_alone() -> None:
    of_the_batch = nn.BatchNorm2d(3, track_running_stats=False)
    assert foldable_norms_in_program(traced(norm_after(nn.Conv2d(3, 3, 1), of_the_batch))) == []
    shared = nn.Conv2d(3, 3, 1)
    assert (
        foldable_norms_in_program(
            traced(norm_after(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)))
        )
        == []
    )
    assert foldable_norms_in_program(traced(norm_after(shared, nn.BatchNorm2d(3), shared))) == []
    assert (
        foldable_norms_in_program(
            returned(lambda x, y: y + functional.batch_norm(y, *torch.ones(2, 4)))
        )
        == []
    )


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Dropout2d(0.5), nn.AlphaDropout(0.5)]
)
def test_layers_that_run_as_in_training_are_named(layer: nn.Module) -> None:
    model = norm_after(nn.Conv2d(3, 3, 1), nn.Sequential(layer))
    assert train_mode_modules(traced(model)) == []
    layer.train()
    assert train_mode_modules(traced(model)) == ["1.0"]


def test_a_random_draw_runs_as_in_training() -> None:
    assert train_mode_modules(returned(lambda x, y: y * torch.rand_like(y).bernoulli(0.5))) == [""]


def test_a_flag_without_meaning_and_a_norm_without_statistics_do_not() -> None:
    model = norm_after(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False))
    model[0].train()
    assert train_mode_modules(traced(model)) == []


@pytest.mark.parametrize(
    ("function", "names", "is_mapping"),
    [
        (lambda x, y: y, ["output"], False),
        (lambda x, y: [y], ["output_0"], False),
        (lambda x, y: (y, None, [y + 1, y + 2]), ["output_0", "output_2.0", "output_2.1"], False),
        (lambda x, y: {"out": y, "aux": {"low": y + 1}}, ["out", "aux.low"], True),
    ],
)
def test_outputs_are_named(function: Callable, names: list[str], is_mapping: bool) -> None:
    program = returned(function)
    assert output_names(program) == names
    assert returns_mapping(program) == is_mapping


class Pair:
    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second


class Many(Pair):
    def __init__(self, *parts: Any) -> None:
        self.parts = parts


class Sample(OrderedDict):  # type: ignore[type-arg]
    """As diffusers returns its maps."""


pytree.register_pytree_node(
    Sample,
    lambda made: ([*made.values()], [*made]),
    lambda parts, keys: Sample(zip(keys, parts, strict=True)),
)
pytree.register_pytree_node(
    Pair, lambda made: ([made.first, made.second], None), lambda parts, _: Pair(*parts)
)
pytree.register_pytree_node(Many, lambda made: ([*made.parts], None), lambda parts, _: Many(*parts))


@pytest.mark.parametrize(
    ("function", "names", "is_mapping"),
    [
        (lambda x, y: Sample(sample=x, more=(x, y)), ["sample", "more.0", "more.1"], True),
        (lambda x, y: Sample(y=x, x=y), ["y", "x"], True),
        (lambda x, y: Pair(x, [y]), ["first", "second.0"], True),
        (lambda x, y: (Many(x, y), x), ["output_0.0", "output_0.1", "output_1"], False),
        (lambda x, y: Many(y, y), ["output_0", "output_1"], False),
    ],
)
def test_outputs_of_a_class_that_was_registered_without_names_are_named(
    function: Callable, names: list[str], is_mapping: bool
) -> None:
    program = returned(function)
    assert (output_names(program), returns_mapping(program)) == (names, is_mapping)
    net = Returns(function).eval()
    assert [*named_leaves(net(images()))] == names  # so a file and its model are compared


class Unread(nn.Module):
    """Computes a head that only training returns, with a norm and a dropout in it."""

    def __init__(self) -> None:
        super().__init__()
        norm, relu = nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.head = nn.Sequential(nn.Conv2d(3, 4, 3), norm, relu, nn.Dropout(0.1))
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        unread = self.conv(x)
        made = self.head(x), self.norm(unread)
        return unread.relu_() if self.training else made[1]


def test_what_no_output_reads_is_not_judged() -> None:
    net = Unread().eval()
    assert foldable_norms_in_program(traced(net)) == ["norm"]  # of the head's norm nobody knows
    net.head[3].train()
    assert train_mode_modules(traced(net)) == []


def test_a_write_counts_where_what_is_written_over_is_read() -> None:
    def drawn(x: Tensor, y: Tensor) -> Tensor:
        y[0].view(-1)[1:].bernoulli_()
        return y * 2

    assert train_mode_modules(returned(drawn)) == [""]
    assert train_mode_modules(returned(lambda x, y: (y.clone().bernoulli_(), x)[1])) == []


def test_an_output_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(ExportError, match=r"scale is no tensor; return tensors"):
        output_names(returned(lambda x, y: {"out": y, "scale": 4}))


def test_a_lone_example_still_gives_a_symbolic_batch() -> None:
    program = traced(SmallNet().eval(), images(1), dynamic_batch=True)
    (image,) = (node for node in program.graph.nodes if node.name == "image")
    assert not isinstance(image.meta["val"].shape[0], int)


def test_inputs_of_different_batch_sizes_are_refused() -> None:
    model = Returns(lambda x, y: y).eval()
    with pytest.raises(ExportError, match=r"first axes of sizes \[2, 3\].*dynamic_batch=False"):
        traced(model, images(2), images(3), dynamic_batch=True)


def test_a_forward_that_fixes_the_batch_is_refused_with_the_way_out() -> None:
    model = Returns(lambda x, y: y.reshape(2, -1) + x.sum()).eval()
    with pytest.raises(ExportError, match=r"torch.export cannot trace.*pass dynamic_batch=False"):
        traced(model, dynamic_batch=True)
    traced(model, dynamic_batch=False)


def test_a_forward_that_cannot_be_traced_is_refused_with_the_reason() -> None:
    with pytest.raises(ExportError, match=r"cannot trace the model \(GuardOnData.*Could not guard"):
        returned(lambda x, y: y if y.sum() > 0 else -y)
