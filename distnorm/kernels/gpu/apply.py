"""Finalize and apply, in one launch: shared sums become scale and shift, and update the running statistics.

Every program computes scale and shift of its own channels, which costs less than a launch. The first program of each
channel stores them for the backward pass and updates the running statistics. No value has to be known on the host.

Launches: 1. Bytes: x and a residual once, y once.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from distnorm.kernels.activations import RECTIFIED
from distnorm.kernels.gpu import formulas
from distnorm.kernels.gpu.activations import FORMULAS
from distnorm.kernels.gpu.tiles import channels, launch, operator, place, spread, tiles_of

BLOCK = 128
"""Channels per program of ``update_running_kernel``."""


@operator("gpu_apply", mutates=("running",))
def apply(
    x_NCL: Tensor,
    shared: Tensor,
    pivot_C: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    residual_NCL: Tensor | None,
    followed: Sequence[Tensor],
    running: Sequence[Tensor],
    earlier: Tensor | None,
    momentum: float | None,
    eps: float,
    clip: float,
    clip_after: int,
    kinds: int,
    activation: int,
    guarded: bool = False,
    parameter: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = (x - pivot) * scale + shift`` of dense ``x_NCL``; then ``+ residual`` and the activation, if requested.

    Args:
        x_NCL: the input; ``residual_NCL`` has its strides.
        shared: sums ``[kinds * C]`` and their count, float64.
        pivot_C: what the loop centres about.
        weight_C: the learnt scale.
        bias_C: the learnt shift.
        residual_NCL: what is added to the output.
        followed: copies of running_var and its number of updates, for the correction of RMS; else empty.
        running: running_mean, running_var and their number of updates, updated in place; else empty.
        earlier: a copy of that number, where ``momentum`` is None: the plain average over all steps.
        momentum: the weight of this step.
        eps: guards the division.
        clip: the bound of the correction, in force after ``clip_after`` updates.
        clip_after: see ``clip``.
        kinds: 2 for batch norm, 1 for RMS.
        activation: its number in ``kernels/activations.py``.
        guarded: whether ``running`` skips moments that would make it non-finite.
        parameter: that of the activation.

    Returns:
        y; means of ``shared`` and d scale / d weight ``[kinds + 1, C]``, float64; scale and shift ``[2, C]``, float32.
    """
    saved, narrow = _kept(x_NCL, kinds)
    y_NCL = torch.empty_like(x_NCL)
    tiles = tiles_of(x_NCL)
    followed_var, followed_updates = followed if followed else (None, None)
    running_mean, running_var, updates = running if running else (None, None, None)
    launch(
        *(apply_kernel, tiles.grid, x_NCL, y_NCL, residual_NCL, shared, pivot_C, weight_C, bias_C),
        *(followed_var, followed_updates, running_mean, running_var, updates, earlier, saved, narrow),
        *(momentum, eps, clip, clip_after, parameter, *tiles.image, kinds, activation == RECTIFIED),
        *(FORMULAS[activation], _limit(running) if guarded else 0.0, BLOCK),
    )
    return y_NCL, saved, narrow


@torch.library.register_fake("distnorm::gpu_apply")
def _(
    x_NCL: Tensor,
    shared: Tensor,
    pivot_C: Tensor,
    weight_C: Tensor | None,
    bias_C: Tensor | None,
    residual_NCL: Tensor | None,
    followed: Sequence[Tensor],
    running: Sequence[Tensor],
    earlier: Tensor | None,
    momentum: float | None,
    eps: float,
    clip: float,
    clip_after: int,
    kinds: int,
    activation: int,
    guarded: bool = False,
    parameter: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x_NCL), *_kept(x_NCL, kinds)


def _limit(running: Sequence[Tensor]) -> float:
    """The largest moment: half the maximum, since an update towards it must not overflow either."""
    return torch.finfo(running[1].dtype).max / 2 if running else 0.0


def _kept(x_NCL: Tensor, kinds: int) -> tuple[Tensor, Tensor]:
    channels_ = x_NCL.shape[1]
    return (
        x_NCL.new_empty((kinds + 1) * channels_, dtype=torch.float64),
        x_NCL.new_empty(2 * channels_, dtype=torch.float32),
    )


