"""What passes need of a method, and which methods' arithmetic ``arithmetic.c`` and the kernels for GPUs know."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from distnorm.types import Affine, Moments


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


class Shared(Protocol):
    """What running statistics need of a method: its moments, and the name of its arithmetic, if that is written out."""

    def formula(self, affine: Affine | None = None) -> Formula | None:
        """The name of the same arithmetic in C, if there is one; with ``affine`` if the transform is wanted."""
        ...

    def moments(self, means_KC: Tensor, count: Tensor) -> Moments:
        """What running statistics absorb."""
        ...


class PerChannel(Shared, Protocol):
    """What a pass needs of its method, in C-sized float64 arithmetic. ``methods.ChannelAffine`` documents each."""

    raw: ClassVar[slice]

    def link(self, means_KC: Tensor, eps: float) -> Tensor:
        """``theta_KC``."""
        ...

    def coefficients(self, theta_KC: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
        """``scale_C, shift_C``."""
        ...


RAW_MOMENTS = 2
"""Kinds of raw sums that exist: of x, and of x squared."""

FORMULAS = {"rms": 0, "batch_norm": 1}
"""The numbers that ``dense.c`` has for them."""


def plain(*values_C: Tensor | None) -> bool:
    """Whether C can read ``[C]`` values of a layer whose input is on the CPU."""
    for each in values_C:
        if each is not None and not (each.dtype is torch.float32 and each.is_contiguous() and each.is_cpu):
            return False
    return True
