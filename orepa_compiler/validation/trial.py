"""Runs a rewrite beside the model, and takes back what does not agree.

In float64, on copies of both, each batch is given with and without gradients, twice where a call
leaves something behind. Rounding the new weights is no fault: where it shows, the rewrite is made
once more in float64, and judged there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from orepa_compiler.capture.effects.randomness import RandomState
from orepa_compiler.capture.effects.remembering import Remembered
from orepa_compiler.capture.skeleton import value_copy
from orepa_compiler.errors import ReparamError
from orepa_compiler.planning import Edit, Plan
from orepa_compiler.validation.agreement import (
    Disagreement,
    Origin,
    largest_error,
    output_difference,
    stale_modules,
    training_difference,
)
from orepa_compiler.validation.behaviour import Behaviour, TrialCall, behaviour, evaluation_calls
from orepa_compiler.validation.blame import (
    blamed_edits,
    kept_by,
    narrowed,
    outputs_by_module,
    place_of,
    suspects,
)
from orepa_compiler.validation.precision import (
    EXACT,
    exactly,
    fits_in_float64,
    nudged,
    rounding_limit,
)
from orepa_compiler.validation.state import state_of
from orepa_compiler.verification.evaluation import Batch
from orepa_compiler.verification.nesting import describe_argument
from orepa_compiler.verification.outputs.rounding import (
    MAX_TOLERANCE,
    NOISE_FACTOR,
)

# What a module's own way to collapse may change: some cast to float32 themselves (passes/adopt).
ADOPTED = 1e-5

# How often a plan is made anew because the one before it did not agree, before all is taken back.
ROUNDS = 8

# How many rewrites are tried at most to find which edits are to blame; 60 edits take 6 of them.
MOST_TRIALS = 40

DISAGREES = "its rewrite did not agree with it on the inputs"

Kept = Mapping[str, str]
# (the model to rewrite in place, what is kept, the batches) -> the rewritten model and its plan
Make = Callable[[nn.Module, Kept, list[Batch]], tuple[nn.Module, Plan]]


@dataclass(frozen=True)
class Wanted:
    """What has to hold: outputs in eval mode are equal; in train mode, the same is trained."""

    outputs: bool = True
    training: bool = False


def tried(
    model: nn.Module,
    make: Make,
    copied: Callable[[nn.Module], nn.Module],
    batches: list[Batch],
    *,
    wanted: Wanted,
    inplace: bool,
) -> tuple[nn.Module, Plan]:
    """What `make` makes of the model, with what did not agree left alone; its plan says so.

    copied: makes the copy that is rewritten, where the model itself is not.
    Raises ReparamError where the model does not run on the inputs, or nothing that was left helps.
    """
    trial = _Trial(model, make, copied, batches, wanted, inplace)
    return trial.run()


@dataclass(frozen=True)
class _Record:
    """What a model did in eval and in train mode; None where that is not asked for."""

    evaluated: Behaviour
    trained: Behaviour | None


@dataclass(frozen=True)
class _Attempt:
    """What was made, where it does not agree (None: it does), and the form that shows it best."""

    made: nn.Module
    plan: Plan
    found: Disagreement | None
    shown_by: nn.Module


class _Trial:
    def __init__(
        self,
        model: nn.Module,
        make: Make,
        copied: Callable[[nn.Module], nn.Module],
        batches: list[Batch],
        wanted: Wanted,
        inplace: bool,
    ) -> None:
        self.model, self.make, self.copied = model, make, copied
        self.batches, self.wanted, self.inplace = batches, wanted, inplace
        self.origin = Origin.of(model)
        self.random = RandomState()
        self.is_exact = not inplace and fits_in_float64(model)
        self.rounds, self.trials = 1, 0
        self.stock = self._stock()
        self.limit = rounding_limit(model)

    def run(self) -> tuple[nn.Module, Plan]:
        """The first attempt that agrees; each keeps what the ones before it found wrong."""
        kept: dict[str, str] = {}
        worst: Disagreement | None = None
        for number in range(ROUNDS + 1):
            before = state_of(self.model) if self.inplace else None
            attempt = self._attempt(kept, before)
            if attempt.found is None:
                return attempt.made, replace(attempt.plan, checked=self._checked())
            worst = worst or attempt.found
            is_last = number == ROUNDS - 1
            edits, reason = self._blamed(attempt, before, is_last=is_last)
            if number == 0 and (why := self._unsteady()):
                made, plan = self._made({}, before)
                return made, replace(plan, checked=f"not checked: {why}")
            if not is_last:
                edits = self._narrowed(edits, attempt.plan.edits, kept, before)
            blamed = kept_by(edits, reason)
            if not blamed.keys() - kept.keys():
                break
            kept |= blamed
        assert worst is not None
        raise ReparamError(
            f"the rewritten model does not do what the model does on the inputs: {worst.text}"
        )

    def _narrowed(
        self,
        blamed: tuple[Edit, ...],
        edits: tuple[Edit, ...],
        kept: Kept,
        before: Remembered | None,
    ) -> tuple[Edit, ...]:

        def agrees_with(some: tuple[Edit, ...]) -> bool:
            others = kept_by(tuple(edit for edit in edits if edit not in some), DISAGREES)
            for path in kept_by(some, ""):
                others.pop(path, None)
            attempt = self._attempt({**kept, **others}, before)
            if before is not None:
                before.put_back()
            return attempt.found is None

        return narrowed(blamed, edits, agrees_with, lambda: self.trials < MOST_TRIALS)

    def _attempt(self, kept: Kept, before: Remembered | None) -> _Attempt:
        self.trials += 1
        made, plan = self._made(kept, before)
        after = RandomState()
        found, shown_by = self._judged(made, plan, kept)
        after.put_back()
        return _Attempt(made, plan, found, shown_by)

    def _made(self, kept: Kept, before: Remembered | None) -> tuple[nn.Module, Plan]:
        self.random.put_back()
        target = self.model if self.inplace else self.copied(self.model)
        try:
            return self.make(target, kept, self.batches)
        except BaseException:
            if before is not None:
                before.put_back()
            raise

    def _judged(
        self, made: nn.Module, plan: Plan, kept: Kept
    ) -> tuple[Disagreement | None, nn.Module]:
        """Where it does not agree, and the model that shows it."""
        places = tuple(dict.fromkeys(map(place_of, plan.edits)))
        record, found, shown_by = self._record(made), None, made
        before, after = self.stock.evaluated, record.evaluated
        if self.wanted.outputs:
            found = output_difference(before, after, tolerance=self.limit)
            if found is not None and self.is_exact:
                found, shown_by = self._judged_exactly(found, made, plan, kept)
        found = found or stale_modules(before, after, places)
        if found is None and self.stock.trained and record.trained:
            before, after = self.stock.trained, record.trained
            found = stale_modules(before, after, places) or training_difference(
                before, after, self.origin, made
            )
        return found, shown_by

    def _judged_exactly(
        self, found: Disagreement, made: nn.Module, plan: Plan, kept: Kept
    ) -> tuple[Disagreement | None, nn.Module]:
        """The verdict on the rewrite made once more in float64, whose weights are not rounded."""
        stock = self.stock.evaluated
        if found.error == float("inf"):  # what runs for a module that is gone is not cast with it
            own = self._in_own_precision(made, plan)
            if own is not None:
                return own, made
        self.random.put_back()
        exact, _ = self.make(value_copy(self.model).double(), kept, exactly(self.batches))
        is_adopted = any(edit.done_by == "adopt" for edit in plan.edits)
        limit = ADOPTED if is_adopted else EXACT
        again = output_difference(stock, self._evaluated(exact), tolerance=limit)
        if again is None and found.error != float("inf"):
            return None, exact
        if again is not None and again.error is not None and again.error <= self._noise():
            return None, exact  # the model computes in a lower precision inside
        return again or found, exact

    def _in_own_precision(self, made: nn.Module, plan: Plan) -> Disagreement | None:
        """Modules that no longer run, or tensors that are no parameters: they are not cast."""
        stock, places = self.stock, [place_of(edit) for edit in plan.edits]
        own = self._behaviour(value_copy(made), list(stock.evaluated.calls), dtype=None)
        if stale := stale_modules(stock.evaluated, own, places):
            return stale
        if stock.trained is None:
            return None
        calls = list(stock.trained.calls)
        own = self._behaviour(value_copy(made), calls, training=True, dtype=None)
        return training_difference(stock.trained, own, self.origin, made)

    def _noise(self) -> float:
        """How far the model's own outputs move where its weights move by half an eps."""
        moved = nudged(self.model)
        pairs = zip(self.stock.evaluated.outputs, self._evaluated(moved).outputs, strict=False)
        errors = [
            largest_error(a, b)[0] for a, b in pairs if isinstance(a, dict) and isinstance(b, dict)
        ]
        return min(NOISE_FACTOR * max(errors, default=0.0), MAX_TOLERANCE)

    def _unsteady(self) -> str:
        """Why nothing can be told from the outputs of this model; "" where it can."""
        again = self._evaluated(self.model)
        different = output_difference(self.stock.evaluated, again, tolerance=self.limit)
        if different is None:
            return ""
        return (
            f"the model differs from itself on the same inputs and random numbers "
            f"({different.text})"
        )

    def _blamed(
        self, attempt: _Attempt, before: Remembered | None, *, is_last: bool
    ) -> tuple[tuple[Edit, ...], str]:
        """The edits to blame, and why they are taken back. The model is again what it was."""
        found, edits = attempt.found, attempt.plan.edits
        assert found is not None
        suspicion = None
        if found.call is not None and not found.places:
            calls = list(self.stock.evaluated.calls[: found.call + 1])
            theirs = outputs_by_module(
                self._runnable(attempt.shown_by), self.batches, calls, self.dtype
            )
        if before is not None:
            before.put_back()
        if found.call is not None and not found.places:
            ours = outputs_by_module(self._runnable(self.model), self.batches, calls, self.dtype)
            limit = EXACT if self.is_exact else self.limit
            suspicion = suspects(ours, theirs, edits, tolerance=limit)
        blamed, reason = blamed_edits(found, suspicion, edits)
        if not blamed or is_last:
            blamed, reason = edits, f"{DISAGREES}: {found.text}"
        return blamed, reason

    def _stock(self) -> _Record:
        record = self._record(self.model)
        if record.evaluated.raised and self.is_exact:  # it may not run in float64
            self.is_exact = False
            record = self._record(self.model)
        if record.evaluated.raised:
            number = record.evaluated.calls[len(record.evaluated.outputs) - 1].batch
            shapes = ", ".join(describe_argument(argument) for argument in self.batches[number])
            raise ReparamError(
                f"the model raised at batch {number}, inputs {shapes}: {record.evaluated.raised}; "
                "give inputs= that it takes"
            )
        return record

    def _record(self, model: nn.Module) -> _Record:
        runnable = self._runnable(model)
        evaluated = self._evaluated(model, runnable)
        if not self.wanted.training:
            return _Record(evaluated, None)
        calls = [TrialCall(number, True) for number, _ in enumerate(self.batches)]
        trained = self._behaviour(runnable, calls, training=True, dtype=self.dtype)
        return _Record(evaluated, trained)

    def _evaluated(self, model: nn.Module, runnable: nn.Module | None = None) -> Behaviour:
        runnable = runnable or self._runnable(model)
        calls = evaluation_calls(self.model, self.batches, rounds=self.rounds)
        found = self._behaviour(runnable, calls, dtype=self.dtype)
        if found.is_stateful and self.rounds == 1 and model is self.model:
            self.rounds = 2
            return self._evaluated(model, runnable)
        return found

    def _behaviour(
        self,
        runnable: nn.Module,
        calls: list[TrialCall],
        *,
        dtype: torch.dtype | None,
        training: bool = False,
    ) -> Behaviour:
        paths = [path for path, _ in runnable.named_modules(remove_duplicate=False)]
        return behaviour(
            runnable, self.batches, calls, training=training, dtype=dtype, watched=paths
        )

    @property
    def dtype(self) -> torch.dtype | None:
        return torch.float64 if self.is_exact else None

    def _runnable(self, model: nn.Module) -> nn.Module:
        """What is run in a model's stead: a copy, in float64; in place, the model itself."""
        if self.inplace:
            return model
        return value_copy(model).double() if self.is_exact else value_copy(model)

    def _checked(self) -> str:
        count = len(self.batches)
        text = f"checked on {count} batch{'es' if count != 1 else ''}"
        if self.stock.trained is None or not self.stock.trained.raised:
            return text
        return f"{text}, not in train mode: there the model raised {self.stock.trained.raised}"
