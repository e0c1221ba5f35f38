"""torchvision beside a torch without CUDA: its wheel for Linux is linked to CUDA's libraries, so none of its operators
is there, and torchvision 0.28 fails at its import, where it describes two of them to the compiler
(pytorch/vision#9085). Import this first.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_library = torch.library.Library("torchvision", "FRAGMENT")


def nms(dets: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Places of the boxes that overlap with no better one by more than ``iou_threshold``, the best one first."""
    low, high = dets[:, None, :2].maximum(dets[None, :, :2]), dets[:, None, 2:].minimum(dets[None, :, 2:])
    area, shared = (dets[:, 2:] - dets[:, :2]).prod(1), (high - low).clamp(min=0).prod(2)
    overlap = shared / (area[:, None] + area[None] - shared)
    kept: list[int] = []
    for place in scores.argsort(descending=True, stable=True).tolist():
        if not kept or not bool((overlap[place, kept] > iou_threshold).any()):
            kept.append(place)
    return torch.tensor(kept, dtype=torch.long)


if torch.version.cuda is None and find_spec("torchvision") is not None:
    for name in ("nms", "qnms"):
        _library.define(f"{name}{_SCHEMA}")
    _library.impl("nms", nms, "CPU")

    boxes = import_module("torchvision.ops.boxes")
    boxes._assert_has_ops = lambda: None
    roi_align = import_module("torchvision.ops.roi_align")
    roi_align._roi_align = roi_align._roi_align.__wrapped__  # without its torch.compile, which takes a minute
