"""The four loops over big tensors, for CPU tensors: compiled for dense float32, ATen's for all others.

Shapes: x_NCL, dy_NCL, y_NCL, dx_NCL; pivot_C, scale_C, shift_C, level_C, slope_C in the dtype of the arithmetic (at
least float32); sums_KC float64, of two kinds. ``kernels.aten`` says what each computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distnorm.kernels import aten
from distnorm.kernels.native import library

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Loops(NamedTuple):
    """The compiled loops for one layout, rows or planes, and the arguments that end each call."""

    rows: bool
    sums: Callable[..., None]
    apply: Callable[..., None]
    combine: Callable[..., None]
    image: tuple[int, int, int, int]


def moments(x_NCL: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of x and of its squares with their count, ``[2 C + 1]``, float64; the mean; memory for an output, if any."""
    compiled = loops(x_NCL)
    if compiled is None:
        return aten.moments(x_NCL)
    channels = x_NCL.shape[1]
    wire = torch.empty(2 * channels + 1, dtype=torch.float64)
    pivot_C = x_NCL.new_empty(channels)
    x, pivot, sums = (each.data_ptr() for each in (x_NCL, pivot_C, wire))
    compiled.sums(None, x, None, None, pivot, None, None, sums, *compiled.image)
    return wire, pivot_C, None


def apply(x_NCL: Tensor, pivot_C: Tensor, scale_C: Tensor, shift_C: Tensor, *, into: Tensor | None = None) -> Tensor:
    """``(x - pivot) * scale + shift``, in the dtype of x; in new memory, or ``into``."""
    compiled = loops(x_NCL)
    if compiled is None:
        return aten.apply(x_NCL, pivot_C, scale_C, shift_C, into=into)
    y_NCL = torch.empty_like(x_NCL) if into is None else into
    x, y, *vectors = (each.data_ptr() for each in (x_NCL, y_NCL, pivot_C, scale_C, shift_C))
    compiled.apply(x, None, y, *vectors, False, *compiled.image)
    return y_NCL


def cosums(dy_NCL: Tensor, x_NCL: Tensor, pivot_C: Tensor) -> Tensor:
    """``sum(dy), sum(dy * (x - pivot))``, ``[2, C]``, float64."""
    compiled = loops(x_NCL)
    if compiled is None:
        return aten.cosums(dy_NCL, x_NCL, pivot_C)
    dy_NCL = like(dy_NCL, x_NCL)
    sums_KC = torch.empty(2, x_NCL.shape[1], dtype=torch.float64)
    dy, x, pivot, sums = (each.data_ptr() for each in (dy_NCL, x_NCL, pivot_C, sums_KC))
    compiled.sums(dy, x, None, None, pivot, None, None, sums, *compiled.image)
    return sums_KC


def combine(
    dy_NCL: Tensor, x_NCL: Tensor, pivot_C: Tensor, scale_C: Tensor, level_C: Tensor, slope_C: Tensor
) -> Tensor:
    """``dy * scale + level + (x - pivot) * slope``, in the dtype of x."""
    compiled = loops(x_NCL)
    if compiled is None:
        return aten.combine(dy_NCL, x_NCL, pivot_C, scale_C, level_C, slope_C)
    dx_NCL = torch.empty_like(x_NCL)
    dy_NCL = like(dy_NCL, x_NCL)
    images = (each.data_ptr() for each in (dy_NCL, x_NCL, dx_NCL))
    pivot, scale, level, slope = (each.data_ptr() for each in (pivot_C, scale_C, level_C, slope_C))
    compiled.combine(*images, pivot, scale, None, level, slope, *compiled.image)
    return dx_NCL


def loops(x_NCL: Tensor) -> Loops | None:
    """The compiled loops for ``x_NCL``; None where it is another dtype, has gaps, or is empty."""
    found = library() if x_NCL.dtype is torch.float32 and x_NCL.numel() else None
    if found is None:
        return None
    batch, channels = x_NCL.shape[:2]
    length = x_NCL.numel() // (batch * channels)
    image = batch, channels, length, torch.get_num_threads()
    if x_NCL.is_contiguous() and length > 1:
        return Loops(False, found.plane_sums, found.plane_apply, found.plane_combine, image)
    memory_format = _CHANNELS_LAST.get(x_NCL.dim(), torch.contiguous_format)
    if x_NCL.is_contiguous(memory_format=memory_format) and (length == 1 or x_NCL.dim() in _CHANNELS_LAST):
        return Loops(True, found.row_sums, found.row_apply, found.row_combine, image)
    return None


def like(dy_NCL: Tensor, x_NCL: Tensor) -> Tensor:
    """``dy`` laid out as ``x``, which is dense."""
    if dy_NCL.stride() == x_NCL.stride() and dy_NCL.dtype == x_NCL.dtype:
        return dy_NCL
    return torch.empty_like(x_NCL).copy_(dy_NCL)
