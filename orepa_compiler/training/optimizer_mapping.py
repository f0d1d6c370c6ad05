"""Carries an optimizer over when its model changes form in the middle of training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from orepa_compiler.blocks import ConvBlock
from orepa_compiler.blocks.offline import OfflineBlock
from orepa_compiler.blocks.parts import PartOfBlock
from orepa_compiler.errors import ReparamError

State = dict[str, Any]

# What SGD remembers: a velocity, which goes through a change of coordinates as the weights do.
VELOCITY = "momentum_buffer"


def map_optimizer(optimizer: Optimizer, before: nn.Module, after: nn.Module) -> None:
    """Makes the optimizer of one model that of another form of it, in place.

        grown = orepa.expand(model, where="layer4.*")      # or orepa.cut(model, ...)
        orepa.map_optimizer(optimizer, model, grown)

    Param groups keep their options, and schedulers their hold on them. A parameter that is in both
    models, by its name, keeps its state. One that is gone leaves; a new one joins the group of the
    parameter that was nearest to it, with no state. Parameters of neither model stay.

    A conv that became a block hands its state to the origin branch, which starts as that very
    conv (v = 1). Where branches were cut, and where a block grew, SGD's velocity m of the kernel
    W that the origin (or the conv) took over is the one that it had before,

        m_W = J m,   J the derivative of W with respect to the branches' parameters.

    Other optimizers have no such law: second moments of a product are not a product. Their state
    of that kernel starts anew. So does all state of a linearized sum.

    before: unchanged since the rewrite, which is why it must not have been made in place. Raises
    ReparamError where the optimizer holds no parameter of it; it is untouched then.
    """
    if before is after:
        raise ReparamError("before and after are one model; rewrite a copy (inplace=False)")
    groups = {id(p): n for n, g in enumerate(optimizer.param_groups) for p in g["params"]}
    if not any(id(p) in groups for p in before.parameters()):
        raise ReparamError(
            f"the {type(optimizer).__name__} holds no parameter of the first model; give the model "
            "that it was made with, then the rewritten one"
        )
    new = dict(after.named_parameters())
    homes = _homes(groups, before, new)
    states = _states(_Memory(optimizer, groups, homes), before, after)
    own = {id(p) for p in (*before.parameters(), *new.values())}
    outside = {p: s for p, s in optimizer.state.items() if id(p) not in own}
    for number, group in enumerate(optimizer.param_groups):
        names = [name for name, home in homes.items() if home == number]
        others = [i for i, p in enumerate(group["params"]) if id(p) not in own]
        if "param_names" in group:
            group["param_names"] = [*names, *(group["param_names"][i] for i in others)]
        group["params"] = [*(new[n] for n in names), *(group["params"][i] for i in others)]
    optimizer.state.clear()
    optimizer.state.update(outside)
    optimizer.state.update({new[name]: state for name, state in states.items() if state})


@dataclass(frozen=True)
class _Memory:
    """What an optimizer remembers. groups: id of an old parameter -> its group; homes: new name."""

    optimizer: Optimizer
    groups: dict[int, int]
    homes: dict[str, int | None]

    def state(self, parameter: Tensor | None) -> State:
        return {} if parameter is None else dict(self.optimizer.state.get(parameter, {}))

    def velocity(self, parameter: Tensor) -> Tensor | None:
        """SGD's velocity, or None where there is none yet."""
        found: Tensor | None = self.state(parameter).get(VELOCITY)
        return found

    def has_velocities_only(self, parameters: Iterable[Tensor]) -> bool:
        return all(self.state(p).keys() <= {VELOCITY} for p in parameters)

    def rate(self, parameter: Tensor, target: str) -> float:
        """The learning rate of an old parameter beside that of a new one: a step is lr times m."""
        old, new = self.groups.get(id(parameter)), self.homes[target]
        if old is None or new is None:
            return 1.0
        rates = [float(self.optimizer.param_groups[n]["lr"]) for n in (old, new)]
        return rates[0] / rates[1] if rates[1] else 1.0


