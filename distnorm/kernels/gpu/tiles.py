"""The tiling of a tensor, on the host and in a kernel; and the launch of kernels.

Two layouts. Planes: images [N, C, L], contiguous; a program works on one channel, a tile is ROWS samples by COLS
positions. Rows: [N L, C], channels last; a program works on COLS channels, a tile is ROWS rows of them.

The grid is (channels, splits): program (i, j) handles the tiles j, j + splits, ... of its channels. Positions come as
``L * VEC`` with a constant VEC, so that the compiler can infer their alignment and load vectors.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048
"""Values of a tile: 16 for each thread of 4 warps."""

COLUMNS = 64
"""Channels of a tile of rows: 128 bytes in half precision."""

PROGRAMS = 1024
"""Programs that occupy a large GPU: 8 on each of its multiprocessors."""

LONGEST = 64
"""Tiles per program, unless the grid is at its limit: the number of values in each lane's float32 sums."""

SPLITS = 65535
"""CUDA's limit of a grid's second dimension; beyond it, a program handles more tiles."""

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Tiles(NamedTuple):
    """One launch's grid, and the arguments that end each kernel's: ``N, L, C, tiles, PLANES, VEC, ROWS, COLS``."""

    grid: tuple[int, int]
    image: tuple[int, int, int, int, bool, int, int, int]

    @property
    def splits(self) -> int:
        """Programs that share a channel."""
        return self.grid[1]


def tiles_of(x_NCL: Tensor) -> Tiles:
    """The tiles of ``x_NCL``, which is ``dense``; one split without tiles if it is empty."""
    return _cut(x_NCL.shape, x_NCL.is_contiguous(), TILE, COLUMNS, PROGRAMS)


@lru_cache(maxsize=4096)
def _cut(shape: torch.Size, contiguous: bool, tile: int, width: int, programs: int) -> Tiles:
    batch, channels, length = shape[0], shape[1], math.prod(shape[2:])
    if contiguous and length > 1:
        vector = math.gcd(length, 16)
        columns = min(triton.next_power_of_2(length), tile)
        rows = max(1, min(triton.next_power_of_2(batch), tile // columns))
        count = triton.cdiv(batch, rows) * triton.cdiv(length, columns)
        blocks, image = channels, (batch, length // vector, channels, count, True, vector, rows, columns)
    else:
        columns = min(triton.next_power_of_2(channels), width, tile)
        rows = max(1, min(triton.next_power_of_2(max(batch * length, 1)), tile // columns))
        count = triton.cdiv(batch * length, rows)
        blocks, image = triton.cdiv(channels, columns), (batch * length, 1, channels, count, False, 1, rows, columns)
    wanted = max(triton.cdiv(programs, blocks), triton.cdiv(count, LONGEST))
    return Tiles((blocks, max(1, min(count, wanted, SPLITS))), image)


def dense(x_NCL: Tensor) -> Tensor:
    """``x_NCL`` in one of the two layouts; itself, if it is."""
    channels_last = _CHANNELS_LAST.get(x_NCL.dim())
    if channels_last is not None and x_NCL.is_contiguous(memory_format=channels_last):
        return x_NCL
    return x_NCL.contiguous()


def like(dy_NCL: Tensor, x_NCL: Tensor) -> Tensor:
    """``dy_NCL`` laid out as ``x_NCL``, which is ``dense``."""
    if dy_NCL.stride() == x_NCL.stride() or (dy_NCL.is_contiguous() and x_NCL.is_contiguous()):
        return dy_NCL
    return torch.empty_like(x_NCL, dtype=dy_NCL.dtype).copy_(dy_NCL)


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any) -> None:
    """Run ``kernel`` on the device of its first tensor, which need not be the current one."""
    device = next(each.device for each in arguments if isinstance(each, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*arguments, num_warps=4)
    else:
        kernel[grid](*arguments, num_warps=4)


def operator(name: str, mutates: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the operator ``distnorm::name`` and return that.

    Through the plain registry: ``custom_op`` does the same for 10 to 20 microseconds more of each call (torch 2.13),
    as much as a small layer costs in total.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        qualified = f"distnorm::{name}"
        torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=mutates))
        torch.library.impl(qualified, ("cpu", "cuda"), function)
        found: Callable[..., Any] = getattr(torch.ops.distnorm, name).default
        return found

    return register


@triton.jit
def channels(PLANES: tl.constexpr, COLS: tl.constexpr):
    """The channels of this program: a number, or COLS of them."""
    if PLANES:
        found = tl.program_id(0)
    else:
        found = tl.program_id(0) * COLS + tl.arange(0, COLS)
    return found


@triton.jit
def place(t, N, L, C, PLANES: tl.constexpr, VEC: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Tile t of this program's channels: its first element, offsets from there, which exist, how many per channel."""
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    if PLANES:
        length = L * VEC
        across = tl.cdiv(length, COLS)
        n, at = (t // across) * ROWS, (t % across) * COLS
        base = (tl.cast(n, tl.int64) * C + tl.program_id(0)) * length + at
        offsets = rows[:, None] * (C * length) + cols[None, :]
        mask = (n + rows < N)[:, None] & (at + cols < length)[None, :]
        count = tl.minimum(N - n, ROWS) * tl.minimum(length - at, COLS)
    else:
        n, c = t * ROWS, tl.program_id(0) * COLS
        base = tl.cast(n, tl.int64) * C + c
        offsets = rows[:, None] * C + cols[None, :]
        mask = (n + rows < N)[:, None] & (c + cols < C)[None, :]
        count = tl.minimum(N - n, ROWS)
    return base, offsets, mask, count


@triton.jit
def spread(values, PLANES: tl.constexpr):
    """Values per channel, so that they broadcast against a tile."""
    if PLANES:
        found = values
    else:
        found = values[None, :]
    return found


@triton.jit
def per_channel(values, PLANES: tl.constexpr):
    """The sum of a tile over all but its channels."""
    if PLANES:
        found = tl.sum(tl.sum(values, axis=1), axis=0)
    else:
        found = tl.sum(values, axis=0)
    return found


@triton.jit
def merged(parts, splits, C, c, here, ROWS: tl.constexpr, COLS: tl.constexpr):
    """``parts[splits, 2, C]``, added up over the splits: two sums of COLS channels."""
    ones = tl.zeros([COLS], tl.float64)
    twos = tl.zeros([COLS], tl.float64)
    for first in range(0, splits, ROWS):
        split = first + tl.arange(0, ROWS)
        at = parts + split[:, None] * (2 * C) + c[None, :]
        mask = (split < splits)[:, None] & here[None, :]
        ones += tl.sum(tl.load(at, mask=mask, other=0.0), axis=0)
        twos += tl.sum(tl.load(at + C, mask=mask, other=0.0), axis=0)
    return ones, twos
