"""The ways to an int8 file that are compared, each from the same trained net."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import orepa_compiler as orepa
from benchmarks.study.data import flipped, shifted, split
from benchmarks.study.nets import NETS
from orepa_compiler.quantization.layers import rounded_layers

# A high rate and decay do in some epochs what usual ones do in hundreds: the factors of the norms
# spread, and with them the channels of a deployed kernel: one step for all of it loses by that.
FLOAT_RATE, TUNE_RATE, DECAY = 0.2, 0.01, 5e-3
CALIBRATION = 512  # images
MOMENTUM, SHIFT = 0.9, 1

PRETRAINED = "EfficientNet-Lite0"
PRETRAINED_SIZE = 32  # pixels that it sees

Images = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Setting:
    """One net and one seed.

    epochs: in float, at this rate; tuned: the further ones, rounding or not. test: so many of the
    images of the test. timed: the files too.
    """

    net: str
    seed: int
    train: int = 2000
    epochs: int = 6
    rate: float = FLOAT_RATE
    tuned: int = 2
    batch: int = 50
    test: int = 2500
    timed: bool = False


# The net, and the block of its training form: RepVGG's has a norm in each branch.
FORMS: dict[str, tuple[str, Any]] = {
    "RepVGG-like": ("VGG-7", orepa.REPVGG),
    "residual": ("ResNet-8", orepa.OREPA),
    "mobile": ("MobileNet-7", "auto"),
    "OREPA-VGG": ("VGG-7", orepa.OREPA),
    PRETRAINED: ("EfficientNet-Lite0", orepa.OREPA),
}


def setting_of(net: str, seed: int, *, timed: bool = False) -> Setting:
    """What is run of a net: one with weights of ImageNet is large, and trains shortly."""
    if net == PRETRAINED:
        return Setting(net, seed, epochs=2, rate=0.02, tuned=1, test=2000, timed=timed)
    return Setting(net, seed, timed=timed)


@dataclass(frozen=True)
class Trained:
    """A net in training form after its float epochs, and the images that it sees."""

    setting: Setting
    model: nn.Module
    images: Images
    test: Images

    @property
    def calibration(self) -> Tensor:
        return self.images[0][:CALIBRATION]

    def tuned(self, model: nn.Module, rate: float = TUNE_RATE) -> nn.Module:
        """The model after the further epochs; its ranges are frozen for the second half."""
        setting = self.setting
        return fit(model, setting, self.images, setting.tuned, rate, freezes=True)


def trained(setting: Setting) -> Trained:
    """A net with the weights of its float epochs."""
    parts = split("fashion", train=setting.train, seed=setting.seed, held="test")
    torch.manual_seed(setting.seed)
    name, block = FORMS[setting.net]
    net = NETS[name](parts.train[0].shape[-1])
    for part in net.modules():
        if isinstance(part, nn.Upsample):
            part.size = PRETRAINED_SIZE
    model = orepa.expand(net, block=block, inputs=parts.train[0][: setting.batch])
    model = fit(model, setting, parts.train, setting.epochs, setting.rate)
    images, classes = parts.test
    return Trained(setting, model, parts.train, (images[: setting.test], classes[: setting.test]))


def fit(
    model: nn.Module,
    setting: Setting,
    images: Images,
    epochs: int,
    rate: float,
    *,
    freezes: bool = False,
) -> nn.Module:
    """The model, in place, after so many epochs with a cosine; in eval mode."""
    model.train()
    groups = orepa.param_groups(model, weight_decay=DECAY)
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=MOMENTUM, foreach=True)
    steps = epochs * (len(images[0]) // setting.batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    generator = torch.Generator().manual_seed(setting.seed)
    for step in range(steps):
        if step % (steps // epochs) == 0:
            order = torch.randperm(len(images[0]), generator=generator).split(setting.batch)
        if freezes and step == steps // 2 and rounded_layers(model):
            orepa.freeze_ranges(model)
        chosen = order[step % (steps // epochs)]
        batch = flipped(shifted(images[0][chosen], generator, SHIFT), generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), images[1][chosen]).backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def _export(model: nn.Module, given: Trained, path: Path, **options: Any) -> Path:
    return orepa.export_onnx(model, given.calibration[:2], path, **options)


def _float(given: Trained, path: Path) -> Path:
    return _export(orepa.collapse(given.model), given, path)


def _float_tuned(given: Trained, path: Path) -> Path:
    return _export(orepa.collapse(given.tuned(copy.deepcopy(given.model))), given, path)


def _per_channel(given: Trained, path: Path) -> Path:
    deploy = orepa.collapse(given.model)
    return _export(deploy, given, path, precision="int8", calibration=[given.calibration])


def _equalized(given: Trained, path: Path) -> Path:
    deploy = orepa.equalize(orepa.collapse(given.model), given.calibration)
    return _export(deploy, given, path, precision="int8", calibration=[given.calibration])


def _per_tensor(given: Trained, path: Path) -> Path:
    return _one_step_each(orepa.collapse(given.model), given, path)


def _per_tensor_equalized(given: Trained, path: Path) -> Path:
    deploy = orepa.equalize(orepa.collapse(given.model), given.calibration)
    return _one_step_each(deploy, given, path)


def _one_step_each(deploy: nn.Module, given: Trained, path: Path) -> Path:
    """onnxruntime's quantize_static as it comes: one step for each kernel, all operators."""
    from onnxruntime import quantization

    source = _export(deploy, given, path.with_name("float.onnx"))
    feed = {orepa.OnnxRunner(source).inputs[0].name: given.calibration.numpy()}

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds = iter([feed])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    quantization.quantize_static(str(source), str(path), Reader())
    return path


def _qat_collapsed(given: Trained, path: Path) -> Path:
    plain = orepa.collapse(given.model, fold_norm=False)
    return _tuned_in_int8(plain, given, path)


def _qat_training_form(given: Trained, path: Path) -> Path:
    return _tuned_in_int8(given.model, given, path)


def _tuned_in_int8(model: nn.Module, given: Trained, path: Path) -> Path:
    rounding = given.tuned(orepa.fake_quantize(model, inputs=given.calibration))
    deploy = orepa.collapse(rounding)
    return _export(deploy, given, path, precision="int8")


METHODS: dict[str, Callable[[Trained, Path], Path]] = {
    "float": _float,
    "float, trained on": _float_tuned,
    "PTQ, onnxruntime per tensor": _per_tensor,
    "PTQ, per tensor, equalized": _per_tensor_equalized,
    "PTQ, per channel": _per_channel,
    "PTQ, per channel, equalized": _equalized,
    "QAT after collapse": _qat_collapsed,
    "QAT in training form": _qat_training_form,
}
