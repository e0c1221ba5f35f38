"""``report.md`` of ``gpu_check.py``: the goals, what held, what failed with its whole error, and the figures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpu_units import ENDED, WHOLE, records
from measure import markdown

Record = dict[str, Any]
Sums = dict[tuple[int, str, str], dict[str, float]]
"""Milliseconds of all layers, by batch, dtype and layout, and by contender."""


LAYERS = 53


class Goal(NamedTuple):
    """Something to reach, in the worst of all ``values``, by what they are of; none where nothing was measured."""

    text: str
    limit: float
    values: dict[str, float]
    least: bool = False

    def row(self) -> list[str]:
        """As a table shows it."""
        bound = f"{'at least' if self.least else 'at most'} {self.limit:.2f}"
        if not self.values:
            return [self.text, bound, "", "not run"]
        pick = min if self.least else max
        worst = pick(self.values, key=lambda name: self.values[name])
        value = self.values[worst]
        short = (self.limit - value if self.least else value - self.limit) / self.limit
        return [self.text, bound, f"{value:.3f} ({worst})", "met" if short <= 0 else f"missed by {short:.1%}"]


def measured(found: Iterable[Record], stage: str) -> list[Record]:
    """What a card has measured in this stage."""
    return [each for each in found if each["stage"] == stage and each["state"] == "ok" and each["card"] is not None]


def layer_sums(found: list[Record], way: str, key: str = "done") -> Sums:
    """Over all layers of ResNet-50; without contenders of which a size is missing, as a part that failed leaves it."""
    sums: Sums = {}
    layers: dict[tuple[int, str, str, str], int] = {}
    for each in measured(found, "e"):
        if each["part"].endswith(way):
            kind = each["batch"], each["dtype"], each["layout"]
            row = sums.setdefault(kind, {})
            for name, value in each[key].items():
                row[name] = row.get(name, 0.0) + each["times"] * value
                layers[*kind, name] = layers.get((*kind, name), 0) + each["times"]
    return {
        kind: {name: value for name, value in row.items() if layers[*kind, name] == LAYERS}
        for kind, row in sums.items()
    }


def ratios(sums: Sums, batches: tuple[int, ...], one: str, two: str) -> dict[str, float]:
    """One contender over another one, in each kind of layer."""
    return {
        f"batch {batch}, {dtype}, {layout}": row[one] / row[two]
        for (batch, dtype, layout), row in sums.items()
        if batch in batches and one in row and two in row
    }


def step_ratios(found: list[Record], batches: tuple[int, ...], *pairs: tuple[str, str]) -> dict[str, float]:
    """As ``ratios``, of whole steps."""
    steps = {each["batch"]: each["done"] for each in measured(found, "f") if each["part"] == "steps"}
    return {
        f"batch {batch}, {one}": done[one] / done[two]
        for batch, done in steps.items()
        for one, two in pairs
        if batch in batches and one in done and two in done
    }


def bandwidths(found: list[Record]) -> dict[str, float]:
    """The share of the copy's bandwidth at which ``local_bn`` moves 3 passes forward and 5 backward, batch 64."""
    rates = [each["bytes_per_second"] for each in measured(found, "a") if each["part"] == "copy"]
    parts = [each for each in measured(found, "e") if each["part"].endswith(", graph") and each["batch"] == 64]
    shares: dict[str, float] = {}
    for (batch, dtype, layout), row in layer_sums(found, ", graph").items():
        mine = [each for each in parts if (each["dtype"], each["layout"]) == (dtype, layout)]
        if rates and mine and batch == 64 and "local_bn" in row:
            moved = sum(each["times"] * each["moved"] for each in mine)
            shares[f"{dtype}, {layout}"] = moved / (row["local_bn"] * 1e-3) / rates[-1]
    return shares


def goals(found: list[Record]) -> list[Goal]:
    """What was asked for."""
    issued, graph = layer_sums(found, ", issued"), layer_sums(found, ", graph")
    sync, local, stock = ("sync_bn", "SyncBatchNorm"), "local_bn", "BatchNorm2d"
    rows = [
        Goal(f"layers, batch {batch}: `sync_bn` over torch's SyncBatchNorm", 0.8, ratios(issued, (batch,), *sync))
        for batch in (2, 8, 64)
    ]
    for way, sums in (("issued", issued), ("from a graph", graph)):
        text = f"layers, batch 8 and 64, {way}: `local_bn` over stock"
        rows.append(Goal(text, 1.0, ratios(sums, (8, 64), local, stock)))
    rows.append(Goal("layers, batch 64: share of the copy's bandwidth", 0.8, bandwidths(found), least=True))
    rows.append(Goal("step, batch 2 and 8: `sync_bn` over torch's", 0.8, step_ratios(found, (2, 8), sync)))
    windowed = "mabn", "mabn, Local"
    rows.append(Goal("step, batch 2 and 8: `mabn` over `Local`", 1.03, step_ratios(found, (2, 8), windowed)))
    pairs = [(f"{name}, fused", name) for name in ("sync_bn", "local_bn")]
    rows.append(Goal("step: fused over unfused", 1.0, step_ratios(found, (2, 8, 64), *pairs)))
    return rows


