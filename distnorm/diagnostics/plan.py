"""Plan: predict what each recipe costs on a cluster, from a model's layers and the parameters of a network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.diagnostics.plan_cost import Backend, Network, collective_seconds
from distnorm.diagnostics.plan_traffic import traffic
from distnorm.diagnostics.plan_units import show_bandwidth, show_bytes, show_seconds
from distnorm.recipe import Recipe
from distnorm.recipes import parse

AFFORDABLE = 0.05
"""The share of exposed communication in a step up to which an exact recipe is recommended."""

DEFAULT_RECIPES = (
    "local_bn",
    "sync_bn",
    "hierarchical_bn",
    "group_bn(axis='local')",
    "periodic_bn",
    "mabn",
    "hierarchical_mabn",
    "lazy_bn",
)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One recipe at one number of ranks, after its warm-up; counts, bytes and seconds are per step and rank.

    Attributes:
        recipe: its name and options.
        world: data-parallel ranks.
        blocking: number of blocking collectives.
        background: number of asynchronous collectives.
        nbytes: payload that this rank contributes to both kinds.
        blocking_seconds: time of the blocking collectives.
        background_seconds: time of the asynchronous collectives, hidden or not.
        exposed_seconds: time that communication adds to the step.
        exact: whether the result is that of the joined batch of all ranks.
        covers_all: whether statistics come from all ranks, possibly from different steps.
    """

    recipe: str
    world: int
    blocking: float
    background: float
    nbytes: float
    blocking_seconds: float
    background_seconds: float
    exposed_seconds: float
    exact: bool
    covers_all: bool


