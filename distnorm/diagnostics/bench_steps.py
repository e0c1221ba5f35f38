"""Measure training steps of one model under several recipes, each against the same recipe without sharing."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distnorm.attach import attach
from distnorm.convert import convert
from distnorm.diagnostics.bench_rounds import synchronize, take_turns
from distnorm.diagnostics.bench_statistics import Interval, interval
from distnorm.diagnostics.ledger import Ledger
from distnorm.policies import Local, Periodic, Warmup
from distnorm.recipe import Recipe
from distnorm.recipes import parse

_RATE = 1e-6  # so small that hundreds of complete steps do not change the model noticeably


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe after its warm-up; seconds, counts and bytes are per step and rank.

    Attributes:
        recipe: its name and options.
        step: duration of a step.
        compute: the step of the same method and weights with policy ``Local``.
        exposed: ``step`` minus ``compute``, within the same round.
        collectives: number of collectives, blocking and asynchronous.
        nbytes: their payload.
        rounds: number of measured rounds.
    """

    recipe: str
    step: Interval
    compute: Interval
    exposed: Interval
    collectives: float
    nbytes: float
    rounds: int

    def record(self) -> dict[str, Any]:
        """Return the JSON record."""
        timed = {name: getattr(self, name)._asdict() for name in ("step", "compute", "exposed")}
        return {
            "recipe": self.recipe,
            **{f"{name}_seconds": value for name, value in timed.items()},
            "collectives": self.collectives,
            "bytes": self.nbytes,
            "rounds": self.rounds,
        }


def measure_steps(
    build: Callable[[], nn.Module],
    batch: object,
    names: Sequence[str],
    device: torch.device,
    seconds: float,
    on_progress: Callable[[float], None],
) -> list[Row]:
    """Measure steps of the recipes in ``names`` and of their counterparts without sharing, in turns, for ``seconds``.

    Collective over all ranks. Each of them keeps a model, its gradients and DDP's buckets in memory.
    """
    recipes = {name: steady(parse(name)) for name in names}
    bases = {name: dataclasses.replace(recipe, policy=Local(), name=None) for name, recipe in recipes.items()}
    # A dict, since all ranks need one order, which a set does not have: DDP communicates when it wraps a model.
    contenders = dict.fromkeys([*recipes.values(), *bases.values()])
    trainers = {recipe: Trainer(build, recipe, batch, device) for recipe in contenders}
    seen = take_turns({recipe: trainer.turn for recipe, trainer in trainers.items()}, seconds, device, on_progress)
    counted = {recipe: trainers[recipe].count() for recipe in recipes.values()}
    return [_row(name, seen[recipes[name]], seen[bases[name]], *counted[recipes[name]]) for name in names]


def check_forward(build: Callable[[], nn.Module], batch: object, name: str, device: torch.device) -> None:
    """Raise unless the model accepts the ``batch`` called ``name`` and returns tensors for a loss. No collective.

    Raises:
        ValueError: the message names the batch, or the type that the model returned.
    """
    model = build().to(device)
    try:
        with torch.no_grad():
            output = forward(model, move(batch, device))
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(f"the model does not accept {name}: {error}") from error
    loss_of(output)


def forward(model: nn.Module, batch: object) -> object:
    """Call ``model`` with a batch: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def loss_of(output: object) -> Tensor:
    """Return a loss that depends on every floating-point tensor in ``output``: the sum of their mean squares.

    Raises:
        ValueError: there is no such tensor.
    """
    parts = [each.float().square().mean() for each in _tensors(output) if each.is_floating_point()]
    if not parts:
        raise ValueError(
            f"the model returned {type(output).__name__} without a floating-point tensor, so there is no loss. Return "
            "a tensor, or a tuple, list or dict of tensors."
        )
    return torch.stack(parts).sum()


def move(batch: object, device: torch.device) -> Any:
    """Return ``batch`` with its tensors on ``device``, in tuples, lists and mappings too."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(move(each, device) for each in batch)
    return batch


class Trainer:
    """A model with one recipe, wrapped in DDP, and its training step."""

    def __init__(self, build: Callable[[], nn.Module], recipe: Recipe, batch: object, device: torch.device) -> None:
        """Build and convert a model, wrap it in DDP and attach an optimizer. Collective over all ranks."""
        torch.manual_seed(0)
        self.model = convert(build(), recipe).to(device)
        placed = [device] if device.type != "cpu" else None
        self.wrapped = DistributedDataParallel(self.model, device_ids=placed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), _RATE, momentum=0.9)
        attach(self.model, optimizer=self.optimizer)
        self.batch = move(batch, device)
        self.device = device
        # A recipe that shares every k-th step is measured over k steps.
        self.steps = recipe.policy.every if isinstance(recipe.policy, Periodic) else 1

    def turn(self) -> float:
        """Run the steps of one round, and return seconds per step."""
        dist.barrier()
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(self.steps):
            self._step()
        synchronize(self.device)
        return (time.perf_counter() - started) / self.steps

    def count(self) -> tuple[float, float]:
        """Return collectives and bytes per step."""
        with Ledger(self.model) as ledger:
            self.turn()
        return ledger.collectives / self.steps, ledger.bytes / self.steps

    def _step(self) -> None:
        self.optimizer.zero_grad()
        loss_of(forward(self.wrapped, self.batch)).backward()
        self.optimizer.step()


def steady(recipe: Recipe) -> Recipe:
    """Return ``recipe`` without its warm-up."""
    return dataclasses.replace(recipe, policy=recipe.policy.then) if isinstance(recipe.policy, Warmup) else recipe


def _row(name: str, steps: list[float], bases: list[float], collectives: float, nbytes: float) -> Row:
    return Row(
        recipe=name,
        step=interval(steps),
        compute=interval(bases),
        exposed=interval([step - base for step, base in zip(steps, bases, strict=True)]),
        collectives=collectives,
        nbytes=nbytes,
        rounds=len(steps),
    )


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        yield from _of_all(output.values())
    elif isinstance(output, list | tuple):
        yield from _of_all(output)


def _of_all(parts: Iterable[object]) -> Iterator[Tensor]:
    for part in parts:
        yield from _tensors(part)
