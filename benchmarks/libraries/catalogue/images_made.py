"""Nets that make images: diffusers, and what restores and enlarges: basicsr, spandrel."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.libraries.catalogue.entry import Entry, Making, images, sound, values

_HIDDEN: dict[str, Any] = {"num_feat": 16}
_ENDS: dict[str, Any] = {"num_in_ch": 3, "num_out_ch": 3}


def _step(*shape: int) -> Making:
    """Inputs of a net that removes noise: an image, and which step it is."""
    return lambda: (torch.randn(shape), torch.tensor([3]))


def _told(*shape: int) -> Making:
    """The same with what the image is to show."""
    return lambda: (torch.randn(shape), torch.tensor([3]), torch.randn(1, 5, 32))


def diffusion() -> list[Entry]:
    small: dict[str, Any] = {"block_out_channels": (32, 64), "norm_num_groups": 8}
    unet = {**small, "layers_per_block": 1, "sample_size": 32}
    plain = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    told = {
        **unet, "cross_attention_dim": 32, "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    coder = {
        **small, "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    tiny: dict[str, Any] = {
        f"{side}_block_out_channels": (16, 16) for side in ("encoder", "decoder")
    } | {f"num_{side}_blocks": (1, 1) for side in ("encoder", "decoder")}
    oobleck: dict[str, Any] = {
        "encoder_hidden_size": 16, "downsampling_ratios": [2, 4], "channel_multiples": [1, 2],
        "decoder_channels": 16, "decoder_input_channels": 8, "audio_channels": 1,
    }  # fmt: skip
    attending = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    made: list[tuple[str, dict[str, Any], Making]] = [
        ("UNet2DModel", {**unet, **attending}, _step(1, 3, 32, 32)),
        ("UNet2DModel plain", {**unet, **plain}, _step(1, 3, 32, 32)),
        ("UNet2DModel scaled", {**unet, **plain, "resnet_time_scale_shift": "scale_shift"},
         _step(1, 3, 32, 32)),
        ("UNet2DConditionModel", {**told, "in_channels": 4}, _told(1, 4, 16, 16)),
        ("AutoencoderKL", coder, lambda: images(size=32)),
        ("VQModel", {**coder, "num_vq_embeddings": 16}, lambda: images(size=32)),
        ("AutoencoderTiny", tiny, lambda: images(size=32)),
        ("AutoencoderOobleck", oobleck, lambda: sound(512, 1)),
        ("UNet1DModel",
         {"block_out_channels": (32, 32, 64), "sample_size": 64, "in_channels": 2,
          "out_channels": 2, "extra_in_channels": 16}, _step(1, 2, 64)),
    ]  # fmt: skip
    return [Entry("diffusers", n, f"diffusers.{n.split()[0]}", o, inputs=i) for n, o, i in made]


def restoration() -> list[Entry]:
    small = lambda: images(size=16, count=1)  # noqa: E731
    made: list[tuple[str, str, dict[str, Any], Making]] = [
        ("edsr_arch", "EDSR", {**_ENDS, **_HIDDEN, "num_block": 2}, small),
        ("srresnet_arch", "MSRResNet", {**_HIDDEN, "num_block": 2}, small),
        ("rcan_arch", "RCAN", {**_ENDS, **_HIDDEN, "num_group": 1, "num_block": 2}, small),
        ("ridnet_arch", "RIDNet", {"in_channels": 3, "mid_channels": 16, "out_channels": 3,
                                   "num_block": 1}, small),
        ("rrdbnet_arch", "RRDBNet", {**_ENDS, **_HIDDEN, "num_block": 1, "num_grow_ch": 8}, small),
        ("srvgg_arch", "SRVGGNetCompact", {**_HIDDEN, "num_conv": 3}, small),
        ("ecbsr_arch", "ECBSR", {**_ENDS, "num_block": 2, "num_channel": 8, "with_idt": True,
                                 "act_type": "prelu", "scale": 2}, small),
        ("discriminator_arch", "UNetDiscriminatorSN", {"num_in_ch": 3, "num_feat": 8},
         lambda: images(size=32)),
        ("discriminator_arch", "VGGStyleDiscriminator", {"num_in_ch": 3, "num_feat": 8},
         lambda: images(size=128)),
        ("swinir_arch", "SwinIR", {"img_size": 16, "embed_dim": 12, "depths": (2,),
                                   "num_heads": (2,), "window_size": 4,
                                   "upsampler": "pixelshuffle"}, small),
        ("duf_arch", "DUF", {"num_layer": 16}, values(1, 7, 3, 16, 16)),
        ("tof_arch", "TOFlow", {}, values(1, 7, 3, 32, 32)),
        ("spynet_arch", "BasicModule", {}, values(1, 8, 32, 32)),
        ("basicvsr_arch", "BasicVSR", {**_HIDDEN, "num_block": 1}, values(1, 2, 3, 64, 64)),
        ("edvr_arch", "PredeblurModule", {**_HIDDEN}, small),
        ("edvr_arch", "TSAFusion", {**_HIDDEN}, values(1, 5, 16, 16, 16)),
    ]  # fmt: skip
    return [
        Entry("basicsr", name, f"basicsr.archs.{file}.{name}", options, inputs=inputs)
        for file, name, options, inputs in made
    ]


def enlarging() -> list[Entry]:
    small = lambda: images(size=16, count=1)  # noqa: E731
    wide = lambda: images(size=64, count=1)  # noqa: E731
    narrow: dict[str, Any] = {"nc": [8, 16, 16, 32], "nb": 1}
    unet: dict[str, Any] = {"width": 8, "middle_blk_num": 1, "enc_blk_nums": [1, 1],
                            "dec_blk_nums": [1, 1]}  # fmt: skip
    made: list[tuple[str, dict[str, Any], Making]] = [
        ("Compact.__arch.SRVGG.SRVGGNetCompact", {**_HIDDEN, "num_conv": 3}, small),
        ("DRUNet.__arch.network_unet.DRUNet", narrow, lambda: images(1, 32, 1)),
        ("DnCNN.__arch.network_dncnn.DnCNN", {"nc": 16, "nb": 5}, lambda: images(1, 32, 1)),
        ("ESRGAN.__arch.RRDB.RRDBNet", {"num_filters": 16, "num_blocks": 1}, small),
        ("ESRGAN.__arch.RRDB.RRDBNet plus", {"num_filters": 16, "num_blocks": 1, "plus": True},
         small),
        
        ("KBNet.__arch.kbnet_s.KBNet_s", unet, small),
        ("MixDehazeNet.__arch.MixDehazeNet.MixDehazeNet", 
         {"embed_dims": [8, 16, 16, 16, 8], "depths": [1] * 5}, wide),
        ("MoSR.__arch.mosr_arch.MoSR", {"n_block": 2, "dim": 16}, small),
        ("NAFNet.__arch.NAFNet_arch.NAFNet", unet, small),
        ("OmniSR.__arch.OmniSR.OmniSR", {"num_feat": 16}, small),
        ("PLKSR.__arch.PLKSR.PLKSR", {"dim": 16, "n_blocks": 2}, small),
        ("PLKSR.__arch.RealPLKSR.RealPLKSR", {"dim": 16, "n_blocks": 2}, small),
        ("RCAN.__arch.rcan_arch.RCAN", {"n_resgroups": 1, "n_resblocks": 2, "n_feats": 16}, small),
        ("RealCUGAN.__arch.upcunet_v3.UpCunet2x", {}, wide),
        ("RealCUGAN.__arch.upcunet_v3.UpCunet2x_fast", {}, wide),
        ("SAFMN.__arch.safmn.SAFMN", {"dim": 16, "n_blocks": 2}, small),
        ("SPAN.__arch.span.SPAN", {**_ENDS, "feature_channels": 16}, small),
        ("SwiftSRGAN.__arch.SwiftSRGAN.Generator", {"num_channels": 16, "num_blocks": 2}, small),
        ("DCTLSA.__arch.dctlsa.DCTLSA", {"nf": 20, "num_modules": 6, "num_head": 4}, small),
        ("SCUNet.__arch.SCUNet.SCUNet", {"config": [2] * 7, "dim": 64}, wide),
        ("RetinexFormer.__arch.retinexformer_arch.RetinexFormer", {"n_feat": 8, "stage": 1},
         small),
        ("HVICIDNet.__arch.cidnet.CIDNet", {"channels": [8, 8, 16, 32]}, small),
    ]  # fmt: skip
    return [
        Entry("spandrel", place.rpartition(".")[2],
              f"spandrel.architectures.{place.split()[0]}", options, inputs=inputs)
        for place, options, inputs in made
    ]  # fmt: skip
