"""Epilogues that the kernels do not compute with the norm, and which they can."""

from __future__ import annotations

from torch import Tensor

from distnorm.compat.dispatch_state import has_function_mode
from distnorm.kernels.activations import activate
from distnorm.types import RELU, Epilogue


def fits(residual: Tensor, x_NCL: Tensor) -> bool:
    """Return whether the kernels can add ``residual`` to a norm of ``x_NCL``: of equal shape, dtype and device."""
    alike = isinstance(residual, Tensor) and residual.shape == x_NCL.shape and residual.dtype == x_NCL.dtype
    return alike and residual.device == x_NCL.device


def apart(y_NCL: Tensor, epilogue: Epilogue, widen: bool | None) -> Tensor:
    """Return ``activation(y + residual)``; unless ``widen``, the sum is in place of y, or of the residual if None."""
    residual = epilogue.residual_NCL
    if residual is not None:
        y_NCL = y_NCL + residual if widen else residual.add_(y_NCL) if widen is None else y_NCL.add_(residual)
    return activate(y_NCL, epilogue.activation)


def in_place(y_NCL: Tensor, epilogue: Epilogue, widen: bool | None) -> Tensor:
    """Return what ``apart`` does, of y that nothing else refers to: in its memory where that changes nothing else."""
    residual_NCL, activation = epilogue
    fitting = residual_NCL is None or (widen is not None and fits(residual_NCL, y_NCL))
    if not fitting or has_function_mode():  # a mode may have kept y
        return apart(y_NCL, epilogue, widen)
    if residual_NCL is not None:
        y_NCL.add_(residual_NCL)
    return y_NCL.relu_() if activation is RELU else activate(y_NCL, activation)
