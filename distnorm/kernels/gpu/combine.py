"""Backward combine: ``dx = dy * scale + level + (x - pivot) * slope``.

Every program works out level and slope of its own channels from the shared cotangents.

Launches: 1. Bytes: dy and x once, dx once; y, if the mask is taken from it, and the residual's gradient, if it is asked
for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distnorm.kernels.gpu import formulas
from distnorm.kernels.gpu.cosums import masked
from distnorm.kernels.gpu.tiles import channels, launch, operator, place, spread, tiles_of


@operator("gpu_combine")
def combine(
    dy_NCL: Tensor,
    x_NCL: Tensor,
    y_NCL: Tensor | None,
    cotangents: Tensor,
    count: Tensor,
    pivot_C: Tensor,
    saved: Tensor,
    narrow: Tensor,
    eps: float,
    kinds: int,
    mask: int,
    adds: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of x; and that of the residual, if ``adds`` says that there was one, else an empty tensor.

    ``cotangents`` and their forward's ``count`` are shared ones; the other arguments are as for ``cosums``.
    """
    dx_NCL, dresidual_NCL = _gradients(x_NCL, adds)
    if x_NCL.numel():
        tiles = tiles_of(x_NCL)
        launch(
            *(combine_kernel, tiles.grid, dy_NCL, x_NCL, y_NCL, dx_NCL, dresidual_NCL if adds else None),
            *(cotangents, count, pivot_C, saved, narrow, eps, *tiles.image, kinds, mask),
        )
    return dx_NCL, dresidual_NCL


@torch.library.register_fake("distnorm::gpu_combine")
def _(
    dy_NCL: Tensor,
    x_NCL: Tensor,
    y_NCL: Tensor | None,
    cotangents: Tensor,
    count: Tensor,
    pivot_C: Tensor,
    saved: Tensor,
    narrow: Tensor,
    eps: float,
    kinds: int,
    mask: int,
    adds: bool,
) -> tuple[Tensor, Tensor]:
    return _gradients(x_NCL, adds)


def _gradients(x_NCL: Tensor, adds: bool) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x_NCL), torch.empty_like(x_NCL) if adds else x_NCL.new_empty(0)


@triton.jit(do_not_specialize=["N", "tiles"])
def combine_kernel(
    dy,
    x,
    y,
    dx,
    dresidual,
    cotangents,
    total,
    pivot,
    saved,
    narrow,
    eps,
    N,
    L,
    C,
    tiles,
    PLANES: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    KINDS: tl.constexpr,
    MASK: tl.constexpr,
):
    """One pass over x and dy."""
    c = channels(PLANES, COLS)
    here = c < C
    level, slope = formulas.link(cotangents, saved, total, pivot, eps, C, c, here, KINDS)
    level, slope = spread(level.to(tl.float32), PLANES), spread(slope.to(tl.float32), PLANES)
    middle = spread(tl.load(pivot + c, mask=here, other=0.0), PLANES)
    scale = spread(tl.load(narrow + c, mask=here, other=0.0), PLANES)
    shift = spread(tl.load(narrow + C + c, mask=here, other=0.0), PLANES)
    for t in range(tl.program_id(1), tiles, tl.num_programs(1)):
        base, offsets, mask, _ = place(t, N, L, C, PLANES, VEC, ROWS, COLS)
        values = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = masked(dy, y, values, middle, scale, shift, base + offsets, mask, MASK)
        found = grad * scale + ((values - middle) * slope + level)
        tl.store(dx + base + offsets, found.to(dx.dtype.element_ty), mask=mask)
        if dresidual is not None:
            tl.store(dresidual + base + offsets, grad.to(dresidual.dtype.element_ty), mask=mask)
