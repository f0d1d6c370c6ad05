"""What the trainers of others do around a model, in little: each pattern to its end, in float64.

docs/training.md says which of the trainers themselves were run by hand.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

import orepa_compiler as orepa
from orepa_compiler.algebra.classifiers import is_batch_norm
from orepa_compiler.blocks import ConvBlock
from tests.norms import randomise_norms


class Unit(nn.Module):
    """ultralytics' Conv."""

    def __init__(self, width_in: int, width: int, kernel: int = 3, groups: int = 1) -> None:
        super().__init__()
        padding = kernel // 2
        self.conv = nn.Conv2d(width_in, width, kernel, 1, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))  # type: ignore[no-any-return]

    def forward_fuse(self, x: Tensor) -> Tensor:
        return self.act(self.conv(x))  # type: ignore[no-any-return]


class Detect(nn.Module):
    """A head with tensors that are no buffers, and a fuse() that has nothing to do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stride = torch.tensor([8.0])
        self.out = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        raw = self.out(x)
        return raw if self.training else (raw.sigmoid() * self.stride, raw)

    def fuse(self) -> None:
        return None


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(Unit(3, 6), Unit(6, 6, groups=6), Unit(6, 6, 1), Detect(6))

    def forward(self, x: Tensor) -> Any:
        return self.model(x)

    def _apply(self, fn: Any, recurse: bool = True) -> Detector:
        super()._apply(fn, recurse)
        self.model[-1].stride = fn(self.model[-1].stride)
        return self

    def fuse(self) -> Detector:
        for module in self.modules():
            if isinstance(module, Unit) and hasattr(module, "bn"):
                fused = _fused(module.conv, module.bn)
                module.conv.weight, module.conv.bias = fused
                del module.bn
                module.forward = module.forward_fuse  # type: ignore[method-assign]
            if isinstance(module, Detect):
                module.fuse()
        return self


def _fused(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[nn.Parameter, nn.Parameter]:
    statistics = norm.running_mean, norm.running_var, norm.eps
    return fuse_conv_bn_weights(conv.weight, conv.bias, *statistics, norm.weight, norm.bias)  # type: ignore[arg-type]


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=generator)


def detector() -> nn.Module:
    torch.manual_seed(0)
    return randomise_norms(Detector().double())


def blocks_in(model: nn.Module) -> Iterator[str]:
    return (path for path, module in model.named_modules() if isinstance(module, ConvBlock))


def trained_as_ultralytics_does(model: nn.Module, x: Tensor) -> nn.Module:
    """A deep copy averages the state_dict, and is what the file holds: pickled, in half."""
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.SGD(orepa.param_groups(model), 0.05, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        (model.train()(x) - 1).square().mean().backward()
        optimizer.step()
        decay, state = 0.9 * step / 3, model.state_dict()
        for name, value in average.state_dict().items():
            if value.dtype.is_floating_point:
                value.mul_(decay).add_(state[name].detach(), alpha=1 - decay)
    held = io.BytesIO()
    torch.save({"ema": copy.deepcopy(average).half(), "optimizer": optimizer.state_dict()}, held)
    held.seek(0)
    return torch.load(held, weights_only=False)["ema"].double()  # type: ignore[no-any-return]


def test_as_ultralytics_trains(x: Tensor, tmp_path: Path) -> None:
    average = trained_as_ultralytics_does(orepa.expand(detector(), inputs=x), x)
    assert list(blocks_in(average)) == ["model.0.conv", "model.1.conv", "model.2.conv"]
    expected = average.eval()(x)[0]
    # The trainer's last evaluation fuses what it saved: in training form that is refused, whole.
    with pytest.raises(
        orepa.ReparamError, match=r"weight of a block .* call orepa.collapse\(model\)"
    ):
        copy.deepcopy(average).fuse()  # type: ignore[operator]
    deploy = orepa.collapse(average, inputs=x)
    assert not list(blocks_in(deploy))
    assert not any(map(is_batch_norm, deploy.modules()))
    fused = copy.deepcopy(deploy).fuse().fuse()  # type: ignore[operator]
    for made in (deploy, fused, copy.deepcopy(deploy).float().double()):
        torch.testing.assert_close(made(x)[0], expected, rtol=1e-5, atol=1e-6)
    kept = orepa.collapse(average, fold_norm=False)
    torch.testing.assert_close(kept.fuse()(x)[0], expected)  # type: ignore[operator]
    path = orepa.export_onnx(deploy.float(), x.float(), tmp_path / "yolo.onnx")
    assert orepa.verify(deploy, str(path), x.float())


class Metric(nn.Module):
    """As those of torchmetrics: tensors that are its state, in a dict, and reset() beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.defaults = {"total": torch.zeros(())}
        self.total = torch.zeros(())
        self.update = self.counted(self.update)  # type: ignore[method-assign]

    def counted(self, update: Any) -> Any:
        def wrapped(*args: Any) -> None:
            update(*args)

        return wrapped

    def update(self, found: Tensor) -> None:
        self.total = self.total + found.detach().sum()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "update"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.update = self.counted(type(self).update.__get__(self))  # type: ignore[method-assign]


