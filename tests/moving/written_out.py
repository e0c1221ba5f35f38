"""Windows of statistics and cotangents written out as lists of entries, for all ranks at once, in float64.

Formulas of docs/moving.md. Shapes: x_NC batch by channel; statistics and cotangents [2, C], for BatchNorm of (mean,
log standard deviation), for RMS with a first row of zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from distnorm.methods import RMS, BatchNorm, Method

EPS, MOMENTUM = 1e-5, 0.1


class Call(NamedTuple):
    """One forward of the layer on one rank, and the cotangent that comes back."""

    x: Tensor
    dy: Tensor


class Answer(NamedTuple):
    y: Tensor
    dx: Tensor


Step = list[list[Call]]
"""Per rank, its calls."""


def moments(x_NC: Tensor) -> Tensor:
    """Sums of x and x squared."""
    return torch.stack((x_NC.sum(0), x_NC.square().sum(0)))


def location_and_scale(method: Method, means: Tensor) -> tuple[Tensor, Tensor]:
    mean = means[0] if isinstance(method, BatchNorm) else torch.zeros_like(means[0])
    return mean, (means[1] - mean.square() + EPS).sqrt()


def cotangents(method: Method, z: Tensor, s: Tensor, g: Tensor) -> Tensor:
    """Of location and log-scale, summed over the batch: y = z, z = (x - mean) exp(-log s)."""
    first = -g.sum(0) / s if isinstance(method, BatchNorm) else torch.zeros_like(s)
    return torch.stack((first, -(g * z).sum(0)))


@dataclass
class Running:
    mean: Tensor
    var: Tensor

    def update(self, method: Method, means: Tensor, count: float) -> None:
        if count <= 1:
            return
        if isinstance(method, RMS):
            fresh_mean, fresh_var = torch.zeros_like(means[0]), means[1]
        else:
            fresh_mean = means[0]
            fresh_var = (means[1] - means[0].square()) * count / (count - 1)
        self.mean = (1 - MOMENTUM) * self.mean + MOMENTUM * fresh_mean
        self.var = (1 - MOMENTUM) * self.var + MOMENTUM * fresh_var


@dataclass
class Entry:
    """One step's sums over ranks and what they are divided by."""

    total: Tensor
    weight: float

    def mean(self) -> Tensor:
        return self.total / self.weight


@dataclass
class Windows:
    """A layer under ``Moving``, on all ranks."""

    method: Method
    window: int
    staleness: int
    loss_reduction: Literal["mean", "sum"]
    channels: int
    weight: Tensor
    bias: Tensor
    forward: list[Tensor] = field(default_factory=list)
    backward: list[Tensor] = field(default_factory=list)
    in_flight: tuple[Entry, Entry] | None = None

    def __post_init__(self) -> None:
        self.running = Running(torch.zeros(self.channels).double(), torch.ones(self.channels).double())

    def _used(self, entries: list[Tensor], newest: Tensor | None) -> Tensor:
        old = entries[len(entries) - (self.window - 1) :] if len(entries) >= self.window else entries
        used = [*(old if self.window > 1 else []), *([] if newest is None else [newest])]
        return torch.stack(used).mean(0) if used else torch.zeros(2, self.channels).double()

    def step(self, calls: Step) -> list[list[Answer]]:
        """Answers of all calls; then the step ends."""
        forward, backward = Entry(torch.zeros(2, self.channels).double(), 0), Entry(torch.zeros(2, 1).double(), 0)
        answers: list[list[Answer]] = [[] for _ in calls]
        if self.staleness:
            for rank, mine in enumerate(calls):
                for call in mine:
                    answers[rank] += self._call([call], forward, backward)
        else:
            for together in zip(*calls, strict=True):
                for rank, answer in enumerate(self._call(list(together), forward, backward)):
                    answers[rank].append(answer)
        self._end(forward, backward)
        return answers

    def _call(self, together: list[Call], forward: Entry, backward: Entry) -> list[Answer]:
        """One forward and backward of the ranks that share the newest entry."""
        counts = [len(call.x) for call in together]
        total, n = sum((moments(call.x) for call in together), torch.zeros(2, self.channels).double()), sum(counts)
        forward.total, forward.weight = forward.total + total, forward.weight + n
        used = self._used(self.forward, total / n if n else None)
        if not self.staleness:
            self.running.update(self.method, used, n)
        mean, s = location_and_scale(self.method, used)
        zs = [(call.x - mean) / s for call in together]
        gs = [call.dy * self.weight for call in together]
        shared = sum(
            (cotangents(self.method, z, s, g) for z, g in zip(zs, gs, strict=True)),
            torch.zeros(2, self.channels).double(),
        )
        contributions = n if self.loss_reduction == "sum" else len(together)
        backward.total, backward.weight = backward.total + shared, backward.weight + contributions
        h = self._used(self.backward, shared / contributions if contributions else None)
        per_value = h if self.loss_reduction == "sum" else h * len(together) / max(n, 1)
        return [Answer(z * self.weight + self.bias, self._dx(z, s, g, per_value)) for z, g in zip(zs, gs, strict=True)]

    def _dx(self, z: Tensor, s: Tensor, g: Tensor, per_value: Tensor) -> Tensor:
        return g / s + per_value[0] + per_value[1] * z / s

    def _end(self, forward: Entry, backward: Entry) -> None:
        completed = (forward, backward)
        if self.staleness:
            completed, self.in_flight = self.in_flight, completed  # type: ignore[assignment]  # None before the first
        if completed is None:
            return
        for entries, entry in zip((self.forward, self.backward), completed, strict=True):
            if entry.weight:
                entries.append(entry.mean())
        if self.staleness and completed[0].weight:
            used = torch.stack(self.forward[-max(self.window - 1, 1) :]).mean(0)
            self.running.update(self.method, used, completed[0].weight)

    def without_gradient(self, xs: Sequence[Tensor]) -> list[Tensor]:
        """A training forward under no_grad: exact, and it leaves no trace in the windows."""
        n = sum(map(len, xs))
        means = sum(map(moments, xs), torch.zeros(2, self.channels).double()) / n
        self.running.update(self.method, means, n)
        mean, s = location_and_scale(self.method, means)
        return [(x - mean) / s * self.weight + self.bias for x in xs]


def draw(generator: torch.Generator, size: int, channels: int, drift: float) -> Call:
    """A batch whose location and scale move with ``drift``."""
    x, dy = (torch.randn(size, channels, generator=generator, dtype=torch.float64) for _ in range(2))
    return Call(x * (1 + drift) + drift, dy)


def assert_all_close(given: Any, expected: Any, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)
