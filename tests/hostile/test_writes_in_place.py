"""Writes in place that change what a conv, a norm or a branch reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tests.hostile.forms import SIZE, Branches, Form
from tests.hostile.judging import exact_or_refused


def form(run: Callable[[Any, Any], Any], *, trains: bool = False) -> Form:
    class Written(Branches):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("store", torch.zeros(SIZE, SIZE, SIZE, SIZE))

        def forward(self, x: Any) -> Any:
            return run(self, x.clone())

    return Form(Written, trains=trains)


def writes(write: Callable[[Any, Any], Any], *, trains: bool = False) -> Form:
    """Something is written between the two branches' reading of x."""

    def run(m: Any, x: Any) -> Any:
        y = m.large(x)
        write(x, y)
        return m.norm(y + m.small(x))

    return form(run, trains=trains)


def behind(write: Callable[[Any], Any], *, trains: bool = True) -> Form:
    """Something is written to the conv's map before the norm reads it."""

    def run(m: Any, x: Any) -> Any:
        y = m.large(x)
        write(y)
        return m.norm(y)

    return form(run, trains=trains)


def data_set(y: Any) -> None:
    y.data = y.data.clamp(max=0.5)


def detached(y: Any) -> None:
    with torch.no_grad():
        y.detach().clamp_(max=0.5)


def by_set(y: Any) -> None:
    y.set_(y.detach() * 2)


def later(m: Any, x: Any) -> Any:
    """The map is written to when the norm has read it already, and is returned."""
    y = m.large(x)
    z = m.norm(y)
    return z, y.detach().mul_(0.5)


def returned_view(m: Any, x: Any) -> Any:
    y = m.large(x)
    view = y.detach()[:, :4]
    z = m.norm(y)
    return z, view


def shared_memory(m: Any, x: Any) -> Any:
    flat = x.view(SIZE, -1)
    y = m.large(x)
    flat.zero_()
    return m.norm(y + m.small(x))


def expanded(m: Any, x: Any) -> Any:
    view = x[:, :1].expand(-1, SIZE, -1, -1)
    y = m.large(view)
    x.mul_(2)
    return m.norm(y + m.small(view))


def out_given(m: Any, x: Any) -> Any:
    y = m.large(x)
    torch.mul(x.detach(), 2, out=m.store)
    return m.norm(y + m.small(m.store))


def halves(m: Any, x: Any) -> Any:
    y = m.large(x)
    first, second = y[:, :4], y[:, 4:]
    first = first + 0 * second
    second.detach().relu_()
    return m.norm(torch.cat([first, second], 1))


def mask_in_place(m: Any, x: Any) -> Any:
    y = m.large(x)
    mask = seen = y.detach() > 0
    seen &= x > 0
    return m.norm(y + m.small(x)) * mask


def shifted_in_place(m: Any, x: Any) -> Any:
    y = m.large(x)
    factor = seen = (y.detach() > 0).long()
    seen <<= 1
    return m.norm(y + m.small(x)) * factor


FORMS = {
    "a mask by &=": form(mask_in_place),
    "an integer by <<=": form(shifted_in_place),
    "einsum of the input": writes(lambda x, y: torch.einsum("nchw->nwhc", x).relu_()),
    "relu_ of the input": writes(lambda x, y: x.relu_()),
    "F.relu in place": writes(lambda x, y: F.relu(x, inplace=True)),
    "relu_ of a view": writes(lambda x, y: x.view(SIZE, -1).relu_()),
    "relu_ of a permuted view": writes(lambda x, y: x.permute(0, 2, 3, 1)[..., :4].relu_()),
    "add_ between": writes(lambda x, y: x.add_(y.detach())),
    "an index set": writes(lambda x, y: x.__setitem__((slice(None), 0), 0.0)),
    "out= by name": writes(lambda x, y: torch.clamp(x, max=0.1, out=x)),
    "index_add_": writes(lambda x, y: x.index_add_(1, torch.tensor([0]), x[:, :1].clone())),
    ".data of the input": writes(lambda x, y: x.data.mul_(2), trains=True),
    "set .data of the input": writes(lambda x, y: data_set(x), trains=True),
    "detach of the input": writes(lambda x, y: x.detach().mul_(2)),
    "untyped storage": writes(lambda x, y: x.untyped_storage().fill_(0), trains=True),
    "numpy memory": writes(lambda x, y: x.detach().numpy().fill(0.5), trains=True),
    "set .data of the map": behind(data_set),
    "detached map": behind(detached),
    "clamp_ of the map": behind(lambda y: y.clamp_(max=0.5)),
    "relu_ of a view of the map": behind(lambda y: y.view(-1).relu_()),
    "sort_ of channels": behind(lambda y: y.copy_(y.detach().clone().flip(1))),
    "set_": behind(by_set, trains=False),
    "transpose_ of channels": behind(lambda y: y.transpose_(1, 2)),
    "after the norm": form(later),
    "a view that is returned": form(returned_view, trains=True),
    "shared memory": form(shared_memory),
    "expanded": form(expanded),
    "out= a buffer": form(out_given, trains=True),
    "two halves": form(halves),
}

test_exact_or_refused = exact_or_refused(FORMS)
