"""Loads a TensorRT package: classic tensorrt, or tensorrt_rtx, which builds without a GPU."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch

from orepa_compiler.choices import Flavor as Flavor
from orepa_compiler.dependencies import import_extra
from orepa_compiler.errors import ExportError, MissingPackage

# Flavor -> its package; the classic one first.
PACKAGES = {"trt": "tensorrt", "rtx": "tensorrt_rtx"}

# Package -> the extra that installs it.
EXTRAS = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}

# TensorRT's type names.
DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


def load_flavor(flavor: Flavor = "auto") -> ModuleType:
    """Imports the TensorRT package to build with.

    trt: classic tensorrt. rtx: tensorrt_rtx. auto: the classic one where it is installed and a GPU
    is present, else tensorrt_rtx.
    Raises MissingPackage where the package is not installed, ExportError for classic tensorrt
    without a GPU, on which it times its kernels.
    """
    if flavor not in ("auto", *PACKAGES):
        raise ExportError(f"flavor={flavor!r} is not one of auto, {', '.join(PACKAGES)}")
    has_gpu = torch.cuda.is_available()
    if flavor != "auto":
        package = PACKAGES[flavor]
        found = import_extra(package, extra=EXTRAS[package])
        if flavor == "trt" and not has_gpu:
            raise ExportError(
                "flavor='trt' builds on the GPU that it will run on, and torch sees none; build on "
                "such a machine, or with flavor='rtx' for a named one"
            )
        return found
    installed = installed_flavors()
    usable = [name for name in installed if has_gpu or name != "tensorrt"]
    if not usable:
        raise MissingPackage(
            "no TensorRT that can build here; install it with: pip install 'orepa-compiler[trt]' "
            "(on a machine with a GPU) or pip install 'orepa-compiler[trt-rtx]' (on any)"
        )
    return installed[usable[0]]


def installed_flavors() -> dict[str, ModuleType]:
    """Lists the TensorRT packages that are installed, by name, the classic one first."""
    found = {}
    for package, extra in EXTRAS.items():
        try:
            found[package] = import_extra(package, extra=extra)
        except MissingPackage:
            continue
    return found


@functools.cache
def error_log(tensorrt: ModuleType) -> Any:
    """Makes a TensorRT logger that prints nothing and keeps the error messages in `errors`.

    One for each package: TensorRT sends all messages of a process to the first logger it is given.
    """
    shown = (tensorrt.ILogger.Severity.ERROR, tensorrt.ILogger.Severity.INTERNAL_ERROR)

    class ErrorLog(tensorrt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, msg: str) -> None:
            if severity in shown:
                self.errors.append(msg)

    return ErrorLog()


def load_engine(path: str, serialized: bytes) -> tuple[ModuleType, Any]:
    """Loads a serialized engine, and gives the TensorRT package that could, and the engine.

    Raises ExportError with each package's reason where none can.
    """
    installed = installed_flavors()
    if not installed:
        raise MissingPackage(
            "this needs TensorRT; install it with: pip install 'orepa-compiler[trt]' or "
            "pip install 'orepa-compiler[trt-rtx]'"
        )
    reasons = []
    for name, tensorrt in installed.items():
        log = error_log(tensorrt)
        log.errors.clear()
        engine = tensorrt.Runtime(log).deserialize_cuda_engine(serialized)
        if engine is not None:
            return tensorrt, engine
        reasons.append(
            f"{name} {tensorrt.__version__}: {' '.join(log.errors) or 'no reason given'}"
        )
    raise ExportError(
        f"{path}: no installed TensorRT can load this engine ({'; '.join(reasons)}); "
        "build it with the package and version that runs it"
    )
