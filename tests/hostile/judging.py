"""Puts a model through every verb and says what was wrong: nothing, if it is exact or refused."""

from __future__ import annotations

import copy
import dataclasses
import os
import random
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

import orepa_compiler as orepa
from orepa_compiler.blocks import ConvBlock
from tests.hostile.forms import Form
from tests.norms import randomise_norms

LIMITS = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
STEP = 0.05
THOROUGH = "OREPA_THOROUGH" in os.environ

Options = dict[str, Any]


@dataclass(frozen=True)
class Before:
    """The stock model: what it gives, which parameters a step misses, what else a step trains."""

    outputs: list[Any]
    idle: set[str]
    outside: int


def exact_or_refused(forms: dict[str, Form]) -> Callable[[str], None]:
    """A test of all the forms of a kind."""

    @pytest.mark.parametrize("name", forms)
    def test(name: str) -> None:
        found = faults(forms[name], number=list(forms).index(name))
        assert not found, "\n".join(found)

    return test


def faults(
    form: Form, *, number: int | None = None, ways: Iterable[tuple[str, Options]] | None = None
) -> list[str]:
    """What is wrong with plan, expand, a step and collapse of this model, a line for each.

    number: of the form among those of its kind. Half of the ways are tried with it, the other half
    with the next, unless OREPA_THOROUGH is set; None tries all. ways: verbs with their options.
    """
    torch.set_num_threads(1)
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = stock_of(form)
        before = Before(
            outputs(stock, form), *(_gradients(stock, form) if form.trains else (set(), 0))
        )
        for verb, options in _ways(form, None if THOROUGH else number) if ways is None else ways:
            told = "inputs" if "inputs" in options else ""
            block = "OREPA" if "block" in options else ""
            try:
                problems = list(_tried(form, verb, options, before))
            except Exception as crash:  # whatever it is, it is a fault of the verb
                problems = [f"CRASH {type(crash).__name__}: {str(crash)[:150]}"]
            place = "in place" if "inplace" in options else ""
            label = " ".join(filter(None, (verb, told, block, place)))
            found += [f"{label}: {problem}" for problem in problems]
    return found


def _ways(form: Form, number: int | None) -> Iterator[tuple[str, Options]]:
    told = {"inputs": form.given()}
    first, second = (told, {}) if (number or 0) % 2 else ({}, told)
    block = {} if (number or 0) % 2 else {"block": orepa.OREPA}  # which linearizes first
    own = {"inplace": True} if (number or 0) % 3 == 2 else {}
    yield from (("plan", second), ("collapse", {**first, **own}), ("expand", {**second, **block}))
    if number is None:
        yield from (("plan", first), ("collapse", second), ("expand", first), ("expand", second))
        for verb in ("collapse", "expand"):
            yield from ((verb, {**told, "inplace": True}) for told in (first, second))


def stock_of(form: Form) -> nn.Module:
    """The model as its maker trained it: in eval mode, with statistics in its norms."""
    _start(form, 0)
    model = randomise_norms(form.make())
    return (model.double() if form.double else model).eval()


def outputs(model: nn.Module, form: Form) -> list[Any]:
    """What each call gives, one after the other on a copy; twice with other seeds if it varies."""
    found, copied = [], copy.deepcopy(model)
    _start(form, 0)
    for seed in (0, 1) if form.varies else (0,):
        for number, call in enumerate(form.compared()):
            _seed(100 * seed + number)
            found.append(_kept(call(copied)))
    return found


def _tried(form: Form, verb: str, options: Options, before: Before) -> Iterator[str]:
    given = stock_of(form)
    options = copy.deepcopy(options)
    state = copy.deepcopy(given.state_dict())
    made = None
    try:
        made = getattr(orepa, verb)(given, **options)
    except orepa.ReparamError as refusal:
        if form.norms is not None or form.blocks is not None:
            yield from () if form.told and "inputs" not in options else [f"REFUSED: {refusal}"]
    if made is None or "inplace" not in options:  # an error leaves it as it was in place too
        if error := difference(list(state.items()), list(given.state_dict().items())):
            yield f"changed the state of the given model by {error:.1e}"
        yield from _differing(before.outputs, outputs(given, form), "the given model is changed: ")
    if isinstance(made, nn.Module):
        yield from _judged(form, stock_of(form), made.eval(), verb, options, before)


def _judged(
    form: Form, stock: nn.Module, made: nn.Module, verb: str, options: Options, before: Before
) -> Iterator[str]:
    after = outputs(made, form)
    yield from _differing(before.outputs, after)
    if form.varies and _is_fixed(before.outputs) != _is_fixed(after):
        yield "WRONG: what was random is fixed"
    yield from _not_reached(form, made, verb, options)
    if verb == "expand" and form.trains:
        yield from _training_faults(form, stock, made, before)
        yield from _faults_after_a_step(form, made, options)