@triton.jit(do_not_specialize=["clip_after", "N", "tiles"])
def apply_kernel(
    x,
    y,
    residual,
    shared,
    pivot,
    weight,
    bias,
    followed,
    followed_updates,
    running_mean,
    running_var,
    updates,
    earlier,
    saved,
    narrow,
    momentum,
    eps,
    clip,
    clip_after,
    parameter,
    N,
    L,
    C,
    tiles,
    PLANES: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    KINDS: tl.constexpr,
    RECTIFIES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass over x. The first split of each channel writes the C-sized results."""
    c = channels(PLANES, COLS)
    here = c < C
    split, splits = tl.program_id(1), tl.num_programs(1)
    mean, square, count, factor, scale, shift = formulas.forward(
        shared, pivot, weight, bias, followed, followed_updates, clip, clip_after, eps, C, c, here, KINDS
    )
    # As many as there are channels: a scalar truth is spread as a number by the interpreter, which Triton 3.9 refuses.
    mine = here & (split + 0 * c == 0)
    if KINDS == 2:
        tl.store(saved + c, mean, mask=mine)
    tl.store(saved + (KINDS - 1) * C + c, square, mask=mine)
    tl.store(saved + KINDS * C + c, factor, mask=mine)
    tl.store(narrow + c, scale.to(tl.float32), mask=mine)
    tl.store(narrow + C + c, shift.to(tl.float32), mask=mine)
    if running_var is not None:
        fresh = mine & (count > 1)
        counts = (split == 0) & (tl.program_id(0) == 0) & (tl.load(shared + KINDS * C) > 1)
        if LIMIT > 0:
            total = tl.load(shared + KINDS * C + 0 * tl.arange(0, BLOCK))
            bad = formulas.misfits(shared, formulas.divisor(total), total, C, LIMIT, KINDS, BLOCK)
            fresh = fresh & (bad + 0 * c == 0)
            counts = counts & (bad == 0)
        formulas.update_running(mean, square, count, running_mean, running_var, earlier, momentum, c, fresh, KINDS)
        tl.store(updates, tl.load(updates) + 1, mask=counts)
    middle = spread(tl.load(pivot + c, mask=here, other=0.0), PLANES)
    scale, shift = spread(scale.to(tl.float32), PLANES), spread(shift.to(tl.float32), PLANES)
    for t in range(split, tiles, splits):
        base, offsets, mask, _ = place(t, N, L, C, PLANES, VEC, ROWS, COLS)
        values = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32)
        values = normalized(values, middle, scale, shift)
        if residual is not None:
            values += tl.load(residual + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if RECTIFIES:
            values = tl.where(values < 0, 0.0, values)  # NaN stays NaN
        if ACTIVATION is not None:
            values, _ = ACTIVATION(values, values, parameter)
        tl.store(y + base + offsets, values.to(y.dtype.element_ty), mask=mask)


@triton.jit
def normalized(values, middle, scale, shift):
    """``(x - pivot) * scale + shift``, with fixed rounding: backward passes repeat it bit for bit."""
    return tl.fma(values - middle, scale, shift)


@operator("gpu_update_running", mutates=("running",))
def update_running(
    means: Tensor,
    total: Tensor,
    completed: Tensor,
    running: Sequence[Tensor],
    earlier: Tensor | None,
    momentum: float | None,
    kinds: int,
    guarded: bool = False,
) -> None:
    """Update running statistics with ``means[kinds * C]`` of ``total`` values, if ``completed`` is not 0. One launch.

    All float64; ``running``, ``earlier``, ``momentum`` and ``guarded`` as for ``apply``.
    """
    channels_ = running[1].numel()
    blocks = (triton.cdiv(channels_, BLOCK),)
    limit = _limit(running) if guarded else 0.0
    launch(
        update_running_kernel,
        blocks,
        means,
        total,
        completed,
        *running,
        earlier,
        momentum,
        channels_,
        kinds,
        limit,
        BLOCK,
    )


@torch.library.register_fake("distnorm::gpu_update_running")
def _(
    means: Tensor,
    total: Tensor,
    completed: Tensor,
    running: Sequence[Tensor],
    earlier: Tensor | None,
    momentum: float | None,
    kinds: int,
    guarded: bool = False,
) -> None:
    pass


@triton.jit
def update_running_kernel(
    means,
    total,
    completed,
    running_mean,
    running_var,
    updates,
    earlier,
    momentum,
    C,
    KINDS: tl.constexpr,
    LIMIT: tl.constexpr,
    COLS: tl.constexpr,
):
    """Call ``formulas.update_running`` with means that no forward has computed."""
    c = tl.program_id(0) * COLS + tl.arange(0, COLS)
    here = c < C
    mean = tl.load(means + c, mask=here, other=0.0)
    square = tl.load(means + (KINDS - 1) * C + c, mask=here, other=0.0)
    count = tl.load(total + 0 * c)
    fresh = here & (count > 1) & (tl.load(completed + 0 * c) > 0)
    counts = (tl.program_id(0) == 0) & (tl.load(total) > 1) & (tl.load(completed) > 0)
    if LIMIT > 0:
        bad = formulas.misfits(means, 1.0 + 0.0 * count, count, C, LIMIT, KINDS, COLS)
        fresh = fresh & (bad + 0 * c == 0)
        counts = counts & (bad == 0)
    formulas.update_running(mean, square, count, running_mean, running_var, earlier, momentum, c, fresh, KINDS)
    tl.store(updates, tl.load(updates) + 1, mask=counts)
