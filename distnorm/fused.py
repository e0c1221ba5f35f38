"""Kernels meet autograd: every ``ChannelAffine`` method on a few loops over its big tensors, in one Function.

Forward: moments of x, shared sums, C-sized arithmetic, one loop that applies. Backward: two channel sums of dy, shared
cotangents, C-sized arithmetic, one loop that combines. The C-sized derivatives are the method's (``pull``,
``pull_link``). Under ``create_graph=True`` the plain path runs instead, as a repetition of the forward: it is
differentiable to any order and issues no second collective forward.

Shapes: x_NCL, dy_NCL, dx_NCL; pivot_C, scale_C, shift_C; sums_KC, means_KC, theta_KC of the method's K kinds.
"""

from __future__ import annotations

from collections.abc import Callable
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


def normalize(
    method: ChannelAffine, x_NCL: Tensor, share: Exchange, affine: Affine, between: Callable[[], None] | None = None
) -> Tensor:
    """As ``method.normalize``: same values to rounding, same collectives.

    If given, ``between`` makes nodes of the graph that shall run while cotangents are under way: the engine takes ready
    nodes newest first, so they come after the node that sends them, and before the one that waits.
    """
    finish, waiting_NCL = None, x_NCL
    if between is not None:
        finish = Finish()
        waiting_NCL = _Wait.apply(x_NCL, finish)
        between()
    y_NCL: Tensor = _Normalize.apply(waiting_NCL, affine.weight_C, affine.bias_C, x_NCL, method, share, affine, finish)
    return y_NCL


class Finish:
    """What ``_Normalize.backward`` leaves for ``_Wait.backward`` within one backward pass."""

    def __init__(self) -> None:
        """Nothing yet."""
        self.gradient: Callable[[], Tensor] | None = None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCL: Tensor, finish: Finish) -> Tensor:
        ctx.finish = finish
        return x_NCL.view_as(x_NCL)

    @staticmethod
    def backward(ctx: Any, dx_NCL: Tensor) -> tuple[Tensor, None]:
        """The gradient that was left; what comes here stands in for it, unless a graph is being built."""
        gradient, ctx.finish.gradient = ctx.finish.gradient, None
        return dx_NCL if gradient is None else gradient(), None


class _Normalize(torch.autograd.Function):
    """A function of its first three arguments.

    ``x_NCL`` is ``waiting_NCL`` before ``_Wait``: what second derivatives have to say of x must not pass there, where
    the gradient that was left takes the place of what comes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        waiting_NCL: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        x_NCL: Tensor,
        method: ChannelAffine,
        share: Exchange,
        affine: Affine,
        finish: Finish | None,
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
        ctx.finish = finish
        ctx.method, ctx.share, ctx.total, ctx.means_KC, ctx.theta_KC = method, share, total, means_KC, theta_KC
        ctx.affine = _as_of_now(affine) if method.follows else affine
        ctx.pivot_C, ctx.scale_C = pivot_C, scale_C.to(pivot_C.dtype)
        return aten.apply(x_NCL, pivot_C, ctx.scale_C, shift_C, into=y_NCL)

    @staticmethod
    def backward(ctx: Any, dy_NCL: Tensor) -> tuple[Tensor | None, ...]:
        """One pass for the sums, two that combine."""
        x_NCL, weight_C, bias_C = ctx.saved_tensors
        affine: Affine = ctx.affine._replace(weight_C=weight_C, bias_C=bias_C)  # as saved: checkpoints give others
        if torch.is_grad_enabled():
            return *_differentiable(ctx, x_NCL, affine, dy_NCL), None, None, None, None, None
        pivot_C, method = ctx.pivot_C, ctx.method
        shift_grad_C, scale_grad_C = (each.double() for each in aten.cosums(dy_NCL, x_NCL, pivot_C))
        scale_grad_C = torch.addcmul(scale_grad_C, pivot_C.double(), shift_grad_C)
        theta_grad_KC, weight_grad_C, bias_grad_C = method.pull(ctx.theta_KC, affine, scale_grad_C, shift_grad_C)
        dx_NCL = None
        if ctx.needs_input_grad[0]:
            shared = ctx.share.scatter(theta_grad_KC)
            if ctx.finish is None:
                dx_NCL = _input_gradient(ctx, dy_NCL, x_NCL, affine.eps, shared())
            else:
                ctx.finish.gradient = lambda: _input_gradient(ctx, dy_NCL, x_NCL, affine.eps, shared())
                dx_NCL = dy_NCL
        return dx_NCL, _like(weight_C, weight_grad_C), _like(bias_C, bias_grad_C), None, None, None, None, None


def _as_of_now(affine: Affine) -> Affine:
    """Running statistics go on changing in place before the backward pass."""
    running_var_C, updates = (None if each is None else each.clone() for each in affine[3:])
    return affine._replace(running_var_C=running_var_C, updates=updates)


def _input_gradient(ctx: Any, dy_NCL: Tensor, x_NCL: Tensor, eps: float, shared_KC: Tensor) -> Tensor:
    """``dy * scale + g_1 + 2 g_2 x``, written about the pivot."""
    grad_KC = ctx.method.pull_link(ctx.means_KC, ctx.theta_KC, shared_KC, eps) / ctx.total
    slope_C = 2 * grad_KC[-1]
    level_C = ctx.pivot_C.double() * slope_C
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
