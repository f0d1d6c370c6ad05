"""What detectors need: suppression of boxes, targets, and outputs that can be compared.

A detector's boxes go through thresholds and suppression, where a last digit decides what is
returned at all. Compared are its feature maps and the outputs of its heads, for boxes that are
given.
"""

from __future__ import annotations

from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import box_iou, boxes

COMPARED = "feature maps and head outputs"

_BOXES = ((8.0, 8.0, 72.0, 64.0), (16.0, 24.0, 100.0, 110.0), (40.0, 4.0, 90.0, 60.0))
_POINTS = 17


def provide_suppression() -> None:
    """torchvision.ops.nms in plain torch, where torchvision's compiled part does not load."""
    if torchvision.extension._has_ops():
        return
    torch.library.impl("torchvision::nms", "CPU", _suppressed)
    boxes._assert_has_ops = lambda: None


def _suppressed(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    order = scores.argsort(descending=True)
    overlaps = box_iou(dets[order], dets[order]) > iou_threshold
    kept: list[int] = []
    for index in range(len(order)):
        if not overlaps[index, kept].any():
            kept.append(index)
    return order[kept]


def is_detector(model: nn.Module) -> bool:
    return type(model).__module__.startswith("torchvision.models.detection.")


def images(size: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(3, size, size, generator=generator).to(dtype) for _ in range(2)]


def targets(model: nn.Module, size: int, dtype: torch.dtype) -> list[dict[str, Tensor]]:
    """One target for each image, with masks or keypoints where the model learns them."""
    given = torch.tensor(_BOXES).to(dtype)
    target = {"boxes": given, "labels": torch.ones(len(given), dtype=torch.int64)}
    roi_heads: Any = getattr(model, "roi_heads", None)
    if roi_heads is not None and roi_heads.has_mask():
        target["masks"] = torch.ones(len(given), size, size, dtype=torch.uint8)
    if roi_heads is not None and roi_heads.has_keypoint():
        points = given[:, None, :2] + torch.arange(_POINTS)[None, :, None].to(dtype)
        seen = torch.ones(len(given), _POINTS, 1).to(dtype)
        target["keypoints"] = torch.cat([points, seen], dim=2).float()  # no other type is taken
    return [target, {name: value.clone() for name, value in target.items()}]


def inner_outputs(model: Any, given: list[Tensor]) -> list[Any]:
    """Feature maps, and what each head makes of them for the same boxes."""
    batch, _ = model.transform(given, None)
    features = model.backbone(batch.tensors)
    if isinstance(features, Tensor):
        features = {"0": features}
    maps = list(features.values())
    if not hasattr(model, "rpn"):
        return [maps, model.head(maps)]
    roi = model.roi_heads
    regions = [torch.tensor(_BOXES).to(maps[0].dtype) for _ in given]
    where = (features, regions, batch.image_sizes)
    outputs = [
        maps,
        model.rpn.head(maps),
        roi.box_predictor(roi.box_head(roi.box_roi_pool(*where))),
    ]
    if roi.has_mask():
        outputs.append(roi.mask_predictor(roi.mask_head(roi.mask_roi_pool(*where))))
    if roi.has_keypoint():
        outputs.append(roi.keypoint_predictor(roi.keypoint_head(roi.keypoint_roi_pool(*where))))
    return outputs
