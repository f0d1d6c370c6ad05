"""Which TensorRT builds, and what is said where none can."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from orepa_compiler.errors import ExportError, MissingPackage
from orepa_compiler.export.tensorrt.flavors import error_log, load_engine, load_flavor

CLASSIC, RTX = SimpleNamespace(name="classic"), SimpleNamespace(name="rtx")


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    def setup(*, classic: bool, rtx: bool, gpu: bool) -> None:
        monkeypatch.setitem(sys.modules, "tensorrt", CLASSIC if classic else None)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", RTX if rtx else None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)

    return setup


@pytest.mark.parametrize(
    ("classic", "rtx", "gpu", "chosen"),
    [
        (True, True, True, CLASSIC),
        (True, False, True, CLASSIC),
        (True, True, False, RTX),
        (False, True, True, RTX),
        (False, True, False, RTX),
    ],
)
def test_auto_takes_classic_where_a_gpu_is(choose, classic, rtx, gpu, chosen) -> None:  # type: ignore[no-untyped-def]
    choose(classic=classic, rtx=rtx, gpu=gpu)
    assert load_flavor() is chosen


@pytest.mark.parametrize(("classic", "gpu"), [(False, False), (False, True), (True, False)])
def test_without_a_usable_one_both_extras_are_named(choose, classic, gpu) -> None:  # type: ignore[no-untyped-def]
    choose(classic=classic, rtx=False, gpu=gpu)
    with pytest.raises(MissingPackage, match=r"orepa-compiler\[trt\].*orepa-compiler\[trt-rtx\]"):
        load_flavor()


def test_a_named_flavor_is_taken_or_its_extra_is_named(choose) -> None:  # type: ignore[no-untyped-def]
    choose(classic=True, rtx=True, gpu=True)
    assert load_flavor("rtx") is RTX
    assert load_flavor("trt") is CLASSIC
    choose(classic=False, rtx=False, gpu=True)
    with pytest.raises(MissingPackage, match=r"orepa-compiler\[trt-rtx\]'$"):
        load_flavor("rtx")
    with pytest.raises(MissingPackage, match=r"orepa-compiler\[trt\]'$"):
        load_flavor("trt")


def test_classic_without_a_gpu_is_refused(choose) -> None:  # type: ignore[no-untyped-def]
    choose(classic=True, rtx=True, gpu=False)
    with pytest.raises(ExportError, match=r"torch sees none; build on.*flavor='rtx'"):
        load_flavor("trt")


def test_an_unknown_flavor_is_refused_with_the_known() -> None:
    with pytest.raises(ExportError, match=r"flavor='tensorrt' is not one of auto, trt, rtx"):
        load_flavor("tensorrt")  # type: ignore[arg-type]


def test_an_engine_that_cannot_be_loaded_is_refused_with_the_reasons() -> None:
    tensorrt = pytest.importorskip("tensorrt_rtx")
    message = (
        rf"net.engine: no installed TensorRT can load.*tensorrt_rtx {tensorrt.__version__}: \S"
    )
    with pytest.raises(ExportError, match=message):
        load_engine("net.engine", b"no engine at all, but some bytes that are long enough" * 10)


def test_without_tensorrt_an_engine_cannot_be_loaded(choose) -> None:  # type: ignore[no-untyped-def]
    choose(classic=False, rtx=False, gpu=True)
    with pytest.raises(MissingPackage, match=r"orepa-compiler\[trt\].*orepa-compiler\[trt-rtx\]"):
        load_engine("net.engine", b"")


def test_the_log_keeps_errors_only_and_prints_nothing(
    capfd: pytest.CaptureFixture[str],
) -> None:
    tensorrt = pytest.importorskip("tensorrt_rtx")
    log = error_log(tensorrt)
    assert error_log(tensorrt) is log, "TensorRT keeps to the first logger of a process"
    log.errors.clear()
    log.log(tensorrt.ILogger.Severity.WARNING, "slow")
    log.log(tensorrt.ILogger.Severity.ERROR, "broken")
    network = tensorrt.Builder(log).create_network(1)
    tensorrt.OnnxParser(network, log).parse(b"no model")
    assert log.errors[0] == "broken"
    assert "Failed to parse the ONNX model" in log.errors[1]
    assert capfd.readouterr() == ("", "")
