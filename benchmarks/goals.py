"""The goals of docs/performance.md, judged by what was measured: a goal fails only where the interval excludes it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import moving
import tiny
from measure import Interval, exposed_ratio, markdown, ratio

Record = Mapping[str, Any]


class Goal(NamedTuple):
    """A ratio, and what it may be at most."""

    what: str
    most: float
    found: Interval

    @property
    def verdict(self) -> str:
        """What the interval says."""
        return "met" if self.found.median <= self.most else "not excluded" if self.found.low <= self.most else "missed"

    def row(self) -> list[str]:
        """As the table shows it."""
        median, low, high = (f"{value:.3f}" for value in self.found)
        return [self.what, f"{self.most:g}", median if low == high else f"{median} [{low}, {high}]", self.verdict]


def layer_goals(record: Record) -> Iterator[Goal]:
    """``local_bn`` over stock, without communication."""
    for case in record["results"][0]["cases"]:
        most = 0.7 if case["format"] == "contiguous" else 1.15
        what = f"layers, {case['format']}, width {case['width']}: `local_bn` over stock"
        yield Goal(what, most, ratio(case["ms"]["local_bn"], case["ms"]["stock"]))


def tiny_goals(record: Record) -> Iterator[Goal]:
    """What the host does for a layer of almost no values."""
    for result in record["results"]:
        ms, where = result["ms"], f"layers of {math.prod(tiny.SHAPE)} values, {result['ranks']} ranks"
        if result["ranks"] == 1:
            for name, most in (("local_bn", 1.25), ("sync_bn", 1.25), ("mabn", 2)):
                yield Goal(f"{where}: `{name}` over stock", most, ratio(ms[name], ms["stock"]))
        else:
            over = ratio(ms["sync_bn"], ms["gather, no network"])
            yield Goal(f"{where}: `sync_bn` over gather without network", 1, over)


def step_goals(record: Record, where: str, over_gather: float, over_naive: float) -> Iterator[Goal]:
    """Exposed time of ``sync_bn`` over that of its peers."""
    result = record["results"][0]
    ms = result["ms"]
    for peer, most in (("gather", over_gather), ("naive", over_naive)):
        what = f"{where}, width {result['width']}: exposed `sync_bn` over {peer}"
        yield Goal(what, most, exposed_ratio(ms["sync_bn"], ms[peer], ms["local_bn"]))


def whole_step_goal(record: Record) -> Goal:
    """The whole step on four hosts."""
    result = record["results"][0]
    what = f"4 hosts, 1 ms, width {result['width']}: whole step, `sync_bn` over gather"
    return Goal(what, 0.32, ratio(result["ms"]["sync_bn"], result["ms"]["gather"]))


def moving_goals(record: Record) -> Iterator[Goal]:
    """Moving statistics over the same without sharing, as published: centralized weights in the projected form."""
    for result in record["results"]:
        for name in moving.METHODS:
            place = f"{result['ranks']} ranks, {result.get('delay_ms') or 0:g} ms, width {result['width']}"
            what = f"{place}: step of `{name}` over the same with `Local`"
            yield Goal(what, moving.GOAL, moving.over_local(result, name, "projected"))
        if moving.key("mabn", "forward") in result["ms"]:
            what = f"width {result['width']}, batch {result['batch']}: projection over step"
            yield Goal(what, moving.PROJECTION_GOAL, moving.projected_part(result))


def mpi_goals(record: Record) -> Iterator[Goal]:
    """Statistics by MPI, and without it by shared memory, over those by gloo, and over no synchronization."""
    ms = record["results"][0]["ms"]
    for way, name in (("MPI", "mpi:sync_bn"), ("shared memory", "sync_bn")):
        exposed = exposed_ratio(ms[name], ms["gloo:sync_bn"], ms["local_bn"])
        yield Goal(f"{way}: exposed `sync_bn` over gloo's", 0.1, exposed)
        yield Goal(f"{way}: whole step, `sync_bn` over stock", 1.03, ratio(ms[name], ms["stock"]))


def plan_goals(record: Record) -> Iterator[Goal]:
    """How far predictions are off; single figures, without an interval."""
    for result in record["results"]:
        error = abs(result["fit_ms"] / result["measured_ms"] - 1)
        what = f"`distnorm plan`, 2 ranks, {result.get('delay_ms') or 0:g} ms: error of the predicted collective time"
        yield Goal(what, 0.25, Interval(error, error, error))


def goals(records: Mapping[str, Record]) -> list[Goal]:
    """All goals for which there are figures."""
    found: list[Goal] = []
    have = {name for name, record in records.items() if record["results"]}
    if "layer" in have:
        found += layer_goals(records["layer"])
    if "tiny" in have:
        found += tiny_goals(records["tiny"])
    for part in sorted(have & {"step-32", "step-64"}):
        found += step_goals(records[part], "2 ranks, loopback", 0.6, 0.45)
    for part in sorted(have & {"hosts-16", "hosts-32"}):
        found += step_goals(records[part], "4 hosts, 1 ms", 0.25, 0.2)
    if "hosts-16" in have:
        found.append(whole_step_goal(records["hosts-16"]))
    if "moving" in have:
        found += moving_goals(records["moving"])
    if "mpi" in have:
        found += mpi_goals(records["mpi"])
    if "plan" in have:
        found += plan_goals(records["plan"])
    return found


def table(records: Mapping[str, Record]) -> list[str]:
    """One row per goal."""
    rows = [goal.row() for goal in goals(records)]
    return markdown(["", "at most", "measured", ""], rows) if rows else ["not measured yet"]
