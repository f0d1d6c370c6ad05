"""Classic TensorRT by its names: the code asks for none that one of its versions lacks."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from orepa_compiler.errors import ExportError
from orepa_compiler.export import build_engine
from orepa_compiler.export.run import runners
from orepa_compiler.export.tensorrt.flavors import error_log
from tests.export.classic_tensorrt import NAMES, ClassicTensorRT
from tests.export.tensorrt_names import names_of

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")


@pytest.fixture(params=list(NAMES))
def classic(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Classic TensorRT of one version, as the code sees it on a machine with a GPU."""
    stand_in = ClassicTensorRT(request.param)
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return stand_in


def test_the_names_of_classic_tensorrt_suffice(
    classic: Any, exported: dict[str, Path], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        # TensorRT for RTX, which stands in, has the names of the timing cache and calls them old.
        warnings.simplefilter("ignore", DeprecationWarning)
        engine = build_engine(
            exported["fp16"],
            tmp_path / "net.engine",
            workspace_gb=1,
            shapes=[(1, 3, 16, 16), (2, 3, 16, 16), (4, 3, 16, 16)],
            timing_cache=tmp_path / "timings",
        )
    assert engine.stat().st_size > 10_000
    assert (tmp_path / "timings").stat().st_size > 0


def test_the_stand_in_answers_to_no_other_name(classic: Any) -> None:
    for name in ("ComputeCapability", "NoSuchClass"):
        with pytest.raises(AttributeError, match=rf"module.{name} is not in tensorrt"):
            getattr(classic, name)
    config = classic.Builder(error_log(classic)).create_builder_config()
    assert hasattr(config, "set_memory_pool_limit")
    assert not hasattr(config, "num_compute_capabilities")
    with pytest.raises(AttributeError, match=r"IBuilderConfig.capability is not in"):
        config.capability = 1


def test_version_11_has_no_precision_flags_and_version_10_has() -> None:
    ten, later_ten, eleven = (ClassicTensorRT(version) for version in sorted(NAMES))
    assert (later_ten.__name__, later_ten.__version__) == ("tensorrt", "tensorrt 10.16.1.11")
    assert ten.BuilderFlag.TF32 == eleven.BuilderFlag.TF32
    assert "FP16" in NAMES["tensorrt 10.12.0.36"]["BuilderFlag"].split()
    with pytest.raises(AttributeError, match=r"BuilderFlag.FP16 is not in tensorrt 11"):
        eleven.BuilderFlag.FP16  # noqa: B018


def test_classic_tensorrt_takes_no_named_gpu(
    classic: Any, exported: dict[str, Path], tmp_path: Path
) -> None:
    message = r"compute_capability='8.9' is for flavor='rtx'; tensorrt builds for the GPU"
    with pytest.raises(ExportError, match=message):
        build_engine(exported["fp32"], tmp_path / "net.engine", compute_capability="8.9")


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [("ICudaEngine", r"\b_?engine\.(\w+)"), ("IExecutionContext", r"\b_context\.(\w+)")],
)
def test_the_names_that_a_runner_uses_are_in_every_version(kind: str, pattern: str) -> None:
    used = set(re.findall(pattern, Path(runners.__file__).read_text()))
    assert len(used) >= 4
    for version, names in NAMES.items():
        assert used <= set(names[kind].split()), version
    assert used <= set(dir(getattr(tensorrt_rtx, kind)))


BINDINGS = importlib.util.find_spec("tensorrt_bindings")


@pytest.mark.skipif(BINDINGS is None, reason="the classic bindings are not installed here")
def test_the_record_is_what_the_installed_bindings_have() -> None:
    assert BINDINGS is not None
    assert BINDINGS.origin
    owners = importlib.metadata.packages_distributions()["tensorrt_bindings"]
    version = f"tensorrt {importlib.metadata.version(owners[0])}"
    assert version in NAMES, "record it: python -m tests.export.tensorrt_names"
    kinds = list(NAMES[version])
    assert names_of(Path(BINDINGS.origin).parent, kinds) == NAMES[version]
