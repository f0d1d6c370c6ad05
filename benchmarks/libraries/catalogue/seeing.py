"""Nets that find things: ultralytics; those of transformers that hold convs; kornia's features."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from benchmarks.libraries.catalogue.entry import Entry, Making, images, sound, values

_YOLOS = (
    "yolov3-tiny", "yolov5n", "yolov6n", "yolov8n", "yolov8n-ghost", "yolov9t", "yolov10n",
    "yolo11n", "yolo12n", "yolo26n", "yolov8n-p2",
)  # fmt: skip
_CVT: dict[str, Any] = {
    "patch_sizes": [7, 3, 3], "patch_stride": [4, 2, 2], "patch_padding": [2, 1, 1],
    **{name: [value] * 3 for name, value in {
        "mlp_ratio": 2.0, "attention_drop_rate": 0.0, "drop_rate": 0.0, "drop_path_rate": 0.0,
        "qkv_bias": True, "qkv_projection_method": "dw_bn", "kernel_qkv": 3, "padding_kv": 1,
        "stride_kv": 2, "padding_q": 1, "stride_q": 1, "cls_token": False,
    }.items()},
}  # fmt: skip
_TASKS = (
    ("SegmentationModel", "yolov8n-seg"), ("SegmentationModel", "yolo11n-seg"),
    ("PoseModel", "yolov8n-pose"), ("OBBModel", "yolo11n-obb"),
    ("ClassificationModel", "yolov8n-cls"), ("ClassificationModel", "yolo11n-cls"),
    ("WorldModel", "yolov8s-worldv2"),
)  # fmt: skip


def detection() -> list[Entry]:
    nets = [("DetectionModel", name) for name in _YOLOS]
    return [
        Entry("ultralytics", name, f"{__name__}.narrow_yolo", arguments=(task, name),
              inputs=values(1, 3, 64, 64))
        for task, name in (*nets, *_TASKS)
    ]  # fmt: skip


def narrow_yolo(task: str, name: str) -> nn.Module:
    """A YOLO of ultralytics with an eighth of its channels."""
    tasks = importlib.import_module("ultralytics.nn.tasks")
    form = tasks.yaml_model_load(f"{name}.yaml")
    form["scales"] = {form["scale"]: [0.33, 0.125, 1024]} if form.get("scale") else {}
    made: nn.Module = getattr(tasks, task)(form, verbose=False)
    return made


def understanding() -> list[Entry]:
    small: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 64, 64]}
    speech: dict[str, Any] = {
        "num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 4,
        "intermediate_size": 64, "conv_dim": (32,) * 7,
    }  # fmt: skip
    mobile: dict[str, Any] = {"depth_multiplier": 0.25}
    stages: dict[str, Any] = {"embed_dim": [16, 32, 64], "depth": [1, 1, 1]}
    made: Iterable[tuple[str, dict[str, Any], Making]] = [
        ("ResNetForImageClassification", {**small, "embedding_size": 16}, images),
        ("MobileNetV1ForImageClassification", mobile, images),
        ("MobileNetV2ForImageClassification", mobile, images),
        ("EfficientNetForImageClassification", {"width_coefficient": 0.5,
                                                "depth_coefficient": 0.5,
                                                "hidden_dim": 640}, images),
        ("RegNetForImageClassification", {**small, "groups_width": 16}, images),
        ("ConvNextForImageClassification", small, images),
        ("ConvNextV2ForImageClassification", small, images),
        ("PoolFormerForImageClassification", small, images),
        ("SegformerForSemanticSegmentation", {"depths": [1] * 4}, images),
        ("MobileViTForImageClassification", {"image_size": 64}, images),
        ("MobileViTV2ForImageClassification", {"image_size": 64, "width_multiplier": 0.5},
         images),
        ("BitForImageClassification", {**small, "embedding_size": 16, "num_groups": 8}, images),
        ("CvtForImageClassification", {**stages, "num_heads": [1, 2, 4], **_CVT}, images),
        ("LevitForImageClassification", {"image_size": 64, "hidden_sizes": [32, 64, 96],
                                         "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
                                         "key_dim": [8, 8, 8]}, images),
        ("PvtV2ForImageClassification", {"depths": [1] * 4, "hidden_sizes": [16, 32, 40, 64]},
         images),
        ("FocalNetForImageClassification", {"embed_dim": 16, "depths": [1, 1, 1, 1],
                                            "image_size": 64}, images),
        ("SwiftFormerForImageClassification", {"embed_dims": [16, 16, 32, 32],
                                               "depths": [1, 1, 1, 1]}, images),
        ("HGNetV2ForImageClassification", {"embedding_size": 16}, images),
        ("TextNetForImageClassification", {}, images),
        ("PPLCNetForImageClassification", {}, images),
        ("SuperPointForKeypointDetection", {}, lambda: images(3, 64, 1)),
        ("Swin2SRForImageSuperResolution", {"embed_dim": 12, "depths": [1], "num_heads": [2],
                                            "image_size": 16, "window_size": 4},
         lambda: images(size=16, count=1)),
        ("Wav2Vec2Model", speech, sound),
        ("HubertModel", speech, sound),
        ("WavLMModel", speech, sound),
        ("SEWModel", {**speech, "squeeze_factor": 2, "conv_dim": (32,) * 13}, sound),
        ("UniSpeechModel", speech, sound),
        ("Data2VecAudioModel", speech, sound),
        ("EncodecModel", {"num_filters": 8, "hidden_size": 16, "codebook_size": 16,
                          "codebook_dim": 16, "num_lstm_layers": 1}, lambda: sound(960, 1)),
        ("DacModel", {"encoder_hidden_size": 8, "decoder_hidden_size": 32, "hidden_size": 128,
                      "downsampling_ratios": [2, 4], "upsampling_ratios": [4, 2],
                      "n_codebooks": 2, "codebook_size": 16}, lambda: sound(512, 1)),
    ]  # fmt: skip
    return [
        Entry("transformers", model, f"transformers.{model}", options, (), _configuration(model),
              inputs)
        for model, options, inputs in made
    ]  # fmt: skip


def _configuration(model: str) -> str:
    """The name of a model's configuration: ResNetForImageClassification, ResNetConfig."""
    return re.split(r"For[A-Z]|Model$", model)[0] + "Config"