# --- tables --------------------------------------------------------------------------------------


def layer_table(found: list[Record]) -> list[str]:
    """All 53 layers; what the host takes is apart."""
    ways = [("issued", ", issued", "done"), ("host alone", ", issued", "issued"), ("graph", ", graph", "done")]
    rows = []
    names = list(dict.fromkeys(name for row in layer_sums(found, ", issued").values() for name in row))
    for issued, way, key in ways:
        for (batch, dtype, layout), row in sorted(layer_sums(found, way, key).items()):
            rows.append(
                [issued, str(batch), dtype, layout, *(f"{row[name]:.3f}" if name in row else "" for name in names)]
            )
    if not rows:
        return []
    title = ["", "## All 53 layers of ResNet-50, forward and backward, ms", ""]
    return [*title, *markdown(["", "batch", "dtype", "layout", *names], rows, 4)]


def step_table(found: list[Record]) -> list[str]:
    """Whole steps, and compiled ones."""
    steps = {str(each["batch"]): each["done"] for each in measured(found, "f") if each["part"] == "steps"}
    for each in measured(found, "f"):
        if each["unit"].startswith("compiled: ") and each["part"] != WHOLE:
            steps.setdefault(f"{each['batch']}, compiled", {}).update(each["done"])
    if not steps:
        return []
    names = list(dict.fromkeys(name for done in steps.values() for name in done))
    rows = [[batch, *(f"{done[name]:.2f}" if name in done else "" for name in names)] for batch, done in steps.items()]
    return ["", "## Steps of ResNet-50, ms", "", *markdown(["batch", *names], rows)]


def stage_table(found: list[Record], titles: Mapping[str, str]) -> list[str]:
    """How many parts of each stage held."""
    rows = []
    for letter, title in titles.items():
        mine = [each for each in found if each["stage"] == letter]
        parts = [each for each in mine if each["part"] not in (WHOLE, ENDED) or each["state"] != "ok"]
        states = [sum(each["state"] == state for each in parts) for state in ("ok", "failed", "not run")]
        seconds = sum(each.get("seconds", 0.0) for each in mine if each["part"] == WHOLE)
        rows.append([f"({letter}) {title}", *map(str, states), f"{seconds:.0f}"])
    return ["", "## Stages", "", *markdown(["", "held", "failed", "not run", "seconds, all processes"], rows)]


def details(found: list[Record]) -> list[str]:
    """What parts found, but for timings, which have tables; and why parts did not run."""
    lines = ["", "## Found", ""]
    for each in found:
        given = {key: each[key] for key in each if key not in _KNOWN}
        if each["stage"] not in ("e", "f") and each["state"] == "ok" and given:
            lines.append(f"* ({each['stage']}) {each['unit']}, {each['part']}: `{json.dumps(given)}`")
    missing: dict[tuple[str, str], int] = {}
    for each in found:
        if each["state"] == "not run":
            key = each["stage"], each.get("reason", "")
            missing[key] = missing.get(key, 0) + 1
    lines += [f"* ({stage}) not run: {reason} ({count} parts)" for (stage, reason), count in missing.items()]
    return lines


_KNOWN = {"stage", "unit", "part", "state", "card", "at", "seconds", "error", "reason"}


def failures(found: list[Record]) -> list[str]:
    """Every error, whole."""
    lines = []
    for each in found:
        if each["state"] == "failed":
            lines += ["", f"### ({each['stage']}) {each['unit']}, {each['part']}", "", "```text", each["error"], "```"]
    return ["", "## Failures", *lines] if lines else []


def write(folder: Path, titles: Mapping[str, str]) -> list[str]:
    """``report.md`` anew; its lines up to the failures, for who looks on."""
    found = records(folder)
    cards = sorted({each["card"] for each in found if each["card"] is not None})
    if cards:
        head = f"On {' and '.join(cards)}; every ratio is of one process."
    else:
        head = (
            "**No card: not run.** What follows ran in Triton's interpreter on a CPU, and shows that this script works."
        )
    rows = [goal.row() for goal in goals(found)]
    lines = ["# Check on a GPU", "", head, "", "## Goals", "", *markdown(["", "", "worst", ""], rows, 4)]
    lines += stage_table(found, titles) + layer_table(found) + step_table(found)
    (folder / "report.md").write_text("\n".join([*lines, *failures(found), *details(found)]) + "\n")
    return lines
