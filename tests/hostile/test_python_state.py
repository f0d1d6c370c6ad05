"""Forwards that read or write more than their inputs: modes, counters, caches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from torch.jit import is_tracing

from tests.hostile.forms import SIZE, Branches, Form, Pair, images
from tests.hostile.judging import exact_or_refused


class GradientMode(Pair):
    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return F.relu(self.norm(y)) if torch.is_grad_enabled() else F.relu(y)


class InferenceMode(Pair):
    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return y if torch.is_inference_mode_enabled() else self.norm(y)


class Autocast(Pair):
    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return y * 2 if torch.is_autocast_enabled("cpu") else self.norm(y)


class DefaultType(Pair):
    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return self.norm(y) if torch.get_default_dtype() == torch.float32 else y


def asking(asks: Callable[[], bool], *, is_raw: bool = True) -> Callable[[], nn.Module]:
    """Leaves the norm out, or goes on alike, where the process answers yes."""

    class Asking(Pair):
        def forward(self, x: Any) -> Any:
            y = self.conv(x)
            if asks():
                return y if is_raw else F.relu(self.norm(y))
            return self.norm(y)

    return Asking


class AsksBetweenBranches(Branches):
    """Its forward is written anew, from the graph of one way."""

    def forward(self, x: Any) -> Any:
        y = self.large(x) + self.small(x)
        return self.norm(y) * (2 if torch.are_deterministic_algorithms_enabled() else 1)


class TracedOtherwise(Pair):
    """Asks torch.jit.trace's own question, by a name of its own, in a function of its own."""

    def forward(self, x: Any) -> Any:
        return self.conv(x) if is_exported() else self.norm(self.conv(x))


def is_exported() -> bool:
    return is_tracing() or torch.compiler.is_exporting()


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def by_jit(model: nn.Module) -> Any:
    return torch.jit.trace(model, (images(),), check_trace=False)(images())


def by_export(model: nn.Module) -> Any:
    return torch.export.export(model, (images(),)).module()(images())


class SetsTraining(Pair):
    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        self.training = not self.training
        return self.norm(y) if self.training else y


class Counter(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Any) -> Any:
        self.calls += 1
        y = self.conv(x)
        return self.norm(y) if self.calls % 2 else y


class CountedInList(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Any) -> Any:
        self.seen.append(1)
        y = self.conv(x)
        return self.norm(y) if len(self.seen) % 2 else y


class CountedInObject(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.state = SimpleNamespace(calls=0)

    def forward(self, x: Any) -> Any:
        self.state.calls += 1
        y = self.conv(x)
        return self.norm(y) if self.state.calls % 2 else y


class CountedOnClass(Pair):
    calls: ClassVar[int] = 0

    def forward(self, x: Any) -> Any:
        type(self).calls += 1
        y = self.conv(x)
        return self.norm(y) if type(self).calls % 2 else y


CALLS = 0


class CountedInWorld(Pair):
    def forward(self, x: Any) -> Any:
        global CALLS
        CALLS += 1
        y = self.conv(x)
        return self.norm(y) if CALLS % 2 else y


def start_counting() -> None:
    global CALLS
    CALLS = CountedOnClass.calls = 0


class CountedInBuffer(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Any) -> Any:
        self.calls += 1
        y = self.conv(x)
        return torch.where(self.calls % 2 == 1, self.norm(y), y)


class CountedByClosure(Pair):
    def __init__(self) -> None:
        super().__init__()
        calls = 0

        def count() -> int:
            nonlocal calls
            calls += 1
            return calls

        self.count = count

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        return self.norm(y) * (1.0 if self.count() else 2.0)


class Cached(Pair):
    """What the first call found is given by the later ones too."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Any = None

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        if self.scale is None:
            self.scale = y.detach().std()
            return self.norm(y)
        return y / self.scale


class Memory(Pair):
    """Adds what the last call gave."""

    def __init__(self) -> None:
        super().__init__()
        self.last: Any = 0.0

    def forward(self, x: Any) -> Any:
        y = self.conv(x) + self.last
        self.last = y.detach()
        return self.norm(y)


class PlainTensor(Pair):
    """A tensor that is no buffer is written to."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.ones(1, SIZE, 1, 1, dtype=torch.float64)

    def forward(self, x: Any) -> Any:
        self.factor.mul_(1.5)
        return self.norm(self.conv(x) * self.factor)


class Buffer(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, SIZE, 1, 1))

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        self.mean = 0.5 * self.mean + 0.5 * y.detach().mean((0, 2, 3), keepdim=True)
        return self.norm(y - self.mean)


