"""Kernels for policies that keep sums of earlier steps: in Triton on a CUDA device, in C on a CPU, else in torch.

All tensors are float64 except counters, which are int64. A *vector* holds the values of all slots, one weight per slot,
and possibly more. A slot is what one layer shares in one direction. The docstrings here hold for all three versions.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from distnorm.compat.uninterrupted import Call, uninterrupted
from distnorm.kernels import gpu
from distnorm.kernels.native import library

_ITEMSIZE = 8  # bytes, of both float64 and int64


class Slots(NamedTuple):
    """The layout of a vector, as tensors on its device.

    Fields:
        starts: where the values of each slot start, and where those of the last one end.
        slot_of: the slot of each value.
    """

    starts: Tensor
    slot_of: Tensor

    def parts(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values and the weights of ``vector``."""
        values = self.slot_of.numel()
        return vector[:values], vector[values : values + self.starts.numel() - 1]

    def means(self, vector: Tensor) -> Tensor:
        """Return the values of ``vector`` divided by their weights; 0 for slots that were not used."""
        values, weights = self.parts(vector)
        spread = weights[self.slot_of]
        return torch.where(spread > 0, values / spread, 0.0)

    def judge(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Return which slots of ``vector`` have finite values and weight, and which of these have a weight above 0."""
        values, weights = self.parts(vector)
        broken = torch.zeros_like(weights).index_add_(0, self.slot_of, (~values.isfinite()).to(weights.dtype))
        finite = (broken == 0) & weights.isfinite()
        return finite, finite & (weights > 0)


def in_triton(values: Tensor, outbox: Tensor) -> bool:
    """Return whether the Triton kernels accept ``values`` for a step whose vector is ``outbox``."""
    return values.is_cuda and values.device == outbox.device and gpu.available()


def add(outbox: Tensor, span: slice, weight_at: int, values: Tensor, weight: Tensor | float) -> None:
    """Add ``values`` and ``weight`` to those of a slot of ``outbox``, in torch."""
    own = outbox[span], outbox[weight_at]
    uninterrupted(partial(own[0].add_, values), partial(own[1].add_, weight))


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
    """Add ``newest / scale``, of this ``weight``, to a slot of ``outbox``; return the layer's result.

    The result is ``scale * weight`` times the mean of the slot's entries and the newest, if it has any weight.

    Args:
        newest: the values of the slot; followed by their count if ``counted``, as in the result.
        weight: the weight that the values are a sum over, a scalar; None for their count, or for 1 without one.
        scale: the loss scale; a tensor only if it is on the device of ``newest``.
        sums: over the entries of each slot, for all slots.
        filled: the number of entries of each slot.
        outbox: the vector of this step.
        span: the place of the slot's values in ``outbox`` and ``sums``.
        number: the number of the slot.
        counted: see ``newest``.
    """
    if in_triton(newest, outbox):
        from distnorm.kernels.gpu import entries  # imports Triton

        weight = newest[-1] if counted else weight
        place = outbox, span.start, span.stop - span.start, number, counted
        made: Tensor = entries.window(newest.contiguous(), weight, *_at_or_number(scale), sums, filled, *place)
        return made
    weight_at = sums.numel() + number
    compiled = library() if newest.is_cpu and newest.is_contiguous() else None
    if compiled is not None:
        out, start, sent = torch.empty_like(newest), _ITEMSIZE * span.start, outbox.data_ptr()
        compiled.entries_window(
            *(newest.data_ptr(), span.stop - span.start, counted, float(scale)),
            1.0 if weight is None else weight.item(),
            *(sums.data_ptr() + start, filled.data_ptr() + _ITEMSIZE * number),
            *(sent + start, sent + _ITEMSIZE * weight_at, out.data_ptr()),
        )
        return out
    if weight is None:
        weight = newest[-1] if counted else newest.new_ones(())
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
        start, sent = _ITEMSIZE * span.start, outbox.data_ptr()
        compiled.entries_mix(
            *(newest.data_ptr(), newest.numel(), factor, 1.0, factor, others.data_ptr() + start),
            *(sent + start, sent + _ITEMSIZE * weight_at, out.data_ptr()),
        )
        return out
    add(outbox, span, weight_at, newest / scale, 1.0)
    return newest + scale * others[span]


def pushing(
    vector: Tensor, slots: Slots, ring: Tensor, filled: Tensor, position: Tensor, sums: Tensor, dropped: Tensor
) -> tuple[list[Call], Tensor, Tensor]:
    """Return calls that make ``vector`` the newest entry of ``ring``: per slot its values divided by its weight.

    In Triton this is done when the function returns. Slots without weight, and those with values that are not finite,
    keep their entries.

    Args:
        vector: of the layout ``slots``.
        slots: the layout.
        ring: entries ``[depth, values]``; with depth 0 it keeps none.
        filled: the number of entries of each slot.
        position: the row of the next entry of each slot; may be changed in place.
        sums: over the entries.
        dropped: how often each slot was not finite.

    Returns:
        The calls. After they have run: which slots are usable, bool, and the new ``position``.
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
        alive = vector.data_ptr  # until the calls have run, since C has its address only
        return [alive, push], usable, position
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
    """Return calls that set ``sums`` to those over the entries: row by row, bitwise as in C and Triton."""
    return [sums.zero_, *(partial(sums.add_, row) for row in ring)]


def _at_or_number(scale: Tensor | float) -> tuple[Tensor | None, float]:
    """Return ``scale`` as the Triton kernels take it: as tensor, or else as number."""
    return (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
