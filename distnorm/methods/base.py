"""The interface of a method: one differentiable function from local values to normalized ones, with sums to be shared.

Shapes: x_NCL is the input, of any layout from ``[N, C]`` to ``[N, C, D, H, W]``. sums_KC, means_KC and theta_KC have K
kinds of statistics.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from distnorm.kernels.arithmetic import RAW_MOMENTS, Formula
from distnorm.types import Affine, Moments, Share


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for arithmetic on activations: at least float32."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def per_channel(values_C: Tensor, x_NCL: Tensor) -> Tensor:
    """View ``[C]`` values so that they broadcast against ``x_NCL``, in the dtype of its arithmetic."""
    return values_C.to(compute_dtype(x_NCL.dtype)).view(1, -1, *(1,) * (x_NCL.dim() - 2))


class Method(ABC):
    """Which statistics are computed, and how they transform the input. Concrete ones are final frozen dataclasses."""

    centred: ClassVar[bool] = True
    """Whether evaluation subtracts ``running_mean``. If not, ``running_var`` tracks the second moment."""

    @property
    def kinds(self) -> int:
        """Return the number of rows of the shared sums. All values in the last row have one sign."""
        return 1

    @property
    def follows(self) -> bool:
        """Return whether the transform depends on the running statistics."""
        return False

    def formula(self, affine: Affine | None = None) -> Formula | None:
        """Return the name of its arithmetic if ``kernels`` has it in C; ``affine`` if the transform is wanted."""
        return None

    @abstractmethod
    def normalize(self, x_NCL: Tensor, share: Share, affine: Affine) -> Tensor:
        """Normalize ``x_NCL`` with shared statistics; shape and dtype are kept.

        Every value that passes through ``share`` is equal on all sharing ranks afterwards. Trainable parameters must be
        applied after it, never before: their gradients then stay local, and data parallelism averages them.
        """

    @abstractmethod
    def moments(self, means_KC: Tensor, count: Tensor) -> Moments:
        """Return the update of the running statistics from the shared ``means_KC`` over ``count`` values."""


class ChannelAffine(Method):
    """Methods of the form ``y = scale_C * x + shift_C``, defined by C-sized float64 arithmetic alone.

    ``normalize`` below is their executable specification. ``kernels`` compute the same with one memory pass per loop.
    """

    raw: ClassVar[slice]
    """Which raw moments the method shares: rows of (mean of x, mean of x squared)."""

    @property
    def kinds(self) -> int:
        """Return the number of raw moments."""
        return len(range(RAW_MOMENTS)[self.raw])

    @abstractmethod
    def link(self, means_KC: Tensor, eps: float) -> Tensor:
        """Return the coordinates theta_KC of the shared means, in which cotangents are exchanged."""

    @abstractmethod
    def coefficients(self, theta_KC: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
        """Return ``scale_C, shift_C``, float64."""

    def normalize(self, x_NCL: Tensor, share: Share, affine: Affine) -> Tensor:
        """Normalize on the plain path: differentiable any number of times, traceable, on any device.

        Moments are computed about the local mean, and y is ``(x - mean) * scale + (shift + mean * scale)``. The last
        term is C-sized and float64, so large means cost no accuracy.
        """
        count = x_NCL.numel() // x_NCL.shape[1]
        values_NCL = x_NCL.to(compute_dtype(x_NCL.dtype))
        raw_KC, pivot_C = _raw_means(values_NCL) if count else _no_values(values_NCL)
        theta_KC, _ = share(count, raw_KC[self.raw] * count, partial(self.link, eps=affine.eps))
        scale_C, shift_C = self.coefficients(theta_KC, affine)
        centred_NCL = values_NCL - per_channel(pivot_C, values_NCL)
        shift_C = shift_C + pivot_C * scale_C
        return (centred_NCL * per_channel(scale_C, x_NCL) + per_channel(shift_C, x_NCL)).to(x_NCL.dtype)


def _raw_means(values_NCL: Tensor) -> tuple[Tensor, Tensor]:
    """Return float64 (mean, mean of squares) ``[2, C]``, and the detached mean."""
    dims = [dim for dim in range(values_NCL.dim()) if dim != 1]
    var_C, mean_C = torch.var_mean(values_NCL, dims, correction=0)
    var_C, mean_C = var_C.double(), mean_C.double()
    return torch.stack((mean_C, var_C + mean_C.square())), mean_C.detach()


def _no_values(values_NCL: Tensor) -> tuple[Tensor, Tensor]:
    """Return zeros that are part of the graph: a rank without values must take part in the backward collective."""
    dims = [dim for dim in range(values_NCL.dim()) if dim != 1]
    zero_C = values_NCL.sum(dims, dtype=torch.float64)
    return torch.stack((zero_C, zero_C)), zero_C.detach()
