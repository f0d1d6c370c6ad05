"""Which models there are: by library, how each is made small, and what it is called with."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Inputs = tuple[Any, ...]


def images(channels: int = 3, size: int = 64, count: int = 2) -> Inputs:
    return (torch.randn(count, channels, size, size),)


def volumes(channels: int = 1, size: int = 32) -> Inputs:
    return (torch.randn(1, channels, size, size, size),)


def sound(samples: int = 4000, *axes: int) -> Inputs:
    return (torch.randn(1, *axes, samples),)


@dataclass(frozen=True)
class Entry:
    """One model. place: the module and the name of what makes it. inputs: of one call.

    configuration: the class whose object the model is made of, by its name in the same module.
    """

    library: str
    name: str
    place: str
    options: dict[str, Any] = field(default_factory=dict)
    arguments: tuple[Any, ...] = ()
    configuration: str = ""
    inputs: Callable[[], Inputs] = images

    def make(self) -> nn.Module:
        """The model, without weights from anywhere, in eval mode."""
        torch.manual_seed(0)
        module, _, name = self.place.rpartition(".")
        home = importlib.import_module(module)
        made: nn.Module
        if self.configuration:
            made = getattr(home, name)(getattr(home, self.configuration)(**self.options))
        else:
            made = getattr(home, name)(*self.arguments, **self.options)
        return made.eval()


def _segmentation() -> list[Entry]:
    heads = ("Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "Linknet")
    encoders = ("efficientnet-b0", "mobilenet_v2", "se_resnet50", "densenet121", "vgg11_bn",
                "xception", "mobileone_s0", "timm-regnetx_002", "mit_b0",
                "inceptionv4")  # fmt: skip
    pairs = [(head, "resnet18") for head in (*heads, "MAnet", "UPerNet")]
    pairs += [("Unet", encoder) for encoder in encoders] + [("FPN", "efficientnet-b0")]
    return [
        Entry("segmentation_models_pytorch", f"{head} {encoder}",
              f"segmentation_models_pytorch.{head}", {"encoder_weights": None}, (encoder,))
        for head, encoder in pairs
    ]  # fmt: skip


def _monai() -> list[Entry]:
    flat: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    deep = {**flat, "spatial_dims": 3}
    steps: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2)}
    kernels: dict[str, Any] = {
        "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2],
    }  # fmt: skip
    one = lambda: images(1)  # noqa: E731
    made = [
        ("UNet", {**flat, **steps, "num_res_units": 2, "norm": "batch"}, one),
        ("UNet", {**deep, **steps, "num_res_units": 2}, volumes),
        ("BasicUNet", {**flat, "features": (8, 8, 16, 16, 32, 8)}, one),
        ("DynUNet", {**flat, **kernels, "norm_name": "batch"}, one),
        ("DynUNet", {**deep, **kernels, "res_block": True}, volumes),
        ("SegResNet", {**flat, "init_filters": 8}, one),
        ("VNet", deep, volumes),
        ("DenseNet121", flat, one),
        ("AttentionUnet", {**flat, **steps}, one),
        ("HighResNet", flat, one),
    ]
    return [
        Entry("monai", f"{name} {options['spatial_dims']}d", f"monai.networks.nets.{name}", options,
              inputs=inputs)
        for name, options, inputs in made
    ]  # fmt: skip


def _pytorchcv() -> list[Entry]:
    names = ("resnet18", "preresnet18", "mobilenetv2_w1", "shufflenetv2_w1", "efficientnet_b0",
             "sqnxt23_w1", "dla34", "hrnet_w18_small_v1", "vovnet27s", "seresnet18",
             "menet108_8x1_g3",
             "mobilenetv3_small_w1", "igcv3_w1", "mnasnet_small", "darknet53", "peleenet",
             "bninception", "regnetx002", "repvgg_a0", "fbnet_cb", "ghostnet",
             "spnasnet")  # fmt: skip
    place = "pytorchcv.model_provider.get_model"
    return [Entry("pytorchcv", name, place, {"pretrained": False}, (name,)) for name in names]


def _transformers() -> list[Entry]:
    small: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64]}
    speech: dict[str, Any] = {
        "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4,
        "intermediate_size": 64,
    }  # fmt: skip
    made: list[tuple[str, str, dict[str, Any], Callable[[], Inputs]]] = [
        ("ResNetForImageClassification", "ResNetConfig", {**small, "embedding_size": 16}, images),
        ("MobileNetV1ForImageClassification", "MobileNetV1Config", {}, images),
        ("MobileNetV2ForImageClassification", "MobileNetV2Config", {}, images),
        ("RegNetForImageClassification", "RegNetConfig", small, images),
        ("ConvNextForImageClassification", "ConvNextConfig", small, images),
        ("PoolFormerForImageClassification", "PoolFormerConfig", small, images),
        ("SegformerForSemanticSegmentation", "SegformerConfig", {"depths": [1] * 4}, images),
        ("MobileViTForImageClassification", "MobileViTConfig", {}, images),
        ("Wav2Vec2Model", "Wav2Vec2Config", speech, sound),
        ("HubertModel", "HubertConfig", speech, sound),
    ]
    return [
        Entry("transformers", model, f"transformers.{model}", options, (), configuration, inputs)
        for model, configuration, options, inputs in made
    ]


def _step(*shape: int) -> Callable[[], Inputs]:
    """Inputs of a net that removes noise: an image, and which step it is."""
    return lambda: (torch.randn(shape), torch.tensor([3]))


def _diffusers() -> list[Entry]:
    down: dict[str, Any] = {
        "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 32,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    coder: dict[str, Any] = {
        "block_out_channels": (32, 64), "norm_num_groups": 8,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    tiny: dict[str, Any] = {
        f"{side}_block_out_channels": (16, 16) for side in ("encoder", "decoder")
    } | {f"num_{side}_blocks": (1, 1) for side in ("encoder", "decoder")}
    oobleck: dict[str, Any] = {
        "encoder_hidden_size": 16, "downsampling_ratios": [2, 4], "channel_multiples": [1, 2],
        "decoder_channels": 16, "decoder_input_channels": 8, "audio_channels": 1,
    }  # fmt: skip
    made: list[tuple[str, dict[str, Any], Callable[[], Inputs]]] = [
        ("UNet2DModel", down, _step(1, 3, 32, 32)),
        ("AutoencoderKL", coder, lambda: images(size=32)),
        ("AutoencoderTiny", tiny, lambda: images(size=32)),
        ("AutoencoderOobleck", oobleck, lambda: sound(512, 1)),
    ]
    return [Entry("diffusers", n, f"diffusers.{n}", o, inputs=i) for n, o, i in made]


def _kornia() -> list[Entry]:
    patches = lambda: images(1, 32, 4)  # noqa: E731
    names = ("HardNet", "HardNet8", "SOSNet", "TFeat", "HyNet")
    return [
        Entry("kornia", name, f"kornia.feature.{name}", {}, (False,), inputs=patches)
        for name in names
    ]


def entries() -> dict[str, Entry]:
    """Every model by its key, library:name."""
    found = (_segmentation, _monai, _pytorchcv, _transformers, _diffusers, _kornia)
    return {f"{e.library}:{e.name}": e for part in found for e in part()}


def outputs_of(value: Any) -> list[Tensor]:
    """The tensors that a model returns, whatever holds them."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if hasattr(value, "values") else value
    if isinstance(parts, str) or not hasattr(parts, "__iter__"):
        return [t for t in vars(value).values() if isinstance(t, Tensor)] if value else []
    return [tensor for part in parts for tensor in outputs_of(part)]
