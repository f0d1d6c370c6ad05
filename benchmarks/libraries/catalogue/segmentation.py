"""Models of segmentation_models_pytorch: each head, each family of encoders, at small depths."""

from __future__ import annotations

from typing import Any

from benchmarks.libraries.catalogue.entry import Entry

_HEADS = ("Unet", "UnetPlusPlus", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "Linknet",
          "MAnet", "UPerNet", "Segformer")  # fmt: skip
_ENCODERS = (
    "efficientnet-b0", "mobilenet_v2", "se_resnet50", "densenet121", "vgg11_bn", "xception",
    "mobileone_s0", "timm-regnetx_002", "mit_b0", "dpn68", "timm-efficientnet-b0",
    "timm-skresnet18", "timm-tf_efficientnet_lite0", "tu-convnext_atto", "tu-ghostnet_050",
    "tu-mobilenetv3_small_050", "tu-repghostnet_050", "tu-hrnet_w18_small",
)  # fmt: skip
_DECODER: dict[str, Any] = {"encoder_depth": 3, "decoder_channels": (32, 16, 8)}


def segmentation() -> list[Entry]:
    options = {
        "Unet": _DECODER,
        "UnetPlusPlus": _DECODER,
        "MAnet": _DECODER,
        "PSPNet": {"encoder_depth": 3, "psp_out_channels": 32},
        "FPN": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32},
        "UPerNet": {"decoder_channels": 32},
    }
    pairs = [(head, "resnet18") for head in _HEADS]
    pairs += [("Unet", encoder) for encoder in _ENCODERS]
    pairs += [("FPN", "efficientnet-b0"), ("DeepLabV3Plus", "mobilenet_v2")]
    return [
        Entry("segmentation_models_pytorch", f"{head} {encoder}",
              f"segmentation_models_pytorch.{head}",
              {"encoder_weights": None, **(options.get(head, {}) if _is_deep(encoder) else {})},
              (encoder,))
        for head, encoder in pairs
    ]  # fmt: skip


def _is_deep(encoder: str) -> bool:
    """Whether an encoder can be cut to three of its stages."""
    return not encoder.startswith(("mit", "tu-convnext"))
