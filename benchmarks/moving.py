"""What moving statistics cost beside the same method and weights with policy ``Local``, which shares nothing.

Run ``torchrun --standalone --nproc_per_node 2 benchmarks/moving.py``, or with a delay between ranks by
``benchmarks/hosts.py``. ResNet-18 under DDP; steps of all contenders alternate in one process. Recipes are as they are
after their warm-up. ``--weights`` names the forms of the weights axis: ``none``; ``forward``, where every forward
centres the weights; ``projected``, where they are centred once per SGD step.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from measure import Interval, finish, markdown, milliseconds, parser_of, ratio, rounds
from models import IMAGE, resnet18
from torch import nn
from training import stepper

import distnorm
from distnorm import Recipe, recipes
from distnorm.diagnostics.bench_steps import steady
from distnorm.layers.weights import centralized
from distnorm.policies import Local

FORMS = ("none", "forward", "projected")
METHODS = ("mabn", "lazy_bn")
GOAL, PROJECTION_GOAL = 1.03, 0.03


def recipe_of(name: str, form: str) -> Recipe:
    """The recipe after its warm-up."""
    weights = "none" if form == "none" else "centralized"
    return steady(recipes.build(name, weights=weights))


def key(name: str, form: str, local: bool = False) -> str:
    """How a contender is called."""
    return f"{name}, {form}" + (", Local" if local else "")


def contenders(forms: Sequence[str], width: int, batch: int) -> Iterator[tuple[str, Callable[[], float]]]:
    """Every method and form with its own policy and with ``Local``; and the projection by itself."""
    shape = (batch, 3, IMAGE, IMAGE)
    for name in METHODS:
        for form in forms:
            shared = recipe_of(name, form)
            for local in (False, True):
                recipe = dataclasses.replace(shared, policy=Local(), name=None) if local else shared
                model = distnorm.convert(resnet18(width), recipe)
                yield key(name, form, local), stepper(model, shape, optimizer_ends=form != "forward")
    model = distnorm.convert(resnet18(width), recipe_of(METHODS[0], "projected"))
    yield "projection", lambda: projection(model)


def projection(model: nn.Module) -> float:
    """Milliseconds in which all weights are centred in place."""
    started = time.perf_counter()
    for layer in centralized(model):
        layer.project()
    return (time.perf_counter() - started) * 1e3


def over_local(result: Mapping[str, Any], name: str, form: str) -> Interval:
    """A step over that of the same method and weights with policy ``Local``."""
    return ratio(result["ms"][key(name, form)], result["ms"][key(name, form, local=True)])


def projected_part(result: Mapping[str, Any]) -> Interval:
    """What part of a step the projection is."""
    return ratio(result["ms"]["projection"], result["ms"][key("mabn", "projected", local=True)])


def table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Moving statistics beside ``Local``, one row per network, recipe and form."""
    rows = []
    for result in results:
        for method in METHODS:
            for form in (each for each in FORMS if key(method, each) in result["ms"]):
                pair = [milliseconds(result["ms"][key(method, form, local)]) for local in (False, True)]
                place = [str(result[name]) for name in ("ranks", "width", "batch")]
                place.append(f"{result.get('delay_ms') or 0:g}")
                rows.append([f"`{method}`", form, *place, *pair, str(over_local(result, method, form))])
    titles = ["recipe", "weights", "ranks", "width", "batch", "delay, ms", "step, ms", "with `Local`, ms", "ratio"]
    return markdown(titles, rows, texts=2)


def weights_table(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What centralized weights cost by themselves: steps with policy ``Local``, over those with weights as they are."""
    rows = []
    for result in (each for each in results if key("mabn", "none") in each["ms"]):
        for method in METHODS:
            steps = {
                form: result["ms"][key(method, form, local=True)] for form in FORMS if key(method, form) in result["ms"]
            }
            over = [
                f"{milliseconds(steps[form])} | {ratio(steps[form], steps['none'])}" if form in steps else " | "
                for form in FORMS[1:]
            ]
            alone = f"{milliseconds(result['ms']['projection'])} | {percent(projected_part(result))}"
            place = [str(result[name]) for name in ("ranks", "width", "batch")]
            rows.append([f"`{method}`", *place, milliseconds(steps["none"]), *over, alone])
    titles = ["forward form, ms", "ratio", "projected form, ms", "ratio", "the projection alone, ms", "of the step"]
    return markdown(["method of", "ranks", "width", "batch", "weights as they are, ms", *titles], rows)


def percent(part: Interval) -> str:
    """An interval as percent."""
    return f"{part.median:.1%} [{part.low:.1%}, {part.high:.1%}]".replace("%", " %")


def main() -> None:
    """Measure and print."""
    parser = parser_of("Time moving statistics beside policy Local.", runs=30, warmup=5)
    parser.add_argument("--weights", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--batch", type=int, default=4, help="images per rank")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    seen = rounds(dict(contenders(options.weights, options.width, options.batch)), options)
    result = {"ranks": dist.get_world_size(), "width": options.width, "batch": options.batch, "ms": seen}
    finish(result, [*table([result]), "", *weights_table([result])], options.json)


if __name__ == "__main__":
    main()
