"""Models of MONAI, in two and in three dimensions."""

from __future__ import annotations

from typing import Any

from benchmarks.libraries.catalogue.entry import Entry, Inputs, Making, images, values, volumes

_FLAT: dict[str, Any] = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
_DEEP: dict[str, Any] = {**_FLAT, "spatial_dims": 3}
_STEPS: dict[str, Any] = {"channels": (8, 16, 32), "strides": (2, 2)}
_KERNELS: dict[str, Any] = {
    "kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2],
}  # fmt: skip
_FEATURES = {"features": (8, 8, 16, 16, 32, 8)}
_LEVELS: dict[str, Any] = {
    "channels": (16, 32), "num_res_blocks": (1, 1), "attention_levels": (False, False),
    "norm_num_groups": 8,
}  # fmt: skip
_RESNET: dict[str, Any] = {
    "layers": [1, 1, 1, 1], "block_inplanes": [8, 16, 32, 64], "n_input_channels": 1,
    "num_classes": 4,
}  # fmt: skip
_SE: dict[str, Any] = {"layers": (1, 1, 1, 1), "in_channels": 1, "num_classes": 4}
_ADVERSARIAL: dict[str, Any] = {"channels": (8, 16), "strides": (2, 2)}


def one() -> Inputs:
    return images(1)


def medical() -> list[Entry]:
    return [
        Entry("monai", name, f"monai.networks.nets.{name.split()[0]}", options, inputs=inputs)
        for name, options, inputs in (*_unets(), *_classifiers(), *_generative())
    ]


def _unets() -> list[tuple[str, dict[str, Any], Making]]:
    return [
        ("UNet 2d", {**_FLAT, **_STEPS, "num_res_units": 2, "norm": "batch"}, one),
        ("UNet 3d", {**_DEEP, **_STEPS, "num_res_units": 2}, volumes),
        ("BasicUNet 2d", {**_FLAT, **_FEATURES}, one),
        ("BasicUNetPlusPlus 2d", {**_FLAT, **_FEATURES, "norm": "batch"}, one),
        ("DynUNet 2d", {**_FLAT, **_KERNELS, "norm_name": "batch"}, one),
        ("DynUNet 3d", {**_DEEP, **_KERNELS, "res_block": True}, volumes),
        ("DynUNet supervised",
         {**_FLAT, "kernel_size": [3] * 4, "strides": [1, 2, 2, 2],
          "upsample_kernel_size": [2, 2, 2], "norm_name": "batch", "deep_supervision": True}, one),
        ("SegResNet 2d", {**_FLAT, "init_filters": 8}, one),
        ("SegResNetDS 2d", {**_FLAT, "init_filters": 8, "blocks_down": (1, 1, 1)}, one),
        ("VNet 3d", _DEEP, volumes),
        ("AttentionUnet 2d", {**_FLAT, **_STEPS}, one),
        ("HighResNet 2d", _FLAT, one),
        ("FlexibleUNet 2d", {"in_channels": 1, "out_channels": 2, "backbone": "efficientnet-b0",
                             "decoder_channels": (32, 16, 16, 8, 8)}, one),
        ("MedNeXt 2d", {**_FLAT, "init_filters": 8, "blocks_down": (1, 1, 1, 1),
                        "blocks_bottleneck": 1, "blocks_up": (1, 1, 1, 1)}, one),
        ("Quicknat 2d", {"num_classes": 2, "num_filters": 8, "norm": "BATCH"}, one),
        ("RegUNet 2d", {"spatial_dims": 2, "in_channels": 1, "num_channel_initial": 8,
                        "depth": 2}, one),
        ("LocalNet 2d", {"spatial_dims": 2, "in_channels": 1, "num_channel_initial": 8,
                         "extract_levels": (0, 1)}, one),
        ("VoxelMorphUNet 2d",
         {"spatial_dims": 2, "in_channels": 2, "unet_out_channels": 16,
          "channels": (8, 8, 16, 16, 16, 16), "final_conv_channels": (8,)}, lambda: images(2)),
        ("UNETR 2d", {"in_channels": 1, "out_channels": 2, "img_size": 32, "spatial_dims": 2,
                      "feature_size": 8, "hidden_size": 48, "mlp_dim": 48, "num_heads": 2,
                      "norm_name": "batch"}, values(1, 1, 32, 32)),
    ]  # fmt: skip


def _classifiers() -> list[tuple[str, dict[str, Any], Making]]:
    return [
        ("DenseNet 2d", {**_FLAT, "init_features": 16, "growth_rate": 8,
                         "block_config": (2, 2, 2)}, one),
        ("DenseNet 3d", {**_DEEP, "init_features": 8, "growth_rate": 4,
                         "block_config": (2, 2)}, volumes),
        ("ResNet 2d", {**_RESNET, "block": "basic", "spatial_dims": 2}, one),
        ("ResNet 3d", {**_RESNET, "block": "bottleneck", "spatial_dims": 3}, volumes),
        ("EfficientNetBN 2d", {"model_name": "efficientnet-b0", "pretrained": False,
                               "in_channels": 1, "num_classes": 4}, one),
        ("SEResNet50 2d", {**_SE, "spatial_dims": 2}, one),
        ("SEResNext50 3d", {**_SE, "spatial_dims": 3}, volumes),
        ("Classifier 2d", {**_ADVERSARIAL, "in_shape": (1, 64, 64), "classes": 3,
                           "norm": "batch"}, one),
    ]  # fmt: skip


def _generative() -> list[tuple[str, dict[str, Any], Making]]:
    shape = {**_FLAT, **_LEVELS}
    return [
        ("AutoencoderKL 2d",
         {**shape, "latent_channels": 3, "with_encoder_nonlocal_attn": False,
          "with_decoder_nonlocal_attn": False}, values(1, 1, 32, 32)),
        ("VQVAE 2d",
         {**_FLAT, "channels": (16, 16), "num_res_layers": 1, "num_res_channels": (16, 16),
          "downsample_parameters": ((2, 4, 1, 1),) * 2,
          "upsample_parameters": ((2, 4, 1, 1, 0),) * 2}, one),
        ("AutoEncoder 2d", {**_FLAT, **_ADVERSARIAL, "num_res_units": 1, "norm": "batch"}, one),
        ("PatchDiscriminator 2d", {"spatial_dims": 2, "channels": 8, "in_channels": 1}, one),
        ("Discriminator 2d", {**_ADVERSARIAL, "in_shape": (1, 64, 64)}, one),
        ("Generator 2d", {**_ADVERSARIAL, "latent_shape": (16,), "start_shape": (16, 8, 8)},
         values(2, 16)),
    ]  # fmt: skip
