"""Statistics of layer inputs: sums of this rank and step, and the running mean and variance of all ranks.

All are flat float64 vectors: T channels of all layers in a row, and L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Running statistics of one layer's input; ``values`` is their number per channel in the last step.

    0 ``values`` say that nothing was seen yet.
    """

    mean_C: Tensor
    var_C: Tensor
    values: Tensor


class Statistics:
    """The sums that this rank adds up until they are sent, and the running statistics of all ranks.

    ``sums`` has the sum of each channel, the sum of squares of each channel, and the count of each layer.
    """

    def __init__(self, channels: Sequence[int], device: torch.device, momentum: float) -> None:
        """Start with mean 0 and variance 1; ``channels`` are the input channels of each layer."""
        starts = list(accumulate(channels, initial=0))
        self._spans = [slice(*pair) for pair in pairwise(starts)]
        self._channels, layers = starts[-1], len(channels)
        self._layer_of = torch.repeat_interleave(torch.tensor(channels)).to(device)  # on the CPU: nobody waits
        self._momentum = momentum
        self.sums = torch.zeros(2 * self._channels + layers, dtype=torch.float64, device=device)
        self.mean = self.sums.new_zeros(self._channels)
        self.var = self.sums.new_ones(self._channels)
        self.count = self.sums.new_zeros(layers)

    def add(self, layer: int, x: Tensor, kernel_dims: int) -> None:
        """Add the values of ``x``, an input ``[..., C, *kernel_dims]`` of the layer with this number."""
        if x.numel() == 0:
            return
        x = x.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(0)  # one sample may come without a batch
        channel = x.dim() - 1 - kernel_dims
        others = [dim for dim in range(x.dim()) if dim != channel]
        # Centred on its own mean: sums of squares of float32 values would lose a variance far below the mean.
        var_C, mean_C = (each.double().to(self.sums.device) for each in torch.var_mean(x, others, correction=0))
        count = x.numel() // x.shape[channel]
        sums, squares, counts = self._parts(self.sums)
        sums[self._spans[layer]] += count * mean_C
        squares[self._spans[layer]] += count * (var_C + mean_C.square())
        counts[layer] += count

    def update(self, total: Tensor) -> None:
        """Average the sums of all ranks into the running statistics. Layers without values, or with NaN, keep theirs.

        Does not wait for a GPU.
        """
        sums, squares, counts = self._parts(total)
        count_C = counts[self._layer_of]
        mean = sums / count_C
        var = (squares / count_C - mean.square()).clamp_min(0)
        lost = torch.zeros_like(counts).index_add_(0, self._layer_of, (~torch.isfinite(mean + var)).double())
        usable = (counts > 0) & (lost == 0)
        usable_C = usable[self._layer_of]
        self.mean = torch.where(usable_C, torch.lerp(self.mean, mean, self._momentum), self.mean)
        self.var = torch.where(usable_C, torch.lerp(self.var, var, self._momentum), self.var)
        self.count = torch.where(usable, counts, self.count)

    def of(self, layer: int) -> Moments:
        """Return the running statistics of the layer with this number."""
        span = self._spans[layer]
        return Moments(self.mean[span], self.var[span], self.count[layer])

    def _parts(self, vector: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sums, squares, counts = vector.split([self._channels, self._channels, len(self._spans)])
        return sums, squares, counts
