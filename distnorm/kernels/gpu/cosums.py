"""Backward sums: sum(dy) and sum(dy * (x - pivot)), then the cotangents that are shared and the parameters' gradients.

Float32 within a program, lane by lane; float64 between programs. Where the activation was fused, dy is masked on the
way in: by the output (MASK 2), or by the output formed anew from x (MASK 1), which spares its bytes.

Launches: 1, or 2 where several programs share a channel. Bytes: dy and x once; y, if the mask is taken from it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distnorm.kernels.gpu import formulas
from distnorm.kernels.gpu.moments import MERGE_COLUMNS, MERGE_ROWS
from distnorm.kernels.gpu.tiles import channels, launch, merged, operator, per_channel, place, spread, tiles_of

UNMASKED, BY_INPUT, BY_OUTPUT = 0, 1, 2
"""Which gradients pass: all; those of outputs that x says were positive; of outputs that y says were."""


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents ``[kinds * C]``, float64, and the gradients of weight and bias, in the dtype of the weight.

    Args:
        dy_NCL: the output's gradient, with the strides of ``x_NCL``; so has ``y_NCL``.
        x_NCL: the input, dense.
        y_NCL: the output, where the mask is taken from it.
        pivot_C: as for ``apply``, like ``weight_C`` and ``kinds``.
        weight_C: see there.
        saved: what ``apply`` returned, like ``narrow``.
        narrow: see there.
        kinds: see there.
        mask: UNMASKED, BY_INPUT or BY_OUTPUT.
    """
    channels_ = x_NCL.shape[1]
    found = cotangents, weight_grad_C, bias_grad_C = _gradients(x_NCL, weight_C, kinds)
    if not x_NCL.numel():
        return cotangents.zero_(), weight_grad_C.zero_(), bias_grad_C.zero_()
    tiles = tiles_of(x_NCL)
    whole = tiles.splits == 1
    parts = cotangents if whole else saved.new_empty(tiles.splits * 2 * channels_)
    launch(
        *(cosums_kernel, tiles.grid, dy_NCL, x_NCL, y_NCL, pivot_C, weight_C, saved, narrow, parts),
        *(weight_grad_C, bias_grad_C, *tiles.image, kinds, mask, whole),
    )
    if not whole:
        launch(
            *(pull_kernel, (triton.cdiv(channels_, MERGE_COLUMNS),), parts, saved, pivot_C, weight_C, *found),
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
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(x_NCL, weight_C, kinds)


def _gradients(x_NCL: Tensor, weight_C: Tensor | None, kinds: int) -> tuple[Tensor, Tensor, Tensor]:
    channels_ = x_NCL.shape[1]
    dtype = torch.float32 if weight_C is None else weight_C.dtype
    weight_grad_C, bias_grad_C = (x_NCL.new_empty(channels_, dtype=dtype) for _ in range(2))
    return x_NCL.new_empty(kinds * channels_, dtype=torch.float64), weight_grad_C, bias_grad_C


@triton.jit
def masked(dy, y, values, middle, scale, shift, at, mask, MASK: tl.constexpr):
    """The gradient of a tile of outputs, before the activation; ``values`` are those of x."""
    grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    if MASK == 1:
        # Rounded as the output was: what became 0 there has no gradient.
        output = ((values - middle) * scale + shift).to(dy.dtype.element_ty).to(tl.float32)
        grad = tl.where(output <= 0, 0.0, grad)
    if MASK == 2:
        output = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        grad = tl.where(output <= 0, 0.0, grad)
    return grad


@triton.jit(do_not_specialize=["N", "tiles"])
def cosums_kernel(
    dy,
    x,
    y,
    pivot,
    weight,
    saved,
    narrow,
    parts,
    weight_grad,
    bias_grad,
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
        grad = masked(dy, y, values, middle, scale, shift, base + offsets, mask, MASK)
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
