"""Records what a model does on inputs: its outputs, what ran, what would be trained."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from orepa_compiler.capture.effects.nested import tensors
from orepa_compiler.capture.effects.randomness import random_state_kept, seed_all
from orepa_compiler.errors import ReparamError
from orepa_compiler.validation.state import Watching, state_kept, state_of
from orepa_compiler.verification.evaluation import Batch
from orepa_compiler.verification.nesting import map_tensors, named_leaves

# The generators begin each call here: not where the caller's stand, whose next numbers a trace may
# have drawn already.
_SEED = 20_220

# So many flags of a model are tried.
_MOST_FLAGS = 6


@dataclass(frozen=True)
class TrialCall:
    """One call of a model: batch, its number; with_grad, whether gradients are recorded.

    flags: arguments by name beside those of the batch; the model may refuse such a call.
    """

    batch: int
    with_grad: bool
    flags: tuple[tuple[str, bool], ...] = ()

    def __str__(self) -> str:
        flags = "".join(f" with {name}={value}," for name, value in self.flags)
        return f"batch {self.batch}{flags} {'with' if self.with_grad else 'without'} gradients"


@dataclass(frozen=True)
class Behaviour:
    """What a model did.

    outputs: for each call its leaves by name, or, as text, what it raised. counts: how often the
    modules that were watched ran. trained: names of the parameters that a backward pass from the
    outputs would reach; strangers: the other tensors that it would give a gradient. is_stateful:
    whether a call left something behind.
    """

    calls: tuple[TrialCall, ...]
    outputs: tuple[dict[str, Any] | str, ...]
    counts: Mapping[str, int] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()
    strangers: tuple[Tensor, ...] = ()
    is_stateful: bool = False

    @property
    def raised(self) -> str:
        """What the first call that failed raised; "" where none did, or none but with flags."""
        pairs = zip(self.calls, self.outputs, strict=False)
        return next((found for call, found in pairs if is_failure(found, call)), "")


def is_failure(output: dict[str, Any] | str, call: TrialCall) -> TypeGuard[str]:
    """Whether a call raised that had no reason to."""
    return isinstance(output, str) and not call.flags


def evaluation_calls(model: nn.Module, batches: list[Batch], *, rounds: int = 1) -> list[TrialCall]:
    """Each batch with and without gradients, in turn, so often; each flag turned once.

    A flag is an argument of the model that is True or False where it is not given.
    """
    numbers = range(len(batches))
    pairs = [TrialCall(number, with_grad) for number in numbers for with_grad in (True, False)]
    flags = [TrialCall(0, False, (flag,)) for flag in _turned_flags(model, len(batches[0]))]
    return pairs * rounds + flags


def _turned_flags(model: nn.Module, given: int) -> list[tuple[str, bool]]:
    """The flags of a model that `given` positional arguments leave, each at its other value."""
    try:
        parameters = list(inspect.signature(model.forward).parameters.values())[given:]
    except (TypeError, ValueError):
        return []
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return [(p.name, not p.default) for p in named if isinstance(p.default, bool)][:_MOST_FLAGS]


def behaviour(
    model: nn.Module,
    batches: list[Batch],
    calls: Iterable[TrialCall],
    *,
    training: bool = False,
    dtype: torch.dtype | None = None,
    watched: Iterable[str] = (),
) -> Behaviour:
    """What the model does in train or in eval mode; it and the generators are put back after it.

    The mode is set by the model's own train() or eval(). dtype: of floating inputs; None leaves
    them. The calls end with the first that raises.
    """
    calls = list(calls)
    outputs: list[dict[str, Any] | str] = []
    reached: dict[int, Tensor] = {}
    counts: dict[str, int] = {}
    with _aside(model, training), _counting(model, watched, counts):
        before = state_of(model)
        for number, call in enumerate(calls):
            seed_all(_SEED + number)
            batch = _placed(batches[call.batch], dtype)
            outputs.append(_called(model, batch, call, reached if training else None))
            if is_failure(outputs[-1], call):
                break
        is_stateful = before.is_changed()
        known = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        trained = frozenset(known[key] for key in reached if key in known)
        strangers = tuple(leaf for key, leaf in reached.items() if key not in known)
    return Behaviour(tuple(calls), tuple(outputs), counts, trained, strangers, is_stateful)


@contextmanager
def _aside(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in a mode, without autocast, and nothing of what it does left behind."""
    mode = model.training
    with random_state_kept(), state_kept(model), _plain_torch():
        try:
            model.train(training)
            yield
        finally:
            model.train(mode)  # a train() of its own may have merged weights


@contextmanager
def _plain_torch() -> Iterator[None]:
    """Neither inference mode nor autocast, whatever stands around; no call warns of anything."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _called(
    model: nn.Module, batch: Batch, call: TrialCall, reached: dict[int, Tensor] | None
) -> dict[str, Any] | str:
    """The leaves of what one call returned, or what it raised."""
    try:
        with torch.set_grad_enabled(call.with_grad), _nothing_saved():
            value = model(*batch, **dict(call.flags))
        if reached is not None:
            reached.update(_leaves_behind(tensors(value)))
        return flat(value)
    except Exception as error:  # a forward is the user's code: anything may come out of it
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def flat(value: Any) -> dict[str, Any]:
    """The leaves of a nested value by name, also those in objects of the user's; copied."""
    found: dict[str, Any] = {}
    try:
        named = named_leaves(value)
    except ReparamError:  # two leaves of one name
        named = {str(number): tensor for number, tensor in enumerate(tensors(value))}
    for name, leaf in named.items():
        if isinstance(leaf, Tensor):
            found[name] = leaf.detach().clone()
            continue
        inside = list(tensors(leaf))
        found.update({f"{name}.{i}": tensor.detach().clone() for i, tensor in enumerate(inside)})
        if not inside:
            found[name] = leaf
    return found


def _leaves_behind(outputs: Iterable[Tensor]) -> dict[int, Tensor]:
    """The tensors that a backward pass from the outputs would give a gradient, by their ids."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    open_ends = [output.grad_fn for output in outputs if output.grad_fn is not None]
    while open_ends:
        node = open_ends.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found[id(leaf)] = leaf
        open_ends += [further for further, _ in node.next_functions if further is not None]
    return found


@contextmanager
def _nothing_saved() -> Iterator[None]:
    """Graphs keep no feature maps inside: they are followed and never run backward."""

    def unpack(nothing: None) -> Tensor:
        raise RuntimeError("the forward asks for gradients itself")

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, unpack):
        yield


class _Counter(Watching):
    """A hook that counts how often a module runs."""

    __slots__ = ("counts", "path")

    def __init__(self, counts: dict[str, int], path: str) -> None:
        self.counts, self.path = counts, path

    def __call__(self, *_: Any) -> None:
        self.counts[self.path] += 1


@contextmanager
def _counting(model: nn.Module, watched: Iterable[str], counts: dict[str, int]) -> Iterator[None]:
    """How often the modules at these paths run, into `counts`; paths that are not there are not."""
    modules = dict(model.named_modules(remove_duplicate=False))
    handles = []

    for path in watched:
        module = modules.get(path)
        if module is not None and not isinstance(module, torch.jit.ScriptModule):
            counts[path] = 0
            handles.append(module.register_forward_pre_hook(_Counter(counts, path)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _placed(batch: Batch, dtype: torch.dtype | None) -> Batch:
    def place(tensor: Tensor) -> Tensor:
        wanted = dtype if dtype and tensor.is_floating_point() else tensor.dtype
        return tensor.detach().to(wanted, copy=True)  # a model may begin with a layer in place

    placed: Batch = map_tensors(batch, place)
    return placed
