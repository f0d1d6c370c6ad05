"""Samples in one safetensors file: what another machine judges the same artifact by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from orepa_compiler.errors import ReparamError
from orepa_compiler.verification.evaluation import Outputs
from orepa_compiler.verification.samples import Samples
from orepa_compiler.verification.truth import Truth

_FORMAT = 1


def save_samples(samples: Samples, path: Path) -> None:
    """Writes the samples; of several noisy outputs, the worst alone.

    Raises ReparamError where an input or an output is no plain tensor: those have no place there.
    """
    lean = samples.lean()
    tensors: dict[str, Tensor] = {}
    for index, batch in enumerate(lean.batches):
        groups: dict[str, dict[str, Any]] = {
            "input": {str(number): leaf for number, leaf in enumerate(batch)},
            "expected": lean.expected[index].leaves,
            "truth": lean.truth.outputs[index].leaves,
        }
        if lean.truth.noisy:
            groups["noisy"] = lean.truth.noisy[0][index].leaves
        for group, leaves in groups.items():
            for name, leaf in leaves.items():
                if not isinstance(leaf, Tensor):
                    raise ReparamError(
                        f"{group} {name} is a {type(leaf).__name__}: only tensors are kept as "
                        "samples, so this export can be checked again beside its model only"
                    )
                tensors[f"{index}/{group}/{name}"] = leaf.detach().cpu().contiguous().clone()
    about = {
        "format": _FORMAT,
        "made": lean.made,
        "forms": [outputs.form for outputs in lean.expected],
        "working": _name(lean.truth.working),
        "noise_scale": lean.truth.noise_scale,
        "notes": lean.truth.notes,
        "precision": _name(lean.precision) if lean.precision else None,
    }
    path.write_bytes(save(tensors, {"orepa.samples": json.dumps(about)}))


def load_samples(path: Path) -> Samples:
    """The samples that save_samples wrote. Raises ReparamError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["orepa.samples"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise ReparamError(f"{path}: holds no samples of an export ({error})") from error
    groups: dict[tuple[int, str], dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, group, name = key.split("/", 2)
        groups.setdefault((int(index), group), {})[name] = tensor
    count = range(len(about["made"]))

    def outputs(group: str) -> list[Outputs]:
        return [Outputs(groups.get((i, group), {}), about["forms"][i]) for i in count]

    batches = [
        tuple(tensor for _, tensor in sorted(groups[i, "input"].items(), key=lambda kv: int(kv[0])))
        for i in count
    ]
    has_noise = any(group == "noisy" for _, group in groups)
    truth = Truth(
        outputs("truth"),
        [outputs("noisy")] if has_noise else [],
        getattr(torch, about["working"]),
        about["noise_scale"],
        tuple(about["notes"]),
    )
    precision = getattr(torch, about["precision"]) if about["precision"] else None
    return Samples(batches, about["made"], outputs("expected"), truth, precision)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
