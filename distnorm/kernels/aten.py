"""The four loops over activations in ATen, for CPU tensors that the compiled loops do not accept.

Shapes: x_NCL and dy_NCL of one layout; pivot_C, scale_C, g1_C, g2_C in the dtype of the arithmetic (at least float32).
Inference-mode batch norm is ATen's fastest per-channel multiply-add on a CPU, and its backward computes both channel
sums in one pass. Half-precision tensors are converted to float32 first, since rounding (x - pivot) would lose accuracy.
Empty tensors never reach ATen, whose batch norm divides by their size (torch 2.13: this ends the process).
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW_VALUES = 32
"""Up to this number of values of a channel in one sample, group norm is slow."""


def moments(x_NCL: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return sums of x and of x^2 with their count, ``[2 C + 1]``, float64; the mean; memory for an output, if any."""
    count = x_NCL.numel() // x_NCL.shape[1]
    mean_C, var_C, spare_NCL = _mean_and_variance(x_NCL)
    raw = torch.cat((mean_C, torch.addcmul(var_C, mean_C, mean_C), mean_C.new_ones(1)))
    return raw.mul_(count), mean_C.to(wide_dtype(x_NCL)), spare_NCL


def _mean_and_variance(x_NCL: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return mean and biased variance per channel, float64 ``[C]``, and memory for an output like x, if available.

    For contiguous images, group norm with a group per channel computes the moments of every channel of every sample in
    one pass, by a stable recurrence. They are combined in float64: mean = E[mean_n], var = E[var_n] + Var[mean_n]. All
    other tensors use sums about a pivot, in two passes. For an empty tensor both are zero.
    """
    if not x_NCL.numel():
        zero_C = x_NCL.new_zeros(x_NCL.shape[1], dtype=torch.float64)
        return zero_C, zero_C, None
    batch, channels = x_NCL.shape[:2]
    length = x_NCL.numel() // (batch * channels)
    if length <= FEW_VALUES or x_NCL.dtype != wide_dtype(x_NCL) or not x_NCL.is_contiguous():
        return _moments_about_pivot(x_NCL, batch * length)
    spare_NCL, mean_NC, invstd_NC = torch.native_group_norm(x_NCL, None, None, batch, channels, length, channels, 0.0)
    mean_NC, invstd_NC = mean_NC.double(), invstd_NC.double()
    mean_C = mean_NC.mean(0)
    return mean_C, invstd_NC.pow_(-2).add_((mean_NC.sub_(mean_C)).square_()).mean(0), spare_NCL


def _moments_about_pivot(x_NCL: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute the moments in two passes, or four if the first sample is far from the others."""
    pivot_C = pivot(x_NCL)
    sum_C, square_C, centred_NCL = sums(x_NCL, pivot_C)
    if bool((sum_C.square() > 0.75 * count * square_C).any()):
        pivot_C = pivot_C + sum_C / count
        sum_C, square_C, centred_NCL = sums(x_NCL, pivot_C)
    offset_C = sum_C.double().div_(count)
    var_C = square_C.double().div_(count).addcmul_(offset_C, offset_C, value=-1).clamp_min_(0)
    return offset_C.add_(pivot_C), var_C, centred_NCL if centred_NCL.dtype == x_NCL.dtype else None


def pivot(x_NCL: Tensor) -> Tensor:
    """Return the mean of the first sample, ``[C]``. Sums about it lose at most a factor N of accuracy.

    With p the mean of one of N samples, (p - mean)^2 <= N var, so E(x - p)^2 - (p - mean)^2 cancels at most
    log2(N + 1) bits.
    """
    first_CL = x_NCL[0].to(wide_dtype(x_NCL))
    return first_CL.flatten(1).mean(1) if x_NCL.dim() > 2 else first_CL.clone()


def sums(x_NCL: Tensor, pivot_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``sum(x - pivot), sum((x - pivot)^2)``, each ``[C]``, and ``x - pivot``. Two passes."""
    zero_C = torch.zeros_like(pivot_C)
    centred_NCL = apply(x_NCL.to(pivot_C.dtype), pivot_C, torch.ones_like(pivot_C), zero_C)
    return *_cosums(centred_NCL, centred_NCL, zero_C), centred_NCL


def apply(x_NCL: Tensor, pivot_C: Tensor, scale_C: Tensor, shift_C: Tensor, *, into: Tensor | None = None) -> Tensor:
    """Return ``(x - pivot) * scale + shift``, in the dtype of x; in new memory, or ``into``. One pass."""
    if not x_NCL.numel():
        return torch.empty_like(x_NCL)
    one_C = torch.ones_like(pivot_C)
    if into is None:
        return torch.batch_norm(x_NCL, scale_C, shift_C, pivot_C, one_C, False, 0.0, 0.0, False)
    none = pivot_C.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        x_NCL, scale_C, shift_C, pivot_C, one_C, False, 0.0, 0.0, out=into, save_mean=none, save_invstd=none
    )
    return into


def cosums(dy_NCL: Tensor, x_NCL: Tensor, pivot_C: Tensor) -> Tensor:
    """Return ``sum(dy), sum(dy * (x - pivot))``, ``[2, C]``, float64. One pass."""
    return torch.stack(_cosums(dy_NCL, x_NCL, pivot_C)).double()


def _cosums(dy_NCL: Tensor, x_NCL: Tensor, pivot_C: Tensor) -> tuple[Tensor, Tensor]:
    if not x_NCL.numel():
        return torch.zeros_like(pivot_C), torch.zeros_like(pivot_C)
    if not _dense_alike(dy_NCL, x_NCL):  # ATen's loop over strides would add in the dtype of dy
        dy_NCL, x_NCL = dy_NCL.to(pivot_C.dtype), x_NCL.to(pivot_C.dtype)
    one_C = torch.ones_like(pivot_C)
    _, product_C, sum_C = torch.ops.aten.native_batch_norm_backward(
        dy_NCL, x_NCL, one_C, pivot_C, one_C, None, None, False, 0.0, [False, True, True]
    )
    return sum_C, product_C


def combine(
    dy_NCL: Tensor, x_NCL: Tensor, pivot_C: Tensor, scale_C: Tensor, level_C: Tensor, slope_C: Tensor
) -> Tensor:
    """Return ``dy * scale + level + (x - pivot) * slope``, in the dtype of x. Two passes."""
    dx_NCL = apply(x_NCL.to(pivot_C.dtype), pivot_C, slope_C, level_C)
    scale_1C1 = scale_C.view(1, -1, *(1,) * (x_NCL.dim() - 2))
    return dx_NCL.addcmul_(dy_NCL, scale_1C1).to(x_NCL.dtype)


def _dense_alike(dy_NCL: Tensor, x_NCL: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return any(
        dy_NCL.is_contiguous(memory_format=each) and x_NCL.is_contiguous(memory_format=each)
        for each in (torch.contiguous_format, formats.get(x_NCL.dim(), torch.contiguous_format))
    )


def wide_dtype(x_NCL: Tensor) -> torch.dtype:
    """Return the dtype of the arithmetic on ``x_NCL``: at least float32."""
    return torch.float32 if x_NCL.dtype.itemsize < torch.float32.itemsize else x_NCL.dtype
