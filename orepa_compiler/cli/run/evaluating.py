"""--evaluate: a function of the user's own tells how good each form of a model is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orepa_compiler.errors import ReparamError
from orepa_compiler.model_source import load_function
from orepa_compiler.progress import announced

# Of one form: what the function called it -> the number.
Scores = dict[str, float]


@dataclass(frozen=True)
class Evaluated:
    """What the user's function gave for a form of the model, in the order of the forms."""

    form: str
    scores: Scores

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.6g}" for name, value in self.scores.items())


class Evaluation:
    """The function, and what it gave so far. Each form is told by a call of its own."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.function: Callable[..., Any] = load_function(source)
        self.found: list[Evaluated] = []
        parameters = inspect.signature(self.function).parameters.values()
        needed = [p for p in parameters if p.default is p.empty]
        if len(needed) > 1:
            raise ReparamError(
                f"{source}: it is called with one argument, the model, and takes "
                f"{', '.join(p.name for p in needed)}"
            )

    def of(self, form: str, side: Callable[..., Any]) -> Evaluated:
        """What the function gives for one form, which is called as the model is.

        Raises ReparamError where it raises, or gives no numbers.
        """
        if isinstance(side, nn.Module):
            side.eval()
        with announced(f"evaluating the {form}"), torch.no_grad():
            try:
                given = self.function(side)
            except Exception as error:
                reason = " ".join(str(error).split())
                raise ReparamError(
                    f"{self.source}: raised {type(error).__name__} on the {form}: {reason}"
                ) from error
        evaluated = Evaluated(form, _numbers(self.source, given))
        self.found.append(evaluated)
        return evaluated


def _numbers(source: str, given: Any) -> Scores:
    named = given if isinstance(given, Mapping) else {"score": given}
    try:
        return {
            str(name): float(value.item() if isinstance(value, Tensor) else value)
            for name, value in named.items()
        }
    except (TypeError, ValueError, RuntimeError) as error:
        raise ReparamError(
            f"{source}: gave {type(given).__name__}; return a number, or a dict of numbers"
        ) from error
