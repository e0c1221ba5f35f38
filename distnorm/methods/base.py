"""What a method is: one differentiable function from local values to normalized ones, given a way to share sums.

Shapes: x_NCL input of any layout from ``[N, C]`` to ``[N, C, D, H, W]``; sums_KC, means_KC, theta_KC of K kinds.
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
    """The dtype of big-tensor arithmetic: at least float32."""
    return torch.float32 if dtype.itemsize < torch.float32.itemsize else dtype


def per_channel(values_C: Tensor, x_NCL: Tensor) -> Tensor:
    """View ``[C]`` values so that they broadcast against ``x_NCL``, in the dtype of its arithmetic."""
    return values_C.to(compute_dtype(x_NCL.dtype)).view(1, -1, *(1,) * (x_NCL.dim() - 2))


class Method(ABC):
    """Which statistics, which transform. Concrete methods are final frozen dataclasses."""

    centred: ClassVar[bool] = True
    """Whether evaluation subtracts ``running_mean``; if not, ``running_var`` tracks the second moment."""

    @property
    def kinds(self) -> int:
        """Rows of the sums that it shares, of which the last one's have one sign."""
        return 1

    @property
    def follows(self) -> bool:
        """Whether the transform depends on the running statistics."""
        return False

    def formula(self, affine: Affine | None = None) -> Formula | None:
        """The name of its arithmetic, where ``kernels`` has it in C; with ``affine`` if the transform is wanted."""
        return None

    @abstractmethod
    def normalize(self, x_NCL: Tensor, share: Share, affine: Affine) -> Tensor:
        """Normalize ``x_NCL`` by shared statistics; shape and dtype kept.

        Every quantity that passes through ``share`` comes back equal on all sharing ranks. Trainable parameters must
        enter after it, never before: their gradients stay local, and data parallelism averages them.
        """

    @abstractmethod
    def moments(self, means_KC: Tensor, count: Tensor) -> Moments:
        """What the running statistics absorb of the shared ``means_KC`` over ``count`` values."""


class ChannelAffine(Method):
    """Methods of the form ``y = scale_C * x + shift_C``, written in C-sized float64 arithmetic alone.

    ``normalize`` below is their executable specification; ``kernels`` compute the same with one pass per loop.
    """

    raw: ClassVar[slice]
    """Which raw moments the method shares: rows of (mean of x, mean of x squared)."""

    @property
    def kinds(self) -> int:
        """Kinds of raw moments."""
        return len(range(RAW_MOMENTS)[self.raw])

    @abstractmethod
    def link(self, means_KC: Tensor, eps: float) -> Tensor:
        """The coordinates theta_KC of the shared means, in which cotangents travel."""

    @abstractmethod
    def coefficients(self, theta_KC: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
        """``scale_C, shift_C``, float64."""

    def normalize(self, x_NCL: Tensor, share: Share, affine: Affine) -> Tensor:
        """The plain path: differentiable any number of times, traceable, on any device.

        Moments are taken about the local mean, and y is formed as ``(x - mean) * scale + (shift + mean * scale)``,
        whose last term is C-sized and float64: large means cost no accuracy.
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
    """Float64 (mean, mean of squares) ``[2, C]``, and the detached mean."""
    dims = [dim for dim in range(values_NCL.dim()) if dim != 1]
    var_C, mean_C = torch.var_mean(values_NCL, dims, correction=0)
    var_C, mean_C = var_C.double(), mean_C.double()
    return torch.stack((mean_C, var_C + mean_C.square())), mean_C.detach()


def _no_values(values_NCL: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros that still hang in the graph: a rank without values must take part in the backward collective."""
    dims = [dim for dim in range(values_NCL.dim()) if dim != 1]
    zero_C = values_NCL.sum(dims, dtype=torch.float64)
    return torch.stack((zero_C, zero_C)), zero_C.detach()
