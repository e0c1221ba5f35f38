"""The four loops over activations for CPU tensors: compiled for dense float32, in ATen for all others.

Shapes: x_NCL, dy_NCL, y_NCL, dx_NCL; pivot_C, scale_C, shift_C, level_C, slope_C in the dtype of the arithmetic (at
least float32); sums_KC float64, of two kinds. ``kernels.aten`` documents what each computes.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CDLL
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from distnorm.kernels import aten
from distnorm.kernels.native import NO_EPILOGUE, library

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Family(NamedTuple):
    """The compiled loops for rows or for planes."""

    rows: bool
    sums: Callable[..., None]
    apply: Callable[..., None]
    combine: Callable[..., None]


Image = tuple[int, int, int, int]
"""N, C, L and the number of threads: the last arguments of each call of a loop."""

Loops = tuple[Family, Image]


def moments(x_NCL: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return sums of x and of x^2 with their count, ``[2 C + 1]``, float64; the mean; memory for an output, if any."""
    compiled = loops(x_NCL)
    if compiled is None:
        return aten.moments(x_NCL)
    family, image = compiled
    channels = x_NCL.shape[1]
    payload = torch.empty(2 * channels + 1, dtype=torch.float64)
    pivot_C = x_NCL.new_empty(channels)
    x, pivot, sums = (each.data_ptr() for each in (x_NCL, pivot_C, payload))
    family.sums(None, x, None, None, pivot, None, None, NO_EPILOGUE, sums, *image)
    return payload, pivot_C, None


def apply(x_NCL: Tensor, pivot_C: Tensor, scale_C: Tensor, shift_C: Tensor, *, into: Tensor | None = None) -> Tensor:
    """Return ``(x - pivot) * scale + shift``, in the dtype of x; in new memory, or ``into``."""
    compiled = loops(x_NCL)
    if compiled is None:
        return aten.apply(x_NCL, pivot_C, scale_C, shift_C, into=into)
    family, image = compiled
    y_NCL = torch.empty_like(x_NCL) if into is None else into
    x, y, *vectors = (each.data_ptr() for each in (x_NCL, y_NCL, pivot_C, scale_C, shift_C))
    family.apply(x, None, y, *vectors, NO_EPILOGUE, *image)
    return y_NCL


def cosums(dy_NCL: Tensor, x_NCL: Tensor, pivot_C: Tensor) -> Tensor:
    """Return ``sum(dy), sum(dy * (x - pivot))``, ``[2, C]``, float64."""
    compiled = loops(x_NCL)
    if compiled is None:
        return aten.cosums(dy_NCL, x_NCL, pivot_C)
    family, image = compiled
    dy_NCL = like(dy_NCL, x_NCL)
    sums_KC = torch.empty(2, x_NCL.shape[1], dtype=torch.float64)
    dy, x, pivot, sums = (each.data_ptr() for each in (dy_NCL, x_NCL, pivot_C, sums_KC))
    family.sums(dy, x, None, None, pivot, None, None, NO_EPILOGUE, sums, *image)
    return sums_KC


def combine(
    dy_NCL: Tensor, x_NCL: Tensor, pivot_C: Tensor, scale_C: Tensor, level_C: Tensor, slope_C: Tensor
) -> Tensor:
    """Return ``dy * scale + level + (x - pivot) * slope``, in the dtype of x."""
    compiled = loops(x_NCL)
    if compiled is None:
        return aten.combine(dy_NCL, x_NCL, pivot_C, scale_C, level_C, slope_C)
    family, image = compiled
    dx_NCL = torch.empty_like(x_NCL)
    dy_NCL = like(dy_NCL, x_NCL)
    images = (each.data_ptr() for each in (dy_NCL, x_NCL, dx_NCL))
    pivot, scale, level, slope = (each.data_ptr() for each in (pivot_C, scale_C, level_C, slope_C))
    family.combine(*images, pivot, scale, None, level, slope, *image)
    return dx_NCL


def loops(x_NCL: Tensor) -> Loops | None:
    """Return the compiled loops for ``x_NCL``; None if it has another dtype, has gaps, or is empty."""
    values = x_NCL.numel()
    found = library() if x_NCL.dtype is torch.float32 and values else None
    if found is None:
        return None
    batch, channels, *_ = x_NCL.shape
    length = values // (batch * channels)
    image = batch, channels, length, torch.get_num_threads()
    if length > 1 and x_NCL.is_contiguous():
        return _families(found)[False], image
    memory_format = _CHANNELS_LAST.get(x_NCL.dim(), torch.contiguous_format)
    if x_NCL.is_contiguous(memory_format=memory_format) and (length == 1 or x_NCL.dim() in _CHANNELS_LAST):
        return _families(found)[True], image
    return None


@cache
def _families(found: CDLL) -> tuple[Family, Family]:
    """Return the loops for planes and for rows."""
    planes = Family(False, found.plane_sums, found.plane_apply, found.plane_combine)
    return planes, Family(True, found.row_sums, found.row_apply, found.row_combine)


def like(dy_NCL: Tensor, x_NCL: Tensor) -> Tensor:
    """Return ``dy`` in the layout of ``x``, which is dense."""
    if dy_NCL.stride() == x_NCL.stride() and dy_NCL.dtype == x_NCL.dtype:
        return dy_NCL
    return torch.empty_like(x_NCL).copy_(dy_NCL)
