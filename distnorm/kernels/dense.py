"""One forward and backward of one layer in C: dense float32 on a CPU, by a method that ``arithmetic.c`` knows.

Small layers cost what Python costs, so every pass is one call, by addresses. Shapes: x_NCL, y_NCL, their gradients
dx_NCL, dy_NCL, and dz_NCL, which is dy_NCL before the tail; weight_C, bias_C; shared and cotangents float64,
``[K C + 1]`` with the count and ``[K C]``, of the formula's K kinds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from distnorm.kernels.arithmetic import FORMULAS, Formula, address, plain
from distnorm.kernels.cpu import Loops, like, loops
from distnorm.kernels.native import library
from distnorm.types import Running, Tail

DOUBLE = 8  # bytes


class DensePass:
    """What the kernels remember between the loops of a forward, and for its backward."""

    def __init__(self, formula: Formula, compiled: Loops, eps: float) -> None:
        """Nothing is computed yet."""
        found = library()
        assert found is not None, "there are loops"
        self._c, self._formula, self._eps = found, formula, eps
        self._lay_out(compiled)
        self.absorbed = False

    def _lay_out(self, compiled: Loops) -> None:
        self._way = compiled.rows, FORMULAS.index(self._formula.name)
        self._image = compiled.image

    def _dense(self, x_NCL: Tensor) -> Tensor:
        """``x`` as the loops take it. Hooks of saved tensors may give the backward another layout than they got."""
        compiled = loops(x_NCL)
        if compiled is None:
            x_NCL = x_NCL.float().contiguous()
            compiled = loops(x_NCL)
        assert compiled is not None, "dense float32 values, of which there are some"
        self._lay_out(compiled)
        return x_NCL

    def sums(self, x_NCL: Tensor) -> Tensor:
        """What the method shares: local sums and their count, float64 ``[K C + 1]``."""
        channels, kinds = x_NCL.shape[1], self._formula.kinds
        self._memory = x_NCL.new_empty(7 * channels + 1 + (5 * channels + 1) // 2, dtype=torch.float64)
        self._at = self._memory.data_ptr()
        self._c.dense_sums(self._way[0], x_NCL.data_ptr(), self._at, *self._image)
        return self._memory[(2 - kinds) * channels : 2 * channels + 1]

    def normalize(
        self,
        x_NCL: Tensor,
        shared: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        tail: Tail,
        running: Running | None,
    ) -> Tensor:
        """The output, by ``shared`` sums and their count; ``running`` statistics absorb these, if given and plain."""
        self._shared = shared = shared.contiguous()
        formula, y_NCL = self._formula, torch.empty_like(x_NCL)
        residual_NCL = None if tail.residual_NCL is None else like(tail.residual_NCL, x_NCL)
        # Without a residual, the output's sign is known from x.
        self._relu = tail.relu and residual_NCL is None
        self._c.dense_normalize(
            *(*self._way, x_NCL.data_ptr(), address(residual_NCL), y_NCL.data_ptr(), tail.relu, shared.data_ptr()),
            *(address(weight_C), address(bias_C), address(formula.running_var_C), formula.clip, self._eps, self._at),
            *(*self._statistics(running), *self._image),
        )
        return y_NCL

    def _statistics(self, running: Running | None) -> _Addresses:
        """Where C finds what absorbs, the momentum and the guard."""
        if running is None or not _absorbs(running):
            return None, None, None, 0.0, False
        self.absorbed = True
        return _addresses(running)

    def pull(
        self, dy_NCL: Tensor, x_NCL: Tensor, y_NCL: Tensor | None, weight_C: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cotangents of what was shared, gradients of weight and bias, and what ``combine`` wants of the output's.

        With a relu the output is given, too. With a residual, the last result is its gradient.
        """
        x_NCL, weight_C = self._dense(x_NCL), None if weight_C is None else weight_C.float().contiguous()
        dz_NCL = dy_NCL = like(dy_NCL, x_NCL)
        output = masked = None
        if y_NCL is not None and not self._relu:
            y_NCL, dz_NCL = like(y_NCL, x_NCL), torch.empty_like(x_NCL)
            output, masked = y_NCL.data_ptr(), dz_NCL.data_ptr()
        channels = x_NCL.shape[1]
        cotangents = self._memory.new_empty(self._formula.kinds * channels)
        weight_grad_C, bias_grad_C = x_NCL.new_empty(channels), x_NCL.new_empty(channels)
        found = cotangents.data_ptr(), weight_grad_C.data_ptr(), bias_grad_C.data_ptr()
        self._c.dense_pull(
            *(*self._way, self._relu, dy_NCL.data_ptr(), x_NCL.data_ptr(), output, masked, address(weight_C), self._at),
            *(*found, *self._image),
        )
        return cotangents, weight_grad_C, bias_grad_C, dz_NCL

    def combine(self, dz_NCL: Tensor, x_NCL: Tensor, cotangents: Tensor) -> Tensor:
        """The input's gradient, by shared cotangents and the last result of ``pull``."""
        x_NCL = self._dense(x_NCL)
        dz_NCL = like(dz_NCL, x_NCL)
        count = self._shared.data_ptr() + self._formula.kinds * x_NCL.shape[1] * DOUBLE
        cotangents, dx_NCL = cotangents.contiguous(), torch.empty_like(x_NCL)
        self._c.dense_combine(
            *(*self._way, self._relu, dz_NCL.data_ptr(), x_NCL.data_ptr(), dx_NCL.data_ptr()),
            *(cotangents.data_ptr(), count, self._eps, self._at, *self._image),
        )
        return dx_NCL


def absorb(formula: Formula, shared: Tensor, running: Running) -> bool:
    """Let ``running`` statistics absorb ``shared`` sums and their count, if C can: to the bit as ``normalize`` does.

    Nothing happens where fewer than two values were seen.
    """
    found = library() if formula.name in FORMULAS else None
    if found is None or not _absorbs(running):
        return False
    mean_C, var_C, updates, *rate = _addresses(running)
    wire = shared.contiguous()
    function = getattr(found, f"{formula.name}_absorb")
    function(wire.data_ptr(), (len(wire) - 1) // formula.kinds, *rate, updates, mean_C, var_C)
    return True


_Addresses = tuple[int | None, int | None, int | None, float, bool]
"""Of running_mean, running_var and the number of updates; the momentum, negative for the plain average; the guard."""


def _absorbs(running: Running) -> bool:
    on_cpu = running.updates is not None and running.updates.is_cpu
    return running.is_whole and plain(running.mean_C) and plain(running.var_C) and on_cpu


def _addresses(running: Running) -> _Addresses:
    mean_C, var_C, updates, momentum, guarded = running
    assert mean_C is not None and var_C is not None and updates is not None, "they are whole"
    increment_version((mean_C, var_C, updates))  # as torch's own operations do, for autograd's checks
    rate = -1.0 if momentum is None else momentum
    return mean_C.data_ptr(), var_C.data_ptr(), updates.data_ptr(), rate, guarded


def dense_pass(
    formula: Formula, x_NCL: Tensor, weight_C: Tensor | None, bias_C: Tensor | None, eps: float
) -> DensePass | None:
    """A pass over ``x_NCL``; None where the C does not take it."""
    compiled = loops(x_NCL) if formula.name in FORMULAS else None
    if compiled is None or not (plain(weight_C) and plain(bias_C) and plain(formula.running_var_C)):
        return None
    return DensePass(formula, compiled, eps)
