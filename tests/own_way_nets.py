"""Modules that collapse by a method of their own, as those of other libraries do; some wrongly."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.compiler_nets import conv_norm
from tests.norms import randomise_norms


class OwnWay(nn.Module):
    """Two conv-norm branches in a forward that no trace can follow, and a method that knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.large, self.small = conv_norm(width, width, 3, padding=1), conv_norm(width, width, 1)
        self.one: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.one is not None:
            return F.relu(self.one(x))
        size = int(x.shape[-1])
        outputs = [branch(x) for branch in (self.large, self.small)]
        assert all(int(y.shape[-1]) == size for y in outputs)
        if bool(x.isnan().any()):
            raise ValueError("NaN in the input")
        return F.relu(sum(outputs[1:], outputs[0]))

    def folded(self) -> tuple[Tensor, Tensor]:
        kernels, biases = [], []
        for branch in (self.large, self.small):
            conv, norm = branch[0], branch[1]
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator]
            kernel = conv.weight * scale.reshape(-1, 1, 1, 1)
            pad = 1 if kernel.shape[-1] == 1 else 0
            kernels.append(F.pad(kernel, [pad] * 4))  # type: ignore[arg-type]
            biases.append(norm.bias - norm.running_mean * scale)  # type: ignore[operator]
        return kernels[0] + kernels[1], biases[0] + biases[1]

    def convert(self) -> nn.Conv2d:
        weight, bias = self.folded()
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        conv.weight.data, conv.bias.data = weight.detach(), bias.detach()  # type: ignore[union-attr]
        return conv


class Switches(OwnWay):
    def switch_to_deploy(self) -> None:
        self.one = self.convert()
        del self.large, self.small


class Reparameterizes(OwnWay):
    def reparameterize(self) -> None:
        self.one = self.convert()
        del self.large, self.small

    def switch_to_deploy(self) -> None:
        raise AssertionError("reparameterize comes first")


class Fuses(OwnWay):
    def fuse(self) -> nn.Module:
        return nn.Sequential(self.convert(), nn.ReLU())


class Rounds(Switches):
    """A method that makes a float32 kernel, whatever the module is in."""

    def convert(self) -> nn.Conv2d:
        conv = super().convert()
        return conv.float()


class Heads(Switches):
    """Its stride and its grid are plain tensors: its own _apply casts them, a forward makes one."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.stride, self.grid = torch.tensor(8.0), torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.grid.shape != x.shape[2:]:
            self.grid = torch.ones(x.shape[2:], dtype=x.dtype)
        return y * self.stride + self.grid

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        super()._apply(fn, recurse)
        self.stride, self.grid = fn(self.stride), fn(self.grid)
        return self


class Copies(Switches):
    """A method that fills a layer of torch's default dtype, as timm's do."""

    def convert(self) -> nn.Conv2d:
        weight, bias = self.folded()
        conv = nn.Conv2d(weight.shape[1], weight.shape[0], 3, padding=1)
        conv.weight.data.copy_(weight)
        conv.bias.data.copy_(bias)  # type: ignore[union-attr]
        return conv


class Wrong(Switches):
    """The norms' means are forgotten."""

    def folded(self) -> tuple[Tensor, Tensor]:
        weight, _ = super().folded()
        return weight, self.large[1].bias + self.small[1].bias  # type: ignore[operator]


class Broken(Switches):
    def switch_to_deploy(self) -> None:
        raise ValueError("no kernel\nat all")


class Nothing(Switches):
    """As the head of a detector, whose fuse() has something to do in another version."""

    def switch_to_deploy(self) -> None:
        return None


class Wider(Switches):
    """After its method, it runs no more."""

    def convert(self) -> nn.Conv2d:
        return nn.Conv2d(99, 6, 3)


def net_of(kind: type[OwnWay]) -> nn.Module:
    torch.manual_seed(6)
    net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Sequential(kind(6)))
    return randomise_norms(net.double())
