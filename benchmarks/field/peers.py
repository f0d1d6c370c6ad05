"""timm's models with a method of their own for deployment, and what timm makes of them."""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from dataclasses import asdict
from typing import Any

import torch
from timm.models import _registry
from timm.utils import reparameterize_model
from torch import nn

from benchmarks.field.counting import counted
from benchmarks.field.examining import Row, double, error, examine, is_sound, outputs
from benchmarks.zoo.building import Subject, build, parameter_count
from benchmarks.zoo.examining import Limits
from benchmarks.zoo.inputs import Instance, find

METHODS = ("fuse", "reparameterize", "switch_to_deploy")
# A larger model is not run: in float64, beside copies of it, it would take more than 20 GB.
MOST_PARAMETERS = 400_000_000
# How much larger than timm's an error may be that is still that of float32 itself.
_NOISE = 2.0


def classes() -> dict[type[nn.Module], str]:
    """timm's module classes with such a method -> the module of timm that defines them."""
    found: dict[type[nn.Module], str] = {}
    for family in sorted(set(_registry._model_to_module.values())):
        for value in vars(sys.modules[f"timm.models.{family}"]).values():
            is_class = inspect.isclass(value) and issubclass(value, nn.Module)
            if is_class and any(method in vars(value) for method in METHODS):
                found[value] = value.__module__.rpartition(".")[2]
    return found


def peers() -> tuple[list[Subject], list[Subject]]:
    """The models of timm with such a class, and those of them that are too large to be run here."""
    wanted = classes()
    found: tuple[list[Subject], list[Subject]] = ([], [])
    for name, family in sorted(_registry._model_to_module.items()):
        if family not in wanted.values():
            continue
        subject = Subject("timm", name, family)
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = build(subject)
        if not {type(module) for module in model.modules()}.isdisjoint(wanted):
            found[parameter_count(model) > MOST_PARAMETERS].append(subject)
    return found


def examine_peer(subject: Subject, limits: Limits) -> Row:
    """The row of a timm model. status: collapsed, or fail, also where timm's is better.

    limits: those of its process, which `run_all` watches.
    """
    instance, model, _ = find(Instance(subject))
    inputs, wanted = instance.inputs(), classes()
    kinds = {type(module) for module in model.modules()} & wanted.keys()
    names = sorted(f"{wanted[kind]}.{kind.__name__}" for kind in kinds)
    row: Row = {"kind": "timm", "name": subject.name, "source": ", ".join(names)}
    row |= {"size": instance.size, **examine(model, inputs)}
    row["timm"] = _by_timm(model, inputs)
    return {**row, "status": "collapsed" if is_sound(row) and _is_no_worse(row) else "fail"}


def _by_timm(model: nn.Module, inputs: tuple[Any, ...]) -> Row:
    """What reparameterize_model leaves, and its errors."""
    plain = double(inputs)
    exact = copy.deepcopy(model).double()
    truth = outputs(exact, plain)
    row: Row = {}
    for name, net, given in (("float32", model, inputs), ("float64", exact, plain)):
        try:
            deploy = reparameterize_model(net)
            row[name] = error(outputs(deploy, given), truth)
        except Exception as problem:  # timm's own methods: whatever comes out is a finding
            row[f"{name}_problem"] = f"{type(problem).__name__}: {problem}".split("\n")[0][:160]
            continue
        row["after"] = row.get("after") or asdict(counted(deploy, tuple(x[:1] for x in given)))
    return row


def _is_no_worse(row: Row) -> bool:
    timm = row["timm"]
    if "after" not in timm:
        return True
    limit = _NOISE * max(timm.get("float32", 0.0), row["noise"])
    is_fewer = row["after"]["norms"] <= timm["after"]["norms"]
    return is_fewer and row["float32"] <= limit and row["after"]["macs"] <= timm["after"]["macs"]
