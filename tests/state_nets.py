"""Nets of random stages with state: flags, counters, modes, lists, tied weights, children set.

Most stages are plain, so that the folds beside the stages with state are tried too.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZE = 8
C = SIZE


class Stage(nn.Module):
    """A conv and its norm, and a way to run them that reads or writes some state.

    world: an object that all stages of the net know. earlier: the stage before, whose layers this
    one may reach; kept in a list, so that it is no child.
    """

    def __init__(self, kind: str, random: Random, world: Any, earlier: list[Stage]) -> None:
        super().__init__()
        kernel = random.choice([1, 3])
        self.conv = nn.Conv2d(C, C, kernel, padding=kernel // 2, bias=random.random() < 0.5)
        self.side, self.norm = nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)
        self.kind, self.world, self.earlier, self.calls = kind, world, earlier[-1:], 0
        self.layers, self.named = [self.conv, [self.norm]], {"norm": self.norm}
        self.first_scale: Any = None
        self.register_buffer("mean", torch.zeros(1, C, 1, 1))
        self.factor = torch.ones(1, C, 1, 1, dtype=torch.float64)
        if kind == "tied parameter" and earlier:
            self.conv.weight = earlier[-1].conv.weight
            self.conv.padding = earlier[-1].conv.padding
        if kind in HOOKS:
            HOOKS[kind](self)

    def forward(self, x: Any, raw: bool = False, gain: Any = None, **options: Any) -> Any:
        return F.relu(RUNS[self.kind](self, x, raw, gain, options))


def plain(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    return s.norm(s.conv(x))


def branches(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    return s.norm(s.conv(x) + s.side(x))


def flag(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    y = s.conv(x)
    return y if raw else s.norm(y)


def optional(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    y = s.conv(x)
    return s.norm(y if gain is None else y * gain)


def keyword(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    y = s.conv(x)
    return s.norm(y) + s.side(x) if options.get("wide", True) else y


def counter(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    s.calls += 1
    y = s.conv(x)
    return s.norm(y) if s.calls % 2 else y


def idle_counter(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    s.calls += 1
    return s.norm(s.conv(x))


def world_written(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    s.world.calls += 1
    return s.norm(s.conv(x))


def world_read(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    y = s.conv(x)
    return s.norm(y) if s.world.calls % 2 else y


def map_left(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    y = s.conv(x)
    s.world.maps = [y.detach()]
    return s.norm(y)


def map_taken(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    y = s.conv(x)
    return s.norm(y + s.world.maps.pop() if s.world.maps else y)


def gradient_mode(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    y = s.conv(x)
    return s.norm(y) if torch.is_grad_enabled() else y


def no_gradients(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    with torch.no_grad():
        y = s.conv(x)
    return s.norm(y + s.side(x))


def from_list(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    return s.layers[1][0](s.layers[0](x))


def from_dict(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    return s.named["norm"](s.conv(x))


def tied(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    y = s.norm(s.conv(x))
    if not s.earlier:
        return y
    weight = s.earlier[0].conv.weight
    return y + F.conv_transpose2d(x, weight, padding=weight.shape[-1] // 2)


def earlier_norm(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    return (s.earlier[0].norm if s.earlier else s.norm)(s.conv(x))


def sets_eps(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    s.norm.eps = 0.3
    return s.norm(s.conv(x))


def sets_dilation(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    y = s.conv(x)
    s.side.padding, s.side.dilation = (1, 1), (2, 2)
    return s.norm(y + s.side(x)[..., 1:-1, 1:-1])


def batch_mode(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    mode = s.norm.training
    s.norm.train()
    y = s.norm(s.conv(x))
    s.norm.train(mode)
    return y


def buffer_set(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    y = s.conv(x)
    s.mean = 0.5 * s.mean + y.detach().mean((0, 2, 3), keepdim=True)
    return s.norm(y - s.mean)


def tensor_written(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    s.factor.mul_(1.25)
    return s.norm(s.conv(x) * s.factor)


def cached(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    y = s.conv(x)
    if s.first_scale is None:
        s.first_scale = float(y.detach().std())
        return s.norm(y)
    return y / s.first_scale


def weights_read(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    size = sum(p.detach().abs().mean() for p in s.conv.parameters())
    return s.norm(s.conv(x)) * size.double()


def data_set(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    s.conv.weight.data = s.conv.weight.data.clamp(-0.1, 0.1)
    return s.norm(s.conv(x))


def asks(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    y = s.conv(x)
    return y if hasattr(y, "mask") or type(y).__name__ == "Proxy" else s.norm(y)


def tries(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    y = s.conv(x)
    try:
        is_loud = float(y.detach().abs().max()) > 1e6
    except Exception:
        is_loud = True
    return y if is_loud else s.norm(y)


def training_read(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    y = s.norm(s.conv(x))
    return y + s.side(x) if s.training else s.side(x) + y


def kernel_twice(s: Any, x: Any, raw: Any, gain: Any, options: Any) -> Any:
    return s.norm(s.conv(x)) + F.conv2d(x, s.side.weight) + s.side(x)


def halved_output(stage: Stage) -> None:
    stage.conv.register_forward_hook(lambda module, args, output: output / 2)


def doubled_input(stage: Stage) -> None:
    stage.norm.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


HOOKS: dict[str, Callable[[Stage], None]] = {"hook": halved_output, "pre-hook": doubled_input}
PLAIN = {"plain": plain, "branches": branches, "idle counter": idle_counter}
RUNS: dict[str, Callable[..., Any]] = {
    **PLAIN,
    **dict.fromkeys(HOOKS, plain),
    "tied parameter": plain,
    **{
        run.__name__.replace("_", " "): run
        for run in (
            *(flag, optional, keyword, counter, world_written, world_read, map_left, map_taken),
            *(gradient_mode, no_gradients, from_list, from_dict, tied, earlier_norm, sets_eps),
            *(sets_dilation, batch_mode, buffer_set, tensor_written, cached, weights_read),
            *(data_set, asks, tries, training_read, kernel_twice),
        )
    },
}


class StateNet(nn.Module):
    """Stages one after the other, some in a net of their own, with flags that are passed on."""

    def __init__(self, seed: int, depth: int = 1, world: Any = None) -> None:
        super().__init__()
        random = Random(seed)
        world = world or SimpleNamespace(calls=0, maps=[])
        self.stages, made = nn.ModuleList(), list[Stage]()
        for _ in range(random.randint(2, 3)):
            if depth and random.random() < 0.2:
                self.stages.append(StateNet(random.randint(0, 999), depth - 1, world))
                continue
            kind = random.choice(list(PLAIN if random.random() < 0.45 else RUNS))
            made.append(Stage(kind, random, world, made))
            self.stages.append(made[-1])
        self.passes_on, self.residual = random.random() < 0.7, random.random() < 0.3

    def forward(self, x: Any, raw: bool = False, gain: Any = None, **options: Any) -> Any:
        for stage in self.stages:
            y = stage(x, raw, gain, **options) if self.passes_on else stage(x)
            x = x + y if self.residual else y
        return x

    def kinds(self) -> list[str]:
        """What its stages are, to say which net it is."""
        return [stage.kind for stage in self.modules() if isinstance(stage, Stage)]


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn([SIZE] * 4, generator=generator, dtype=torch.float64)


def calls() -> tuple[Callable[[nn.Module], Any], ...]:
    """A net as it is called: by default, without gradients, with each of its arguments."""
    gain = torch.linspace(0.5, 1.5, SIZE, dtype=torch.float64).view(-1, 1, 1)

    def without_gradients(net: nn.Module) -> Any:
        with torch.no_grad():
            return net(images())

    return (
        lambda net: net(images()),
        without_gradients,
        lambda net: net(images(), raw=True, wide=False),
        lambda net: net(images(), gain=gain),
    )
