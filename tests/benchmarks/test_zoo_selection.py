"""Sixty models of the zoo, one for each way through the code, checked as the whole zoo is.

What is unusual in them: convs with a forward of their own (nfnet, resnetv2, Conv2dSame), called
several times or under several names (detectors, CoaT), under forwards that do not trace (TinyViT,
EfficientViT), layer scale, BatchNorm on tokens (LeViT), behind a concatenation (MixNet) or before a
conv (Visformer), sums of branches (GhostNetV3, RepViT, RepGhost), 1 x 1 maps, rectangular and
grouped kernels. FastViT is not among them: torch 2.13 itself corrupts memory in the backward of its
1 x 1 stem conv of stride 2.

Those that take longest, and show nothing that no other shows, are checked where OREPA_THOROUGH is
set.
"""

from __future__ import annotations

import os

import pytest

from benchmarks.zoo import detection
from benchmarks.zoo.building import subjects
from benchmarks.zoo.examining import Limits, examine
from benchmarks.zoo.running import run_all

pytestmark = pytest.mark.zoo

LIMITS = Limits(seconds=600, memory=8e9)

# Convs, how many of them are expanded by default, and the norms that are left, behind what no
# conv alone makes: counted, so that a match that is lost is seen.
MODELS = {
    "timm:botnet26t_256": (31, 28, 3),
    "timm:coat_lite_tiny": (20, 0, 0),
    "timm:convit_tiny": (1, 0, 0),
    "timm:crossvit_tiny_240": (2, 0, 0),
    "timm:cs3darknet_focus_s": (31, 31, 0),
    "timm:davit_tiny": (28, 1, 0),
    "timm:dla46_c": (49, 48, 0),
    "timm:dpn48b": (70, 37, 21),
    "timm:edgenext_xx_small": (20, 9, 0),
    "timm:efficientnet_cc_b0_4e": (57, 25, 23),
    "timm:efficientvit_b0": (50, 38, 0),
    "timm:efficientvit_m0": (116, 112, 0),
    "timm:ese_vovnet19b_slim": (23, 19, 0),
    "timm:eva02_tiny_patch14_224": (1, 0, 0),
    "timm:ghostnet_050": (95, 80, 0),
    "timm:ghostnetv3_050": (309, 294, 0),
    "timm:hardcorenas_a": (51, 34, 0),
    "timm:hiera_tiny_224": (1, 0, 0),
    "timm:hrnet_w18_small": (91, 91, 0),
    "timm:inception_next_atto": (64, 48, 0),
    "timm:lcnet_035": (32, 27, 0),
    "timm:levit_128s": (4, 4, 2),
    "timm:mixnet_s": (123, 97, 0),
    "timm:mnasnet_small": (66, 46, 0),
    "timm:mobilenetv4_conv_small_035": (46, 45, 0),
    "timm:mobilevit_xxs": (35, 32, 0),
    "timm:nest_tiny": (3, 2, 0),
    "timm:nf_regnet_b0": (86, 18, 0),
    "timm:poolformer_s12": (28, 12, 0),
    "timm:pvt_v2_b0": (18, 4, 0),
    "timm:regnetx_002": (44, 44, 0),
    "timm:repghostnet_050": (95, 80, 0),
    "timm:repvit_m0_9": (126, 83, 2),
    "timm:resnest14d": (27, 19, 0),
    "timm:resnetv2_18": (21, 8, 9),
    "timm:rexnet_100": (75, 49, 0),
    "timm:shvit_s1": (77, 73, 1),
    "timm:starnet_s1": (80, 50, 1),
    "timm:test_byobnet": (22, 14, 0),
    "timm:test_coatnet": (27, 8, 2),
    "timm:test_convnext": (13, 9, 0),
    "timm:test_efficientnet": (17, 13, 0),
    "timm:test_efficientnet_gn": (17, 13, 0),
    "timm:test_efficientnet_ln": (17, 13, 0),
    "timm:test_mambaout": (11, 2, 0),
    "timm:test_maxvit": (25, 9, 0),
    "timm:test_nfnet": (33, 17, 0),
    "timm:test_resnet": (15, 15, 0),
    "timm:test_vit": (1, 0, 0),
    "timm:test_vit4": (1, 0, 0),
    "timm:tf_efficientnet_lite0": (49, 49, 0),
    "timm:tf_mobilenetv3_small_minimal_100": (35, 34, 0),
    "timm:tiny_vit_5m_224": (27, 27, 0),
    "timm:visformer_tiny": (57, 23, 1),
    "timm:xcit_nano_12_p8_224": (28, 15, 12),
    "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn": (69, 47, 0),
    "torchvision:lraspp_mobilenet_v3_large": (66, 47, 0),
    "torchvision:mnasnet0_5": (52, 52, 0),
    "torchvision:shufflenet_v2_x0_5": (56, 56, 0),
    "torchvision:squeezenet1_1": (26, 26, 0),
}

LONG = {
    "timm:botnet26t_256", "timm:convit_tiny", "timm:crossvit_tiny_240",
    "timm:cs3darknet_focus_s", "timm:davit_tiny", "timm:dpn48b", "timm:edgenext_xx_small",
    "timm:efficientnet_cc_b0_4e", "timm:efficientvit_b0", "timm:efficientvit_m0",
    "timm:ese_vovnet19b_slim", "timm:eva02_tiny_patch14_224", "timm:ghostnet_050",
    "timm:ghostnetv3_050", "timm:hardcorenas_a", "timm:hiera_tiny_224", "timm:hrnet_w18_small",
    "timm:lcnet_035", "timm:mnasnet_small", "timm:mobilenetv4_conv_small_035",
    "timm:mobilevit_xxs", "timm:nest_tiny", "timm:nf_regnet_b0", "timm:poolformer_s12",
    "timm:pvt_v2_b0", "timm:regnetx_002", "timm:repghostnet_050", "timm:repvit_m0_9",
    "timm:resnest14d", "timm:rexnet_100", "timm:shvit_s1", "timm:starnet_s1", "timm:test_vit4",
    "timm:tf_efficientnet_lite0", "torchvision:lraspp_mobilenet_v3_large",
    "torchvision:mnasnet0_5",
}  # fmt: skip
CHECKED = [key for key in MODELS if "OREPA_THOROUGH" in os.environ or key not in LONG]


@pytest.mark.filterwarnings("ignore")  # of the libraries, about models that they deprecate
@pytest.mark.parametrize("key", CHECKED)
def test_model(key: str) -> None:
    detection.provide_suppression()
    (row,) = run_all(subjects(key), examine, LIMITS)  # a crash there is a row, and ends no test run
    assert row["status"] == "pass", {k: row.get(k) for k in ("why", "checks", "plan")}
    assert (row["convs"], row["plan"]["expanded"], row["norms_after"]) == MODELS[key]
