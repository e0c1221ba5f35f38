"""Backward sums: sum(dz) and sum(dz * (x - pivot)), then the cotangents that are shared and the parameters' gradients.

dz is the gradient dy of the output, before the activation if one is fused. With a residual the mask of a ReLU follows
from the output only (MASK 2); dz is then written, for the residual and for ``combine``. Otherwise the mask follows from
x (MASK 1), as does the input of another ACTIVATION, which saves the bytes of both. Float32 within a program, lane by
lane; float64 between programs.

Launches: 1, or 2 where several programs share a channel. Bytes: dy and x once; y and dz, if there is a residual.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distnorm.kernels.activations import NONE
from distnorm.kernels.gpu import formulas
from distnorm.kernels.gpu.activations import FORMULAS
from distnorm.kernels.gpu.apply import normalized
from distnorm.kernels.gpu.moments import MERGE_COLUMNS, MERGE_ROWS
from distnorm.kernels.gpu.tiles import channels, launch, merged, operator, per_channel, place, spread, tiles_of

UNMASKED, BY_INPUT, BY_OUTPUT = 0, 1, 2
"""Which gradients pass: all; those whose output was positive, computed from x; the same, read from y."""


@operator("gpu_cosums")
def cosums(
    dy_NCL: Tensor,
    x_NCL: Tensor,
    y_NCL: Tensor | None,
    pivot_C: Tensor,
    weight_C: Tensor | None,
    saved: Tensor,
    narrow: Tensor,
    kinds: int,
    mask: int,
    activation: int = NONE,
    parameter: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cotangents ``[kinds * C]``, float64; the gradients of weight and bias, in the dtype of the weight; and dz.

    dz is empty unless ``mask`` is BY_OUTPUT. Gradients of outputs that are NaN pass.

    Args:
        dy_NCL: the output's gradient, with the strides of ``x_NCL``; so has ``y_NCL``.
        x_NCL: the input, dense.
        y_NCL: the output, where the mask is taken from it.
        pivot_C: as for ``apply``, like ``weight_C`` and ``kinds``.
        weight_C: as for ``apply``.
        saved: what ``apply`` returned, like ``narrow``.
        narrow: scale and shift, as ``apply`` returned them.
        kinds: as for ``apply``.
        mask: UNMASKED, BY_INPUT or BY_OUTPUT.
        activation: as for ``apply``, like ``parameter``.
        parameter: that of the activation.
    """
    channels_ = x_NCL.shape[1]
    found = cotangents, weight_grad_C, bias_grad_C, dz_NCL = _gradients(dy_NCL, x_NCL, weight_C, kinds, mask)
    if not x_NCL.numel():
        return cotangents.zero_(), weight_grad_C.zero_(), bias_grad_C.zero_(), dz_NCL
    tiles = tiles_of(x_NCL)
    whole = tiles.splits == 1
    parts = cotangents if whole else saved.new_empty(tiles.splits * 2 * channels_)
    launch(
        *(cosums_kernel, tiles.grid, dy_NCL, x_NCL, y_NCL, dz_NCL, pivot_C, weight_C, saved, narrow, parts),
        *(weight_grad_C, bias_grad_C, parameter, *tiles.image, kinds, mask, FORMULAS[activation], whole),
    )
    if not whole:
        launch(
            *(pull_kernel, (triton.cdiv(channels_, MERGE_COLUMNS),), parts, saved, pivot_C, weight_C, *found[:3]),
            *(tiles.splits, channels_, kinds, MERGE_ROWS, MERGE_COLUMNS),
        )
    return found


