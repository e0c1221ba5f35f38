"""Backward combine: ``dx = dz * scale + level + (x - pivot) * slope``.

Every program computes level and slope of its own channels from the shared cotangents. The gradient dz
before an activation is computed from dy again as in ``cosums``, unless that wrote it.

Launches: 1. Bytes: dz and x once, dx once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distnorm.kernels.activations import NONE
from distnorm.kernels.gpu import formulas
from distnorm.kernels.gpu.activations import FORMULAS
from distnorm.kernels.gpu.apply import normalized
from distnorm.kernels.gpu.cosums import masked
from distnorm.kernels.gpu.tiles import channels, launch, operator, place, spread, tiles_of


@operator("gpu_combine")
def combine(
    dz_NCL: Tensor,
    x_NCL: Tensor,
    cotangents: Tensor,
    count: Tensor,
    pivot_C: Tensor,
    saved: Tensor,
    narrow: Tensor,
    eps: float,
    kinds: int,
    mask: int,
    activation: int = NONE,
    parameter: float = 0.0,
) -> Tensor:
    """Return the gradient of x.

    ``cotangents`` and their forward's ``count`` are shared ones; ``mask`` is UNMASKED or BY_INPUT, for ``dz_NCL`` as it
    comes; the other arguments are as for ``cosums``.
    """
    dx_NCL = torch.empty_like(x_NCL)
    if x_NCL.numel():
        tiles = tiles_of(x_NCL)
        launch(
            *(combine_kernel, tiles.grid, dz_NCL, x_NCL, dx_NCL, cotangents, count, pivot_C, saved, narrow, eps),
            *(parameter, *tiles.image, kinds, mask, FORMULAS[activation]),
        )
    return dx_NCL


@torch.library.register_fake("distnorm::gpu_combine")
def _(
    dz_NCL: Tensor,
    x_NCL: Tensor,
    cotangents: Tensor,
    count: Tensor,
    pivot_C: Tensor,
    saved: Tensor,
    narrow: Tensor,
    eps: float,
    kinds: int,
    mask: int,
    activation: int = NONE,
    parameter: float = 0.0,
) -> Tensor:
    return torch.empty_like(x_NCL)


@triton.jit(do_not_specialize=["N", "tiles"])
def combine_kernel(
    dz,
    x,
    dx,
    cotangents,
    total,
    pivot,
    saved,
    narrow,
    eps,
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
    MASK: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """One pass over x and dz."""
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
        grad = tl.load(dz + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if MASK == 1:
            grad = masked(grad, x, values, middle, scale, shift)
        if ACTIVATION is not None:
            _, grad = ACTIVATION(normalized(values, middle, scale, shift), grad, parameter)
        found = grad * scale + ((values - middle) * slope + level)
        tl.store(dx + base + offsets, found.to(dx.dtype.element_ty), mask=mask)
