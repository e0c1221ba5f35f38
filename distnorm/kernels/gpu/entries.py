"""Slots of a step under a policy with a window: the same as csrc/entries.c, in float64.

No program reads what another one writes. What all programs read is constant: the newest values, their weight, the loss
scale and the completed entries. In the outbox, the output and the ring every lane reads and writes its own elements.
One lane of the first program adds to a slot's weight.

Launches: 1 per layer and direction, and 1 at a step's end for all layers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from distnorm.kernels.gpu.tiles import launch, operator

BLOCK = 256
"""Values per block."""

# Slots start at any offset; one compiled variant handles all.
_ANY = {
    "do_not_specialize": ["start", "number", "count", "values", "depth"],
    "do_not_specialize_on_alignment": ["newest", "weight", "scale_at"],
}


@operator("entries_window", mutates=("outbox",))
def window(
    newest: Tensor,
    weight: Tensor | None,
    scale_at: Tensor | None,
    scale: float,
    sums: Tensor,
    filled: Tensor,
    outbox: Tensor,
    start: int,
    count: int,
    number: int,
    counted: bool,
) -> Tensor:
    """Add ``newest / loss scale`` to a slot of this step; return the layer's result. One launch.

    That is loss scale * ``weight`` * mean of the slot's completed entries and the newest, if it has any weight.

    Args:
        newest: the slot's values, or more; float64 like all but the loss scale and ``filled``.
        weight: what they are the sum of, a scalar; None for 1.
        scale_at: the loss scale, a scalar of any dtype; None for ``scale``.
        scale: the same as a number.
        sums: of the completed entries, for all slots.
        filled: the number of completed entries per slot, int64.
        outbox: values of all slots, and then their weights.
        start: where the slot's values begin there, and in ``sums``.
        count: the number of these values.
        number: the number of the slot.
        counted: whether the weight follows in the output.
    """
    out = sums.new_empty(count + counted)
    launch(
        *(window_kernel, (triton.cdiv(count, BLOCK),), newest, weight, scale_at, scale, sums, filled, outbox, out),
        *(start, count, number, sums.numel(), counted, BLOCK),
    )
    return out


@torch.library.register_fake("distnorm::entries_window")
def _(
    newest: Tensor,
    weight: Tensor | None,
    scale_at: Tensor | None,
    scale: float,
    sums: Tensor,
    filled: Tensor,
    outbox: Tensor,
    start: int,
    count: int,
    number: int,
    counted: bool,
) -> Tensor:
    return sums.new_empty(count + counted)


@triton.jit(**_ANY)
def window_kernel(
    newest,
    weight,
    scale_at,
    scale: tl.float64,
    sums,
    filled,
    outbox,
    out,
    start,
    count,
    number,
    values,
    COUNTED: tl.constexpr,
    COLS: tl.constexpr,
):
    """A program handles COLS values of the slot."""
    lane = tl.arange(0, COLS)
    i = tl.program_id(0) * COLS + lane
    here, first = i < count, i == 0
    own, factor = spread_scalar(weight, 1.0, lane), spread_scalar(scale_at, scale, lane)
    value = tl.load(newest + i, mask=here, other=0.0) / factor
    mean = tl.where(own > 0, value / tl.where(own > 0, own, 1.0), 0.0)
    entries = tl.load(filled + number + 0 * lane) + (own > 0)
    mean = (tl.load(sums + start + i, mask=here, other=0.0) + mean) / tl.where(entries > 1, entries, 1)
    tl.store(out + i, mean * (own * factor), mask=here)
    if COUNTED:
        tl.store(out + count + 0 * lane, own, mask=first)
    add(outbox + start + i, value, here)
    add(outbox + values + number + 0 * lane, own, first)


@operator("entries_mix", mutates=("outbox",))
def mix(
    newest: Tensor,
    scale_at: Tensor | None,
    scale: float,
    others: Tensor,
    outbox: Tensor,
    start: int,
    number: int,
) -> Tensor:
    """Add ``newest / loss scale`` to a slot of this step, weight 1; return the layer's result. One launch.

    That is ``newest + loss scale * others``, which are laid out as ``sums``; all else is as for ``window``.
    """
    out = torch.empty_like(newest)
    count = newest.numel()
    launch(
        *(mix_kernel, (triton.cdiv(count, BLOCK),), newest, scale_at, scale, others, outbox, out),
        *(start, count, number, others.numel(), BLOCK),
    )
    return out


@torch.library.register_fake("distnorm::entries_mix")
def _(
    newest: Tensor,
    scale_at: Tensor | None,
    scale: float,
    others: Tensor,
    outbox: Tensor,
    start: int,
    number: int,
) -> Tensor:
    return torch.empty_like(newest)


@triton.jit(**_ANY)
def mix_kernel(
    newest,
    scale_at,
    scale: tl.float64,
    others,
    outbox,
    out,
    start,
    count,
    number,
    values,
    COLS: tl.constexpr,
):
    """A program handles COLS values of the slot."""
    lane = tl.arange(0, COLS)
    i = tl.program_id(0) * COLS + lane
    here, factor = i < count, spread_scalar(scale_at, scale, lane)
    value = tl.load(newest + i, mask=here, other=0.0)
    tl.store(out + i, value + factor * tl.load(others + start + i, mask=here, other=0.0), mask=here)
    add(outbox + start + i, value / factor, here)
    add(outbox + values + number + 0 * lane, tl.full([COLS], 1.0, tl.float64), i == 0)


@operator("entries_push", mutates=("ring", "filled", "sums", "dropped"))
def push(
    vector: Tensor,
    starts: Tensor,
    ring: Tensor,
    filled: Tensor,
    position: Tensor,
    sums: Tensor,
    dropped: Tensor,
) -> tuple[Tensor, Tensor]:
    """Let a completed ``vector`` become the newest entry of the ring, slot by slot. One launch.

    Slots without weight, and those with values that are not finite, keep their entries.

    Args:
        vector: the values of all slots and then their weights, float64 like ``ring`` and ``sums``.
        starts: where slots begin, and where the last one ends; int64 like the counters.
        ring: entries ``[depth, values]``, at least one.
        filled: how many entries each slot has.
        position: where each slot's next entry goes.
        sums: of the entries.
        dropped: how often each slot was not finite.

    Returns:
        Which slots have a new entry, bool; and the next ``position``, which is new: all lanes of a program read it.
    """
    usable, following = _pushed(position)
    depth, values = ring.shape
    launch(
        *(push_kernel, (filled.numel(),), vector, starts, ring, filled, position, sums, dropped, usable, following),
        *(values, depth, BLOCK),
    )
    return usable, following


@torch.library.register_fake("distnorm::entries_push")
def _(
    vector: Tensor,
    starts: Tensor,
    ring: Tensor,
    filled: Tensor,
    position: Tensor,
    sums: Tensor,
    dropped: Tensor,
) -> tuple[Tensor, Tensor]:
    return _pushed(position)


def _pushed(position: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(position, dtype=torch.bool), torch.empty_like(position)


@triton.jit(**_ANY)
def push_kernel(
    vector,
    starts,
    ring,
    filled,
    position,
    sums,
    dropped,
    usable,
    following,
    values,
    depth,
    COLS: tl.constexpr,
):
    """A program handles one slot: it looks for values that are not finite, then writes."""
    lane = tl.arange(0, COLS)
    slot, first = tl.program_id(0) + 0 * lane, lane == 0
    start, end = tl.load(starts + tl.program_id(0)), tl.load(starts + tl.program_id(0) + 1)
    weight, row = tl.load(vector + values + slot), tl.load(position + slot)
    broken = not_finite(weight).to(tl.int32)
    for at in range(start, end, COLS):
        broken |= not_finite(tl.load(vector + at + lane, mask=at + lane < end, other=0.0)).to(tl.int32)
    bad = tl.max(broken, axis=0) + 0 * lane
    good = (weight > 0) & (bad == 0)
    tl.store(usable + slot, good, mask=first)
    tl.store(following + slot, tl.where(good, (row + 1) % depth, row), mask=first)
    add(dropped + slot, bad, first)
    add(filled + slot, 1, first & good & (tl.load(filled + slot, mask=first, other=0) < depth))
    for at in range(start, end, COLS):
        i = at + lane
        here = (i < end) & good
        newest = tl.load(vector + i, mask=here, other=0.0) / tl.where(good, weight, 1.0)
        total = tl.zeros([COLS], tl.float64)
        for entry in range(depth):
            old = tl.load(ring + entry * tl.cast(values, tl.int64) + i, mask=here, other=0.0)
            total += tl.where(entry == row, newest, old)
        tl.store(ring + row * values + i, newest, mask=here)
        tl.store(sums + i, total, mask=here)


@triton.jit
def spread_scalar(at, default, lane):
    """The scalar at a pointer in float64, or else ``default``, once per lane: the interpreter compares no others."""
    if at is None:
        found = tl.full(lane.shape, default, tl.float64)
    else:
        found = tl.load(at + 0 * lane).to(tl.float64)
    return found


@triton.jit
def add(at, values, here):
    """``at += values`` where ``here``."""
    tl.store(at, tl.load(at, mask=here, other=0.0) + values, mask=here)


@triton.jit
def not_finite(values):
    """NaN or infinite."""
    return (tl.abs(values) < float("inf")) == 0