@torch.library.register_fake("distnorm::gpu_cosums")
def _(
    dy_NCL: Tensor,
    x_NCL: Tensor,
    y_NCL: Tensor | None,
    pivot_C: Tensor,
    weight_C: Tensor | None,
    saved: Tensor,
    narrow: Tensor,
    kinds: int,
    mask: int,
    activation: int = NONE,
    parameter: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _gradients(dy_NCL, x_NCL, weight_C, kinds, mask)


def _gradients(
    dy_NCL: Tensor, x_NCL: Tensor, weight_C: Tensor | None, kinds: int, mask: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    channels_ = x_NCL.shape[1]
    dtype = torch.float32 if weight_C is None else weight_C.dtype
    weight_grad_C, bias_grad_C = (x_NCL.new_empty(channels_, dtype=dtype) for _ in range(2))
    dz_NCL = torch.empty_like(x_NCL, dtype=dy_NCL.dtype) if mask == BY_OUTPUT else dy_NCL.new_empty(0)
    return x_NCL.new_empty(kinds * channels_, dtype=torch.float64), weight_grad_C, bias_grad_C, dz_NCL


@triton.jit
def masked(grad, x, values, middle, scale, shift):
    """``grad`` where the recomputed output, without a residual, is above 0; ``values`` are those of x."""
    output = normalized(values, middle, scale, shift)
    # Rounded as the output was: what became 0 there has no gradient.
    return passing(grad, output.to(x.dtype.element_ty).to(tl.float32))


@triton.jit
def passing(grad, output):
    """``grad`` where ``output`` is above 0, or NaN."""
    return tl.where(output <= 0, 0.0, grad)


@triton.jit(do_not_specialize=["N", "tiles"])
def cosums_kernel(
    dy,
    x,
    y,
    dz,
    pivot,
    weight,
    saved,
    narrow,
    parts,
    weight_grad,
    bias_grad,
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
    WHOLE: tl.constexpr,
):
    """``parts[split, 2, C]``; with WHOLE the cotangents in its place, and the parameters' gradients."""
    c = channels(PLANES, COLS)
    here = c < C
    split, splits = tl.program_id(1), tl.num_programs(1)
    middle = spread(tl.load(pivot + c, mask=here, other=0.0), PLANES)
    scale = spread(tl.load(narrow + c, mask=here, other=0.0), PLANES)
    shift = spread(tl.load(narrow + C + c, mask=here, other=0.0), PLANES)
    ones = tl.zeros([ROWS, COLS], tl.float32)
    twos = tl.zeros([ROWS, COLS], tl.float32)
    for t in range(split, tiles, splits):
        base, offsets, mask, _ = place(t, N, L, C, PLANES, VEC, ROWS, COLS)
        values = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy + base + offsets, mask=mask, other=0.0).to(tl.float32)
        if MASK == 1:
            grad = masked(grad, x, values, middle, scale, shift)
        if MASK == 2:
            grad = passing(grad, tl.load(y + base + offsets, mask=mask, other=0.0).to(tl.float32))
            tl.store(dz + base + offsets, grad.to(dz.dtype.element_ty), mask=mask)
        if ACTIVATION is not None:
            _, grad = ACTIVATION(normalized(values, middle, scale, shift), grad, parameter)
            grad = tl.where(mask, grad, 0.0)
        ones += grad
        twos += grad * tl.where(mask, values - middle, 0.0)
    one, two = per_channel(ones, PLANES).to(tl.float64), per_channel(twos, PLANES).to(tl.float64)
    if WHOLE:
        formulas.pull(one, two, saved, pivot, weight, parts, weight_grad, bias_grad, C, c, here, KINDS)
    else:
        at = parts + split * (2 * C) + c
        tl.store(at, one, mask=here)
        tl.store(at + C, two, mask=here)


@triton.jit(do_not_specialize=["splits"])
def pull_kernel(
    parts,
    saved,
    pivot,
    weight,
    cotangents,
    weight_grad,
    bias_grad,
    splits,
    C,
    KINDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """``formulas.pull`` of ``parts[splits, 2, C]``."""
    c = tl.program_id(0) * COLS + tl.arange(0, COLS)
    here = c < C
    one, two = merged(parts, splits, C, c, here, ROWS, COLS)
    formulas.pull(one, two, saved, pivot, weight, cotangents, weight_grad, bias_grad, C, c, here, KINDS)