class Shared:
    """What modules of one net tell one another."""

    def __init__(self) -> None:
        self.raw, self.maps = False, []


class Talking(nn.Module):
    """The first conv's child says whether the norm is run."""

    class Writer(Pair):
        def __init__(self, shared: Shared) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x: Any) -> Any:
            y = super().forward(x)
            self.shared.raw = not self.shared.raw
            return y

    class Reader(Writer):
        def forward(self, x: Any) -> Any:
            y = self.conv(x)
            return y if self.shared.raw else self.norm(y)

    def __init__(self) -> None:
        super().__init__()
        shared = Shared()
        self.first, self.second = self.Writer(shared), self.Reader(shared)

    def forward(self, x: Any) -> Any:
        return self.second(self.first(x))


class Leaving(nn.Module):
    """A child leaves its conv's map in an object, from where the parent takes it."""

    class Leaver(Pair):
        def __init__(self, shared: Shared) -> None:
            super().__init__()
            self.shared = shared

        def forward(self, x: Any) -> Any:
            y = self.conv(x)
            self.shared.maps.append(y)
            return self.norm(y)

    def __init__(self) -> None:
        super().__init__()
        self.shared = Shared()
        self.child = self.Leaver(self.shared)

    def forward(self, x: Any) -> Any:
        return self.child(x), self.shared.maps.pop()


class Elsewhere(nn.Module):
    """A counter that steers nothing, far from the layers that fold."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Any) -> Any:
            self.calls += 1
            return F.relu(x)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.counting, self.second = Pair(), self.Counting(), Pair()

    def forward(self, x: Any) -> Any:
        return self.second(self.counting(self.first(x)))


class TrainingFlag(Pair):
    def forward(self, x: Any) -> Any:
        y = self.norm(self.conv(x))
        return y if self.training else F.relu(y)


def half() -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def modes(*contexts: Any, of: torch.dtype = torch.float64) -> tuple[Any, ...]:
    def within(context: Any) -> Any:
        def call(model: nn.Module) -> Any:
            with context():
                return model(images().to(of))

        return call

    return tuple(map(within, (contextlib.nullcontext, *contexts, contextlib.nullcontext)))


FORMS = {
    "gradient mode": Form(GradientMode),
    "inference mode": Form(InferenceMode, calls=modes(torch.inference_mode)),
    "default type": Form(DefaultType),
    "autocast": Form(
        Autocast, inputs=images().float(), calls=modes(half, of=torch.float32), double=False
    ),
    "deterministic": Form(
        asking(torch.are_deterministic_algorithms_enabled), calls=modes(deterministic)
    ),
    "deterministic, written anew": Form(AsksBetweenBranches, calls=modes(deterministic)),
    "anomalies": Form(asking(torch.is_anomaly_enabled), calls=modes(torch.autograd.detect_anomaly)),
    "jit.is_tracing": Form(TracedOtherwise, calls=(lambda m: m(images()), by_jit)),
    "compiler.is_exporting": Form(
        asking(torch.compiler.is_exporting), calls=(lambda m: m(images()), by_export)
    ),
    "is_tracing, and goes on alike": Form(
        asking(torch.jit.is_tracing, is_raw=False),
        calls=(lambda m: m(images()), by_jit),
        norms=0,
        blocks=1,
    ),
    "sets its training": Form(SetsTraining),
    "counter": Form(Counter),
    "counted in a list": Form(CountedInList),
    "counted in an object": Form(CountedInObject),
    "counted on the class": Form(CountedOnClass, before=start_counting),
    "counted in the world": Form(CountedInWorld, before=start_counting),
    "counted in a buffer": Form(CountedInBuffer),
    "counted in a closure": Form(CountedByClosure),
    "cached": Form(Cached),
    "memory": Form(Memory),
    "plain tensor": Form(PlainTensor),
    "buffer set": Form(Buffer),
    "modules that talk": Form(Talking),
    "a map that is left": Form(Leaving),
    "counter elsewhere": Form(Elsewhere, norms=0, blocks=2),
    "training": Form(TrainingFlag, norms=0, blocks=1),
}
test_exact_or_refused = exact_or_refused(FORMS)
