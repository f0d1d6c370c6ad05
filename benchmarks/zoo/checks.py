"""The checks on one model: expanded, trained a step, collapsed, and put back into the stock net."""

from __future__ import annotations

import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from benchmarks.zoo.comparing import relative_error
from benchmarks.zoo.counting import convs_of, normalised, watching_norms
from benchmarks.zoo.inputs import Instance, observe
from benchmarks.zoo.training import NotFinite, train_step
from orepa_compiler.blocks import ConvBlock
from orepa_compiler.verification.nesting import is_finite

CHECKS = ("preserve", "step", "collapse", "stock")
# Relative to the largest output: what float32 keeps through a deep net, and float64.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
_LEAST_CHANGE = 1e-5  # of the output, by the step


@dataclass(frozen=True)
class Asked:
    """How the library is called. with_inputs: give it inputs, for a forward that does not trace."""

    where: str | None = None
    with_inputs: bool = False


@dataclass(frozen=True)
class Check:
    """outcome: pass, fail, refused (the library says why it will not), error, or not run."""

    outcome: str = "not run"
    error: float | None = None
    message: str = ""


@dataclass
class Findings:
    """What was seen in one run over the checks, in one precision."""

    checks: dict[str, Check] = field(default_factory=lambda: dict.fromkeys(CHECKS, Check()))
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_only_imprecise(self) -> bool:
        """Whether every check ran, and those that failed gave numbers: float64 will tell why."""
        failed = [check for check in self.checks.values() if check.outcome == "fail"]
        ran = all(c.outcome in ("pass", "fail", "refused") for c in self.checks.values())
        return ran and bool(failed) and all(check.error is not None for check in failed)

    def as_row(self) -> dict[str, Any]:
        return {"checks": {name: asdict(check) for name, check in self.checks.items()},
                "seconds": self.seconds, **self.facts}  # fmt: skip


def run_checks(
    instance: Instance,
    given: list[nn.Module],
    expected: list[Tensor],
    *,
    asked: Asked,
    dtype: torch.dtype,
) -> Findings:
    """The four checks on the one model in `given`, whose outputs are `expected`.

    It is taken out of the list and freed: its memory is wanted for the gradients.
    """
    run = _Run(instance, dtype, asked, Findings())
    expanded = run.preserve(given, expected)
    if expanded is None:
        return run.findings
    trained = run.step(expanded)
    if trained is not None:
        run.collapse(expanded, trained)
        run.stock(expanded, trained)
    return run.findings


@dataclass
class _Run:
    instance: Instance
    dtype: torch.dtype
    asked: Asked
    findings: Findings

    def preserve(self, given: list[nn.Module], expected: list[Tensor]) -> nn.Module | None:
        """expand(init="preserve") computes what the model did."""
        expanded: list[nn.Module] = []
        with self._check("preserve") as conclude:
            with self._timed("expand"):
                made = orepa.expand(given.pop(), where=self.asked.where, **self._inputs())
                expanded.append(made.eval())
                del made
            blocks = sum(isinstance(m, ConvBlock) for m in expanded[0].modules())
            self.findings.facts["blocks"] = blocks
            conclude(relative_error(self._outputs(expanded[0]), expected))
        return expanded[0] if expanded else None

    def step(self, expanded: nn.Module) -> list[Tensor] | None:
        """One step of SGD in train mode changes the output, and all stays finite."""
        trained: list[list[Tensor]] = []
        with self._check("step") as conclude:
            before = self._outputs(expanded)
            idle = train_step(expanded, self.instance, self.dtype)
            self.findings.facts["blocks_without_gradient"] = idle
            outputs = self._outputs(expanded)
            if not is_finite(outputs):
                raise NotFinite("the outputs are not finite after the step")
            change = relative_error(outputs, before)
            if change < _LEAST_CHANGE:
                raise NotFinite(f"the step changed the outputs by {change:.1e} only")
            self.findings.facts["step_change"] = change
            conclude(0.0)
            trained.append(outputs)
        return trained[0] if trained else None

    def collapse(self, expanded: nn.Module, trained: list[Tensor]) -> None:
        """collapse computes what the expanded model does in eval mode."""
        with self._check("collapse") as conclude:
            with self._timed("collapse"):
                deploy = orepa.collapse(expanded, **self._inputs())
            with watching_norms(deploy) as norms:
                found = self._outputs(deploy)
            plan = orepa.recorded_plans(deploy)[-1]
            why = {refusal.path: normalised(refusal.reason) for refusal in plan.refusals}
            self.findings.facts |= {
                "convs_after": len(convs_of(deploy).all),
                "norms_after": norms.total,
                "norms_behind_conv_after": {
                    path: why.get(path, "no reason given") for path in sorted(norms.behind)
                },
                "norm_reasons": dict(Counter(why.values())),
            }
            conclude(relative_error(found, trained))

    def stock(self, expanded: nn.Module, trained: list[Tensor]) -> None:
        """collapse(fold_norm=False) loads strictly into a fresh stock model, which computes it."""
        with self._check("stock") as conclude:
            try:
                kept = orepa.collapse(expanded, fold_norm=False, **self._inputs())
            except orepa.ReparamError as refusal:
                text = normalised(str(refusal).split(": ", 1)[-1])
                self.findings.checks["stock"] = Check("refused", None, text)
                return
            fresh = self.instance.stock().to(self.dtype)
            fresh.load_state_dict(kept.state_dict(), strict=True)
            del kept
            conclude(relative_error(self._outputs(fresh), trained))

    def _inputs(self) -> dict[str, Any]:
        return {"inputs": self.instance.inputs(self.dtype)} if self.asked.with_inputs else {}

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        model.eval()
        return observe(model, self.instance.inputs(self.dtype))

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.findings.seconds[name] = round(time.perf_counter() - start, 3)

    @contextmanager
    def _check(self, name: str) -> Iterator[Callable[[float], None]]:
        """What is raised inside is the check's outcome; it never ends the run."""
        start = time.perf_counter()

        def conclude(error: float) -> None:
            is_right = error <= TOLERANCE[self.dtype]
            self.findings.checks[name] = Check("pass" if is_right else "fail", error)

        try:
            yield conclude
        except NotFinite as problem:
            self.findings.checks[name] = Check("fail", None, str(problem))
        except Exception as problem:  # the library's, torch's or a model's: all belong in the row
            self.findings.checks[name] = Check("error", None, described(problem))
        self.findings.seconds[f"check {name}"] = round(time.perf_counter() - start, 2)


def described(problem: Exception) -> str:
    """The error, and where in the code it came from: the last lines of its traceback.

    Files are named from where Python imports them, for a record holds no path of a machine.
    """
    text = "".join(traceback.format_exception(problem))
    for root in sorted(filter(None, sys.path), key=len, reverse=True):
        text = text.replace(f'File "{root}/', 'File "')
    return text[-1500:]