def _homes(
    groups: dict[int, int], before: nn.Module, new: dict[str, nn.Parameter]
) -> dict[str, int | None]:
    """The group of each new parameter: that of its namesake, or of what was nearest to it."""
    old = dict(before.named_parameters())

    def nearness(name: str, other: str) -> tuple[int, bool, bool]:
        p, q = new[name], old[other]
        pairs = zip(name.split("."), other.split("."), strict=False)
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        return shared, p.dim() == q.dim(), (p.dim() > 1) == (q.dim() > 1)

    homes = {}
    for name in new:
        near = name if name in old else max(old, key=lambda other: nearness(name, other))
        homes[name] = groups.get(id(old[near]))
    return homes


def _states(memory: _Memory, before: nn.Module, after: nn.Module) -> dict[str, State]:
    """The state of each new parameter by its name."""
    old = dict(before.named_parameters())
    states = {
        name: memory.state(old[name])
        for name, p in after.named_parameters()
        if name in old and old[name].shape == p.shape
    }
    for path, was, now in _changed(before, after):
        prefix = f"{path}." if path else ""
        name = prefix + ("branches.origin.weight" if isinstance(now, ConvBlock) else "weight")
        if name in memory.homes:
            states[name] = _kernel_state(memory, was, now, name)
        if isinstance(was, ConvBlock) and isinstance(now, ConvBlock):
            states[f"{prefix}scaling"] = _scaling_state(memory, was, now)
        norm_bias = f"{prefix}norm.bias"
        if isinstance(was, _ConvNd) and norm_bias in memory.homes:
            states[norm_bias] = memory.state(was.bias)
    return {name: state for name, state in states.items() if memory.homes.get(name) is not None}


def _changed(
    before: nn.Module, after: nn.Module
) -> Iterator[tuple[str, _ConvNd | ConvBlock, _ConvNd | ConvBlock]]:
    """The places where a block stands that did not, or with other branches, or no longer."""
    old = dict(before.named_modules())
    for path, now in after.named_modules():
        was = old.get(path)
        if not isinstance(was, (_ConvNd, ConvBlock)) or isinstance(was, OfflineBlock):
            continue  # norms make of its kernels what no derivative of a kernel tells
        if isinstance(now, (_ConvNd, ConvBlock)) and _branches(was) != _branches(now):
            yield path, was, now


def _branches(module: _ConvNd | ConvBlock) -> list[str]:
    """The names of a block's branches; a conv has none."""
    return list(module.branches) if isinstance(module, ConvBlock) else []


def _kernel_state(
    memory: _Memory, was: _ConvNd | ConvBlock, now: _ConvNd | ConvBlock, name: str
) -> State:
    """The state of the kernel in `now` that took others over."""
    if not isinstance(was, ConvBlock):
        return memory.state(was.weight)
    kept = {*_branches(now)} - {"origin"}
    part = PartOfBlock(was, [n for n in was.branches if n not in kept])
    parameters = dict(part.named_parameters())
    velocities = {n: memory.velocity(p) for n, p in parameters.items()}
    if all(v is None for v in velocities.values()):
        return {}
    if not memory.has_velocities_only(parameters.values()):
        return {}
    tangents = {
        n: v * memory.rate(parameters[n], name) for n, v in velocities.items() if v is not None
    }
    return {VELOCITY: part.pushed_forward(tangents)}


def _scaling_state(memory: _Memory, was: ConvBlock, now: ConvBlock) -> State:
    """The velocities of the rows that stay; origin's went into its kernel, as its factor did."""
    if was.scaling is None or now.scaling is None:
        return {}
    velocity = memory.velocity(was.scaling)
    if velocity is None or not memory.has_velocities_only([was.scaling]):
        return {}
    rows = torch.zeros_like(now.scaling)
    order = list(was.branches)
    for index, name in enumerate(now.branches):
        if name in order and name != "origin":
            rows[index] = velocity[order.index(name)]
    return {VELOCITY: rows}