def matching() -> list[Entry]:
    patches: Making = lambda: images(1, 32, 4)  # noqa: E731
    names = ("HardNet", "HardNet8", "SOSNet", "TFeat", "HyNet")
    made: list[tuple[str, tuple[Any, ...], dict[str, Any], Making]] = [
        *((f"feature.{name}", (False,), {}, patches) for name in names),
        ("feature.OriNet", (False,), {}, patches),
        ("feature.KeyNet", (False,), {}, lambda: images(1, 32)),
        ("feature.XFeatModel", (), {}, lambda: images(1, 64)),
        ("feature.DISK", (), {}, lambda: images(3, 64)),
        ("models.dexined.DexiNed", (), {"pretrained": False}, lambda: images(3, 64, 1)),
        (
            "models.tiny_vit.TinyViT",
            (),
            {
                "img_size": 64,
                "embed_dims": (16, 32, 32, 64),
                "depths": (1, 1, 1, 1),
                "num_heads": (1, 1, 2, 2),
                "window_sizes": (2, 2, 2, 2),
            },
            lambda: images(3, 64),
        ),
        ("models.efficient_vit.backbone.efficientvit_backbone_b0", (), {}, images),
        ("models.vit_mobile.MobileViT", ("xxs",), {"patch_size": (2, 2)}, images),
    ]
    return [
        Entry("kornia", place.rpartition(".")[2], f"kornia.{place}", options, arguments,
              inputs=inputs)
        for place, arguments, options, inputs in made
    ]  # fmt: skip
