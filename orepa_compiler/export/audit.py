"""Finds what half precision would do to a model's values, before anything is cast.

A value above the type's largest becomes inf. One below its smallest normal number has fewer digits,
down to none: a tensor is called subnormal where that costs more than the type's rounding does,

    rms(x - cast(x)) / rms(x)  >  eps
"""

from __future__ import annotations

import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from orepa_compiler.errors import ExportError
from orepa_compiler.export.onnx.precision import PRECISIONS, kept_modules, lies_in
from orepa_compiler.verification.evaluation import batches_of, evaluation_mode

WIDTH = 120  # of the text that str() gives
MOST_ROWS = 30  # printed; to_dict() has them all
NEAREST = 3  # of the rows without a problem: the largest values


@dataclass(frozen=True)
class AuditRow:
    """One weight, or all results of one operator in one module's forward.

    what: the weight's name or the operator's. largest: the largest magnitude. subnormal: the share
    of values other than 0 below the smallest normal number. loss: the error of the cast relative to
    the values, both as root mean square. problem: overflow, subnormal, or "".
    """

    module: str
    what: str
    largest: float
    subnormal: float
    loss: float
    problem: str


@dataclass(frozen=True, repr=False)
class HalfAudit:
    """The verdict: truthy when nothing overflows or goes subnormal.

    keep: the modules to keep in float32 against what was found; an empty path where no module but
    the whole model would do. kept: those that were kept.
    """

    precision: str
    rows: tuple[AuditRow, ...]
    keep: tuple[str, ...]
    kept: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.rows) and not self.problems

    @property
    def problems(self) -> list[AuditRow]:
        return [row for row in self.rows if row.problem]

    @property
    def advice(self) -> str:
        """Says what to do, in one line."""
        if not self.problems:
            return "nothing overflows or goes subnormal"
        if "" in self.keep:
            other = "bf16 or fp32" if self.precision == "fp16" else "fp32"
            return f"no module's own output fits {self.precision}: export in {other}"
        return "keep in float32: " + " ".join(f"--keep-fp32 {path}" for path in self.keep)

    @property
    def verdict(self) -> str:
        """Says the result in one line."""
        if not self.problems:
            largest = max((row.largest for row in self.rows), default=0.0)
            return f"{self.precision}: {self.advice} (largest magnitude {largest:.4g})"
        kinds = [row.problem for row in self.problems]
        counts = [f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)]
        return f"{self.precision}: {', '.join(counts)}; {self.advice}"

    def __repr__(self) -> str:
        return f"<HalfAudit {self.verdict}>"

    def __str__(self) -> str:
        page = io.StringIO()
        Console(file=page, width=WIDTH, force_terminal=False, color_system=None).print(self)
        return "\n".join(line.rstrip() for line in page.getvalue().splitlines())

    def __rich__(self) -> Group:
        ranked = sorted(self.problems, key=lambda row: row.largest, reverse=True)
        fine = sorted((r for r in self.rows if not r.problem), key=lambda r: r.largest)
        shown = [*ranked[:MOST_ROWS], *fine[::-1][:NEAREST]]
        rest = len(self.rows) - len(shown)
        hidden = max(0, len(ranked) - MOST_ROWS)
        below = [Text(f"and {rest} more, {hidden} of them with a problem")] if rest else []
        return Group(Text(self.verdict), _table(shown), *below)

    def to_dict(self) -> dict[str, Any]:
        """Gives all of it as plain values that json.dumps takes."""
        return {
            "ok": bool(self),
            "verdict": self.verdict,
            "precision": self.precision,
            "keep": list(self.keep),
            "kept": list(self.kept),
            "rows": [asdict(row) for row in self.rows],
        }


def _table(rows: Sequence[AuditRow]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("module", "what"):
        table.add_column(name, overflow="fold")
    for name in ("largest", "subnormal", "loss"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        mark = Text(row.problem, style="red") if row.problem else Text("ok", style="green")
        where = Text(row.module or "(the model itself)")
        numbers = (f"{row.largest:.4g}", f"{row.subnormal:.2%}", f"{row.loss:.1e}")
        table.add_row(where, Text(row.what), *numbers, mark)
    return table


HALVES = ("fp16", "bf16")


def audit_half(
    model: nn.Module, inputs: Any, *, precision: str = "fp16", keep_fp32: str | Iterable[str] = ()
) -> HalfAudit:
    """Finds what overflows or goes subnormal in half precision; truthy when nothing does.

        print(orepa.audit_half(deploy, images, precision="fp16"))

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
        """Computes the share of values other than 0 that lie below the smallest normal number."""
        return self.small / self.count if self.count else 0.0

    @property
    def loss(self) -> float:
        """Computes rms(x - cast(x)) / rms(x), of what does not overflow."""
        return (self.error / self.power) ** 0.5 if self.power else 0.0

    def problem(self, dtype: torch.dtype) -> str:
        """Names what is wrong: overflow, subnormal, or nothing."""
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
    """Finds, for each problem, the innermost module around it whose output the type holds.

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
