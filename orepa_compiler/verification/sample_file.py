"""Samples in one safetensors file: what another machine judges the same artifact by."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from orepa_compiler.errors import ReparamError
from orepa_compiler.files.schemas import read_json
from orepa_compiler.verification.evaluation import Outputs
from orepa_compiler.verification.nesting import Form
from orepa_compiler.verification.outputs.decisions import Decision
from orepa_compiler.verification.samples import Samples
from orepa_compiler.verification.structure import Structure, rebuilt, taken_apart
from orepa_compiler.verification.truth import Truth

_FORMAT = 2
_KEY = "orepa.samples"

Group = Literal["input", "expected", "truth", "noisy", "threshold", "choice", "unclear"]
Precision = Literal["float64", "float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class _Batch:
    """What safetensors does not hold of a batch.

    made: as in Samples. form, outputs: of the outputs, and their names in order. inputs: how the
    tensors are nested. noise: of each decision.
    """

    made: str
    form: Form
    outputs: list[str]
    inputs: list[Structure]
    noise: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _About:
    format: int
    batches: list[_Batch]
    working: Precision
    precision: Precision | None
    notes: list[str]
    noise_name: str = ""


def save_samples(samples: Samples, path: Path) -> None:
    """Writes the samples; of several noisy outputs, the worst alone.

    Raises ReparamError where an input or an output is no plain tensor or value: those have no place
    there.
    """
    lean = samples.lean()
    tensors: dict[str, Tensor] = {}
    batches = []
    for index in range(len(lean.batches)):
        inputs, structures = taken_apart(lean.batches[index])
        decisions = lean.truth.decisions_of(index)
        groups = {"input": inputs, **dict(_output_groups(lean, index))}
        for group, leaves in groups.items():
            for name, leaf in leaves.items():
                tensors[f"{index}/{group}/{name}"] = _plain(group, name, leaf)
        noise = {name: decision.noise for name, decision in decisions.items()}
        ours = lean.expected[index]
        batches.append(_Batch(lean.made[index], ours.form, list(ours.leaves), structures, noise))
    precision = _name(lean.precision) if lean.precision else None
    truth = lean.truth
    working, notes = _name(truth.working), list(truth.notes)
    about = _About(_FORMAT, batches, working, precision, notes, truth.noise_name)
    path.write_bytes(save(tensors, {_KEY: json.dumps(asdict(about))}))


def _output_groups(lean: Samples, index: int) -> Iterator[tuple[Group, dict[str, Any]]]:
    yield "expected", lean.expected[index].leaves
    yield "truth", lean.truth.outputs[index].leaves
    if lean.truth.noisy:
        yield "noisy", lean.truth.noisy[0][index].leaves
    decisions = lean.truth.decisions_of(index)
    for kind in ("threshold", "choice"):
        yield kind, {name: d.on for name, d in decisions.items() if d.kind == kind}
    yield "unclear", lean.truth.unclear_of(index)


def _plain(group: str, name: str, leaf: Any) -> Tensor:
    if not isinstance(leaf, Tensor):
        raise ReparamError(
            f"{group} {name} is a {type(leaf).__name__}: only tensors are kept as samples, so this "
            "export can be checked again beside its model only"
        )
    return leaf.detach().cpu().contiguous().clone()


def load_samples(path: Path) -> Samples:
    """The samples that save_samples wrote. Raises ReparamError for any other file."""
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ReparamError(f"{path}: holds no samples of an export ({error})") from error
    if text is None:
        raise ReparamError(f"{path}: holds no samples of an export (no {_KEY} in its metadata)")
    about = read_json(text, _About, what=f"{path}: {_KEY}")
    if about.format != _FORMAT:
        raise ReparamError(
            f"{path}: has samples of format {about.format}, this version reads {_FORMAT}; export "
            "again"
        )
    return _samples(about, _grouped(path, tensors, len(about.batches)), path)


Groups = dict[tuple[int, str], dict[str, Tensor]]


def _grouped(path: Path, tensors: dict[str, Tensor], count: int) -> Groups:
    """The tensors by batch and group. Raises ReparamError for a name that is none of ours."""
    groups: Groups = {}
    for key, tensor in tensors.items():
        index, _, rest = key.partition("/")
        group, _, name = rest.partition("/")
        is_one = index.isdecimal() and len(index) < 9 and int(index) < count
        if not (is_one and name and group in Group.__args__):  # type: ignore[attr-defined]
            raise ReparamError(f"{path}: the tensor {key!r} belongs to none of {count} batches")
        groups.setdefault((int(index), group), {})[name] = tensor
    return groups


def _samples(about: _About, groups: Groups, path: Path) -> Samples:
    count = range(len(about.batches))

    def outputs(group: Group) -> list[Outputs]:
        return [_ordered(path, i, group, about.batches[i], groups) for i in count]

    has_noise = any(group == "noisy" for _, group in groups)
    expected, right = outputs("expected"), outputs("truth")
    decisions = tuple(
        {
            name: Decision(kind, on, about.batches[i].noise.get(name, 0.0))
            for kind in ("threshold", "choice")
            for name, on in groups.get((i, kind), {}).items()
        }
        for i in count
    )
    _check_decisions(path, right, decisions)
    truth = Truth(
        right,
        [outputs("noisy")] if has_noise else [],
        getattr(torch, about.working),
        tuple(about.notes),
        decisions,
        tuple(groups.get((i, "unclear"), {}) for i in count),
        about.noise_name,
    )
    batches = [
        rebuilt(about.batches[i].inputs, groups.get((i, "input"), {}), what=f"{path}: batch {i}")
        for i in count
    ]
    precision = getattr(torch, about.precision) if about.precision else None
    return Samples(batches, [batch.made for batch in about.batches], expected, truth, precision)


def _ordered(path: Path, index: int, group: Group, batch: _Batch, groups: Groups) -> Outputs:
    """The outputs of a group in the order of the model: safetensors has one of its own."""
    found = groups.get((index, group), {})
    if found.keys() != set(batch.outputs):
        raise ReparamError(
            f"{path}: batch {index}: the outputs are {', '.join(batch.outputs) or 'none'}, but "
            f"{group} holds {', '.join(found) or 'none'}; export again"
        )
    return Outputs({name: found[name] for name in batch.outputs}, batch.form)


def _check_decisions(
    path: Path, right: list[Outputs], decisions: tuple[dict[str, Decision], ...]
) -> None:
    for index, known in enumerate(decisions):
        for name, decision in known.items():
            leaf = right[index].leaves.get(name)
            shape = decision.on.shape if decision.kind == "threshold" else decision.on.shape[:-1]
            if leaf is None or leaf.shape != shape or not decision.on.is_floating_point():
                raise ReparamError(
                    f"{path}: batch {index}: what {name} was decided on does not fit it; export "
                    "again"
                )


def _name(dtype: torch.dtype) -> Any:
    return str(dtype).removeprefix("torch.")
