"""Layers whose input int8 cannot hold are named, with what keeping them in float32 would cost."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import orepa_compiler as orepa
from orepa_compiler.export.int8.dithering import NOISE_NAME
from orepa_compiler.export.int8.ranges import advice, lost_channels
from orepa_compiler.verification import judge, take_samples
from tests.export.nets import far_apart

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_layer_behind_far_apart_channels_is_named() -> None:
    assert lost_channels(far_apart(1.0), [(X,)]) == []
    (found,) = lost_channels(far_apart(1e6), [(X,)])
    assert (found.path, found.lost, found.channels) == ("2", 7, 8)
    assert found.weights == pytest.approx(292 / (292 + 224))
    said = advice([found])
    assert said.startswith("2: int8 rounds 7 of 8 input channels to 0 (the largest is 1e+06 ti")
    assert said.endswith("keep_fp32=['2'] keeps them in float32: 56.6% of the weights stay four "
                         "times as large")  # fmt: skip
    assert lost_channels(far_apart(1e6), [(X,)], keep=["2"]) == []
    assert advice([]) == ""


def test_an_export_that_loses_them_says_so(tmp_path: Path) -> None:
    path, options = tmp_path / "net.onnx", {"precision": "int8", "calibration": [X]}
    with pytest.warns(orepa.Int8RangeWarning, match=r"net.onnx: 2: int8 rounds 7 of 8 input"):
        orepa.export_onnx(far_apart(1e6), X, path, **options)  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        orepa.export_onnx(far_apart(1.0), X, path, **options)  # type: ignore[arg-type]
        orepa.export_onnx(far_apart(1e6), X, path, keep_fp32="2", **options)  # type: ignore[arg-type]


def test_noise_of_int8_that_allows_no_verdict_is_called_so() -> None:
    samples = take_samples(far_apart(1.0), X)
    (noisy,) = (
        [replace(out, leaves={"output": out.leaves["output"] * 2}) for out in outputs]
        for outputs in samples.truth.noisy[:1]
    )
    truth = replace(samples.truth, noisy=[noisy], noise_name=NOISE_NAME)
    report = judge(replace(samples, truth=truth), far_apart(1.0))
    assert "the reference's own error in int8 with these ranges is 1.0e+00" in report.verdict
