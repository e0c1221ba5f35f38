"""One forward and backward of one layer, by its method's formulas, or in C or Triton if these have the method.

Shapes: as in kernels/dense.py.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from distnorm.kernels import activations, cpu, gradients
from distnorm.kernels.arithmetic import RAW_MOMENTS, PerChannel
from distnorm.kernels.dense import dense_pass
from distnorm.types import RELU, Affine, Epilogue, Running


class Pass(Protocol):
    """One forward of one layer and its backward: the computation before and after each of the two exchanges."""

    def sums(self, x_NCL: Tensor) -> Tensor:
        """Return what the method shares: local sums and their count, float64 ``[K C + 1]``."""
        ...

    def can_update(self, running: Running) -> bool:
        """Return whether ``normalize`` can update the ``running`` statistics in the same call."""
        ...

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
        ...

    def pull(
        self, dy_NCL: Tensor, x_NCL: Tensor, y_NCL: Tensor | None, weight_C: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Return cotangents of the shared sums, gradients of weight and bias, and the output gradient for ``combine``.

        With a ReLU the output is given. The last result is also the gradient of a residual.
        """
        ...

    def combine(self, dz_NCL: Tensor, x_NCL: Tensor, cotangents: Tensor) -> Tensor:
        """Return the gradient of the input, from shared cotangents."""
        ...


class FormulaPass:
    """A ``Pass`` over any CPU tensor, for any method."""

    def __init__(self, method: PerChannel, affine: Affine) -> None:
        """Start without computing anything."""
        self._method = method
        self._affine = affine

    def sums(self, x_NCL: Tensor) -> Tensor:
        """Return what the method shares: local sums and their count, float64 ``[K C + 1]``."""
        payload, self._pivot_C, self._spare_NCL = cpu.moments(x_NCL)
        return payload[self._method.raw.start * x_NCL.shape[1] :]

    def can_update(self, running: Running) -> bool:
        """Return false: running statistics need a separate call."""
        return False

    def normalize(
        self,
        x_NCL: Tensor,
        shared: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        epilogue: Epilogue,
        running: Running | None,
    ) -> Tensor:
        """Return the output for ``shared`` sums and their count."""
        self._total = torch.where(shared[-1] > 0, shared[-1], 1)
        self._means_KC = shared[:-1].view(-1, x_NCL.shape[1]) / self._total
        self._theta_KC = self._method.link(self._means_KC, self._affine.eps)
        affine = self._affine._replace(weight_C=weight_C, bias_C=bias_C)
        scale_C, shift_C = self._method.coefficients(self._theta_KC, affine)
        shift_C = torch.addcmul(shift_C, self._pivot_C.to(scale_C.dtype), scale_C).to(self._pivot_C.dtype)
        self._scale_C = scale_C.to(self._pivot_C.dtype)
        into_NCL, self._spare_NCL = self._spare_NCL, None
        y_NCL = cpu.apply(x_NCL, self._pivot_C, self._scale_C, shift_C, into=into_NCL)
        if epilogue.residual_NCL is not None:
            y_NCL.add_(epilogue.residual_NCL)
        if epilogue.activation == RELU:
            return y_NCL.relu_()
        self._shift_C, self._activation = shift_C, epilogue.activation
        return activations.activate(y_NCL, epilogue.activation)

    def pull(
        self, dy_NCL: Tensor, x_NCL: Tensor, y_NCL: Tensor | None, weight_C: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
        """Return cotangents of the shared sums, gradients of weight and bias, and the gradient before the epilogue."""
        dz_NCL = self._before_activation(dy_NCL, x_NCL, y_NCL)
        shift_grad_C, scale_grad_C = cpu.cosums(dz_NCL, x_NCL, self._pivot_C).unbind()
        scale_grad_C = torch.addcmul(scale_grad_C, self._pivot_C.double(), shift_grad_C)
        affine = self._affine._replace(weight_C=weight_C)
        cotangents_KC, *grads = gradients.pull(self._method, self._theta_KC, affine, scale_grad_C, shift_grad_C)
        return cotangents_KC.flatten(), grads[0], grads[1], dz_NCL

    def _before_activation(self, dy_NCL: Tensor, x_NCL: Tensor, y_NCL: Tensor | None) -> Tensor:
        if y_NCL is not None:
            dz_NCL: Tensor = torch.ops.aten.threshold_backward(dy_NCL, y_NCL, 0)
            return dz_NCL
        if self._activation is None:
            return dy_NCL
        z_NCL = cpu.apply(x_NCL, self._pivot_C, self._scale_C, self._shift_C)
        return activations.pull(z_NCL, dy_NCL, self._activation)

    def combine(self, dz_NCL: Tensor, x_NCL: Tensor, cotangents: Tensor) -> Tensor:
        """Return the gradient of the input, from shared cotangents."""
        theta_grad_KC = cotangents.view_as(self._theta_KC)
        found_KC = gradients.pull_link(self._method, self._means_KC, self._theta_KC, theta_grad_KC, self._affine.eps)
        grad_KC = found_KC / self._total
        slope_C = 2 * grad_KC[-1]
        level_C = self._pivot_C.double() * slope_C
        if len(grad_KC) == RAW_MOMENTS:
            level_C += grad_KC[0]
        dtype = self._pivot_C.dtype
        return cpu.combine(dz_NCL, x_NCL, self._pivot_C, self._scale_C, level_C.to(dtype), slope_C.to(dtype))


# docs/decisions.md#saved-tensors-are-examined-again
def new_pass(method: PerChannel, x_NCL: Tensor, affine: Affine) -> Pass:
    """Return the pass that computes one forward and its backward."""
    formula = method.formula(affine)
    if formula is not None and x_NCL.is_cuda:
        from distnorm.kernels.gpu.gpu_pass import GpuPass  # imports Triton

        return GpuPass(formula, affine.eps)
    dense = None if formula is None else dense_pass(formula, x_NCL, affine.weight_C, affine.bias_C, affine.eps)
    return FormulaPass(method, affine) if dense is None else dense
