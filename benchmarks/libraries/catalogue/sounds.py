"""Nets that hear: torchaudio, speechbrain, asteroid."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.libraries.catalogue.entry import Entry, Inputs, Making, sound, values

_LENGTHS = torch.tensor([40])


def _speech() -> Inputs:
    return (torch.randn(1, 40, 16), _LENGTHS)


def hearing() -> list[Entry]:
    conformer: dict[str, Any] = {
        "input_dim": 16, "num_heads": 2, "ffn_dim": 16, "num_layers": 2,
        "depthwise_conv_kernel_size": 15,
    }  # fmt: skip
    mask: dict[str, Any] = {
        "enc_num_feats": 32, "msk_num_feats": 16, "msk_num_hidden_feats": 32, "msk_num_layers": 2,
        "msk_num_stacks": 1,
    }  # fmt: skip
    speech: dict[str, Any] = {
        "extractor_mode": "layer_norm", "extractor_conv_layer_config": [(16, 10, 5), (16, 3, 2)],
        "extractor_conv_bias": False, "encoder_embed_dim": 16,
        "encoder_projection_dropout": 0.0, "encoder_pos_conv_kernel": 16,
        "encoder_pos_conv_groups": 4, "encoder_num_layers": 1, "encoder_num_heads": 2,
        "encoder_attention_dropout": 0.0, "encoder_ff_interm_features": 16,
        "encoder_ff_interm_dropout": 0.0, "encoder_dropout": 0.0,
        "encoder_layer_norm_first": True, "encoder_layer_drop": 0.0, "aux_num_out": None,
    }  # fmt: skip
    grouped = {**speech, "extractor_mode": "group_norm", "encoder_layer_norm_first": False}
    made: list[tuple[str, str, dict[str, Any], Making]] = [
        ("Conformer", "Conformer", conformer, _speech),
        ("Conformer grouped", "Conformer", {**conformer, "use_group_norm": True}, _speech),
        ("ConvTasNet", "ConvTasNet", mask, lambda: sound(800, 1)),
        ("Wav2Letter", "Wav2Letter", {"num_classes": 8, "input_type": "mfcc", "num_features": 13},
         values(1, 13, 64)),
        ("MelResNet", "wavernn.MelResNet", {"n_res_block": 2, "n_freq": 16, "n_hidden": 16,
                                            "n_output": 16}, values(1, 16, 40)),
        ("UpsampleNetwork", "wavernn.UpsampleNetwork",
         {"upsample_scales": [2, 2, 2], "n_res_block": 2, "n_freq": 16, "n_hidden": 16,
          "n_output": 16}, values(1, 16, 40)),
        ("wav2vec2_model", "wav2vec2_model", speech, lambda: sound(800)),
        ("wav2vec2_model grouped", "wav2vec2_model", grouped, lambda: sound(800)),
        ("squim objective", "squim.objective.Encoder", {"feat_dim": 16}, values(1, 800)),
    ]  # fmt: skip
    return [
        Entry("torchaudio", name, f"torchaudio.models.{place}", options, inputs=inputs)
        for name, place, options, inputs in made
    ]


def speaking() -> list[Entry]:
    frames = values(1, 48, 40)  # the axis of channels is the last
    vocoder: dict[str, Any] = {
        "in_channels": 16, "out_channels": 1, "resblock_type": "1",
        "resblock_dilation_sizes": [[1, 3, 5]], "resblock_kernel_sizes": [3],
        "upsample_kernel_sizes": [8, 8], "upsample_initial_channel": 32,
        "upsample_factors": [4, 4],
    }  # fmt: skip
    made: list[tuple[str, dict[str, Any], Making]] = [
        ("ECAPA_TDNN.ECAPA_TDNN", {"input_size": 40, "channels": [32] * 4 + [96],
                                   "attention_channels": 16, "lin_neurons": 16}, frames),
        ("Xvector.Xvector", {"tdnn_channels": [32] * 5, "lin_neurons": 16}, frames),
        ("ResNet.ResNet", {"input_size": 40, "channels": [8, 8, 16, 16],
                           "block_sizes": [1, 1, 1, 1], "lin_neurons": 16}, frames),
        ("Cnn14.Cnn14", {"mel_bins": 64, "emb_dim": 32}, values(1, 1, 64, 64)),
        ("ContextNet.ContextNet", {"input_shape": (1, 48, 40), "out_channels": 32,
                                   "conv_channels": [16] * 3, "strides": [1, 2, 1],
                                   "num_blocks": 3, "num_layers": 2}, frames),
        ("convolution.ConvolutionFrontEnd", {"input_shape": (1, 48, 40), "num_blocks": 2,
                                             "num_layers_per_block": 2, "out_channels": [8, 16],
                                             "kernel_sizes": [3, 3], "strides": [1, 2],
                                             "residuals": [True, True]}, frames),
        ("HifiGAN.HifiganGenerator", vocoder, values(1, 16, 24)),
        ("HifiGAN.HifiganGenerator second", {**vocoder, "resblock_type": "2",
                                             "resblock_dilation_sizes": [[1, 3]]},
         values(1, 16, 24)),
        ("HifiGAN.DiscriminatorP", {"period": 2}, values(1, 1, 512)),
        ("conv_tasnet.MaskNet", {"N": 16, "B": 8, "H": 16, "P": 3, "X": 2, "R": 1, "C": 2},
         values(1, 16, 48)),
        ("wav2vec.W2VLatentExtractor", {"out_channels": [16] * 3, "kernel_sizes": [11, 3, 3],
                                        "strides": [5, 2, 2]}, lambda: sound(800)),
        ("CRDNN.CRDNN", {"input_shape": (1, 48, 40), "cnn_channels": [8, 16], "rnn_layers": 1,
                         "rnn_neurons": 16, "dnn_neurons": 16}, frames),
        ("EnhanceResnet.ConvBlock", {"input_shape": (1, 32, 24, 8), "channels": 8},
         values(1, 32, 24, 8)),
    ]  # fmt: skip
    return [
        Entry("speechbrain", place.partition(".")[2],
              f"speechbrain.lobes.models.{place.split()[0]}", options, inputs=inputs)
        for place, options, inputs in made
    ]  # fmt: skip


def parting() -> list[Entry]:
    convs: dict[str, Any] = {
        "n_blocks": 2, "n_repeats": 1, "bn_chan": 16, "hid_chan": 32, "skip_chan": 16,
    }  # fmt: skip
    net = {**convs, "n_filters": 32}
    bands: dict[str, Any] = {"bn_chan": 16, "num_blocks": 1, "n_filters": 32}
    made: list[tuple[str, str, dict[str, Any], tuple[Any, ...], Making]] = [
        ("ConvTasNet", "models.ConvTasNet", net, (2,), lambda: sound(800, 1)),
        ("ConvTasNet batch norm", "models.ConvTasNet", {**net, "norm_type": "bN"}, (2,),
         lambda: sound(800, 1)),
        ("ConvTasNet causal", "models.ConvTasNet", {**net, "causal": True, "norm_type": "cLN"},
         (2,), lambda: sound(800, 1)),
        ("TDConvNet", "masknn.TDConvNet", {**convs, "norm_type": "bN"}, (16, 2),
         values(1, 16, 80)),
        ("TDConvNetpp", "masknn.convolutional.TDConvNetpp", convs, (16, 2), values(1, 16, 80)),
        ("SuDORMRFNet", "models.SuDORMRFNet", bands, (2,), lambda: sound(1600, 1)),
        ("SuDORMRFImprovedNet", "models.SuDORMRFImprovedNet", bands, (2,),
         lambda: sound(1600, 1)),
        ("DCUNet", "models.DCUNet", {"stft_n_filters": 256, "stft_kernel_size": 256,
                                     "stft_stride": 64, "fix_length_mode": "pad"},
         ("DCUNet-10",), lambda: sound(2048, 1)),
    ]  # fmt: skip
    return [
        Entry("asteroid", name, f"asteroid.{place}", options, arguments, inputs=inputs)
        for name, place, options, arguments, inputs in made
    ]
