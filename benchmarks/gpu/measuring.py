"""One model in one precision: exported, built, compared and timed beside the stock net."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from orepa_compiler.errors import NotRun, ReparamError
from orepa_compiler.export import OnnxRunner, TensorRTRunner, bench, build_engine, export_onnx
from orepa_compiler.export.int8.dithering import with_int8_noise
from orepa_compiler.export.onnx.precision import PRECISIONS
from orepa_compiler.model_source import declare_torchvision_operators, load_model
from orepa_compiler.verification import Samples, judge, take_samples

MODELS = {
    "resnet18": "torchvision:resnet18",
    "mobilenet_v3_small": "torchvision:mobilenet_v3_small",
    "deeplabv3_mobilenet_v3_large": "torchvision:deeplabv3_mobilenet_v3_large",
    "repvgg_a0": "timm:repvgg_a0",
    "efficientnet_b0": "torchvision:efficientnet_b0",
}
PRECISION_NAMES = ("fp32", "fp16", "int8")

CPU, CUDA, TENSORRT = "onnxruntime CPU", "onnxruntime CUDA", "TensorRT"

_SIZE, _COMPARED, _CALIBRATION_BATCHES = 224, 4, 4


@dataclass(frozen=True)
class Check:
    """An artifact beside the model. verdict: pass, mismatch, failed or not run, and why."""

    verdict: str
    error: float | None = None
    tolerance: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Row:
    """One model in one precision. state: done, failed or not run. bench: as Bench.to_dict gives."""

    model: str
    precision: str
    state: str
    reason: str = ""
    checks: dict[str, Check] = field(default_factory=dict)
    bench: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        """The row that to_dict gave."""
        checks = {name: Check(**check) for name, check in data["checks"].items()}
        return cls(**{**data, "checks": checks})


def why_not_here() -> str:
    """Why nothing of this can be run on this machine; empty where it can."""
    return "" if torch.cuda.is_available() else "torch sees no CUDA GPU here"


def build(source: str) -> nn.Module:
    """The stock net in eval mode, its norms with statistics as training leaves them."""
    torch.manual_seed(0)
    model = _untrained(source)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low in ((module.running_mean, -0.5), (module.running_var, 0.5)):
                assert tensor is not None
                tensor.uniform_(low, low + 1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model.eval()


def _untrained(source: str) -> nn.Module:
    if "deeplab" not in source:
        return load_model(source)
    declare_torchvision_operators()
    import torchvision

    # As it stands there it would fetch the weights of its backbone.
    name = source.rpartition(":")[2]
    return torchvision.models.get_model(name, weights=None, weights_backbone=None)


def measure(name: str, source: str, precision: str, *, batch: int, size: int = _SIZE) -> Row:
    """The row of a model; what cannot be run, built or compared says so in it."""
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        try:
            found = _measured(source, precision, Path(folder), batch, size)
            row = Row(name, precision, "done", "", *found)
        except Exception as error:  # one model that fails leaves the others their rows
            row = Row(name, precision, "failed", f"{type(error).__name__}: {error}")
        # The folder's name tells nothing, and makes the same reason another one in each row.
        text = json.dumps(row.to_dict()).replace(f"{folder}/", "")
    return replace(Row.from_dict(json.loads(text)), seconds=time.perf_counter() - start)


def _measured(
    source: str, precision: str, folder: Path, batch: int, size: int
) -> tuple[dict[str, Check], dict[str, Any]]:
    stock = build(source)
    generator = torch.Generator().manual_seed(1)
    shape = (_COMPARED, 3, size, size)
    data = [torch.randn(shape, generator=generator) for _ in range(_CALIBRATION_BATCHES)]
    deploy = orepa.collapse(orepa.expand(stock, inputs=data[:1]), inputs=data[:1])
    forms = {"collapsed": deploy, "stock": orepa.collapse(stock, inputs=data[:1])}
    files = {name: _export(net, data, folder / name, precision) for name, net in forms.items()}
    engines: dict[str, Path] = {}
    problem = ""
    try:
        for name, file in files.items():
            engines[name] = build_engine(file, file.with_suffix(".engine"), shapes=_shapes(shape))
    except ReparamError as error:
        engines, problem = {}, str(error)
    samples = _samples(deploy, files["collapsed"], data, precision, folder)
    checks = {
        CPU: _check(samples, lambda: OnnxRunner(files["collapsed"])),
        CUDA: _check(samples, lambda: _on_cuda(files["collapsed"])),
        TENSORRT: Check("failed", reason=problem)
        if problem
        else _check(samples, lambda: TensorRTRunner(engines["collapsed"])),
    }
    found = bench(
        files["collapsed"],
        files["stock"],
        engine=engines.get("collapsed"),
        against_engine=engines.get("stock"),
        batch=batch,
    )
    return checks, found.to_dict()


def _shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    return [(batch, *shape[1:]) for batch in (1, 8, 32)]


def _export(net: nn.Module, data: Sequence[Tensor], path: Path, precision: str) -> Path:
    calibration = list(data) if precision == "int8" else None
    target = path.with_suffix(".onnx")
    return export_onnx(net, data[0], target, precision=precision, calibration=calibration)  # type: ignore[arg-type]


def _samples(
    deploy: nn.Module, file: Path, data: Sequence[Tensor], precision: str, folder: Path
) -> Samples:
    is_int8 = precision == "int8"
    given = list(data) if is_int8 else data[0]
    dtype = PRECISIONS[precision]
    samples = take_samples(deploy, given, precision=dtype, stress=not is_int8)
    if not is_int8:
        return samples
    return with_int8_noise(samples, _export(deploy, data, folder / "fp32", "fp32"), file, folder)


def _on_cuda(file: Path) -> OnnxRunner:
    return OnnxRunner(file, provider="CUDAExecutionProvider")


def _check(samples: Samples, open_runner: Callable[[], Callable[..., Any]]) -> Check:
    try:
        report = judge(samples, open_runner())
    except NotRun as error:
        return Check("not run", reason=str(error))
    except ReparamError as error:
        return Check("failed", reason=str(error))
    worst = report.worst
    numbers = (worst.error, worst.tolerance) if worst else (None, None)
    return Check("pass" if report else "mismatch", *numbers, "" if report else report.verdict)
