"""Local moments: sums of x and of its squares with their count, in float64, and the mean, about which loops centre.

Two levels. A program takes the mean of its first tile as its pivot, sums (x - pivot) and (x - pivot)^2 in float32, lane
by lane, and turns these into sums about 0 in float64; those are added up over programs. With p the mean of one of T
tiles, (p - mean)^2 <= T var, so what cancels within a program is at most log2(T + 1) bits.

Launches: 1, or 2 where several programs share a channel. Bytes: x once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distnorm.kernels.gpu.tiles import (
    channels,
    launch,
    merged,
    operator,
    per_channel,
    place,
    spread,
    tiles_of,
)

MERGE_ROWS, MERGE_COLUMNS = 32, 32
"""Splits and channels per block of the merging kernel."""


@operator("gpu_moments")
def moments(x_NCL: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float64 payload ``[2 C + 1]`` of a dense ``x_NCL``, and the float32 mean ``[C]``, 0 without values."""
    channels_, values = x_NCL.shape[1], x_NCL.numel()
    if not values:
        return x_NCL.new_zeros(2 * channels_ + 1, dtype=torch.float64), x_NCL.new_zeros(channels_, dtype=torch.float32)
    payload = x_NCL.new_empty(2 * channels_ + 1, dtype=torch.float64)
    pivot_C = x_NCL.new_empty(channels_, dtype=torch.float32)
    tiles = tiles_of(x_NCL)
    count = values // channels_
    if tiles.splits == 1:
        launch(sums_kernel, tiles.grid, x_NCL, payload, pivot_C, count, *tiles.image, True)
        return payload, pivot_C
    parts = x_NCL.new_empty(tiles.splits * 2 * channels_, dtype=torch.float64)
    launch(sums_kernel, tiles.grid, x_NCL, parts, pivot_C, count, *tiles.image, False)
    blocks = (triton.cdiv(channels_, MERGE_COLUMNS),)
    launch(merge_kernel, blocks, parts, payload, pivot_C, count, tiles.splits, channels_, MERGE_ROWS, MERGE_COLUMNS)
    return payload, pivot_C


@torch.library.register_fake("distnorm::gpu_moments")
def _(x_NCL: Tensor) -> tuple[Tensor, Tensor]:
    channels_ = x_NCL.shape[1]
    return (
        x_NCL.new_empty(2 * channels_ + 1, dtype=torch.float64),
        x_NCL.new_empty(channels_, dtype=torch.float32),
    )


@triton.jit(do_not_specialize=["count", "N", "tiles"])
def sums_kernel(
    x,
    sums,
    pivot,
    count,
    N,
    L,
    C,
    tiles,
    PLANES: tl.constexpr,
    VEC: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """``sums[split, 2, C]``; with WHOLE it is the payload, and the pivot is written, too."""
    c = channels(PLANES, COLS)
    here = c < C
    split, splits = tl.program_id(1), tl.num_programs(1)
    base, offsets, mask, seen = place(split, N, L, C, PLANES, VEC, ROWS, COLS)
    values = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32)
    centre = per_channel(values, PLANES) / tl.cast(seen, tl.float32)
    ones = tl.where(mask, values - spread(centre, PLANES), 0.0)
    twos = ones * ones
    for t in range(split + splits, tiles, splits):
        base, offsets, mask, more = place(t, N, L, C, PLANES, VEC, ROWS, COLS)
        values = tl.load(x + base + offsets, mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, values - spread(centre, PLANES), 0.0)
        ones += centred
        twos += centred * centred
        seen += more
    one, two = per_channel(ones, PLANES).to(tl.float64), per_channel(twos, PLANES).to(tl.float64)
    number, middle = tl.cast(seen, tl.float64), centre.to(tl.float64)
    total = number * middle + one
    at = sums + split * (2 * C) + c
    tl.store(at, total, mask=here)
    tl.store(at + C, two + middle * (2 * one + number * middle), mask=here)
    if WHOLE:
        tl.store(pivot + c, (total / number).to(tl.float32), mask=here)
        tl.store(sums + 2 * C, tl.cast(count, tl.float64), mask=tl.program_id(0) == 0)


@triton.jit(do_not_specialize=["count", "splits"])
def merge_kernel(parts, payload, pivot, count, splits, C, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The payload of ``parts[splits, 2, C]``, and the mean."""
    c = tl.program_id(0) * COLS + tl.arange(0, COLS)
    here = c < C
    one, two = merged(parts, splits, C, c, here, ROWS, COLS)
    number = tl.cast(count, tl.float64)
    tl.store(payload + c, one, mask=here)
    tl.store(payload + C + c, two, mask=here)
    tl.store(pivot + c, (one / number).to(tl.float32), mask=here)
    tl.store(payload + 2 * C, number, mask=tl.program_id(0) == 0)
