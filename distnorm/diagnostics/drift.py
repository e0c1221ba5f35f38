"""Drift: distances between local statistics, those that a layer uses, and those of the joined batch."""

from __future__ import annotations

from torch import Tensor, nn

from distnorm.attach import conversions_of
from distnorm.types import EVERY_LAYER, Slot


def stats(model: nn.Module, *, exact: bool = False) -> dict[str, float]:
    """Return scalars per layer of the last training step, for policies that average over steps.

    Distances are ``|a - b| / |b|`` of the shared means, in the 2-norm.

    * ``LAYER/local_to_used``: this rank's batch against the statistics that were used;
    * ``LAYER/entries``: steps in the window; ``LAYER/dropped``: steps that were skipped for NaN or Inf;
    * with ``exact``: ``LAYER/used_to_global`` and ``LAYER/local_to_global``, against the joined batch of the last step.

    If ``exact``, issues one collective per conversion: call it on all ranks. Else issues none. Exact policies return no
    scalars.

    Raises:
        ValueError: the model has no converted layer.
    """
    scalars: dict[str, float] = {}
    for conversion in conversions_of(model):
        binding = conversion.bound()
        slot = Slot(EVERY_LAYER, "forward", binding.step, observers=tuple(conversion.observers))
        for layer, seen in binding.reducer.watch(slot, exact=exact).items():
            scalars[f"{layer}/local_to_used"] = _distance(seen.local, seen.used)
            scalars[f"{layer}/entries"] = float(seen.entries)
            scalars[f"{layer}/dropped"] = float(seen.dropped)
            if seen.shared is not None:
                scalars[f"{layer}/used_to_global"] = _distance(seen.used, seen.shared)
                scalars[f"{layer}/local_to_global"] = _distance(seen.local, seen.shared)
    return scalars


def _distance(given: Tensor, reference: Tensor) -> float:
    norm = float(reference.norm())
    return float((given - reference).norm()) / norm if norm else float(given.norm() > 0)
