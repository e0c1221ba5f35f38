"""Which methods' C-sized arithmetic ``arithmetic.c`` and the kernels for GPUs know."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Formula(NamedTuple):
    """A method of ``arithmetic.c``, and what limits its correction by running_var, if it has one.

    Where asking would make the host wait, the device compares ``updates`` with ``clip_after``.
    """

    name: str
    kinds: int
    running_var_C: Tensor | None = None
    clip: float = 1.0
    updates: Tensor | None = None
    clip_after: int = 0


RAW_MOMENTS = 2
"""Kinds of raw sums that exist: of x, and of x squared."""

FORMULAS = ("rms", "batch_norm")
"""By the numbers that ``dense.c`` has for them."""


def address(values_C: Tensor | None) -> int | None:
    """Where C finds ``[C]`` values."""
    return None if values_C is None else values_C.data_ptr()


def plain(values_C: Tensor | None) -> bool:
    """Whether C can read ``[C]`` values of a layer whose input is on the CPU."""
    return values_C is None or (values_C.dtype is torch.float32 and values_C.is_contiguous() and values_C.is_cpu)