def _not_reached(form: Form, made: nn.Module, verb: str, options: Options) -> Iterator[str]:
    if form.told and "inputs" not in options:
        return
    norms = sum(isinstance(module, _NormBase) for module in made.modules())
    if verb == "collapse" and form.norms is not None and norms > form.norms:
        yield f"MISSED: {norms} norms are left, not {form.norms}"
    blocks = sum(isinstance(module, ConvBlock) for module in made.modules())
    if verb == "expand" and form.blocks is not None and blocks < form.blocks:
        yield f"MISSED: {blocks} blocks, not {form.blocks}"


def _training_faults(
    form: Form, stock: nn.Module, made: nn.Module, before: Before
) -> Iterator[str]:
    """Parameters that stop training, and tensors that are trained by no optimizer."""
    after, others = _gradients(made, form)
    idle = {name.rpartition(".")[0] for name in before.idle}
    lost = [name for name in after if not any(_is_inside(name, path) for path in idle)]
    if lost:
        yield f"WRONG: {len(lost)} parameters get no gradient, as {lost[0]}"
    if others > before.outside:
        yield f"WRONG: {others} tensors that are trained are no parameters of the model"
    was = {name for name, parameter in stock.named_parameters() if parameter.requires_grad}
    frozen = [n for n, p in made.named_parameters() if n in was and not p.requires_grad]
    if frozen:
        yield f"WRONG: {frozen[0]} is frozen"


def _is_inside(name: str, path: str) -> bool:
    return not path or name.startswith(path + ".")


def _gradients(model: nn.Module, form: Form) -> tuple[set[str], int]:
    """The parameters that a step does not reach, and how many others it does."""
    model = copy.deepcopy(model).train()
    loss = _loss(model, form)
    loss.backward()
    parameters = dict(model.named_parameters())
    known = {id(parameter) for parameter in parameters.values()}
    idle = {name for name, p in parameters.items() if p.requires_grad and p.grad is None}
    return idle, len(_leaves(loss) - known)


def _leaves(loss: Tensor) -> set[int]:
    found, seen, todo = set(), set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        todo += [following for following, _ in node.next_functions]
    return found


def _loss(model: nn.Module, form: Form) -> Tensor:
    _start(form, 0)
    maps = [y for y in leaves_of(model(*form.arguments())) if isinstance(y, Tensor)]
    return sum((y.square().mean() for y in maps if y.requires_grad), torch.zeros(()))


def _faults_after_a_step(form: Form, expanded: nn.Module, options: Options) -> Iterator[str]:
    trained = copy.deepcopy(expanded).train()
    optimizer = torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=STEP)
    _loss(trained, form).backward()
    optimizer.step()
    _without_graphs(trained.eval())
    expected = outputs(trained, form)
    told = {"inputs": form.given()} if "inputs" in options else {}
    for fold_norm in (True, False):
        label = f"after a step, collapse(fold_norm={fold_norm}): "
        _start(form, 0)
        try:
            deploy = orepa.collapse(trained, fold_norm=fold_norm, **told).eval()
        except orepa.ReparamError:
            continue
        yield from _differing(expected, outputs(deploy, form), label)


def _without_graphs(model: nn.Module) -> None:
    """Lets go of what a call left in attributes, so that the model can be copied."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                vars(module)[name] = value.detach()


def _differing(expected: list[Any], found: list[Any], label: str = "") -> Iterator[str]:
    for number, (one, two) in enumerate(zip(expected, found, strict=True)):
        if error := difference(one, two):
            yield f"{label}WRONG by {error:.1e} in call {number}"
            return


def _is_fixed(found: list[Any]) -> bool:
    half = len(found) // 2
    return all(not difference(a, b) for a, b in zip(found[:half], found[half:], strict=True))


def difference(one: Any, two: Any) -> float:
    """The largest difference above rounding, relative to its map; infinite for other shapes."""
    first, second = leaves_of(one), leaves_of(two)
    if len(first) != len(second):
        return float("inf")
    return max((_apart(a, b) for a, b in zip(first, second, strict=True)), default=0.0)


def _apart(a: Any, b: Any) -> float:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        same = a == b if not isinstance(a, float) else abs(a - b) <= 1e-9 * max(abs(a), 1)
        return 0.0 if bool(same) else float("inf")
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not a.is_floating_point():
        return 0.0 if bool((a == b).all()) else float("inf")
    u, v = a.detach().double(), b.detach().double()
    error = float((u - v).abs().max() / u.abs().max().clamp_min(1e-12)) if u.numel() else 0.0
    return 0.0 if error <= LIMITS[a.dtype] else (error if error == error else float("inf"))


def leaves_of(value: Any) -> list[Any]:
    """The tensors and other values in what a forward returns."""
    if isinstance(value, dict):
        return [leaf for item in value.items() for leaf in leaves_of(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves_of(item)]
    if isinstance(value, SimpleNamespace) or dataclasses.is_dataclass(value):
        return leaves_of(vars(value))
    return [value]


def _kept(value: Any) -> Any:
    """The values as they are now, whatever a later call writes into them."""
    return [
        leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves_of(value)
    ]


def _start(form: Form, seed: int) -> None:
    if form.before is not None:
        form.before()
    _seed(seed)


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
