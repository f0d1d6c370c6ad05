"""Models of pytorchcv: one of each family that is small, of classification and of other tasks."""

from __future__ import annotations

from benchmarks.libraries.catalogue.entry import Entry, Making, images, values

_PLACE = "pytorchcv.model_provider.get_model"
_IMAGENET = (
    "bninception", "resnet10", "preresnet10", "resnext14_32x2d",
    "seresnet10", "sepreresnet10", "senet16", "resnestabc14", "ibn_resnet50", "airnet50_1x64d_r2",
    "bam_resnet18", "cbam_resnet18", "regnetx002", "diaresnet10", "diapreresnet10",
    "diracnet18v2", "sharesnet18", "peleenet", "drnd22", "dpn68", "darknet_tiny", "darknet19",
    "darknet53", "channelnet", "revnet38", "bagnet9", "dla34", "dla46xc", "espnetv2_wd2",
    "dicenet_wd5", "hrnet_w18_small_v1", "vovnet27s", "selecsls42", "hardnet39ds",
    "squeezenet_v1_1", "squeezeresnet_v1_1", "sqnxt23_w1", "shufflenet_g3_w1", "shufflenetv2_wd2",
    "shufflenetv2b_wd2", "menet108_8x1_g3", "mobilenet_wd4", "mobilenetb_wd4", "fdmobilenet_wd4",
    "mobilenetv2_wd4", "mobilenetv3_small_wd2", "igcv3_wd4", "ghostnet", "mnasnet_small",
    "proxylessnas_mobile", "fbnet_cb", "spnasnet", "efficientnet_b0", "efficientnet_b0b",
    "mixnet_s", "resneta10", "octresnet10_ad2", "isqrtcovresnet18",
)  # fmt: skip
_CIFAR = (
    "nin_cifar10", "resnet20_cifar10", "preresnet20_cifar10", "resnext20_2x16d_cifar10",
    "seresnet20_cifar10", "densenet40_k12_cifar10", "rir_cifar10", "resdropresnet20_cifar10",
    "shakeshakeresnet20_2x16d_cifar10", "shakedropresnet20_cifar10", "diaresnet20_cifar10",
    "fractalnet_cifar10",
)  # fmt: skip


def _size(height: int, width: int | None = None) -> Making:
    return values(1, 3, height, width or height)


_OTHER: dict[str, tuple[dict[str, object], Making]] = {
    "simplepose_resnet18_coco": ({"pretrained_backbone": False}, _size(64)),
    "centernet_resnet18_voc": ({"pretrained_backbone": False}, _size(128)),
    "lednet_cityscapes": ({"in_size": (128, 128)}, _size(128)),
    "edanet_cityscapes": ({"in_size": (128, 128)}, _size(128)),
    "enet_cityscapes": ({"in_size": (128, 128)}, _size(128)),
    "erfnet_cityscapes": ({"in_size": (128, 128)}, _size(128)),
    "fastscnn_cityscapes": ({"in_size": (128, 128)}, _size(128)),
    "cgnet_cityscapes": ({"in_size": (128, 128)}, _size(128)),
    "dabnet_cityscapes": ({"in_size": (128, 128)}, _size(128)),
    "sinet_cityscapes": ({"in_size": (128, 128)}, _size(128)),
    "fpenet_cityscapes": ({"in_size": (128, 128)}, _size(128)),
    "linknet_cityscapes": ({"in_size": (128, 128), "pretrained_backbone": False}, _size(128)),
    "segnet_cityscapes": ({"in_size": (64, 64)}, _size(64)),
    "unet_cityscapes": ({"in_size": (64, 64)}, _size(64)),
}


def classification() -> list[Entry]:
    small: list[tuple[str, dict[str, object], Making]] = [
        (name, {}, lambda: images(size=224, count=1)) for name in _IMAGENET
    ]
    small += [(name, {}, lambda: images(size=32)) for name in _CIFAR]
    small += [(name, *made) for name, made in _OTHER.items()]
    return [
        Entry("pytorchcv", name, _PLACE, {"pretrained": False, **options}, (name,), inputs=inputs)
        for name, options, inputs in small
    ]
