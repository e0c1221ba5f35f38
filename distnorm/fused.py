"""Kernels meet autograd: every ``ChannelAffine`` method on a few loops over its big tensors, in one Function.

Forward: moments of x, shared sums, C-sized arithmetic, one loop that applies. Backward: two channel sums of dy, shared
cotangents, C-sized arithmetic, one loop that combines. The C-sized derivatives are the method's (``pull``,
``pull_link``). Under ``create_graph=True`` the plain path runs instead, as a repetition of the forward: it is
differentiable to any order and issues no second collective forward.

Shapes: x_NCL, dy_NCL, dx_NCL; pivot_C, scale_C, shift_C; sums_KC, means_KC, theta_KC of the method's K kinds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distnorm.kernels import aten
from distnorm.methods import ChannelAffine
from distnorm.methods.base import RAW_MOMENTS
from distnorm.types import Affine, Exchange


def suits(x_NCL: Tensor) -> bool:
    """Whether the kernels can take this input; the plain path takes all others.

    Empty ones, too: parameters must receive their gradients in the same order on a rank without values as on others.
    DeepSpeed's ZeRO 2 fills the buckets that ranks add up in that order (0.19.8).
    """
    return x_NCL.device.type == "cpu" and not torch.compiler.is_compiling()


def normalize(method: ChannelAffine, x_NCL: Tensor, share: Exchange, affine: Affine) -> Tensor:
    """As ``method.normalize``: same values to rounding, same collectives."""
    y_NCL: Tensor = _Normalize.apply(x_NCL, affine.weight_C, affine.bias_C, method, share, affine)
    return y_NCL


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_NCL: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        method: ChannelAffine,
        share: Exchange,
        affine: Affine,
    ) -> Tensor:
        """Two passes over contiguous images, three over other layouts."""
        mean_C, var_C, y_NCL = aten.moments(x_NCL)
        raw_KC = torch.stack((mean_C, torch.addcmul(var_C, mean_C, mean_C)))[method.raw]
        count = x_NCL.numel() // x_NCL.shape[1]
        means_KC, total = share.gather(count, raw_KC.mul_(count), held=ctx.needs_input_grad[0])
        theta_KC = method.link(means_KC, affine.eps)
        scale_C, shift_C = method.coefficients(theta_KC, affine)
        pivot_C = mean_C.to(aten.wide_dtype(x_NCL))
        shift_C = torch.addcmul(shift_C, pivot_C.to(scale_C.dtype), scale_C).to(pivot_C.dtype)
        ctx.save_for_backward(x_NCL, weight_C, bias_C)
        ctx.method, ctx.share, ctx.total, ctx.means_KC, ctx.theta_KC = method, share, total, means_KC, theta_KC
        ctx.affine = _as_of_now(affine) if method.follows else affine
        ctx.pivot_C, ctx.scale_C = pivot_C, scale_C.to(pivot_C.dtype)
        return aten.apply(x_NCL, pivot_C, ctx.scale_C, shift_C, into=y_NCL)

    @staticmethod
    def backward(ctx: Any, dy_NCL: Tensor) -> tuple[Tensor | None, ...]:
        """Two passes."""
        x_NCL, weight_C, bias_C = ctx.saved_tensors
        affine: Affine = ctx.affine._replace(weight_C=weight_C, bias_C=bias_C)  # as saved: checkpoints give others
        if torch.is_grad_enabled():
            return *_differentiable(ctx, x_NCL, affine, dy_NCL), None, None, None
        pivot_C, method = ctx.pivot_C, ctx.method
        shift_grad_C, scale_grad_C = (each.double() for each in aten.cosums(dy_NCL, x_NCL, pivot_C))
        wide_pivot_C = pivot_C.double()
        scale_grad_C = torch.addcmul(scale_grad_C, wide_pivot_C, shift_grad_C)
        theta_grad_KC, weight_grad_C, bias_grad_C = method.pull(ctx.theta_KC, affine, scale_grad_C, shift_grad_C)
        dx_NCL = None
        if ctx.needs_input_grad[0]:
            shared_KC = ctx.share.scatter(theta_grad_KC)
            sums_grad_KC = method.pull_link(ctx.means_KC, ctx.theta_KC, shared_KC, affine.eps) / ctx.total
            dx_NCL = _input_gradient(ctx, dy_NCL, x_NCL, wide_pivot_C, sums_grad_KC)
        return dx_NCL, _like(weight_C, weight_grad_C), _like(bias_C, bias_grad_C), None, None, None


def _as_of_now(affine: Affine) -> Affine:
    """Running statistics go on changing in place before the backward pass."""
    running_var_C, updates = (None if each is None else each.clone() for each in affine[3:])
    return affine._replace(running_var_C=running_var_C, updates=updates)


def _input_gradient(ctx: Any, dy_NCL: Tensor, x_NCL: Tensor, wide_pivot_C: Tensor, grad_KC: Tensor) -> Tensor:
    """``dy * scale + g_1 + 2 g_2 x``, written about the pivot."""
    slope_C = 2 * grad_KC[-1]
    level_C = wide_pivot_C * slope_C
    if len(grad_KC) == RAW_MOMENTS:
        level_C += grad_KC[0]
    dtype = ctx.pivot_C.dtype
    return aten.combine(dy_NCL, x_NCL, ctx.pivot_C, ctx.scale_C, level_C.to(dtype), slope_C.to(dtype))


def _differentiable(ctx: Any, x_NCL: Tensor, affine: Affine, dy_NCL: Tensor) -> list[Tensor | None]:
    leaves = [x_NCL, affine.weight_C, affine.bias_C]
    wanted = [leaf for leaf, needed in zip(leaves, ctx.needs_input_grad, strict=False) if needed and leaf is not None]
    y_NCL = ctx.method.normalize(x_NCL, ctx.share.again(), affine)
    found = iter(torch.autograd.grad(y_NCL, wanted, dy_NCL, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]


def _like(parameter_C: Tensor | None, grad_C: Tensor | None) -> Tensor | None:
    return None if parameter_C is None or grad_C is None else grad_C.to(parameter_C.dtype)
