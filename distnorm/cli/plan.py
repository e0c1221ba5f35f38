"""``distnorm plan``: predict what each recipe costs, from a model and the parameters of a network."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import distnorm
from distnorm.attach import conversions_of
from distnorm.cli.named import build_model
from distnorm.diagnostics import draw
from distnorm.diagnostics.bench import read_points, read_step
from distnorm.diagnostics.plan import DEFAULT_RECIPES, Plan, make_plan
from distnorm.diagnostics.plan_cost import ASSUMED_MESSAGE, Network, fit
from distnorm.diagnostics.plan_units import bytes_per_second, seconds

_ASSUMED = {"alpha": "30us", "beta": "10GB/s", "overhead": "0us", "message": f"{ASSUMED_MESSAGE * 1e6:g}us"}
_ASSUMED_STEP = "200ms"
_TIMES = ("overhead", "message", "wake", "alpha", "alpha_node")
_BANDWIDTHS = ("beta", "beta_node")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.usage = "distnorm plan --model MODULE:FUNCTION [options]"
    parser.description = """\
  distnorm plan --model my_models:resnet --measured bench.json --world 8,64
  distnorm plan --model my_models:resnet --alpha-node 30us --beta-node 25Gbit/s

Predict collectives, bytes and exposed time per step, for each recipe and number
of ranks. Starts no ranks and trains nothing. docs/plan.md has the formulas.
Times are written 30us or 1.5ms, bandwidths 10GB/s or 25Gbit/s.
"""
    add = parser.add_argument
    add("--model", required=True, metavar="MODULE:FUNCTION", help="returns the model; takes no arguments")
    add("--recipes", nargs="+", metavar="RECIPE", default=list(DEFAULT_RECIPES), help="default: all of them")
    add("--world", default="2,8,64,512,4096", metavar="N,N,...", help="numbers of ranks; default: %(default)s")
    add("--local", type=int, default=8, metavar="N", help="ranks per node; default: %(default)s")
    add("--step", metavar="TIME", help=f"a step that shares nothing; default: measured, or {_ASSUMED_STEP}")
    add("--backend", choices=["gloo", "nccl"], help="default: measured, or nccl")
    add("--measured", type=Path, metavar="FILE", help="numbers that `distnorm bench --json FILE` wrote")
    add("--alpha", metavar="TIME", help=f"one round of messages in a node; default: {_ASSUMED['alpha']}")
    add("--beta", metavar="BANDWIDTH", help=f"bandwidth in a node; default: {_ASSUMED['beta']}")
    add("--alpha-node", metavar="TIME", help="the same between nodes; default: as --alpha")
    add("--beta-node", metavar="BANDWIDTH", help="of a node's link; default: as --beta")
    add("--overhead", metavar="TIME", help=f"host time of a collective; default: {_ASSUMED['overhead']}")
    add("--message", metavar="TIME", help=f"host time per peer, on gloo; default: {_ASSUMED['message']}")
    add("--wake", metavar="TIME", help="host time of a round of gloo's own; default: 0us")
    add("--json", type=Path, metavar="FILE", help="write the predictions")
    add("--picture", type=Path, metavar="FILE", help="plot exposed time against ranks; needs matplotlib")


def main(chosen: argparse.Namespace) -> int:
    """Run the command; return 0, or 2 after an error message."""
    try:
        plan = _plan(chosen)
        print(plan.table())
        if chosen.json is not None:
            chosen.json.write_text(json.dumps(plan.record(), indent=1) + "\n")
        if chosen.picture is not None:
            draw.to_file(draw.draw_plan, plan, chosen.picture)
    except (ValueError, OSError) as error:
        print(f"distnorm plan: error: {error}", file=sys.stderr)
        return 2
    return 0


def _plan(chosen: argparse.Namespace) -> Plan:
    measured = None if chosen.measured is None else _read(chosen.measured)
    model = distnorm.convert(build_model(chosen.model, meta=True), "sync_bn")
    layers = [pair for conversion in conversions_of(model) for pair in conversion.layers()]
    step = read_step(measured) if measured is not None and chosen.step is None else None
    return make_plan(
        chosen.model,
        layers,
        names=chosen.recipes,
        worlds=[_whole(text) for text in chosen.world.split(",")],
        local=chosen.local,
        network=_network(chosen, measured),
        backend=chosen.backend or (measured["backend"] if measured is not None else "nccl"),
        step_seconds=step if step is not None else _given("--step", chosen.step or _ASSUMED_STEP, seconds),
    )


def _network(chosen: argparse.Namespace, measured: dict[str, Any] | None) -> Network:
    """Return the network: parameters from the command line, the others as measured, else as assumed.

    Without a measurement, parameters between nodes default to those within a node.
    """
    times = {name: _given(f"--{name.replace('_', '-')}", text, seconds) for name, text in _texts(chosen, _TIMES)}
    for name, text in _texts(chosen, _BANDWIDTHS):
        times[f"inverse_{name}"] = 1 / _given(f"--{name.replace('_', '-')}", text, bytes_per_second)
    if measured is not None:
        return replace(fit(read_points(measured)), **times)
    assumed = {name: seconds(_ASSUMED[name]) for name in ("overhead", "message", "alpha")}
    numbers = {**assumed, "inverse_beta": 1 / bytes_per_second(_ASSUMED["beta"]), **times}
    numbers.setdefault("alpha_node", numbers["alpha"])
    numbers.setdefault("inverse_beta_node", numbers["inverse_beta"])
    return Network(**numbers)


def _texts(chosen: argparse.Namespace, names: Sequence[str]) -> Iterator[tuple[str, str]]:
    return ((name, text) for name in names if (text := getattr(chosen, name)) is not None)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--measured {path}: not JSON ({error}). `distnorm bench --json FILE` writes it.") from None
    if not isinstance(found, dict) or found.get("tool") != "distnorm bench" or found.get("format") != 1:
        raise ValueError(f"--measured {path}: not a file of `distnorm bench --json FILE` in format 1.")
    return found


def _given(option: str, text: str, read: Callable[[str], float]) -> float:
    try:
        return read(text)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from None


def _whole(text: str) -> int:
    if not text.strip().isdigit():
        raise ValueError(f"--world {text!r}: need whole numbers separated by commas, such as 2,8,64.")
    return int(text)
