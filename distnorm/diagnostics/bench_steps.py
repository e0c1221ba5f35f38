"""Training steps of one model under several recipes, side by side, each beside the same recipe that shares nothing."""

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

_RATE = 1e-6  # steps are taken in full, and hundreds of them leave the model where it was


@dataclass(frozen=True, kw_only=True)
class Row:
    """One recipe after its warm-up; seconds, counts and bytes are per step and rank.

    Attributes:
        recipe: its name and options.
        step: duration of a step.
        compute: the step of the same method and weights with policy ``Local``.
        exposed: what the step takes longer than that one in the same round.
        collectives: started, blocking and asynchronous.
        nbytes: payload of them.
        rounds: how many turns the figures rest on.
    """

    recipe: str
    step: Interval
    compute: Interval
    exposed: Interval
    collectives: float
    nbytes: float
    rounds: int

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
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
    tell: Callable[[float], None],
) -> list[Row]:
    """Steps of all recipes in ``names``, and of what each is compared with, take turns for ``seconds``.

    Collective over all ranks. Every contender keeps a model, its gradients and DDP's buckets in memory.
    """
    recipes = {name: steady(parse(name)) for name in names}
    bases = {name: dataclasses.replace(recipe, policy=Local(), name=None) for name, recipe in recipes.items()}
    # In one order on all ranks, which a set would not be: DDP communicates when it wraps a model.
    contenders = dict.fromkeys([*recipes.values(), *bases.values()])
    trainers = {recipe: Trainer(build, recipe, batch, device) for recipe in contenders}
    seen = take_turns({recipe: trainer.turn for recipe, trainer in trainers.items()}, seconds, device, tell)
    counted = {recipe: trainers[recipe].count() for recipe in recipes.values()}
    return [_row(name, seen[recipes[name]], seen[bases[name]], *counted[recipes[name]]) for name in names]


def check_forward(build: Callable[[], nn.Module], batch: object, name: str, device: torch.device) -> None:
    """Whether the model takes the ``batch`` called ``name``, and returns something to learn from. No collective.

    Raises:
        ValueError: it does not.
    """
    model = build().to(device)
    try:
        with torch.no_grad():
            output = forward(model, move(batch, device))
    except (RuntimeError, TypeError, IndexError) as error:
        raise ValueError(f"the model does not take {name}: {error}") from error
    loss_of(output)


def forward(model: nn.Module, batch: object) -> object:
    """Call ``model`` with a batch: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, list | tuple) else model(batch)


def loss_of(output: object) -> Tensor:
    """A number that every floating-point tensor in ``output`` takes part in: the sum of their mean squares.

    Raises:
        ValueError: there is none.
    """
    parts = [each.float().square().mean() for each in _tensors(output) if each.is_floating_point()]
    if not parts:
        raise ValueError(f"the model returned {type(output).__name__} without a floating-point tensor in it.")
    return torch.stack(parts).sum()


def move(batch: object, device: torch.device) -> Any:
    """``batch`` with its tensors on ``device``; tuples, lists and mappings keep their form."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return type(batch)(move(each, device) for each in batch)
    return batch


class Trainer:
    """A model under one recipe, and how to take its steps."""

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
        # A recipe that shares every k-th step is not described by any single one of them.
        self.steps = recipe.policy.every if isinstance(recipe.policy, Periodic) else 1

    def turn(self) -> float:
        """Seconds per step."""
        dist.barrier()
        synchronize(self.device)
        started = time.perf_counter()
        for _ in range(self.steps):
            self._step()
        synchronize(self.device)
        return (time.perf_counter() - started) / self.steps

    def count(self) -> tuple[float, float]:
        """Collectives and bytes per step."""
        with Ledger(self.model) as ledger:
            self.turn()
        return ledger.collectives / self.steps, ledger.bytes / self.steps

    def _step(self) -> None:
        self.optimizer.zero_grad()
        loss_of(forward(self.wrapped, self.batch)).backward()
        self.optimizer.step()


def steady(recipe: Recipe) -> Recipe:
    """``recipe`` as it is after its warm-up."""
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
