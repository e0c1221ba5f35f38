"""One forward and backward of one layer in C: dense float32 on a CPU, for a method in ``arithmetic.c``.

Python calls dominate the time of small layers, so every pass is one call that gets addresses. Shapes: x_NCL, y_NCL,
their gradients dx_NCL, dy_NCL, and dz_NCL, which is dy_NCL before the epilogue; weight_C, bias_C; shared and cotangents
float64, ``[K C + 1]`` with the count and ``[K C]``, of the formula's K kinds.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from distnorm.compat.uninterrupted import Call
from distnorm.kernels.activations import as_numbers
from distnorm.kernels.arithmetic import FORMULAS, Formula, plain
from distnorm.kernels.cpu import Loops, loops
from distnorm.kernels.native import library
from distnorm.types import RELU, Epilogue, Running

HEAD = 8  # doubles


def can_update(running: Running) -> bool:
    """Return whether C can update the ``running`` statistics: all three buffers exist, as in stock layers."""
    mean_C, var_C, updates, *_ = running
    if mean_C is None or var_C is None or updates is None:
        return False
    return plain(mean_C, var_C) and updates.is_cpu


class DensePass:
    """A ``passes.Pass``: what the kernels keep between the loops of a forward, and for its backward."""

    can_update = staticmethod(can_update)
    __slots__ = "_at", "_c", "_eps", "_formula", "_image", "_input_known", "_memory", "_rows", "_stores", "_stride"

    def __init__(self, formula: Formula, compiled: Loops, eps: float) -> None:
        """Start without computing anything."""
        found = library()
        assert found is not None, "there are loops"
        self._c, self._formula, self._eps = found, formula, eps
        (self._rows, *_), self._image = compiled

    def sums(self, x_NCL: Tensor) -> Tensor:
        """Return what the method shares: local sums and their count, float64 ``[K C + 1]``."""
        name, kinds, *_ = self._formula
        channels = self._image[1]
        self._stride = x_NCL.stride()
        self._memory = x_NCL.new_empty(HEAD + 7 * channels + 1 + (5 * channels + 1) // 2, dtype=torch.float64)
        self._at = self._memory.data_ptr()
        self._c.dense_sums(self._at, self._rows, FORMULAS[name], self._eps, x_NCL.data_ptr(), *self._image)
        return self._memory[HEAD + (2 - kinds) * channels : HEAD + 2 * channels + 1]

    def normalize(
        self,
        x_NCL: Tensor,
        shared: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        epilogue: Epilogue,
        running: Running | None,
    ) -> Tensor:
        """Return the output for ``shared`` sums and their count; update ``running`` statistics with them, if given."""
        formula, y_NCL = self._formula, torch.empty_like(x_NCL)
        residual_NCL, activation = epilogue
        # Without a residual, what the activation was applied to follows from x.
        self._input_known = activation is not None and residual_NCL is None
        # Its derivative costs more than to write and read what it gives; a ReLU's mask costs less.
        self._stores = self._input_known and activation != RELU
        residual_NCL = None if residual_NCL is None else self._laid_out(residual_NCL)
        shared = shared.contiguous()
        self._c.dense_normalize(
            self._at,
            x_NCL.data_ptr(),
            None if residual_NCL is None else residual_NCL.data_ptr(),
            y_NCL.data_ptr(),
            *as_numbers(activation),
            shared.data_ptr(),
            None if weight_C is None else weight_C.data_ptr(),
            None if bias_C is None else bias_C.data_ptr(),
            None if formula.running_var_C is None else formula.running_var_C.data_ptr(),
            formula.clip,
            *(NOTHING if running is None else _addresses(running)),
        )
        return y_NCL

    def pull(
        self, dy_NCL: Tensor, x_NCL: Tensor, y_NCL: Tensor | None, weight_C: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return cotangents of the shared sums, gradients of weight and bias, and the output gradient for ``combine``.

        With a ReLU the output is given, too. With a residual, the last result is the gradient of the residual. After
        other activations it is the gradient before them, memory that ``combine`` reuses.
        """
        x_NCL, dz_NCL = self._laid_out(x_NCL), self._laid_out(dy_NCL)
        weight_C = weight_C if weight_C is None or plain(weight_C) else weight_C.float().contiguous()
        dy, output, masked = dz_NCL.data_ptr(), None, None
        if y_NCL is not None and not self._input_known:
            y_NCL = self._laid_out(y_NCL)
            output = y_NCL.data_ptr()
        if output is not None or self._stores:
            dy_NCL, dz_NCL = dz_NCL, torch.empty_like(x_NCL)
            masked = dz_NCL.data_ptr()
        channels = self._image[1]
        cotangents = self._memory.new_empty(self._formula.kinds * channels)
        weight_grad_C, bias_grad_C = x_NCL.new_empty(channels), x_NCL.new_empty(channels)
        self._c.dense_pull(
            self._at,
            dy,
            x_NCL.data_ptr(),
            output,
            masked,
            None if weight_C is None else weight_C.data_ptr(),
            cotangents.data_ptr(),
            weight_grad_C.data_ptr(),
            bias_grad_C.data_ptr(),
        )
        return cotangents, weight_grad_C, bias_grad_C, dz_NCL

    def combine(self, dz_NCL: Tensor, x_NCL: Tensor, cotangents: Tensor) -> Tensor:
        """Return the gradient of the input, from shared cotangents and the last result of ``pull``."""
        x_NCL, dz_NCL, cotangents = self._laid_out(x_NCL), self._laid_out(dz_NCL), cotangents.contiguous()
        dx_NCL = dz_NCL if self._stores else torch.empty_like(x_NCL)
        addresses = dz_NCL.data_ptr(), x_NCL.data_ptr(), dx_NCL.data_ptr(), cotangents.data_ptr()
        self._c.dense_combine(self._at, *addresses)
        return dx_NCL

    def _laid_out(self, image_NCL: Tensor) -> Tensor:
        """Return the tensor in the layout of the forward's input: hooks of saved tensors may return another layout."""
        if image_NCL.stride() == self._stride and image_NCL.dtype is torch.float32:
            return image_NCL
        return image_NCL.new_empty_strided(image_NCL.shape, self._stride, dtype=torch.float32).copy_(image_NCL)


