"""One forward and backward of one layer in C: dense float32 on a CPU, by a method that ``arithmetic.c`` knows.

Small layers cost what Python costs, so this file works on addresses. Shapes: x_NCL, y_NCL, their gradients dx_NCL,
dy_NCL, and dz_NCL, which is dy_NCL before the tail; weight_C, bias_C; shared and cotangents float64, ``[K C + 1]`` with
the count and ``[K C]``, of the formula's K kinds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distnorm.kernels.arithmetic import Formula, Functions, address, functions, plain
from distnorm.kernels.cpu import Loops, like, loops
from distnorm.types import Tail

FLOAT, DOUBLE = 4, 8  # bytes


class DensePass:
    """What the kernels remember between the loops of a forward, and for its backward."""

    def __init__(self, formula: Formula, arithmetic: Functions, compiled: Loops, eps: float) -> None:
        """Nothing is computed yet."""
        self._formula, self._arithmetic, self._loops, self._eps = formula, arithmetic, compiled, eps

    def sums(self, x_NCL: Tensor) -> Tensor:
        """What the method shares: local sums and their count, float64 ``[K C + 1]``."""
        channels, kinds = x_NCL.shape[1], self._formula.kinds
        self._channels = channels
        # Float64: sums, count, means, factor; sums of dy. Then float32: pivot, scale, shift; level, slope.
        wide = 7 * channels + 1
        self._memory = x_NCL.new_empty(wide + (5 * channels + 1) // 2, dtype=torch.float64)
        start = self._memory.data_ptr()
        self._means_at = start + (2 * channels + 1) * DOUBLE
        self._narrow_at = narrow = start + wide * DOUBLE
        self._loops.sums(None, x_NCL.data_ptr(), None, None, narrow, None, None, start, *self._loops.image)
        return self._memory[(2 - kinds) * channels : 2 * channels + 1]

    def normalize(
        self, x_NCL: Tensor, shared: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, tail: Tail
    ) -> Tensor:
        """The output, by ``shared`` sums and their count."""
        self._shared = shared = shared.contiguous()
        pivot, row, means = self._narrow_at, self._channels * FLOAT, self._means_at
        formula = self._formula
        self._arithmetic.forward(
            *(shared.data_ptr(), pivot, address(weight_C), address(bias_C), address(formula.running_var_C)),
            *(formula.clip, self._eps, self._channels),
            *(means, means + 2 * self._channels * DOUBLE, pivot + row, pivot + 2 * row),
        )
        y_NCL = torch.empty_like(x_NCL)
        residual_NCL = None if tail.residual_NCL is None else like(tail.residual_NCL, x_NCL)
        # Without a residual, the output's sign is known from x.
        self._shift_at = pivot + 2 * row if tail.relu and residual_NCL is None else None
        tensors = x_NCL.data_ptr(), address(residual_NCL), y_NCL.data_ptr(), pivot, pivot + row, pivot + 2 * row
        self._loops.apply(*tensors, tail.relu, *self._loops.image)
        return y_NCL

    def pull(
        self, dy_NCL: Tensor, x_NCL: Tensor, y_NCL: Tensor | None, weight_C: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cotangents of what was shared, gradients of weight and bias, and what ``combine`` wants of the output's.

        With a relu the output is given, too. With a residual, the last result is its gradient.
        """
        channels, pivot, means, shift = self._channels, self._narrow_at, self._means_at, self._shift_at
        factor = means + 2 * channels * DOUBLE
        sums = factor + channels * DOUBLE
        dz_NCL = dy_NCL = like(dy_NCL, x_NCL)
        output = masked = None
        if y_NCL is not None and shift is None:
            dz_NCL = torch.empty_like(x_NCL)
            output, masked = y_NCL.data_ptr(), dz_NCL.data_ptr()
        scale = None if shift is None else shift - channels * FLOAT
        tensors = dy_NCL.data_ptr(), x_NCL.data_ptr(), output, masked
        self._loops.sums(*tensors, pivot, scale, shift, sums, *self._loops.image)
        cotangents = self._memory.new_empty(self._formula.kinds * channels)
        weight_grad_C, bias_grad_C = x_NCL.new_empty(channels), x_NCL.new_empty(channels)
        self._arithmetic.pull(
            *(sums, means, factor, pivot, address(weight_C), channels),
            *(cotangents.data_ptr(), weight_grad_C.data_ptr(), bias_grad_C.data_ptr()),
        )
        return cotangents, weight_grad_C, bias_grad_C, dz_NCL

    def combine(self, dz_NCL: Tensor, x_NCL: Tensor, cotangents: Tensor) -> Tensor:
        """The input's gradient, by shared cotangents and the last result of ``pull``."""
        channels, pivot, row = self._channels, self._narrow_at, self._channels * FLOAT
        count = self._shared.data_ptr() + self._formula.kinds * channels * DOUBLE
        cotangents = cotangents.contiguous()
        level, slope = pivot + 3 * row, pivot + 4 * row
        self._arithmetic.link(cotangents.data_ptr(), self._means_at, count, pivot, self._eps, channels, level, slope)
        dx_NCL = torch.empty_like(x_NCL)
        tensors = dz_NCL.data_ptr(), x_NCL.data_ptr(), dx_NCL.data_ptr()
        self._loops.combine(*tensors, pivot, pivot + row, self._shift_at, level, slope, *self._loops.image)
        return dx_NCL


def dense_pass(
    formula: Formula, x_NCL: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float
) -> DensePass | None:
    """A pass over ``x_NCL``; None where the C does not take it."""
    compiled, arithmetic = loops(x_NCL), functions(formula.name)
    if compiled is None or arithmetic is None:
        return None
    if not (plain(weight_C) and plain(bias_C) and plain(formula.running_var_C)):
        return None
    return DensePass(formula, arithmetic, compiled, eps)
