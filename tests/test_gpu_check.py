"""The check on a card, as far as a machine without one can tell: all stages in a tiny form, and what becomes of errors.

Nothing is timed here, and no figure of a CPU may pass for one of a card.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

TOP = Path(__file__).parents[1]
BENCHMARKS = TOP / "benchmarks"
CHECK = sorted(BENCHMARKS.glob("gpu_*.py"))
NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
Record = Mapping[str, Any]

# Of each stage a unit or two: the whole of it takes a minute.
SOME = "versions|bandwidth|collectives|windows|4x2x4x4 float32|^local_bn$|launches|gloo|: sync_bn$"
SOME += "|batch 2 float32|^kernels$|host|compiled: local_bn"
FORCED = """
import torch
import torch.distributed as dist
from gpu_contenders import STEPS, SYNC, WINDOWED, forced
from torch import nn
import distnorm
from distnorm.diagnostics import Ledger

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
found = []
for recipe in (SYNC, forced(WINDOWED)):
    stock = nn.BatchNorm2d(4)
    model = distnorm.convert(nn.Sequential(nn.BatchNorm2d(4)), recipe)
    with Ledger(model) as ledger:
        for _ in range(2):
            x = torch.randn(3, 4, 5, 5, requires_grad=True)
            y = model(x)
            y.square().sum().backward()
            if recipe is SYNC:
                torch.testing.assert_close(y, stock(x))
    found.append(ledger.collectives)
assert {"mabn", "mabn, Local"} < set(STEPS)
print(found)
"""
UNITS = """
import os, sys, time
from pathlib import Path
from gpu_units import Log, Phase, run

def fails(log):
    with log.part("first"):
        raise ValueError("what went wrong")
    with log.part("second") as found:
        found["number"] = 3

def aborts(log):
    with log.part("first"):
        pass
    print("last words", flush=True)
    os.abort()

def leaves(log):
    sys.exit("no")

def hangs(log):
    time.sleep(600)

units = {each.__name__: each for each in (fails, aborts, leaves)}
log = Log(Path(sys.argv[1]), None, "x")
run(Phase({"hangs": hangs}, limit=4), log, time.monotonic() + 100, lambda: None)
run(Phase(units, width=2), log, time.monotonic() + 100, lambda: None)
run(Phase({"late": fails}), log, time.monotonic(), lambda: None)
"""


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": f"{TOP}:{BENCHMARKS}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the check leaves behind."""
    found = tmp_path_factory.mktemp("check")
    done = run("benchmarks/gpu_check.py", "--out", str(found), "--stages", "abcdefg", "--only", SOME)
    assert not done.returncode, done.stdout + done.stderr
    return found


@NO_CARD
@pytest.mark.slow
def test_every_stage_runs_without_a_card(folder: Path) -> None:
    found = records(folder)
    assert {each["stage"] for each in found} == set("abcdefg")
    assert {each["state"] for each in found} == {"ok", "not run"}
    assert {each.get("reason") for each in found if each["state"] == "not run"} == {"no card"}
    for stage in "abcdefg":  # more than that units were started
        held = [each for each in found if each["stage"] == stage and each["state"] == "ok" and each["part"] != "(all)"]
        assert held, stage


@NO_CARD
@pytest.mark.slow
def test_a_cpu_reaches_no_goal(folder: Path) -> None:
    text = (folder / "report.md").read_text()
    assert "No card: not run" in text
    goals = [line for line in text.splitlines() if " at most " in line or " at least " in line]
    assert len(goals) == 9 and all(line.endswith("| not run |") for line in goals)
    assert "ms\n" not in text  # no table of timings


def test_what_ended_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_check

    def nothing(log: object) -> None:
        raise AssertionError("there is no time for it")

    made = {name: gpu_check.Stage(lambda card: [gpu_check.Phase({"unit": nothing})], 9) for name in "ab"}
    log = gpu_check.Log(tmp_path, None)
    assert gpu_check.check(log, "a", made, 0, "")  # not run is no failure
    assert records(tmp_path)[0]["reason"] == "no time left"
    assert gpu_check.wanted(tmp_path, None, list(made)) == ["a", "b"]
    log.write("(ended)", "ok")
    dataclasses.replace(log, stage="a").write("(ended)", "ok")
    assert gpu_check.wanted(tmp_path, None, list(made)) == ["b"]
    assert gpu_check.wanted(tmp_path, "ba", list(made)) == ["b", "a"]  # by name, once more
    with pytest.raises(SystemExit, match="no stage 'z'; there are ab"):
        gpu_check.wanted(tmp_path, "az", list(made))


@pytest.mark.slow
def test_whatever_becomes_of_a_unit_the_others_go_on(tmp_path: Path) -> None:
    done = run("-c", UNITS, str(tmp_path))
    assert not done.returncode, done.stderr
    found = {(each["unit"], each["part"]): each for each in records(tmp_path)}
    assert found["fails", "first"]["error"].endswith("ValueError: what went wrong\n")
    assert found["fails", "second"]["number"] == 3
    assert found["aborts", "first"]["state"] == "ok"
    assert "ended with status -6" in found["aborts", "(all)"]["error"]
    assert "last words" in found["aborts", "(all)"]["error"]
    assert found["leaves", "(all)"]["state"] == "failed"
    assert "killed after 4 s" in found["hangs", "(all)"]["error"]
    assert "in hangs" in found["hangs", "(all)"]["error"]  # Python's stack, shortly before
    assert found["late", "(all)"]["reason"] == "no time left"
    assert "last words" in (tmp_path / "log.txt").read_text()