def updating(formula: Formula, means: Tensor, over: float, count: float, running: Running) -> Call | None:
    """Return a call of C that updates ``running`` with ``means / over`` of ``count`` values; None if C cannot.

    The result is bitwise equal to that of ``normalize``. Nothing changes if fewer than two values were seen.
    """
    found = library() if formula.name in FORMULAS else None
    if found is None or not can_update(running):
        return None
    assert running.var_C is not None, "can_update has checked it"
    mean_C, var_C, updates, *rate = _addresses(running)
    payload, function = means.contiguous(), getattr(found, f"{formula.name}_update_running")
    call = partial(function, payload.data_ptr(), over, count, len(running.var_C), *rate, updates, mean_C, var_C)
    call.__dict__["reads"] = payload  # must live as long as the call
    return call


_Addresses = tuple[int | None, int | None, int | None, float, bool]
"""Addresses of running_mean, running_var and the number of updates; the momentum, negative for the plain average; the
guard.
"""

NOTHING: _Addresses = None, None, None, 0.0, False


def _addresses(running: Running) -> _Addresses:
    mean_C, var_C, updates, momentum, guarded, _ = running
    assert mean_C is not None and var_C is not None and updates is not None, "they are whole"
    increment_version((mean_C, var_C, updates))  # as torch's operations do, for autograd's checks
    rate = -1.0 if momentum is None else momentum
    return mean_C.data_ptr(), var_C.data_ptr(), updates.data_ptr(), rate, guarded


def dense_pass(
    formula: Formula, x_NCL: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float
) -> DensePass | None:
    """Return a pass over ``x_NCL``; None if the C kernels do not accept it."""
    compiled = loops(x_NCL) if formula.name in FORMULAS else None
    if compiled is None or not plain(weight_C, bias_C, formula.running_var_C):
        return None
    return DensePass(formula, compiled, eps)
