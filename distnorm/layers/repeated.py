"""Buffers that a method reads in training: a recomputed forward gets those of the forward that it repeats.

The first forward has updated them since. Which one is repeated is recognized by the sums of its input, as for shared
sums (``autograd.recompute``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distnorm.autograd.engine import repeating
from distnorm.autograd.recompute import Record
from distnorm.compat.dispatch_state import exporting
from distnorm.layers.site import Site
from distnorm.methods import Layer
from distnorm.methods.base import compute_dtype


@torch.no_grad()
def as_of_first(x_NCL: Tensor, site: Site, layer: Layer) -> tuple[Layer, Record | None]:
    """Return ``layer`` with copies of its buffers, as they were if the forward of ``x_NCL`` repeats an earlier one.

    If it does not, also return the record that ``remember`` takes with the output.
    """
    state = {**layer.buffers, "updates": layer.updates}
    there = {name: each for name, each in state.items() if each is not None}
    key = _moments(x_NCL)
    record = site.forwards.recall(key, kinds=2) if repeating() else None
    if record is None:
        flat = torch.cat([each.double().flatten() for each in there.values()])
        found = made = Record(key, flat, site.conversion.bound().step, in_graph=False)
    else:
        found, made = record, None
        found.repeated = True
    parts = found.shared.split([each.numel() for each in there.values()])
    for (name, each), part in zip(there.items(), parts, strict=True):
        state[name] = part.view_as(each).to(each.dtype, copy=True)
    updates = state.pop("updates")
    return layer._replace(buffers=state, updates=updates), made


def remember(record: Record, site: Site, y_NCL: Tensor) -> None:
    """Keep ``record`` of the forward that has computed ``y_NCL`` as long as its graph, or the step if it has none."""
    node: Any = y_NCL.grad_fn
    if node is not None:
        record.in_graph = True
        node.metadata[__name__] = record
    site.forwards.note(record)


def _moments(x_NCL: Tensor) -> Tensor:
    """Return the sums of x and of x^2 per channel, and the number of values."""
    dims = [dim for dim in range(x_NCL.dim()) if dim != 1]
    values_NCL = x_NCL.to(compute_dtype(x_NCL.dtype))
    sum_C, square_C = (each.sum(dims, dtype=torch.float64) for each in (values_NCL, values_NCL.square()))
    return torch.cat((sum_C, square_C, sum_C.new_full((1,), x_NCL.numel() // x_NCL.shape[1])))


def with_copies(layer: Layer) -> Layer:
    """Return ``layer`` with copies of its buffers, which a graph may keep, since the original ones change in place."""
    names = [name for name, each in layer.buffers.items() if each is not None]
    buffers = [each for each in layer.buffers.values() if each is not None]
    # A compiler may compute clones again in the backward pass, from what has changed by then (torch 2.13, min-cut).
    hidden = torch.compiler.is_compiling() and not exporting()
    copies = torch.ops.distnorm.copies(buffers) if hidden else [each.clone() for each in buffers]
    return layer._replace(buffers={**layer.buffers, **dict(zip(names, copies, strict=True))})
