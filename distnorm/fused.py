"""Kernels meet autograd: every ``ChannelAffine`` method on four loops over its big tensors.

Between the loops stands C-sized float64 autograd. ``Apply.backward`` runs before ``RawSums.backward`` (its cotangents
come through the former's outputs), so the first leaves its dy with the second, which forms dx in one go. Under
``create_graph=True`` both step aside and answer in differentiable operations instead.

Shapes: x_NCL, dy_NCL, dx_NCL; pivot_C, scale_C, shift_C; raw_KC, the sums of x and of x squared.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from distnorm.boundary import NO_BACKWARD, graph_task
from distnorm.kernels import aten
from distnorm.methods import ChannelAffine
from distnorm.methods.base import RAW_MOMENTS, per_channel
from distnorm.types import Affine, Share


def suits(x_NCL: Tensor) -> bool:
    """Whether the kernels can take this input; the plain path takes all others."""
    return x_NCL.device.type == "cpu" and x_NCL.numel() > 0 and not torch.compiler.is_compiling()


def normalize(method: ChannelAffine, x_NCL: Tensor, share: Share, affine: Affine) -> Tensor:
    """As ``method.normalize``: same values to rounding, same collectives."""
    handover = Handover()
    pivot_C = aten.pivot(x_NCL.detach())
    raw_KC = RawSums.apply(x_NCL, pivot_C, handover)
    if method.raw != slice(0, RAW_MOMENTS):
        raw_KC = raw_KC[method.raw]
    count = x_NCL.numel() // x_NCL.shape[1]
    theta_KC, _ = share(count, raw_KC, partial(method.link, eps=affine.eps))
    scale_C, shift_C = method.coefficients(theta_KC, affine)
    shift_C = shift_C + pivot_C * scale_C
    y_NCL: Tensor = Apply.apply(x_NCL, pivot_C, scale_C.to(pivot_C.dtype), shift_C.to(pivot_C.dtype), handover)
    return y_NCL


class Handover:
    """What ``Apply.backward`` leaves for ``RawSums.backward`` within one backward pass: dy and scale."""

    def __init__(self) -> None:
        """Empty."""
        self._task = NO_BACKWARD
        self._left: tuple[Tensor, Tensor] | None = None

    def leave(self, dy_NCL: Tensor, scale_C: Tensor) -> None:
        """Leave them for this pass only: one over other inputs may never claim them."""
        self._task, self._left = graph_task(), (dy_NCL, scale_C)

    def claim(self) -> tuple[Tensor, Tensor] | None:
        """Take what this pass left, and keep nothing alive."""
        left, self._left = self._left, None
        return left if self._task == graph_task() else None


class RawSums(torch.autograd.Function):
    """``raw_KC = (sum of x, sum of x^2)`` in float64, formed about a pivot."""

    @staticmethod
    def forward(ctx: Any, x_NCL: Tensor, pivot_C: Tensor, handover: Handover) -> Tensor:
        """Two passes over x."""
        ctx.handover = handover
        ctx.save_for_backward(x_NCL, pivot_C)
        count = x_NCL.numel() // x_NCL.shape[1]
        sum_C, square_C = (part.double() for part in aten.sums(x_NCL, pivot_C))
        pivot_C = pivot_C.double()
        return torch.stack((sum_C + count * pivot_C, square_C + pivot_C * (2 * sum_C + count * pivot_C)))

    @staticmethod
    def backward(ctx: Any, g_KC: Tensor) -> tuple[Tensor, None, None]:
        """``dx = g_1 + 2 g_2 x``, written about the pivot, plus ``dy * scale`` if ``Apply`` left it."""
        x_NCL, pivot_C = ctx.saved_tensors
        g1_C = (g_KC[0] + 2 * pivot_C * g_KC[1]).to(pivot_C.dtype)
        g2_C = (2 * g_KC[1]).to(pivot_C.dtype)
        left = ctx.handover.claim()
        if torch.is_grad_enabled():
            centred_NCL = x_NCL - per_channel(pivot_C, x_NCL)
            dx_NCL = centred_NCL * per_channel(g2_C, x_NCL) + per_channel(g1_C, x_NCL)
            return dx_NCL.to(x_NCL.dtype), None, None
        if left is None:
            return aten.apply(x_NCL, pivot_C, g2_C, g1_C), None, None
        dy_NCL, scale_C = left
        return aten.combine(dy_NCL, x_NCL, pivot_C, scale_C, g1_C, g2_C), None, None


class Apply(torch.autograd.Function):
    """``y = (x - pivot) * scale + shift``; the gradient for x is left to ``RawSums``."""

    @staticmethod
    def forward(
        ctx: Any, x_NCL: Tensor, pivot_C: Tensor, scale_C: Tensor, shift_C: Tensor, handover: Handover
    ) -> Tensor:
        """One pass."""
        ctx.handover = handover
        ctx.save_for_backward(x_NCL, pivot_C, scale_C)
        return aten.apply(x_NCL, pivot_C, scale_C, shift_C)

    @staticmethod
    def backward(ctx: Any, dy_NCL: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        """``dscale = sum(dy (x - pivot))``, ``dshift = sum(dy)``. One pass, unless a graph is being built."""
        x_NCL, pivot_C, scale_C = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _apply_backward_with_graph(x_NCL, pivot_C, scale_C, dy_NCL)
        if ctx.needs_input_grad[0]:
            ctx.handover.leave(dy_NCL, scale_C)
        sum_C, product_C = aten.cosums(dy_NCL, x_NCL, pivot_C)
        return None, None, product_C, sum_C, None


def _apply_backward_with_graph(
    x_NCL: Tensor, pivot_C: Tensor, scale_C: Tensor, dy_NCL: Tensor
) -> tuple[Tensor, None, Tensor, Tensor, None]:
    dims = [dim for dim in range(x_NCL.dim()) if dim != 1]
    dy_wide_NCL = dy_NCL.to(scale_C.dtype)
    centred_NCL = x_NCL - per_channel(pivot_C, x_NCL)
    dscale_C = (dy_wide_NCL * centred_NCL).sum(dims)
    dx_NCL = dy_wide_NCL * per_channel(scale_C, x_NCL)
    return dx_NCL.to(x_NCL.dtype), None, dscale_C, dy_wide_NCL.sum(dims), None
