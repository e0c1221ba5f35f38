"""Kernels as an autograd Function: every ``ChannelAffine`` method in a few loops over the activations.

Forward: local sums of x, the shared sums, C-sized arithmetic, one loop that normalizes. Backward: two channel sums of
dy, the shared cotangents, C-sized arithmetic, one loop that computes dx. ``passes`` does everything except sharing.
With ``create_graph=True`` the plain path runs instead and repeats the forward. It is differentiable to any order and
issues no second forward collective.

A layer may have an epilogue: the same Function computes ``relu(y + residual)`` or another activation of y, which saves
memory traffic. What an activation was applied to is not kept: the backward pass computes it again from x.

Shapes: x_NCL, y_NCL, their gradients dx_NCL, dy_NCL, and dz_NCL before the epilogue; weight_C, bias_C.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distnorm.autograd.engine import Deferred, bare_apply
from distnorm.autograd.share import Exchange
from distnorm.compat.dispatch_state import are_own, are_plain, is_batch
from distnorm.kernels import gpu
from distnorm.kernels.activations import activate
from distnorm.kernels.passes import new_pass
from distnorm.kernels.running import update_from_sums
from distnorm.methods import ChannelAffine, Layer
from distnorm.methods.base import affine_of, layer_of
from distnorm.types import RELU, Activation, Affine, Epilogue, Running

NO_EPILOGUE = Epilogue()
_Call = tuple[ChannelAffine, Exchange, Affine, Deferred[Tensor] | None, Running | None, Activation | None]
"""Method, share, affine, what ``_Wait`` waits for, running statistics, and the activation that follows."""


def suits(method: ChannelAffine, x_NCL: Tensor) -> bool:
    """Return whether the kernels accept this plain input; the plain path takes all others.

    On a CPU they accept every method, on a GPU those with a formula.

    They accept empty inputs too: parameters must receive their gradients in the same order on a rank without values as
    on the others. DeepSpeed's ZeRO 2 fills its gradient buckets in that order (0.19.8).
    """
    return x_NCL.is_cpu or (gpu.takes(x_NCL) and method.formula() is not None)


def normalize(
    method: ChannelAffine,
    x_NCL: Tensor,
    share: Exchange,
    affine: Affine,
    between: Callable[[], None] | None = None,
    running: Running | None = None,
    epilogue: Epilogue = NO_EPILOGUE,
) -> Tensor:
    """Compute ``method.normalize`` and then the ``epilogue``: equal values up to rounding, the same collectives.

    If given, ``running`` statistics are updated with the shared statistics, if these are global.

    If given, ``between`` creates nodes of the graph that run while the cotangents are in flight. The engine runs ready
    nodes newest first, so they run after the node that sends the cotangents and before the node that waits.
    """
    weight_C, bias_C, *_ = affine
    residual_NCL, activation = epilogue
    if between is None:
        call: _Call = method, share, affine, None, running, activation
        y_NCL: Tensor = _apply(x_NCL, weight_C, bias_C, residual_NCL, None, call)
        return y_NCL
    finish: Deferred[Tensor] = Deferred()
    waiting_NCL = _Wait.apply(x_NCL, finish)
    between()
    call = method, share, affine, finish, running, activation
    y_NCL = _apply(waiting_NCL, weight_C, bias_C, residual_NCL, x_NCL, call)
    return y_NCL


def affine_step(method: ChannelAffine, x_NCL: Tensor, share: Exchange, layer: Layer, *, plain: bool) -> Tensor:
    """Compute ``method.normalize`` as a step of another method; ``plain``: no mode or transform is active."""
    given = affine_of(layer)
    kernels = plain and are_plain(x_NCL) and are_own(given.weight_C, given.bias_C) and suits(method, x_NCL)
    return normalize(method, x_NCL, share, given) if kernels else method.normalize(x_NCL, share, layer)


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_NCL: Tensor, finish: Deferred[Tensor]) -> Tensor:
        ctx.finish = finish
        return x_NCL.view_as(x_NCL)

    @staticmethod
    def backward(ctx: Any, dx_NCL: Tensor) -> tuple[Tensor, None]:
        """Return the deferred gradient, for which ``dx`` is a placeholder; ``dx`` itself if none was deferred."""
        gradient = ctx.finish.take()
        return dx_NCL if gradient is None else gradient(), None


# docs/decisions.md#one-function-per-layer
class _Normalize(torch.autograd.Function):
    """A function of its first four arguments.

    ``x_NCL`` is ``waiting_NCL`` before ``_Wait``, if there is one. Second derivatives by x must not pass through
    ``_Wait``, which replaces its incoming gradient by the deferred one.
    """

    @staticmethod
    def forward(
        ctx: Any,
        waiting_NCL: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        residual_NCL: Tensor | None,
        x_NCL: Tensor | None,
        call: _Call,
    ) -> Tensor:
        """Compute the sums, then normalize in one pass."""
        method, share, affine, _, running, activation = ctx.call = call
        x_NCL = waiting_NCL if x_NCL is None else x_NCL
        ctx.affine = _as_of_now(affine) if method.follows else affine
        kernels = ctx.kernels = new_pass(method, x_NCL, ctx.affine)
        has_two_values = x_NCL.numel() > x_NCL.shape[1]
        shared = share.gather(kernels.sums(x_NCL), in_graph=ctx.needs_input_grad[0], has_two_values=has_two_values)
        plain = activation is None and residual_NCL is None
        epilogue = NO_EPILOGUE if plain else Epilogue(residual_NCL, activation)
        updated = running if running is not None and share.updates_running() else None
        in_kernel = updated is not None and kernels.can_update(updated)
        y_NCL = kernels.normalize(x_NCL, shared, weight_C, bias_C, epilogue, updated if in_kernel else None)
        if updated is not None and not in_kernel:
            update_from_sums(method, shared, updated, x_NCL.shape[1])
        ctx.save_for_backward(x_NCL, weight_C, bias_C, y_NCL if activation == RELU else None)
        ctx.adds = residual_NCL is not None
        return y_NCL

    @staticmethod
    def backward(ctx: Any, dy_NCL: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the sums in one pass and dx in another.

        The plain path runs where a graph is built, and for tensors that kernels do not accept. Hooks of saved tensors
        may return other tensors than were saved, of any layout, and passes for whole Jacobians use batches of
        gradients.
        """
        x_NCL, weight_C, bias_C, y_NCL = ctx.saved_tensors
        plain = are_plain(dy_NCL, x_NCL, weight_C, y_NCL) and not is_batch(dy_NCL)
        if torch.is_grad_enabled() or not plain:
            affine = ctx.affine._replace(weight_C=weight_C, bias_C=bias_C)  # as saved, since checkpoints give others
            # No gradient of y arrives. That it is zero still has to reach parameters that nothing else reaches.
            dz_NCL = dy_NCL if y_NCL is None else torch.ops.aten.threshold_backward(dy_NCL, y_NCL, 0)
            gradients = _plain_gradients(ctx, x_NCL, affine, dz_NCL, opaque=not plain)
            return *gradients, dz_NCL if ctx.adds else None, None, None
        kernels, (_, share, _, finish, *_) = ctx.kernels, ctx.call
        cotangents, weight_grad_C, bias_grad_C, dz_NCL = kernels.pull(dy_NCL, x_NCL, y_NCL, weight_C)
        dx_NCL = None
        if ctx.needs_input_grad[0]:
            shared = share.scatter(cotangents)
            if finish is None:
                dx_NCL = kernels.combine(dz_NCL, x_NCL, shared.wait())
            else:
                finish.defer(lambda: kernels.combine(dz_NCL, x_NCL, shared.wait()))
                dx_NCL = dy_NCL
        gradients = [dx_NCL, _like(weight_C, weight_grad_C), _like(bias_C, bias_grad_C)]
        return *gradients, dz_NCL if ctx.adds else None, None, None