def test_one_rank_is_made_to_use_its_collectives() -> None:
    done = run("-c", FORCED)
    assert done.stdout == "[4, 2]\n", done.stderr


# --- the report ----------------------------------------------------------------------------------


def timed(stage: str, unit: str, part: str, done: dict[str, float], **facts: Any) -> dict[str, Any]:
    where = {"stage": stage, "unit": unit, "part": part, "state": "ok", "card": "a card"}
    return {**where, "done": done, "issued": done, **facts}


def layer(times: int, way: str, done: dict[str, float], batch: int = 8) -> dict[str, Any]:
    facts = {"batch": batch, "dtype": "float32", "layout": "contiguous", "times": times, "moved": 8000}
    return timed("e", "batch 8 float32", f"{times} layers, {way}", done, **facts)


def report(folder: Path, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The goals' rows, by their first cell."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_report

    (folder / "results.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    found = gpu_report.goals(gpu_report.records(folder))
    gpu_report.write(folder, {"e": "layers"})
    return {row[0]: row for row in (goal.row() for goal in found)}


def test_goals_are_met_or_missed_by_so_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, quick = {"SyncBatchNorm": 2.0, "sync_bn": 1.0}, {"SyncBatchNorm": 1.0, "sync_bn": 1.0}
    lines = [layer(50, "issued", slow), layer(3, "issued", quick), layer(53, "issued", quick, batch=2)]
    lines.append(
        timed("f", "batch 8", "steps", {"sync_bn": 1.2, "SyncBatchNorm": 1.0, "mabn": 1.0, "mabn, Local": 1.0})
    )
    lines[-1]["batch"] = 8
    rows = report(tmp_path, lines, monkeypatch)
    name = "`sync_bn` over torch's SyncBatchNorm"
    assert rows[f"layers, batch 8: {name}"][2:] == ["0.515 (batch 8, float32, contiguous)", "met"]
    assert rows[f"layers, batch 2: {name}"][3] == "missed by 25.0%"
    assert rows[f"layers, batch 64: {name}"][3] == "not run"
    assert rows["step, batch 2 and 8: `sync_bn` over torch's"][2:] == ["1.200 (batch 8, sync_bn)", "missed by 50.0%"]
    assert rows["step, batch 2 and 8: `mabn` over `Local`"][3] == "met"


def test_a_sum_that_lacks_layers_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = {"SyncBatchNorm": 2.0, "sync_bn": 1.0}
    lines = [layer(50, "issued", done), layer(53, "graph", done, batch=2)]
    rows = report(tmp_path, lines, monkeypatch)
    assert {row[3] for row in rows.values()} == {"not run"}
    assert rows.keys() == report(tmp_path, [{**each, "card": None} for each in lines], monkeypatch).keys()


def test_the_share_of_the_bandwidth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = timed("a", "bandwidth", "copy", {}, bytes_per_second=1e7)
    rows = report(tmp_path, [copy, layer(53, "graph", {"local_bn": 1.0}, batch=64)], monkeypatch)
    assert rows["layers, batch 64: share of the copy's bandwidth"][2:] == ["0.800 (float32, contiguous)", "met"]


def test_the_slowest_layers_are_those_beyond_their_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest ones take longest because they are large; what is profiled is what could be quicker."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_stages_speed
    import gpu_units

    log = gpu_units.Log(tmp_path, None, "e", "u")
    assert gpu_stages_speed.slowest(log)["part"] == "contiguous 256 x 56 x 56, graph"  # nothing is known yet
    log.write("copy", "ok", bytes_per_second=1e12)
    for side, spent, batch in ((112, 10.0, 64), (56, 8.0, 64), (28, 9.0, 8)):
        facts = {"batch": batch, "dtype": "float32", "layout": "contiguous", "times": 1, "done": {"local_bn": spent}}
        log.write(f"contiguous 64 x {side} x {side}, graph", "ok", moved=9_000_000_000 * side // 112, **facts)
    assert gpu_stages_speed.slowest(log)["part"] == "contiguous 64 x 56 x 56, graph"


def test_errors_are_in_the_report_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = {"stage": "b", "unit": "u", "part": "p", "state": "failed", "card": "a card", "error": "line 1\nline 2"}
    report(tmp_path, [failed, {**failed, "unit": "v"}, {**failed, "state": "ok"}], monkeypatch)
    text = (tmp_path / "report.md").read_text()
    assert "### (b) v, p\n\n```text\nline 1\nline 2\n```" in text
    assert "(b) u, p" not in text  # the newest record counts


def test_it_needs_torch_and_triton_alone() -> None:
    own = {path.stem for path in BENCHMARKS.glob("*.py")} | {"distnorm", "tests", "torch", "triton"}
    helpers = [BENCHMARKS / "measure.py", BENCHMARKS / "models.py"]
    helpers += [TOP / "tests" / "support" / name for name in ("cases.py", "reference.py")]
    for path in [*CHECK, *helpers]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= own | sys.stdlib_module_names, path
