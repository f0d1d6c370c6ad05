"""ONNX files built into TensorRT engines: one path for tensorrt 10.12, 11 and tensorrt_rtx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console

from orepa_compiler.errors import ExportError
from orepa_compiler.export.atomic import staged
from orepa_compiler.export.flavors import Flavor, error_log, load_flavor
from orepa_compiler.export.network import ParsedNetwork, parse_network
from orepa_compiler.export.progress import build_monitor

Shape = tuple[int, ...]

# The batch sizes of an engine for a file with a symbolic batch: smallest, tuned for, largest.
MIN_BATCH, OPT_BATCH, MAX_BATCH = 1, 8, 32

# Built for where no GPU tells its own: Ada, the newest that most desktops have.
DEFAULT_COMPUTE_CAPABILITY = "8.9"

_GIB = 2**30


def build_engine(
    onnx: str | PathLike[str],
    path: str | PathLike[str],
    *,
    flavor: Flavor = "auto",
    compute_capability: str | None = None,
    shapes: Mapping[str, Sequence[Shape]] | None = None,
    workspace_gb: float | None = None,
    tf32: bool = False,
) -> Path:
    """The path of a TensorRT engine for the ONNX file, in the precision that the file has.

    flavor: tensorrt (built on the GPU it will run on), tensorrt_rtx (built anywhere, for a
    compute_capability such as 8.9), or auto. shapes: input name -> its smallest, tuned-for and
    largest shape; without them a symbolic batch gets MIN_BATCH, OPT_BATCH and MAX_BATCH.
    workspace_gb: a limit in GiB for the memory that kernels may use while they run. tf32: whether
    float32 convs may round their inputs to 10 bits.
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
        draft.write_bytes(_build(tensorrt, parsed, config, source))
    return target


def make_config(
    tensorrt: ModuleType, builder: Any, *, workspace_gb: float | None, tf32: bool
) -> Any:
    """The build settings that every flavor has."""
    config = builder.create_builder_config()
    # TensorRT has TF32 on unless told otherwise.
    (config.set_flag if tf32 else config.clear_flag)(tensorrt.BuilderFlag.TF32)
    if workspace_gb is not None:
        if workspace_gb <= 0:
            raise ExportError(f"workspace_gb={workspace_gb} leaves no memory; pass more than 0")
        config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, int(workspace_gb * _GIB))
    return config


def _set_target(tensorrt: ModuleType, config: Any, compute_capability: str | None) -> None:
    """The GPU to build for, where TensorRT builds for another one than it runs on."""
    if not hasattr(config, "num_compute_capabilities"):
        if compute_capability is not None:
            raise ExportError(
                f"compute_capability={compute_capability!r} is for flavor='tensorrt_rtx'; "
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
            "9.0 and 10.0 (H100, H200, B200) need flavor='tensorrt'"
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[wanted], 0)


def _local_capability() -> str:
    if not torch.cuda.is_available():
        return DEFAULT_COMPUTE_CAPABILITY
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def set_shapes(parsed: ParsedNetwork, config: Any, shapes: Mapping[str, Sequence[Shape]]) -> None:
    """Adds the profile of shapes that the engine will take, where an input is symbolic."""
    network = parsed.network
    inputs = [network.get_input(index) for index in range(network.num_inputs)]
    symbolic = {value.name: tuple(value.shape) for value in inputs if -1 in tuple(value.shape)}
    unknown = shapes.keys() - symbolic.keys()
    if unknown:
        raise ExportError(
            f"shapes names {sorted(unknown)}, but the inputs with symbolic axes are "
            f"{sorted(symbolic) or 'none'}"
        )
    if not symbolic:
        return
    profile = parsed.builder.create_optimization_profile()
    for name, shape in symbolic.items():
        profile.set_shape(name, *shape_range(name, shape, shapes.get(name)))
    if config.add_optimization_profile(profile) < 0:
        raise ExportError(f"TensorRT refuses the shapes {dict(shapes)} for {symbolic}")


def shape_range(name: str, shape: Shape, given: Sequence[Shape] | None) -> list[Shape]:
    """The smallest, tuned-for and largest shape of one input, whose symbolic axes are -1."""
    if given is None:
        if -1 in shape[1:]:
            raise ExportError(
                f"input {name} has symbolic axes beside the batch {shape}; pass shapes="
                f"{{{name!r}: (smallest, tuned-for, largest)}}"
            )
        return [(batch, *shape[1:]) for batch in (MIN_BATCH, OPT_BATCH, MAX_BATCH)]
    ranges = [tuple(entry) for entry in given]
    fits = len(ranges) == 3 and all(
        len(entry) == len(shape)
        and all(
            size == axis or (axis == -1 and size > 0)
            for size, axis in zip(entry, shape, strict=True)
        )
        for entry in ranges
    )
    if not fits or any(not low <= opt <= high for low, opt, high in zip(*ranges, strict=True)):
        raise ExportError(
            f"shapes of input {name} are {ranges}; pass three rising shapes that fit {shape}"
        )
    return ranges


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
