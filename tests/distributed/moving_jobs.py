"""A net, its data and its training loop, for the tests of moving statistics on real processes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import distnorm
from tests.distributed import jobs

WARM = 5
"""Synchronous steps at the start."""
WINDOW = 4
RECIPES: dict[str, dict[str, Any]] = {
    "mabn": {"warmup": WARM + 1, "window": WINDOW},
    "hierarchical_mabn": {"warmup": WARM + 1, "window": WINDOW},
    "lazy_bn": {"warmup": WARM},
}
LAYERS = ("norm1", "norm2")
C = 4
RMS_FORWARD = [*range(C), *range(2 * C, 3 * C)]
"""Where statistics lie in a vector of RMS for both layers; cotangents lie between."""


class Net(nn.Module):
    """Two convolutions with norm, the second one on a branch that a rank may skip."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, C, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(C)
        self.conv2 = nn.Conv2d(C, C, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(C)
        self.head = nn.Linear(C, 2)
        self.reentrant = reentrant

    def backbone(self, x_NCS: Tensor, skip: bool = False) -> Tensor:
        h_NCS = F.relu(self.norm1(self.conv1(x_NCS)))
        if skip:
            return h_NCS
        if self.reentrant is None:
            return h_NCS + self.branch(h_NCS)
        return h_NCS + checkpoint(self.branch, h_NCS, use_reentrant=self.reentrant)

    def branch(self, h_NCS: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(h_NCS)))

    def forward(self, x_NCS: Tensor, skip: bool = False) -> Tensor:
        return self.head(self.backbone(x_NCS, skip).mean((2, 3)))


def net(recipe: str, *, dtype: torch.dtype = torch.float64, reentrant: bool | None = None) -> Net:
    """The same initial net on every rank, converted."""
    torch.manual_seed(1)
    return distnorm.convert(Net(reentrant).to(dtype), recipe, **RECIPES[recipe])


def batch(rank: int, step: int, dtype: torch.dtype = torch.float64, size: int = 4) -> tuple[Tensor, Tensor]:
    """Inputs [N, 3, 5, 5] and labels [N]; ranks see different distributions."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x_NCS = torch.randn(size, 3, 5, 5, generator=generator, dtype=torch.float64)
    labels_N = torch.arange(size) % 2
    x_NCS[labels_N == 1, 0] += 1
    return (x_NCS * (1 + rank / 4) + rank / 4).to(dtype), labels_N


def nodes(world_size: int) -> Callable[[int], Mapping[str, str]]:
    """Two nodes."""
    return _FOUR if world_size == 4 else _TWO


def _FOUR(rank: int) -> dict[str, str]:
    return {"GROUP_RANK": str(rank // 2)}


def _TWO(rank: int) -> dict[str, str]:
    return {"GROUP_RANK": str(rank)}


class Seen(NamedTuple):
    """What training leaves behind."""

    parameters: dict[str, Tensor]
    running: dict[str, Tensor]
    state: dict[str, Any]
    losses: list[float]
    messages: list[str]  # of the log, warnings and worse
    collectives: dict[int, int]  # by step
    extra: Any = None

    @property
    def moving(self) -> dict[str, Any]:
        """The state of the policy that follows the warm-up; the last part's, if it is a chain."""
        then = self.state["reducer"]["then"]
        return then["1"] if "1" in then else then

    @property
    def window(self) -> dict[str, Tensor]:
        return self.moving["window"]

    @property
    def in_flight(self) -> Tensor:
        return self.moving["bucket"]["in_flight"]


def seen(
    model: nn.Module, losses: list[float], messages: list[str], ledger: distnorm.Ledger, extra: Any = None
) -> Seen:
    (state,) = distnorm.state_dict(model)
    parameters = {jobs.plain(name): value.detach().clone() for name, value in model.named_parameters()}
    steps = {step: tally.collectives for step, tally in sorted(ledger.steps.items())}
    return Seen(parameters, jobs.running_statistics(model), state, losses, messages, steps, extra)


@contextmanager
def listening(level: int = logging.WARNING) -> Iterator[list[str]]:
    """Collect what distnorm logs."""
    messages: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("distnorm")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(level, before or level))
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Weights are centred in the forward, whoever ends the steps."""
    return torch.optim.Adam(model.parameters(), lr=0.01)


def wrapped(model: nn.Module, **wrapping: Any) -> DistributedDataParallel:
    with jobs.without_wrapper_warnings():
        return DistributedDataParallel(model, **wrapping)


def average_gradients(model: nn.Module) -> None:
    """As DistributedDataParallel does, for those who do without."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def train(
    rank: int,
    model: nn.Module,
    steps: range,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    skip: Callable[[int], bool] | None = None,
    after: Callable[[int], None] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Seen:
    """Train ``model``, wrapped or not, with boundaries at the end of backward passes unless it is attached."""
    optimizer = optimizer or sgd(model)
    losses = []
    with listening() as messages, distnorm.Ledger(model) as ledger, jobs.without_wrapper_warnings():
        for step in steps:
            x_NCS, labels_N = batch(rank, step, dtype)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x_NCS, skip is not None and skip(step)), labels_N)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if after is not None:
                after(step)
        return seen(model, losses, messages, ledger)


def equal(ours: Any, expected: Any) -> None:
    """Bit for bit."""
    torch.testing.assert_close(spelled(ours), spelled(expected), rtol=0, atol=0, equal_nan=True)


def spelled(tree: Any) -> Any:
    """``tree`` with its texts as numbers, which torch can compare."""
    if isinstance(tree, str):
        return list(tree.encode())
    if isinstance(tree, dict):
        return {name: spelled(value) for name, value in tree.items()}
    return [spelled(value) for value in tree] if isinstance(tree, list | tuple) else tree


def close(ours: Any, expected: Any) -> None:
    """To rounding, in float64."""
    torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-9)


def equal_on_all_ranks(ranks: list[Seen]) -> None:
    """Parameters, running statistics and what is shared. The stale mix keeps the others' part, each rank its own."""
    for each in ranks[1:]:
        equal(each.parameters, ranks[0].parameters)
        equal(each.running, ranks[0].running)
        if "window" in ranks[0].moving:
            equal(each.window, ranks[0].window)
        if "in_flight" in ranks[0].moving["bucket"]:
            equal(each.in_flight, ranks[0].in_flight)
    for value in (*ranks[0].parameters.values(), *ranks[0].running.values()):
        assert value.isfinite().all()
