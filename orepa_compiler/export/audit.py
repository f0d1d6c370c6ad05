"""What half precision would do to a model's values, before anything is cast: named by torch module.

A value above the type's largest becomes inf. One below its smallest normal number has fewer digits,
down to none: a tensor is called subnormal where that costs more than the type's rounding does,

    rms(x - cast(x)) / rms(x)  >  eps
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from orepa_compiler.errors import ExportError
from orepa_compiler.export.audit_report import AuditRow, HalfAudit
from orepa_compiler.export.precision import PRECISIONS, kept_modules, lies_in
from orepa_compiler.verification.evaluation import batches_of, evaluation_mode

HALVES = ("fp16", "bf16")


def audit_half(
    model: nn.Module, inputs: Any, *, precision: str = "fp16", keep_fp32: str | Iterable[str] = ()
) -> HalfAudit:
    """What of a model overflows or goes subnormal in half precision; truthy when nothing does.

    The model runs on `inputs` (a tensor, a tuple of positional arguments, or a list of such
    batches) in eval mode and in its own precision; every operator's result counts for the module
    whose forward made it. keep_fp32: globs on module paths that stay in float32: inside them
    nothing counts but what leaves them.
    Raises ExportError for another precision, for a pattern that matches no module, and where there
    are no inputs.
    """
    if precision not in HALVES:
        raise ExportError(f"precision={precision!r} is not one of {', '.join(HALVES)}")
    dtype, batches = PRECISIONS[precision], batches_of(inputs)
    if not batches:
        raise ExportError("an audit of the activations needs inputs; the list of batches is empty")
    kept = kept_modules(model, keep_fp32)
    weights: dict[tuple[str, str], Tally] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        path, _, own = name.rpartition(".")
        if not lies_in(path, kept):
            _add(weights, (path, own), tensor, dtype)
    watch = _Watch(model, dtype, kept)
    with evaluation_mode(model), torch.no_grad(), watch.hooked():
        for batch in batches:
            _add(watch.values, ("", "input"), batch, dtype)
            arguments = pytree.tree_map(_copy, batch)
            with watch:
                model(*arguments)
    tallies = weights | watch.values
    rows = tuple(
        AuditRow(path, what, tally.largest, tally.subnormal, tally.loss, tally.problem(dtype))
        for (path, what), tally in tallies.items()
    )
    return HalfAudit(precision, rows, tuple(_to_keep(rows, watch.borders, dtype)), kept)


def _copy(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf


@dataclass
class Tally:
    """What was seen of a tensor, over all batches."""

    largest: float = 0.0
    count: int = 0
    small: int = 0
    error: float = 0.0
    power: float = 0.0

    def add(self, tensor: Tensor, dtype: torch.dtype) -> None:
        """Counts the finite values; what is not finite before the cast is no fault of the cast."""
        if not tensor.numel():
            return
        values, kind = tensor.detach().nan_to_num(0.0, 0.0, 0.0), torch.finfo(dtype)
        sizes = values.abs()
        self.largest = max(self.largest, sizes.max().item())
        self.count += int(sizes.count_nonzero())
        self.small += int(((sizes < kind.tiny) & (sizes > 0)).sum())
        inside = values.clamp(-kind.max, kind.max)
        self.error += (inside - inside.to(dtype)).norm(dtype=torch.float64).item() ** 2
        self.power += values.norm(dtype=torch.float64).item() ** 2

    @property
    def subnormal(self) -> float:
        """The share of the values other than 0 that lie below the smallest normal number."""
        return self.small / self.count if self.count else 0.0

    @property
    def loss(self) -> float:
        """rms(x - cast(x)) / rms(x), of what does not overflow."""
        return (self.error / self.power) ** 0.5 if self.power else 0.0

    def problem(self, dtype: torch.dtype) -> str:
        """overflow, subnormal, or nothing."""
        kind = torch.finfo(dtype)
        if self.largest > kind.max:
            return "overflow"
        return "subnormal" if self.small and self.loss > kind.eps else ""


def _add(tallies: dict[tuple[str, str], Tally], key: Any, value: Any, dtype: torch.dtype) -> None:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            tallies.setdefault(key, Tally()).add(leaf, dtype)


@dataclass
class _Watch(TorchDispatchMode):
    """Tallies of every operator's results, by the module whose forward runs.

    is_counting: the operators that run now are those of a tally itself.
    """

    model: nn.Module
    dtype: torch.dtype
    kept: Collection[str]
    values: dict[tuple[str, str], Tally] = field(default_factory=dict)
    borders: dict[tuple[str, str], Tally] = field(default_factory=dict)
    running: list[str] = field(default_factory=lambda: [""])
    is_counting: bool = False

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        path = self.running[-1]
        if not self.is_counting and not lies_in(path, self.kept):
            _add(self.values, (path, func.overloadpacket.__name__), result, self.dtype)
        return result

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Follows which module runs."""
        handles: list[Any] = []
        for path, module in self.model.named_modules():
            if path:
                handles.append(module.register_forward_pre_hook(self._enter(path)))
                handles.append(module.register_forward_hook(self._leave(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Any:
        def enter(module: nn.Module, inputs: Any) -> None:
            self.running.append(path)

        return enter

    def _leave(self, path: str) -> Any:
        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            self.running.pop()
            self.is_counting = True
            _add(self.borders, (path, "output"), output, self.dtype)
            if path in self.kept:
                _add(self.values, (path, "output"), output, self.dtype)
            self.is_counting = False

        return leave


def _to_keep(
    rows: Iterable[AuditRow], borders: dict[tuple[str, str], Tally], dtype: torch.dtype
) -> Iterator[str]:
    """For each problem the innermost module around it whose output the type can hold; once each.

    An empty path: there is none but the model itself.
    """
    found: set[str] = set()
    for row in rows:
        path = row.module
        # What leaves a module is cast again, so keeping it would not help where that overflows.
        while row.problem and path:
            border = borders.get((path, "output"))
            is_outside = row.what == "output" and path == row.module
            if border is not None and not border.problem(dtype) and not is_outside:
                break
            path = path.rpartition(".")[0]
        if row.problem:
            found.add(path)
    yield from (path for path in sorted(found) if not lies_in(path.rpartition(".")[0], found))