class Lit(nn.Module):
    """A module with steps, a metric and hyperparameters, whose forward is one of its methods."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.hparams = {"width": width}
        self.body = nn.Sequential(Unit(3, width), Unit(width, width))
        self.head, self.metric = nn.Linear(width, 2), Metric()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean((2, 3)))  # type: ignore[no-any-return]

    def training_step(self, x: Tensor) -> Tensor:
        found = self(x)
        self.metric.update(found)
        return found.square().mean()  # type: ignore[no-any-return]


@pytest.mark.parametrize("whole", [True, False])
def test_as_lightning_trains(whole: bool, x: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    lit = randomise_norms(Lit().double())
    if whole:
        lit = orepa.expand(lit, inputs=x)
    else:
        lit.body = orepa.expand(lit.body, inputs=x)
    optimizer = torch.optim.SGD(orepa.param_groups(lit), 0.05)
    for _ in range(2):
        optimizer.zero_grad()
        lit.training_step(x).backward()
        optimizer.step()
    assert float(lit.metric.total) != 0
    expected = lit.eval()(x)
    read = orepa.load(lambda: Lit().double(), orepa.save(lit, tmp_path / "lit.safetensors"))
    assert torch.equal(read.eval()(x), expected)
    deploy = orepa.collapse(lit, inputs=x)
    assert not list(blocks_in(deploy))
    assert not any(map(is_batch_norm, deploy.modules()))
    torch.testing.assert_close(deploy(x), expected)
    assert deploy.hparams == {"width": 6}
    deploy.training_step(x)  # what the class can do, its deploy form can


class Answer(dict):  # type: ignore[type-arg]
    """As transformers' outputs: by name, by attribute, without what is None."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class Pretrained(nn.Module):
    """Takes its images and labels by name, and gives the loss with the logits."""

    main_input_name = "pixel_values"

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Sequential(Unit(3, 6), Unit(6, 6))
        self.classifier = nn.Linear(6, 2)

    def forward(
        self, pixel_values: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        logits = self.classifier(self.embedder(pixel_values).mean((2, 3)))
        if labels is None:
            return Answer(logits=logits)
        return Answer(loss=functional.cross_entropy(logits, labels), logits=logits)


def test_as_transformers_trains(x: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = orepa.expand(randomise_norms(Pretrained().double()), inputs=x)
    assert len(list(blocks_in(model))) == 2
    optimizer = torch.optim.AdamW(orepa.param_groups(model), 1e-3)
    labels = torch.tensor([0, 1, 0, 1])
    for _ in range(2):
        optimizer.zero_grad()
        model(pixel_values=x, labels=labels)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    again = orepa.expand(Pretrained().double(), inputs=x)
    again.load_state_dict(state)  # as it resumes, and takes the best of its checkpoints
    expected = model.eval()(x)["logits"]
    assert torch.equal(again.eval()(x)["logits"], expected)
    deploy = orepa.collapse(model, inputs=x)
    assert not any(map(is_batch_norm, deploy.modules()))
    torch.testing.assert_close(deploy(pixel_values=x)["logits"], expected)
    torch.testing.assert_close(deploy(x, labels=labels)["loss"], model(x, labels=labels)["loss"])


def test_as_timms_script_trains(x: Tensor) -> None:
    """Its create_model is wrapped in one line; the state_dict and its average are what it saves."""
    from timm.models import create_model
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3

    torch.manual_seed(0)
    model = randomise_norms(create_model("test_resnet", num_classes=2).double())
    model = orepa.expand(model, where="layer4.*")
    average = ModelEmaV3(model, decay=0.5)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.01, weight_decay=1e-4)
    images = x.repeat(1, 1, 4, 4)
    model.train()(images).square().mean().backward()
    optimizer.step()
    average.update(model)
    read = copy.deepcopy(model).eval()
    read.load_state_dict(average.module.state_dict())
    assert not torch.equal(read(images), model.eval()(images))
    deploy = orepa.collapse(read)
    assert not list(blocks_in(deploy))
    torch.testing.assert_close(deploy(images), read(images))
