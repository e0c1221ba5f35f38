"""The four loops over big tensors, in ATen, for CPU tensors.

Shapes: x_NCL and dy_NCL of one layout, pivot_C, scale_C, g1_C, g2_C in the dtype of the arithmetic (at least float32).
Inference-mode batch norm is ATen's fastest per-channel multiply-add on a CPU, and its backward yields both channel sums
in one pass. Half-precision tensors are widened first: (x - pivot) rounded to them would lose statistics.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pivot(x_NCL: Tensor) -> Tensor:
    """Mean of the first sample, ``[C]``: a centre so close that sums about it lose at most a factor N of accuracy.

    With p the mean of one of N samples, (p - mean)^2 <= N var, so E(x - p)^2 - (p - mean)^2 cancels at most
    log2(N + 1) bits.
    """
    first_CL = x_NCL[0].to(_wide(x_NCL))
    return first_CL.flatten(1).mean(1) if x_NCL.dim() > 2 else first_CL.clone()


def centre(x_NCL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A pivot and the ``sums`` about it. Two passes; four where the first sample lies far from the others."""
    count = x_NCL.numel() // x_NCL.shape[1]
    pivot_C = pivot(x_NCL)
    sum_C, square_C = sums(x_NCL, pivot_C)
    if bool((sum_C.square() > 0.75 * count * square_C).any()):
        pivot_C = pivot_C + sum_C / count
        sum_C, square_C = sums(x_NCL, pivot_C)
    return pivot_C, sum_C, square_C


def sums(x_NCL: Tensor, pivot_C: Tensor) -> tuple[Tensor, Tensor]:
    """``sum(x - pivot), sum((x - pivot)^2)``, each ``[C]``. Two passes."""
    centred_NCL = apply(x_NCL.to(pivot_C.dtype), pivot_C, torch.ones_like(pivot_C), torch.zeros_like(pivot_C))
    sum_C, square_C = cosums(centred_NCL, centred_NCL, torch.zeros_like(pivot_C))
    return sum_C, square_C


def apply(x_NCL: Tensor, pivot_C: Tensor, scale_C: Tensor, shift_C: Tensor) -> Tensor:
    """``(x - pivot) * scale + shift``, in the dtype of x. One pass."""
    return torch.batch_norm(x_NCL, scale_C, shift_C, pivot_C, torch.ones_like(pivot_C), False, 0.0, 0.0, False)


def cosums(dy_NCL: Tensor, x_NCL: Tensor, pivot_C: Tensor) -> tuple[Tensor, Tensor]:
    """``sum(dy), sum(dy * (x - pivot))``, each ``[C]``. One pass."""
    if not _dense_alike(dy_NCL, x_NCL):  # ATen's loop over strides would add up in the dtype of dy
        dy_NCL, x_NCL = dy_NCL.to(pivot_C.dtype), x_NCL.to(pivot_C.dtype)
    one_C = torch.ones_like(pivot_C)
    _, product_C, sum_C = torch.ops.aten.native_batch_norm_backward(
        dy_NCL, x_NCL, one_C, pivot_C, one_C, None, None, False, 0.0, [False, True, True]
    )
    return sum_C, product_C


def combine(dy_NCL: Tensor, x_NCL: Tensor, pivot_C: Tensor, scale_C: Tensor, g1_C: Tensor, g2_C: Tensor) -> Tensor:
    """``dy * scale + g1 + (x - pivot) * g2``, in the dtype of x. Two passes."""
    dx_NCL = apply(x_NCL.to(pivot_C.dtype), pivot_C, g2_C, g1_C)
    scale_1C1 = scale_C.view(1, -1, *(1,) * (x_NCL.dim() - 2))
    return dx_NCL.addcmul_(dy_NCL, scale_1C1).to(x_NCL.dtype)


def _dense_alike(dy_NCL: Tensor, x_NCL: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return any(
        dy_NCL.is_contiguous(memory_format=each) and x_NCL.is_contiguous(memory_format=each)
        for each in (torch.contiguous_format, formats.get(x_NCL.dim(), torch.contiguous_format))
    )


def _wide(x_NCL: Tensor) -> torch.dtype:
    return torch.float32 if x_NCL.dtype.itemsize < torch.float32.itemsize else x_NCL.dtype
