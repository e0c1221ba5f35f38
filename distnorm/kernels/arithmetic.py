"""What passes need of a method, and the methods whose arithmetic is in ``arithmetic.c`` and the GPU kernels."""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from distnorm.types import Affine


class Formula(NamedTuple):
    """A method in ``arithmetic.c``, and the limits of its correction by running_var, if it has one.

    The device compares ``updates`` with ``clip_after`` if the host would have to wait for it.
    """

    name: str
    kinds: int
    running_var_C: Tensor | None = None
    clip: float = 1.0
    updates: Tensor | None = None
    clip_after: int = 0


class Tracked(Protocol):
    """What running statistics need of a method: its moments, and the name of its arithmetic in C, if there is one."""

    def formula(self, affine: Affine | None = None) -> Formula | None:
        """Return the name of the same arithmetic in C, if there is one; ``affine`` if the transform is wanted."""
        ...

    def moments(self, means_KC: Tensor, count: Tensor) -> dict[str, Tensor]:
        """Return what the running statistics move towards, by the name of the buffer."""
        ...


class PerChannel(Tracked, Protocol):
    """What a pass needs of its method, in C-sized float64 arithmetic. ``methods.ChannelAffine`` documents each."""

    raw: ClassVar[slice]

    def link(self, means_KC: Tensor, eps: float) -> Tensor:
        """Return ``theta_KC``."""
        ...

    def coefficients(self, theta_KC: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
        """Return ``scale_C, shift_C``."""
        ...


RAW_MOMENTS = 2
"""The number of raw sums: of x, and of x squared."""

FORMULAS = {"rms": 0, "batch_norm": 1}
"""Their numbers in ``dense.c``."""


def plain(*values_C: Tensor | None) -> bool:
    """Return whether C can read ``[C]`` values of a layer whose input is on the CPU."""
    for each in values_C:
        if each is not None and not (each.dtype is torch.float32 and each.is_contiguous() and each.is_cpu):
            return False
    return True
