"""Small nets for the tests of the passes and the verbs, and what is compared of a model."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tests.norms import randomise_norms

# Largest difference, relative to the largest output.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-10}


def batch(count: int = 4, size: int = 10, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


class Stem(nn.Module):
    """A path with each kind of conv: large, k x k, depthwise with a bias, pointwise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm3 = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 12, 1, bias=False)
        self.norm4 = nn.BatchNorm2d(12)
        self.relu = nn.ReLU()
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.stem(x)))
        x = x + self.relu(self.norm2(self.conv(x)))
        x = self.relu(self.norm3(self.depthwise(x)))
        x = self.relu(self.norm4(self.pointwise(x)))
        return self.head(x.mean((2, 3)))


CONVS = ("stem", "conv", "depthwise", "pointwise")


def stem_net(dtype: torch.dtype = torch.float64) -> Stem:
    """The path net with random norms, in train mode."""
    torch.manual_seed(1)
    net = Stem().to(dtype)
    randomise_norms(net)
    return net


def bare_net(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> nn.Sequential:
    """Two convs with activations and no norm, in train mode."""
    torch.manual_seed(2)
    layers = [
        ("conv1", nn.Conv2d(3, 6, 3, padding=1, bias=bias)),
        ("act1", nn.ReLU()),
        ("conv2", nn.Conv2d(6, 6, 3, padding=1, bias=bias)),
        ("act2", nn.ReLU()),
    ]
    return nn.Sequential(OrderedDict(layers)).to(dtype)


def conv_norm(*args: int, bias: bool = False, **options: Any) -> nn.Sequential:
    conv = nn.Conv2d(*args, bias=bias, **options)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(conv.out_channels)))


class Branches(nn.Module):
    """RepVGG's sum: conv-norm 3x3, conv-norm 1x1 and, where the size stays, a norm."""

    def __init__(self, width_in: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.large = conv_norm(width_in, width, 3, stride=stride, padding=1)
        self.small = conv_norm(width_in, width, 1, stride=stride)
        keeps = width_in == width and stride == 1
        self.same = nn.BatchNorm2d(width) if keeps else None
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.large(x) + self.small(x)
        if self.same is not None:
            y = y + self.same(x)
        return self.relu(y)


def branch_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(
        OrderedDict(first=Branches(3, 6, stride=2), second=Branches(6, 6), third=Branches(6, 6))
    )
    randomise_norms(net)
    return net.to(dtype)


@torch.no_grad()
def output(model: nn.Module, x: Tensor, *, training: bool = False) -> Tensor:
    """The model's output in a mode; its own mode and its running statistics are put back."""
    modes = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.train(training)
    y = model(x)
    model.load_state_dict(state)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return y


def assert_same(found: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    limit = TOLERANCE[expected.dtype] if tolerance is None else tolerance
    found, expected = found.double(), expected.double()
    assert found.isfinite().all()
    assert expected.abs().max() > 1e-3, "nothing to compare with"
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= limit, f"relative error {error:.1e}"


def train_a_step(model: nn.Module, x: Tensor) -> None:
    """One step of SGD that moves every parameter and every running statistic."""
    model.train()
    loss = model(x).square().mean()
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    model.zero_grad()


Fingerprint = list[tuple[str, str, Any]]


def fingerprint(model: nn.Module) -> Fingerprint:
    """All that a verb could spoil: types, modes, hooks, values, requires_grad, identity."""
    found: Fingerprint = []
    for path, module in model.named_modules(remove_duplicate=False):
        own = (id(module), module.training, tuple(map(id, module._forward_hooks.values())))
        found.append((path, type(module).__name__, own))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                values = None if tensor.is_meta else tensor.detach().clone().tolist()
                traits = (id(tensor), tensor.requires_grad, str(tensor.dtype), tensor.stride())
                found.append((f"{path}.{name}", str(tensor.device), (traits, values)))
        found.append((path, "attributes", sorted(vars(module))))
    return found


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Checks that what happens inside leaves the model as it was."""
    before = fingerprint(model)
    yield
    after = fingerprint(model)
    changed = [old[:2] for old, new in zip(before, after, strict=False) if old != new]
    assert not changed
    assert len(before) == len(after)


def same_state(left: nn.Module, right: nn.Module) -> bool:
    """Whether two models hold the same tensors, bit for bit."""
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a
    )


class Inline(nn.Module):
    """A forward made of what a test hands in."""

    def __init__(self, forward: Callable[[Any, Tensor], Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.inner_forward = forward

    def forward(self, x: Tensor) -> Any:
        return self.inner_forward(self, x)
