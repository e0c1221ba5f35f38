"""One forward and backward of one layer on an NVIDIA GPU, for a method in ``formulas.py``.

Beside the collectives, 3 launches forward and 3 backward at most; 2 and 2 where one program has a channel to itself.
Shapes: as in kernels/dense.py.
"""

from torch import Tensor
from torch.autograd.graph import increment_version

from distnorm.kernels.arithmetic import Formula
from distnorm.kernels.gpu.apply import apply, update_running
from distnorm.kernels.gpu.combine import combine
from distnorm.kernels.gpu.cosums import BY_INPUT, BY_OUTPUT, UNMASKED, cosums
from distnorm.kernels.gpu.moments import moments
from distnorm.kernels.gpu.tiles import dense, like
from distnorm.types import Epilogue, GlobalStatistics, Running


class GpuPass:
    """A ``passes.Pass`` over dense or other CUDA tensors."""

    def __init__(self, formula: Formula, eps: float) -> None:
        """Start without computing anything."""
        self._formula, self._eps = formula, eps

    def sums(self, x_NCL: Tensor) -> Tensor:
        """Return what the method shares: local sums and their count, float64 ``[K C + 1]``."""
        payload: Tensor
        payload, self._pivot_C = moments(dense(x_NCL))
        return payload[(2 - self._formula.kinds) * x_NCL.shape[1] :]

    def can_update(self, running: Running) -> bool:
        """Return whether ``normalize`` can update the ``running`` statistics."""
        return running.is_whole

    def normalize(
        self,
        x_NCL: Tensor,
        shared: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        epilogue: Epilogue,
        running: Running | None,
    ) -> Tensor:
        """Return the output for ``shared`` sums and their count; these update the ``running`` statistics, if given."""
        formula, x_NCL = self._formula, dense(x_NCL)
        shared = shared.contiguous()
        self._count, self._mask = shared[-1], _mask(epilogue)
        residual_NCL = None if epilogue.residual_NCL is None else like(epilogue.residual_NCL, x_NCL)
        guarded = running is not None and running.guarded
        followed = [] if formula.running_var_C is None else [formula.running_var_C, formula.updates]
        buffers, earlier, momentum = _arguments(running)
        weight_C, bias_C = (None if each is None else each.contiguous() for each in (weight_C, bias_C))
        y_NCL: Tensor
        y_NCL, self._saved, self._narrow = apply(
            *(x_NCL, shared, self._pivot_C, weight_C, bias_C, residual_NCL, followed, buffers, earlier, momentum),
            *(self._eps, formula.clip, formula.clip_after, formula.kinds, epilogue.relu, guarded),
        )
        increment_version(buffers)
        return y_NCL

    def pull(
        self, dy_NCL: Tensor, x_NCL: Tensor, y_NCL: Tensor | None, weight_C: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return cotangents, gradients of weight and bias, and the output gradient for ``combine``."""
        x_NCL, weight_C = dense(x_NCL), None if weight_C is None else weight_C.contiguous()
        dy_NCL = like(dy_NCL, x_NCL)
        y_NCL = None if y_NCL is None or self._mask != BY_OUTPUT else like(y_NCL, x_NCL)
        cotangents, weight_grad_C, bias_grad_C, dz_NCL = cosums(
            *(dy_NCL, x_NCL, y_NCL, self._pivot_C, weight_C, self._saved, self._narrow),
            *(self._formula.kinds, self._mask),
        )
        return cotangents, weight_grad_C, bias_grad_C, dy_NCL if y_NCL is None else dz_NCL

    def combine(self, dz_NCL: Tensor, x_NCL: Tensor, cotangents: Tensor) -> Tensor:
        """Return the gradient of the input, from shared cotangents and the last result of ``pull``."""
        x_NCL = dense(x_NCL)
        dx_NCL: Tensor = combine(
            *(like(dz_NCL, x_NCL), x_NCL, cotangents.contiguous(), self._count, self._pivot_C, self._saved),
            *(self._narrow, self._eps, self._formula.kinds, UNMASKED if self._mask == BY_OUTPUT else self._mask),
        )
        return dx_NCL


def _mask(epilogue: Epilogue) -> int:
    """Return where the backward pass finds the mask of the activation."""
    if not epilogue.relu:
        return UNMASKED
    return BY_INPUT if epilogue.residual_NCL is None else BY_OUTPUT


def update_from_means(formula: Formula, statistics: GlobalStatistics, running: Running) -> None:
    """Update ``running`` with the ``statistics`` that completed at a step's end, if their weight is not 0."""
    buffers, earlier, momentum = _arguments(running)
    given = statistics.means.contiguous(), statistics.total, statistics.weight
    update_running(*given, buffers, earlier, momentum, formula.kinds, running.guarded)
    increment_version(buffers)


def _arguments(running: Running | None) -> tuple[list[Tensor], Tensor | None, float | None]:
    """Buffers, a copy of their number of updates, and the momentum, as operators take them."""
    if running is None:
        return [], None, 0.0
    mean_C, var_C, updates, momentum, *_ = running
    assert mean_C is not None and var_C is not None and updates is not None, "they are whole"
    # Programs read the number while one of them counts on.
    earlier = updates.clone() if momentum is None else None
    return [mean_C, var_C, updates], earlier, momentum
