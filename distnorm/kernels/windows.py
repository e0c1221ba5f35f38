"""Steps of policies that remember earlier ones: in Triton on a CUDA device, in C on a CPU, else in torch.

All is float64 but counters, which are int64. A *vector* holds the values of all slots, one weight per slot, and maybe
more; a slot is what one layer shares in one direction. Docstrings say it once for all three kinds of kernel.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from distnorm.compat.at_once import Call, at_once
from distnorm.kernels import gpu
from distnorm.kernels.native import library

_ITEMSIZE = 8  # bytes, of float64 and int64 alike


class Slots(NamedTuple):
    """How a vector is laid out, as tensors on its device.

    Fields:
        starts: where each slot's values begin, and where the last one's end.
        slot_of: which slot each value belongs to.
    """

    starts: Tensor
    slot_of: Tensor

    def parts(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The values and the weights of ``vector``."""
        values = self.slot_of.numel()
        return vector[:values], vector[values : values + self.starts.numel() - 1]

    def means(self, vector: Tensor) -> Tensor:
        """The values of ``vector`` over their weights; 0 where a slot was not used."""
        values, weights = self.parts(vector)
        spread = weights[self.slot_of]
        return torch.where(spread > 0, values / spread, 0.0)

    def judge(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Which slots of ``vector`` are finite, values and weight; and which of these have a weight above 0."""
        values, weights = self.parts(vector)
        broken = torch.zeros_like(weights).index_add_(0, self.slot_of, (~values.isfinite()).to(weights.dtype))
        finite = (broken == 0) & weights.isfinite()
        return finite, finite & (weights > 0)


def in_triton(values: Tensor, outbox: Tensor) -> bool:
    """Whether Triton's kernels take ``values`` for a step whose vector is ``outbox``."""
    return values.is_cuda and values.device == outbox.device and gpu.available()


def add(outbox: Tensor, span: slice, weight_at: int, values: Tensor, weight: Tensor | float) -> None:
    """Add ``values`` and ``weight`` to those of a slot of ``outbox``, in torch."""
    own = outbox[span], outbox[weight_at]
    at_once(partial(own[0].add_, values), partial(own[1].add_, weight))


def window(
    newest: Tensor,
    weight: Tensor | None,
    scale: Tensor | float,
    sums: Tensor,
    filled: Tensor,
    outbox: Tensor,
    span: slice,
    number: int,
    *,
    counted: bool,
) -> Tensor:
    """Add ``newest / scale``, of this ``weight``, to a slot of ``outbox``; return what the layer goes on with.

    That is ``scale * weight`` times the mean of the slot's entries and the newest, if it has any weight.

    Args:
        newest: the slot's values; with their count behind them if ``counted``, which the output then has, too.
        weight: what they are the sum of, a scalar; None for 1.
        scale: the loss scale; a tensor only if it is on the device of ``newest``.
        sums: over the entries of each slot, for all slots.
        filled: how many entries each slot has.
        outbox: the vector of this step.
        span: where the slot's values are in ``outbox`` and ``sums``.
        number: which slot it is.
        counted: see there.
    """
    if in_triton(newest, outbox):
        from distnorm.kernels.gpu import entries  # imports Triton

        place = outbox, span.start, span.stop - span.start, number, counted
        made: Tensor = entries.window(newest.contiguous(), weight, *_at_or_number(scale), sums, filled, *place)
        return made
    weight_at = sums.numel() + number
    compiled = library() if newest.is_cpu and newest.is_contiguous() else None
    if compiled is not None:
        own, factor, out = 1.0 if weight is None else weight.item(), float(scale), torch.empty_like(newest)
        if counted:
            out[-1] = own
        compiled.entries_window(
            *(newest.data_ptr(), span.stop - span.start, factor, own, own * factor),
            *(_address(sums, span.start), _address(filled, number)),
            *(_address(outbox, span.start), _address(outbox, weight_at), out.data_ptr()),
        )
        return out
    weight = newest.new_ones(()) if weight is None else weight
    values = (newest[:-1] if counted else newest) / scale
    add(outbox, span, weight_at, values, weight)
    own_mean = torch.where(weight > 0, values / weight, 0)
    share = (sums[span] + own_mean) / (filled[number] + (weight > 0)).clamp_min(1) * weight * scale
    return torch.cat((share, weight.view(1))) if counted else share


def mix(newest: Tensor, scale: Tensor | float, others: Tensor, outbox: Tensor, span: slice, number: int) -> Tensor:
    """Add ``newest / scale``, of weight 1, to a slot of ``outbox``; return ``newest + scale * others`` of the slot.

    Args as for ``window``, with ``others`` laid out as ``sums``.
    """
    if in_triton(newest, outbox):
        from distnorm.kernels.gpu import entries  # imports Triton

        made: Tensor = entries.mix(newest.contiguous(), *_at_or_number(scale), others, outbox, span.start, number)
        return made
    weight_at = others.numel() + number
    compiled = library() if newest.is_cpu and newest.is_contiguous() else None
    if compiled is not None:
        factor, out = float(scale), torch.empty_like(newest)
        compiled.entries_mix(
            *(newest.data_ptr(), newest.numel(), factor, 1.0, factor, _address(others, span.start)),
            *(_address(outbox, span.start), _address(outbox, weight_at), out.data_ptr()),
        )
        return out
    add(outbox, span, weight_at, newest / scale, 1.0)
    return newest + scale * others[span]


def pushing(
    vector: Tensor, slots: Slots, ring: Tensor, filled: Tensor, position: Tensor, sums: Tensor, dropped: Tensor
) -> tuple[list[Call], Tensor, Tensor]:
    """What, done at once, makes ``vector`` the newest entry of ``ring``: per slot its values over its weight.

    In Triton it is done when this returns. Slots without weight, and those with values that are not finite, keep their
    entries.

    Args:
        vector: of the layout ``slots``.
        slots: see there.
        ring: entries ``[depth, values]``; of depth 0 it keeps none.
        filled: how many entries each slot has.
        position: the row of each slot's next entry; may be changed in place.
        sums: over the entries.
        dropped: how often each slot was not finite.

    Returns:
        The calls; and, once they are made, which slots are usable, bool, and the ``position`` to go on with.
    """
    depth, count = len(ring), filled.numel()
    if depth and in_triton(vector, ring):
        from distnorm.kernels.gpu import entries  # imports Triton

        usable, following = entries.push(vector.contiguous(), slots.starts, ring, filled, position, sums, dropped)
        return [], usable, following
    compiled = library() if depth and vector.is_cpu else None
    if compiled is not None:
        vector, usable = vector.contiguous(), torch.empty(count, dtype=torch.bool, device="cpu")
        changed = ring, filled, position, sums, dropped, usable
        push = partial(
            compiled.entries_push,
            *(vector.data_ptr(), slots.starts.data_ptr(), count, depth, *(each.data_ptr() for each in changed)),
        )
        held = vector.data_ptr  # until the calls are made: C knows its address only
        return [held, push], usable, position
    finite, usable = slots.judge(vector)
    noted: list[Call] = [partial(dropped.add_, ~finite)]
    if not depth:
        return noted, usable, position
    values, weights = slots.parts(vector)
    row, column = position[slots.slot_of], torch.arange(sums.numel(), device=position.device)
    entry = torch.where(usable[slots.slot_of], values / weights[slots.slot_of], ring[row, column])
    calls: list[Call] = [
        partial(ring.index_put_, (row, column), entry),
        partial(filled.copy_, (filled + usable).clamp_max_(depth)),
        *summing(ring, sums),
    ]
    return [*noted, *calls], usable, torch.where(usable, (position + 1) % depth, position)


def summing(ring: Tensor, sums: Tensor) -> list[Call]:
    """Calls that, made at once, let ``sums`` be those over the entries: row by row, to the bit as C and Triton do."""
    return [sums.zero_, *(partial(sums.add_, row) for row in ring)]


def _at_or_number(scale: Tensor | float) -> tuple[Tensor | None, float]:
    """``scale`` as Triton's kernels take it: where it lies, or else the number."""
    return (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)


def _address(values: Tensor, at: int) -> int:
    """Of element ``at``, for C."""
    return values.data_ptr() + _ITEMSIZE * at
