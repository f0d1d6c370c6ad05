"""Parameters sorted for an optimizer: which decay, and at which learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from orepa_compiler.blocks import BranchSum, ConvBlock
from orepa_compiler.blocks.catalogue import DeepStem
from orepa_compiler.errors import ReparamError

Preset = Literal["recommended", "reference"]

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# What the authors' code multiplies the learning rate of every bias with.
_BIAS_RATE = 2.0


@dataclass(frozen=True)
class _Place:
    """Where a parameter is: the module that holds it, its own name there, its path."""

    owner: nn.Module
    name: str
    path: str

    @property
    def is_norm(self) -> bool:
        return isinstance(self.owner, _NORMS)

    @property
    def is_bias(self) -> bool:
        return self.name == "bias"

    @property
    def is_scaling(self) -> bool:
        return isinstance(self.owner, BranchSum) and self.name == "scaling"


@dataclass(frozen=True)
class _Treatment:
    """What a group is: its name, whether it decays, and its part of the learning rate."""

    name: str
    decays: bool
    rate: float = 1.0

    def group(self, params: list[nn.Parameter], lr: float | None, decay: float) -> dict[str, Any]:
        made = {"params": params, "weight_decay": decay if self.decays else 0.0, "name": self.name}
        return made if lr is None else {**made, "lr": lr * self.rate}


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 1e-4,
    lr: float | None = None,
    preset: Preset = "recommended",
    stem_divisor: float = 1.0,
) -> list[dict[str, Any]]:
    """Puts each trained parameter into exactly one group, for any torch optimizer.

        optimizer = torch.optim.SGD(orepa.param_groups(model, weight_decay=1e-4), lr=0.1)

    preset: "recommended" decays kernels, and not norms, biases, scaling layers, other vectors, or
    what a timm model names in no_weight_decay(). "reference" is the authors' code: scaling layers
    decay too, and every bias learns twice as fast (theirs also decays the weight of RepVGG's
    identity norm). lr: the learning rate, where groups differ in it or are to carry it.
    stem_divisor: a block with a deep stem learns at lr / stem_divisor; 10 to transfer a backbone
    (Hu et al. 2022, supplement Sec. 2.3).

    Each group has a name ("decay", "no_decay", ...). Frozen parameters are left out. A model in
    DistributedDataParallel, or in fully_shard, is taken as it is.

    Raises ReparamError for a model with nothing to train, with flattened parameters (FSDP1), or
    without the deep stem that stem_divisor speaks of; where rates differ and lr is missing; for a
    preset that is none and numbers out of range.
    """
    _check_numbers(weight_decay, lr, stem_divisor, preset)
    _check_model(model)
    stems = _stems(model)
    if stem_divisor != 1.0 and not stems:
        raise ReparamError(
            f"stem_divisor={stem_divisor} and {type(model).__name__} has no deep stem; leave it out"
        )
    exempt = _exempt(model)
    groups: dict[_Treatment, list[nn.Parameter]] = {}
    for place, parameter in _trained(model):
        if preset == "recommended":
            treatment = _recommended(place, parameter, place.path in exempt)
        else:
            treatment = _reference(place)
        if place.path.startswith(stems) and stem_divisor != 1.0:
            rate = treatment.rate / stem_divisor
            treatment = _Treatment(f"stem_{treatment.name}", treatment.decays, rate)
        groups.setdefault(treatment, []).append(parameter)
    if lr is None and any(treatment.rate != 1.0 for treatment in groups):
        raise ReparamError("these groups differ in their learning rate; give the base one, lr=...")
    return [treatment.group(params, lr, weight_decay) for treatment, params in groups.items()]


def _recommended(place: _Place, parameter: nn.Parameter, is_exempt: bool) -> _Treatment:
    is_vector = parameter.dim() <= 1
    if is_exempt or is_vector or place.is_norm or place.is_scaling or place.is_bias:
        return _Treatment("no_decay", decays=False)
    return _Treatment("decay", decays=True)


def _reference(place: _Place) -> _Treatment:
    if place.is_bias:
        return _Treatment("bias", decays=False, rate=_BIAS_RATE)
    return _Treatment("norm", decays=False) if place.is_norm else _Treatment("decay", decays=True)


def _trained(model: nn.Module) -> Iterator[tuple[_Place, nn.Parameter]]:
    """The parameters that ask for gradients, a shared one where it is met first."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield _Place(module, name, _joined(path, name)), parameter
    if not seen:
        raise ReparamError(
            f"{type(model).__name__} has no parameter with requires_grad=True; "
            "nothing is left to train"
        )


def _stems(model: nn.Module) -> tuple[str, ...]:
    """What the paths of parameters in a block with a deep stem begin with."""
    return tuple(
        _joined(path, "")
        for path, module in model.named_modules()
        if isinstance(module, ConvBlock)
        and any(isinstance(branch, DeepStem) for branch in module.branches.values())
    )


def _exempt(model: nn.Module) -> set[str]:
    """The paths of what timm's models name themselves: tokens, tables of positions."""
    return {
        _joined(path, name)
        for path, module in model.named_modules()
        if callable(named := getattr(module, "no_weight_decay", None))
        for name in named()
    }


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ReparamError(f"the model is a {type(model).__name__}, not a torch.nn.Module")
    for path, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ReparamError(
                "FullyShardedDataParallel flattens parameters, so kernels cannot be told from "
                "norms; shard with torch.distributed.fsdp.fully_shard",
                path=path,
            )


def _check_numbers(
    weight_decay: float, lr: float | None, stem_divisor: float, preset: Preset
) -> None:
    if preset not in get_args(Preset):
        raise ReparamError(f"preset={preset!r} is neither 'recommended' nor 'reference'")
    if not weight_decay >= 0:
        raise ReparamError(f"weight_decay={weight_decay}; give 0 or more")
    if lr is not None and not lr > 0:
        raise ReparamError(f"lr={lr}; give more than 0")
    if not stem_divisor > 0:
        raise ReparamError(f"stem_divisor={stem_divisor}; give more than 0, 10 for a tenth")
