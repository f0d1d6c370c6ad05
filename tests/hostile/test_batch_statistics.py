"""Norms that use the batch's statistics in eval mode, or statistics that they change."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import nn

from tests.hostile.forms import SIZE, Form, Pair, images
from tests.hostile.judging import exact_or_refused


class SwitchedAround(Pair):
    def forward(self, x: Any) -> Any:
        self.norm.train()
        y = self.norm(self.conv(x))
        self.norm.eval()
        return y


class SwitchedByParent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = Pair()

    def forward(self, x: Any) -> Any:
        self.body.train(True)
        y = self.body(x)
        self.body.train(False)
        return y


class SetsTraining(Pair):
    def forward(self, x: Any) -> Any:
        self.norm.training = True
        return self.norm(self.conv(x))


class OwnTrain(Pair):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.norm.train()
        return self


class OwnEval(Pair):
    """eval() is overridden, and train(False) is not."""

    def eval(self) -> Any:
        super().eval()
        self.norm.training = True
        return self


class AlwaysTraining(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> Any:
        return super().train(True)


class TrainingProperty(nn.BatchNorm2d):
    """`training` cannot be switched off."""

    @property
    def training(self) -> bool:  # type: ignore[override]
        return True

    @training.setter
    def training(self, mode: bool) -> None:
        pass


class Evaluated(Pair):
    """In train mode too, the norm keeps to its statistics."""

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        self.norm.eval()
        return self


class EvaluatedInForward(Pair):
    def forward(self, x: Any) -> Any:
        self.norm.eval()
        return self.norm(self.conv(x))


class ByFunction(Pair):
    """The same norm by its function, told to use the batch."""

    def forward(self, x: Any) -> Any:
        norm = self.norm
        return F.batch_norm(
            self.conv(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, True
        )


class WithoutStatistics(Pair):
    def forward(self, x: Any) -> Any:
        return F.batch_norm(self.conv(x), None, None, self.norm.weight, self.norm.bias, True)


class Averaged(Pair):
    """Half of the batch's statistics, half of the norm's own."""

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        mean = (y.detach().mean((0, 2, 3)) + self.norm.running_mean) / 2
        return F.batch_norm(y, mean, self.norm.running_var)


class Updated(Pair):
    """Statistics go on in eval mode, and the output is by the old ones."""

    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        z = self.norm(y)
        if not self.training:
            self.norm.running_mean.lerp_(y.detach().mean((0, 2, 3)), 0.5)
        return z


class Lerped(Pair):
    def forward(self, x: Any) -> Any:
        y = self.conv(x)
        self.norm.running_mean.mul_(0.5).add_(y.detach().mean((0, 2, 3)), alpha=0.5)
        return self.norm(y)


class Reset(Pair):
    def forward(self, x: Any) -> Any:
        self.norm.reset_running_stats()
        return self.norm(self.conv(x))


def with_norm(make: Any) -> Any:
    def model() -> nn.Module:
        made = Pair()
        made.norm = make()
        return made

    return model


def without_buffers() -> nn.Module:
    norm = nn.BatchNorm2d(SIZE)
    norm.running_mean = norm.running_var = None
    return norm


def untracked_later() -> nn.Module:
    norm = nn.BatchNorm2d(SIZE)
    norm.track_running_stats = False
    return norm


def tracked_again() -> nn.Module:
    norm = nn.BatchNorm2d(SIZE, track_running_stats=False)
    norm.track_running_stats = True
    return norm


def in_two_modes() -> nn.Module:
    """The same norm behind two convs: once with the batch's statistics."""

    class Twice(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.second = nn.Conv2d(SIZE, SIZE, 1)

        def forward(self, x: Any) -> Any:
            y = self.norm(self.conv(x))
            self.norm.train()
            z = self.norm(self.second(x))
            self.norm.eval()
            return y + z

    return Twice()


FORMS = {
    "switched around": Form(SwitchedAround),
    "switched by the parent": Form(SwitchedByParent),
    "training set": Form(SetsTraining),
    "own train()": Form(OwnTrain),
    "own eval()": Form(OwnEval),
    "norm's train()": Form(with_norm(lambda: AlwaysTraining(SIZE))),
    "training a property": Form(with_norm(lambda: TrainingProperty(SIZE))),
    "always evaluated": Form(Evaluated, norms=0, blocks=1),
    "evaluated in forward": Form(EvaluatedInForward),
    "by its function": Form(ByFunction),
    "without statistics": Form(WithoutStatistics),
    "half of each": Form(Averaged),
    "updated after": Form(Updated),
    "updated before": Form(Lerped),
    "reset": Form(Reset),
    "track_running_stats=False": Form(
        with_norm(lambda: nn.BatchNorm2d(SIZE, track_running_stats=False))
    ),
    "momentum=None": Form(
        with_norm(lambda: nn.BatchNorm2d(SIZE, momentum=None)), norms=0, blocks=1
    ),
    "no buffers": Form(with_norm(without_buffers)),
    "untracked later": Form(with_norm(untracked_later)),
    "tracked again": Form(with_norm(tracked_again)),
    "instance norm": Form(
        with_norm(lambda: nn.InstanceNorm2d(SIZE, affine=True, track_running_stats=True))
    ),
    "instance norm without statistics": Form(
        with_norm(lambda: nn.InstanceNorm2d(SIZE, affine=True))
    ),
    "two modes": Form(in_two_modes),
    "one image": Form(OwnTrain, inputs=images(2, SIZE, SIZE, SIZE)),
}

test_exact_or_refused = exact_or_refused(FORMS)