@dataclass(frozen=True)
class Recommendation:
    """The recommended recipe for ``world`` ranks, and the reason."""

    world: int
    recipe: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All predictions for a model, and the recommendations.

    Attributes:
        model: name of the function that returned the model.
        layers: number of norm layers.
        channels: sum of their channels.
        local: ranks per node.
        backend: gloo or nccl.
        step_seconds: duration of a step without communication of statistics.
        network: the parameters of the network.
    """

    model: str
    layers: int
    channels: int
    local: int
    backend: Backend
    step_seconds: float
    network: Network
    predictions: list[Prediction]
    recommendations: list[Recommendation]

    def record(self) -> dict[str, Any]:
        """Return the JSON record; docs/plan.md describes its fields."""
        return {"format": 1, **asdict(self)}

    def table(self) -> str:
        """Format one row per number of ranks and recipe, then the recommendations."""
        header = ("ranks", "recipe", "collectives/step", "asynchronous/step", "bytes/step", "exposed", "of the step")
        rows = [header, tuple("-" * len(title) for title in header)]
        for each in self.predictions:
            share = each.exposed_seconds / self.step_seconds
            counts = f"{each.blocking:g}", f"{each.background:g}", show_bytes(each.nbytes)
            rows.append((str(each.world), each.recipe, *counts, show_seconds(each.exposed_seconds), f"{share:.1%}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [self._title(), self._numbers(), ""]
        for row in rows:
            cells = [cell.ljust(width) if at == 1 else cell.rjust(width) for at, (cell, width) in _cells(row, widths)]
            lines.append("  ".join(cells))
        lines.append("")
        lines += [f"{each.world} ranks: {each.recipe}. {each.reason}" for each in self.recommendations]
        return "\n".join(lines)

    def _title(self) -> str:
        return (
            f"{self.model}: {self.layers} norm layers, {self.channels} channels; {self.backend}, up to {self.local} "
            f"ranks per node, step without communication of statistics {show_seconds(self.step_seconds)}"
        )

    def _numbers(self) -> str:
        network = self.network
        near = f"{show_seconds(network.alpha)} and {_bandwidth(network.inverse_beta)}"
        far = f"{show_seconds(network.alpha_node)} and {_bandwidth(network.inverse_beta_node)}"
        host = f"{show_seconds(network.overhead)} per collective, {show_seconds(network.message)} per peer"
        host += f", {show_seconds(network.wake)} per round of gloo's"
        return f"a round and bandwidth in a node: {near}; between nodes: {far}; host: {host}"


def check_world(world: int, local: int) -> None:
    """Raise unless ``world`` ranks fill nodes of ``local`` ranks, or fit on one.

    Raises:
        ValueError: the message names allowed numbers.
    """
    if world < 1 or local < 1:
        raise ValueError(f"world size {world} with {local} ranks per node: both must be at least 1.")
    if world > local and world % local:
        raise ValueError(
            f"world size {world} is not divisible by the {local} ranks of a node; allowed are 1 to {local}, and "
            f"multiples of {local} such as {world // local * local} and {(world // local + 1) * local}."
        )


def predict(
    name: str,
    layers: Sequence[tuple[str, _BatchNorm]],
    world: int,
    local: int,
    network: Network,
    backend: Backend,
    step_seconds: float,
) -> Prediction:
    """Predict what the recipe ``name`` costs for ``layers`` among ``world`` ranks, ``local`` per node.

    exposed = blocking + max(0, background - (step + blocking)): docs/plan.md.

    Raises:
        ValueError: the recipe is unknown, or does not fit this number of ranks.
    """
    recipe: Recipe = parse(name)
    sent = traffic(recipe, layers, world, local)
    spent = {True: 0.0, False: 0.0}
    for each, count in sent.sent.items():
        one = collective_seconds(network, backend, each.reach, each.nbytes, background=each.background)
        spent[each.background] += one * count / sent.period
    covers_all = sent.shared == world
    return Prediction(
        recipe=name,
        world=world,
        blocking=sent.collectives(background=False),
        background=sent.collectives(background=True),
        nbytes=sent.nbytes,
        blocking_seconds=spent[False],
        background_seconds=spent[True],
        exposed_seconds=spent[False] + max(0.0, spent[True] - (step_seconds + spent[False])),
        exact=covers_all and recipe.policy.facts.staleness == 0 and recipe.policy.facts.always_global,
        covers_all=covers_all,
    )


def make_plan(
    model: str,
    layers: Sequence[tuple[str, _BatchNorm]],
    *,
    names: Iterable[str],
    worlds: Sequence[int],
    local: int,
    network: Network,
    backend: Backend,
    step_seconds: float,
) -> Plan:
    """Predict every recipe in ``names`` at every number of ranks in ``worlds``.

    Raises:
        ValueError: as ``predict`` and ``check_world``; or the step is not longer than 0.
    """
    if step_seconds <= 0:
        raise ValueError(f"a step of {show_seconds(step_seconds)}: need a duration above 0.")
    for world in worlds:
        check_world(world, local)
    chosen = list(names)
    predictions = [
        predict(name, layers, world, local, network, backend, step_seconds) for world in worlds for name in chosen
    ]
    found = [recommend([each for each in predictions if each.world == world], step_seconds) for world in worlds]
    return Plan(
        model=model,
        layers=len(layers),
        channels=sum(layer.num_features for _, layer in layers),
        local=local,
        backend=backend,
        step_seconds=step_seconds,
        network=network,
        predictions=predictions,
        recommendations=[each for each in found if each is not None],
    )


def recommend(predictions: Sequence[Prediction], step_seconds: float) -> Recommendation | None:
    """Recommend a recipe out of ``predictions`` for one number of ranks; None if none of them covers all ranks.

    This is the cheapest exact one, if it adds at most ``AFFORDABLE`` to the step; else the one with the least exposed
    communication among those whose statistics come from all ranks.
    """
    if not predictions or predictions[0].world == 1:
        return None
    exact = min((each for each in predictions if each.exact), key=_price, default=None)
    if exact is not None and exact.exposed_seconds <= AFFORDABLE * step_seconds:
        return Recommendation(exact.world, exact.recipe, f"It is exact, and {_cost(exact, step_seconds)}.")
    best = min((each for each in predictions if each.covers_all), key=_price, default=None)
    if best is None:
        return None
    found = _sentence(best, step_seconds)
    if exact is best:
        found = f"It is exact, and the cheapest of all, though {found}"
    elif exact is not None:
        share = exact.exposed_seconds / step_seconds
        found = f"The cheapest exact recipe, {exact.recipe}, would add {share:.0%} to the step; here {found}"
    return Recommendation(best.world, best.recipe, f"{found[0].upper()}{found[1:]}.")


def _price(each: Prediction) -> tuple[float, float]:
    return each.exposed_seconds, each.nbytes


def _cost(each: Prediction, step_seconds: float) -> str:
    share = each.exposed_seconds / step_seconds
    return f"its {each.blocking:g} collectives add {show_seconds(each.exposed_seconds)}, {share:.1%} of the step"


def _sentence(each: Prediction, step_seconds: float) -> str:
    if each.exposed_seconds == 0:
        took = show_seconds(each.background_seconds)
        return f"a collective of {took} runs beside a step of {show_seconds(step_seconds)}, and no layer waits for it"
    if each.blocking:
        return _cost(each, step_seconds)
    return (
        f"a collective of {show_seconds(each.background_seconds)} outlasts the step and adds "
        f"{show_seconds(each.exposed_seconds)}, {each.exposed_seconds / step_seconds:.1%} of it"
    )


def _cells(row: Sequence[str], widths: Sequence[int]) -> Iterable[tuple[int, tuple[str, int]]]:
    return enumerate(zip(row, widths, strict=True))


def _bandwidth(inverse: float) -> str:
    return show_bandwidth(1 / inverse if inverse else math.inf)
