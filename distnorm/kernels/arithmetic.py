"""Which methods' C-sized arithmetic ``arithmetic.c`` knows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.compiled import library


class Formula(NamedTuple):
    """A method of ``arithmetic.c``, and what limits its correction by running_var, if it has one.

    Where asking would make the host wait, the device compares ``updates`` with ``clip_after``.
    """

    name: str
    kinds: int
    running_var_C: Tensor | None = None
    clip: float = 1.0
    updates: Tensor | None = None
    clip_after: int = 0


class Functions(NamedTuple):
    """The C of one formula."""

    forward: Callable[..., None]
    pull: Callable[..., None]
    link: Callable[..., None]
    absorb: Callable[..., None]


@cache
def functions(name: str) -> Functions | None:
    """The C of the formula ``name``; None where there is no library."""
    found = library()
    return None if found is None else Functions(*(getattr(found, f"{name}_{part}") for part in Functions._fields))


def address(values_C: Tensor | None) -> int | None:
    """Where C finds ``[C]`` values."""
    return None if values_C is None else values_C.data_ptr()


def plain(values_C: Tensor | None) -> bool:
    """Whether C can read ``[C]`` values of a layer whose input is on the CPU."""
    return values_C is None or (values_C.dtype is torch.float32 and values_C.is_contiguous() and values_C.is_cpu)


def absorb(formula: Formula, shared: Tensor, layer: _BatchNorm) -> bool:
    """Let the running statistics of ``layer`` absorb ``shared`` float64 sums ``[K C + 1]``, if they are of two values.

    Returns whether C could do it.
    """
    found, mean_C, var_C, tracked = functions(formula.name), *layer_statistics(layer)
    if found is None or not (plain(mean_C) and plain(var_C) and tracked.is_cpu):
        return False
    momentum = -1.0 if layer.momentum is None else layer.momentum
    statistics = mean_C.data_ptr(), var_C.data_ptr()
    found.absorb(shared.contiguous().data_ptr(), layer.num_features, momentum, tracked.data_ptr(), *statistics)
    increment_version((mean_C, var_C, tracked))  # as torch's own operations do, for autograd's checks
    return True


def layer_statistics(layer: _BatchNorm) -> tuple[Tensor, Tensor, Tensor]:
    """``running_mean, running_var, num_batches_tracked`` of a layer that tracks them."""
    mean_C, var_C, tracked = layer.running_mean, layer.running_var, layer.num_batches_tracked
    assert mean_C is not None and var_C is not None and tracked is not None
    return mean_C, var_C, tracked
