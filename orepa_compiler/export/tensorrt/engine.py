"""ONNX files built into TensorRT engines: one path for tensorrt 10.12, 11 and tensorrt_rtx."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from orepa_compiler.errors import ExportError
from orepa_compiler.export.gates.network import ParsedNetwork, parse_network
from orepa_compiler.export.tensorrt.flavors import Flavor, error_log, load_flavor
from orepa_compiler.export.tensorrt.profiles import Shapes, set_shapes
from orepa_compiler.files.atomic import staged
from orepa_compiler.progress import build_monitor

# Built for where no GPU tells its own: Ada, the newest that most desktops have.
DEFAULT_COMPUTE_CAPABILITY = "8.9"

_GIB = 2**30


def build_engine(
    onnx: str | PathLike[str],
    path: str | PathLike[str],
    *,
    flavor: Flavor = "auto",
    compute_capability: str | None = None,
    shapes: Shapes | None = None,
    workspace_gb: float | None = None,
    tf32: bool = False,
    timing_cache: str | PathLike[str] | None = None,
) -> Path:
    """Builds a TensorRT engine of the ONNX file, in the precision that the file has.

        orepa.build_engine("net.onnx", "net.engine", compute_capability="8.9")

    flavor: trt (built on the GPU it will run on), rtx (built anywhere, for a compute_capability
    such as 8.9), or auto. shapes: input name -> its smallest, tuned-for and largest shape, or those
    three alone for the only input; without them a symbolic batch gets 1, 8 and 32. workspace_gb: a
    limit in GiB for the memory that kernels may use while they run. tf32: whether float32 convs may
    round their inputs to 10 bits. timing_cache: a file of kernel timings, read where it exists and
    written after the build.
    Raises ExportError where the file is not collapsed, where the network would differ from it, and
    where TensorRT cannot parse or build it; MissingPackage without TensorRT.
    """
    source, target = Path(onnx), Path(path)
    tensorrt = load_flavor(flavor)
    with staged(target) as draft:
        parsed = parse_network(tensorrt, source)
        config = make_config(tensorrt, parsed.builder, workspace_gb=workspace_gb, tf32=tf32)
        _set_target(tensorrt, config, compute_capability)
        set_shapes(parsed, config, shapes or {})
        if timing_cache is not None:
            read_timing_cache(tensorrt, config, Path(timing_cache))
        draft.write_bytes(_build(tensorrt, parsed, config, source))
    if timing_cache is not None:
        write_timing_cache(config, Path(timing_cache))
    return target


def make_config(
    tensorrt: ModuleType, builder: Any, *, workspace_gb: float | None, tf32: bool
) -> Any:
    """Makes the build settings that every flavor has."""
    config = builder.create_builder_config()
    # TensorRT has TF32 on unless told otherwise.
    (config.set_flag if tf32 else config.clear_flag)(tensorrt.BuilderFlag.TF32)
    if workspace_gb is not None:
        if workspace_gb <= 0:
            raise ExportError(f"workspace_gb={workspace_gb} leaves no memory; pass more than 0")
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, int(workspace_gb * _GIB))
    return config


def _set_target(tensorrt: ModuleType, config: Any, compute_capability: str | None) -> None:
    """Sets the GPU to build for, where TensorRT builds for another one than it runs on."""
    if not hasattr(config, "num_compute_capabilities"):
        if compute_capability is not None:
            raise ExportError(
                f"compute_capability={compute_capability!r} is for flavor='rtx'; "
                f"{tensorrt.__name__} builds for the GPU that it builds on: leave it out"
            )
        return
    wanted = _local_capability() if compute_capability is None else compute_capability
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in tensorrt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    if wanted not in known:
        raise ExportError(
            f"compute_capability={wanted!r} is not one of {', '.join(known)}; "
            "9.0 and 10.0 (H100, H200, B200) need flavor='trt'"
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[wanted], 0)


def _local_capability() -> str:
    if not torch.cuda.is_available():
        return DEFAULT_COMPUTE_CAPABILITY
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def _build(tensorrt: ModuleType, parsed: ParsedNetwork, config: Any, source: Path) -> bytes:
    log = error_log(tensorrt)
    log.errors.clear()
    with build_monitor(tensorrt, Console(stderr=True)) as monitor:
        if monitor is not None:
            config.progress_monitor = monitor
        engine = parsed.builder.build_serialized_network(parsed.network, config)
    if engine is None:
        reasons = " ".join(log.errors) or "it gives no reason"
        raise ExportError(
            f"{source}: {tensorrt.__name__} {tensorrt.__version__} could not build the engine: "
            f"{reasons}"
        )
    return bytes(engine)


def read_timing_cache(tensorrt: ModuleType, config: Any, path: Path) -> None:
    """Gives the timings in the file at `path`, or none where there is no such file, to a build.

    Raises ExportError for a file that this TensorRT or GPU cannot use, and for TensorRT for RTX,
    which keeps no such timings.
    """
    if hasattr(config, "num_compute_capabilities"):
        raise ExportError(
            f"{path}: {tensorrt.__name__} times no kernels and has no timing cache; leave it out, "
            "or build with flavor='trt'"
        )
    content = path.read_bytes() if path.is_file() else b""
    cache = config.create_timing_cache(content)
    # False: timings of another GPU are not taken for this one's.
    if cache is None or not config.set_timing_cache(cache, False):
        raise ExportError(
            f"{path}: this timing cache ({len(content)} bytes) is not of {tensorrt.__name__} "
            f"{tensorrt.__version__} on this GPU; remove it, or give another path"
        )


def write_timing_cache(config: Any, path: Path) -> None:
    """Writes all timings that a build now has to `path`, whole or not at all."""
    with staged(path) as draft:
        draft.write_bytes(bytes(config.get_timing_cache().serialize()))
