"""Every model of ``make zoo``: one of each family that has a batch norm."""

from __future__ import annotations

from functools import cache

from tests.models import libraries, pytorchcv_models, timm_models, transformers_models, transformers_pictures
from tests.models.case import Case

PACKAGES = ("timm", "torchvision", "segmentation-models-pytorch", "monai", "ultralytics", "transformers", "pytorchcv")
LIBRARIES = ("timm", "torchvision", "segmentation_models_pytorch", "monai", "ultralytics", "transformers", "pytorchcv")


@cache
def cases() -> dict[str, Case]:
    """By library and family."""
    every = [
        *timm_models.TIMM,
        *libraries.TORCHVISION,
        *libraries.SMP,
        *libraries.MONAI,
        *libraries.ULTRALYTICS,
        *transformers_models.TINY,
        *transformers_models.MORE,
        *transformers_pictures.PICTURES,
        *pytorchcv_models.PYTORCHCV,
    ]
    return {each.key: each for each in every}