_apply = bare_apply(_Normalize)


def _as_of_now(affine: Affine) -> Affine:
    """Copy what changes in place before the backward pass: the running statistics."""
    weight_C, bias_C, eps, var_C, updates = affine
    now = None if var_C is None else var_C.clone(), None if updates is None else updates.clone()
    return Affine(weight_C, bias_C, eps, *now)


def _plain_gradients(ctx: Any, x_NCL: Tensor, affine: Affine, dz_NCL: Tensor, *, opaque: bool) -> list[Tensor | None]:
    method, share, *_, activation = ctx.call
    create_graph = torch.is_grad_enabled()
    leaves = [x_NCL, affine.weight_C, affine.bias_C]
    if not create_graph:  # tensors from hooks may belong to no graph
        leaves = [each if each is None else each.detach().requires_grad_() for each in leaves]
    wanted = [leaf for leaf, needed in zip(leaves, ctx.needs_input_grad, strict=False) if needed and leaf is not None]
    with torch.enable_grad():
        share = share.for_recomputation(opaque=opaque)
        y_NCL = method.normalize(leaves[0], share, layer_of(affine._replace(weight_C=leaves[1], bias_C=leaves[2])))
        y_NCL = y_NCL if activation == RELU else activate(y_NCL, activation)  # ReLU's gradient is in dz_NCL
    found = iter(torch.autograd.grad(y_NCL, wanted, dz_NCL, create_graph=create_graph))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:3]]


def _like(parameter_C: Tensor | None, grad_C: Tensor | None) -> Tensor | None:
    if parameter_C is None or grad_C is None or grad_C.dtype is parameter_C.dtype:
        return None if parameter_C is None else grad_C
    return grad_C.to(parameter_C.dtype)
