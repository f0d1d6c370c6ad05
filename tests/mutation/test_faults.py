"""Faults in real models: each is caught, and the message names the module or output at fault."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.proving.certifying import certify
from orepa_compiler.proving.locating import explain_report
from orepa_compiler.verification.divergence import Divergence
from tests.mutation.artifacts import (
    CONV,
    EFFICIENTNET,
    RESNET,
    STRIDED,
    BatchStatistics,
    bias,
    dilated,
    flipped_bit,
    images,
    padded,
    poked,
    spoilt,
    trained,
    weight,
)

pytestmark = pytest.mark.zoo

X = images()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return trained(RESNET)


@pytest.fixture(scope="module")
def deploy(resnet: nn.Module) -> nn.Module:
    return orepa.collapse(resnet)


@pytest.fixture(scope="module")
def expanded(resnet: nn.Module) -> nn.Module:
    model = orepa.expand(resnet, init="paper").eval()
    with torch.no_grad():  # one branch starts at zero, and would not be missed
        for parameter in model.get_submodule(CONV).parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def culprit(reference: nn.Module, candidate: Any) -> Divergence:
    """The first diverging module of a pair that fails."""
    report = orepa.verify(reference, candidate, X)
    assert not report, report
    found = explain_report(reference, candidate, X, report)
    assert isinstance(found, Divergence), found
    return found


# What is done to the conv in the middle, or to the one of stride 2, of the collapsed net.
IN_A_CONV: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "bias dropped": (CONV, bias(lambda b: b * 0)),
    "one channel's bias dropped": (CONV, bias(lambda b: b * (torch.arange(48) != 7))),
    "bias of other channels": (CONV, bias(lambda b: b.roll(1))),
    "bias with the wrong sign": (CONV, bias(lambda b: -b)),
    "kernel flipped left to right": (CONV, weight(lambda w: w.flip(3))),
    "kernel flipped upside down": (CONV, weight(lambda w: w.flip(2))),
    "kernel transposed": (CONV, weight(lambda w: w.transpose(2, 3))),
    "kernel turned round": (CONV, weight(lambda w: w.flip((2, 3)))),
    "kernel shifted by one tap": (CONV, weight(lambda w: w.roll(1, 3))),
    "output channels swapped": (CONV, weight(lambda w: w[[1, 0, *range(2, 48)]])),
    "input channels swapped": (CONV, weight(lambda w: w[:, [1, 0, *range(2, 48)]])),
    "input and output channels transposed": (CONV, weight(lambda w: w.transpose(0, 1))),
    "half of the input channels forgotten": (
        CONV,
        weight(lambda w: w * (torch.arange(48) < 24)[None, :, None, None]),
    ),
    "scaled by a thousandth": (CONV, weight(lambda w: w * 1.001)),
    "all zero": (CONV, weight(lambda w: w * 0)),
    "constant": (CONV, weight(lambda w: w * 0 + 0.01)),
    "a tap forgotten": (CONV, weight(lambda w: w * (torch.arange(9) != 4).reshape(3, 3))),
    "a weight is NaN": (CONV, poked(float("nan"))),
    "a weight is inf": (CONV, poked(float("inf"))),
    "bfloat16 passed off as float32": (CONV, weight(lambda w: w.bfloat16().float())),
    "float16 passed off as float32": (CONV, weight(lambda w: w.half().float())),
    "an exponent's bit flipped": (CONV, flipped_bit(26)),
    "a sign flipped": (CONV, flipped_bit(31)),
    "padding off by one, to the right": (CONV, padded(2, 0, 1, 1)),
    "padding off by one, downwards": (CONV, padded(1, 1, 2, 0)),
    "padded by reflection": (CONV, padded(1, 1, 1, 1, mode="reflect")),
    "padded by the border's values": (CONV, padded(1, 1, 1, 1, mode="replicate")),
    "dilated": (CONV, dilated),
    "stride begins one position late": (STRIDED, padded(0, 2, 0, 2)),
    "stride begins one row early": (STRIDED, padded(1, 1, 2, 0)),
    "the stem's bias dropped": ("conv1.6", bias(lambda b: b * 0)),
    "the shortcut forgotten": ("layer2.0.downsample.1", weight(lambda w: w * 0)),
    "the classifier's bias dropped": ("fc", bias(lambda b: b * 0)),
    "another activation": ("layer2.0.act1", lambda act: nn.LeakyReLU(0.01)),
    "no activation": ("layer2.0.act1", lambda act: nn.Identity()),
    "another pooling": ("maxpool", lambda pool: nn.AvgPool2d(3, 2, 1)),
    "bfloat16 within": ("layer3.0.act1", lambda act: Rounded()),
}


class Rounded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu().bfloat16().float()


@pytest.mark.parametrize(("path", "change"), IN_A_CONV.values(), ids=IN_A_CONV.keys())
def test_a_fault_in_a_layer_is_caught_and_placed(
    resnet: nn.Module, deploy: nn.Module, path: str, change: Callable[[Any], Any]
) -> None:
    found = culprit(resnet, spoilt(deploy, path, change))
    assert str(found).startswith(f"first diverging module: {path} (")


# What is done to a norm before it is folded.
IN_THE_FOLD: dict[str, Callable[[Any], Any]] = {
    "stale mean": lambda norm: norm.running_mean.zero_(),
    "stale variance": lambda norm: norm.running_var.fill_(1),
    "wrong eps": lambda norm: setattr(norm, "eps", 1e-3),
    "scale forgotten": lambda norm: norm.weight.fill_(1),
    "shift forgotten": lambda norm: norm.bias.zero_(),
}


@pytest.mark.parametrize("change", IN_THE_FOLD.values(), ids=IN_THE_FOLD.keys())
def test_a_fault_in_the_fold_is_caught_and_placed(resnet: nn.Module, change: Any) -> None:
    bad = orepa.collapse(spoilt(resnet, "layer2.0.bn2", change))
    found = culprit(resnet, bad)
    assert str(found).startswith(f"first diverging module: {CONV} (Conv2d + BatchNorm2d)")
    certificate = certify(resnet, bad, X)
    assert certificate.verdict.startswith(
        f"NOT CERTIFIED: 1 of 15 blocks; {CONV}.weight: is not"
    ) or (certificate.verdict.startswith(f"NOT CERTIFIED: 1 of 15 blocks; {CONV}.bias: is not"))


BRANCHES = (
    *("origin", "pointwise", "pointwise_kernel", "average", "frequency"),
    "depthwise_pointwise",
)


@pytest.mark.parametrize("branch", BRANCHES)
def test_a_forgotten_branch_is_caught_and_placed(expanded: nn.Module, branch: str) -> None:
    def forget(module: nn.Module) -> None:
        for parameter in module.parameters():
            parameter.zero_()

    bad = orepa.collapse(spoilt(expanded, f"{CONV}.branches.{branch}", forget))
    found = culprit(expanded, bad)
    assert str(found).startswith(f"first diverging module: {CONV} (")
    assert certify(expanded, bad, X).verdict.startswith(f"NOT CERTIFIED: 1 of 15 blocks; {CONV}")


def test_a_norm_that_stays_in_train_mode_is_caught_and_placed(resnet: nn.Module) -> None:
    found = culprit(resnet, spoilt(resnet, "layer2.0.bn2", BatchStatistics))
    assert found.module == "layer2.0.bn2"


def test_the_weights_of_another_run_are_caught_and_placed(resnet: nn.Module) -> None:
    found = culprit(resnet, orepa.collapse(trained(RESNET, seed=1)))
    assert (found.module, found.agreeing) == ("conv1.0", 0)


def test_a_depthwise_conv_and_its_neighbour_are_told_apart() -> None:
    net = trained(EFFICIENTNET)
    deploy = orepa.collapse(net)
    for path in ("blocks.3.0.conv_dw", "blocks.3.0.se.conv_reduce", "conv_head"):
        found = culprit(net, spoilt(deploy, path, bias(lambda b: b + 0.1)))
        assert found.module == path


# What is done to the outputs: the message names the output.
OUTPUTS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "one is NaN": (lambda y: y.index_fill(1, torch.tensor(5), float("nan")), "2 NaN in 2000"),
    "one is inf": (lambda y: y.index_fill(1, torch.tensor(5), float("inf")), "2 inf in 2000"),
    "all zero": (lambda y: y * 0, "constant 0 in all 2000 values"),
    "constant": (lambda y: y * 0 + 1, "constant 1 in all 2000 values"),
    "the same for each image": (lambda y: y[:1].expand(2, -1), "is above the tolerance"),
    "classes permuted": (lambda y: y.roll(1, 1), "is above the tolerance"),
    "another dtype": (lambda y: y.half(), "dtype float16 where float32 is due"),
    "a wider dtype": (lambda y: y.double(), "dtype float64 where float32 is due"),
    "another shape": (lambda y: y[..., None], "shape (2, 1000, 1), the reference's is (2, 1000)"),
    "an image is missing": (lambda y: y[:1], "shape (1, 1000), the reference's is (2, 1000)"),
    "after a softmax": (lambda y: y.softmax(1), "is above the tolerance"),
    "missing": (lambda y: (), "the candidate has no output output; it returned nothing"),
    "extra": (lambda y: (y, y), "the reference has no output output_0; its outputs are output"),
}


@pytest.mark.parametrize(("change", "said"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_a_fault_in_the_output_is_caught_and_named(
    resnet: nn.Module, deploy: nn.Module, change: Callable[[Tensor], Any], said: str
) -> None:
    report = orepa.verify(resnet, lambda x: change(deploy(x)), X)
    assert not report
    assert any(said in row.reason for row in report.rows), report
    assert "output" in report.verdict


class Named(nn.Module):
    def __init__(self, net: nn.Module, *names: str) -> None:
        super().__init__()
        self.net, self.names = net, names

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.net.forward_features(x)  # type: ignore[operator]
        values = (self.net.forward_head(features), features)  # type: ignore[operator]
        return dict(zip(self.names, values, strict=False))


def test_a_renamed_output_is_caught_and_named(resnet: nn.Module, deploy: nn.Module) -> None:
    report = orepa.verify(Named(resnet, "logits", "map"), Named(deploy, "logits", "features"), X)
    assert "the candidate has no output map; its outputs are logits, features" in str(report)
    report = orepa.verify(Named(resnet, "logits", "map"), Named(deploy, "logits"), X)
    assert "the candidate has no output map; its outputs are logits" in str(report)


@pytest.mark.parametrize("bit", [0, 3])
def test_a_bit_below_the_noise_is_seen_by_the_certificate_alone(
    resnet: nn.Module, deploy: nn.Module, bit: int
) -> None:
    bad = spoilt(deploy, CONV, flipped_bit(bit))
    assert orepa.verify(resnet, bad, X)
    verdict = certify(resnet, _recorded(bad, deploy), X).verdict
    assert verdict.startswith(f"NOT CERTIFIED: 1 of 15 blocks; {CONV}.weight: is not the float64")


def _recorded(bad: nn.Module, deploy: nn.Module) -> nn.Module:
    assert orepa.recorded_plans(bad) == orepa.recorded_plans(deploy)
    return copy.deepcopy(bad)


def test_a_model_that_was_not_collapsed_is_refused_by_its_place(
    expanded: nn.Module, resnet: nn.Module
) -> None:
    with pytest.raises(orepa.ExportError, match=r"^conv1.0: still in training form"):
        orepa.export_onnx(expanded, X, "never.onnx")
    with pytest.raises(orepa.ExportError, match=r"^conv1.1: a BatchNorm straight after a conv"):
        orepa.export_onnx(resnet, X, "never.onnx")


def test_train_mode_is_refused_by_its_place(deploy: nn.Module) -> None:
    bad = copy.deepcopy(deploy)
    bad.fc = nn.Sequential(nn.Dropout(0.1).train(), bad.fc)
    bad.fc.training = False
    with pytest.raises(orepa.ExportError, match=r"^fc.0: runs as in training"):
        orepa.export_onnx(bad, X, "never.onnx")
