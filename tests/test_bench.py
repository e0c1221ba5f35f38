"""distnorm bench: two real ranks that it starts by itself, and its parts."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from distnorm.cli import main as cli
from distnorm.diagnostics.bench import default_recipes, read_points, read_step
from distnorm.diagnostics.bench_links import Link
from distnorm.diagnostics.bench_rounds import LEAST, WARMUP, take_turns
from distnorm.diagnostics.bench_statistics import interval
from distnorm.diagnostics.bench_steps import check_forward, forward, loss_of, move
from distnorm.diagnostics.plan_cost import Point, Reach
from tests.support.threads import run_threads

TOP = Path(__file__).parents[1]
RECIPES = ("local_bn", "sync_bn", "periodic_bn(every=2)", "mabn", "lazy_bn")
CHANNELS = (8, 4)
MODEL = """
import os
from torch import nn

def small():
    with open(f"ran-{os.environ.get('RANK', 'alone')}", "w"):
        pass
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4)
    )

def plain():
    return nn.Linear(3, 4)
"""


@dataclass
class Job:
    ended: subprocess.CompletedProcess[str]
    folder: Path

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "bench.json").read_text())
        return found


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """``distnorm bench`` without a launcher."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "benched.py").write_text(MODEL)
    command = [sys.executable, "-m", "distnorm", "bench", "--model", "benched:small", "--shape", "3,8,8"]
    command += ["--batch", "2", "--seconds", "3", "--json", "bench.json", "--picture", "bench.png"]
    known = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "MASTER_PORT")}
    environment = {**known, "PYTHONPATH": str(TOP), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, "--recipes", *RECIPES], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    yield Job(ended, folder)


def test_it_starts_two_ranks(job: Job) -> None:
    assert "no launcher: starting 2 ranks on the CPU of this machine" in job.ended.stderr
    assert sorted(path.name for path in job.folder.glob("ran-*")) == ["ran-0", "ran-1", "ran-alone"]  # and a check
    assert (job.record["ranks"], job.record["nodes"], job.record["local"], job.record["backend"]) == (2, 1, 2, "gloo")


def test_collectives_and_bytes_per_step_after_the_warmup(job: Job) -> None:
    exact = 8 * sum(4 * c + 1 for c in CHANNELS)
    moving = {kinds: 8 * (2 * kinds * sum(CHANNELS) + (kinds - 1) * 2 + 2 * 2 + 1) for kinds in (1, 2)}
    found = {row["recipe"]: (row["collectives"], row["bytes"]) for row in job.record["recipes"]}
    assert found == {
        "local_bn": (0, 0),
        "sync_bn": (4, exact),
        "periodic_bn(every=2)": (2, exact / 2),
        "mabn": (1, moving[1]),
        "lazy_bn": (1, moving[2]),
    }


def test_steps_and_exposed_communication(job: Job) -> None:
    rows = {row["recipe"]: row for row in job.record["recipes"]}
    assert tuple(rows) == RECIPES
    for row in rows.values():
        assert row["rounds"] >= LEAST
        for name in ("step_seconds", "compute_seconds", "exposed_seconds"):
            assert row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert 0 < row["compute_seconds"]["median"] < 3
    assert rows["local_bn"]["exposed_seconds"] == {"median": 0, "low": 0, "high": 0}  # it is compared with itself
    assert rows["sync_bn"]["compute_seconds"] == rows["local_bn"]["step_seconds"]
    assert rows["mabn"]["compute_seconds"] != rows["local_bn"]["step_seconds"]  # another method and other weights
    assert rows["sync_bn"]["exposed_seconds"]["median"] > 0
    assert read_step(job.record) == rows["local_bn"]["step_seconds"]["median"]


def test_latency_and_bandwidth(job: Job) -> None:
    links = job.record["links"]
    assert [(link["where"], link["algorithm"], link["ranks"]) for link in links] == [
        ("all ranks", "exchange", 2),
        ("all ranks", "gloo_ring", 2),
    ]
    points = read_points(job.record)
    exchanged = [1 << 10, 1 << 13, 1 << 16, 1 << 17]  # more goes by the ring alone
    assert [point.nbytes for point in points] == [*exchanged, *exchanged, 1 << 18]
    assert all(0 < point.seconds < 1 for point in points)
    assert all(link["latency_seconds"] >= 0 for link in links)


def test_the_table_has_a_unit_in_every_column(job: Job) -> None:
    title, network, steps = job.ended.stdout.strip().split("\n\n")
    assert title.startswith("benched:small, a batch of 2 x 3 x 8 x 8 per rank; 2 ranks on 1 node, gloo, ")
    assert network.splitlines()[0].split() == ["sum", "over", "ranks", "by", "latency", "bandwidth", "of", "1.0", "kB"]
    header, _, *rows, note = steps.splitlines()
    columns = ["recipe", "step (ms)", "compute (ms)", "exposed (ms)", "of the step", "collectives/step", "bytes/step"]
    assert header.split("  ")[0] == "recipe" and [part.strip() for part in header.split("  ") if part] == columns
    assert [row.split()[0] for row in rows] == list(RECIPES)
    assert len({len(line) for line in steps.splitlines()[:-1]}) == 1
    assert "exposed: a step minus the same step without sharing, with 95 % interval" in note


def test_progress_where_nobody_looks_is_a_line_per_tenth(job: Job) -> None:
    told = [line for line in job.ended.stderr.splitlines() if line.startswith("distnorm bench: ")]
    assert told[0].startswith("distnorm bench: network, ") and told[-1] == "distnorm bench: steps, 100% of 3 s"
    assert len(told) <= 11


def test_the_picture(job: Job) -> None:
    assert (job.folder / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_plan_takes_what_was_measured(
    job: Job, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(job.folder)
    monkeypatch.syspath_prepend(str(job.folder))
    asked = ["plan", "--model", "benched:small", "--measured", "bench.json", "--recipes", "sync_bn", "--local", "2"]
    assert cli.main([*asked, "--world", "2", "--json", "plan.json"]) == 0
    assert "gloo, up to 2 ranks per node" in capsys.readouterr().out
    record = json.loads(Path("plan.json").read_text())
    assert record["step_seconds"] == read_step(job.record)


def test_plan_believes_the_points_of_the_file(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file with exchanges of 0.2 ms and gloo's ring of 1 ms: four sums of at most 136 bytes take 0.8 ms."""
    monkeypatch.chdir(job.folder)
    monkeypatch.syspath_prepend(str(job.folder))
    record = json.loads(Path("bench.json").read_text())
    for link in record["links"]:
        for point in link["points"]:
            point["seconds"] = (2e-4 if link["algorithm"] == "exchange" else 1e-3) + point["bytes"] * 1e-9
    Path("made-up.json").write_text(json.dumps(record))
    asked = ["plan", "--model", "benched:small", "--measured", "made-up.json", "--recipes", "sync_bn", "--local", "2"]
    assert cli.main([*asked, "--world", "2", "--json", "plan.json"]) == 0
    found = json.loads(Path("plan.json").read_text())["predictions"][0]["blocking_seconds"]
    assert found == pytest.approx(4 * 2e-4, rel=2e-3)


# --- parts ----------------------------------------------------------------------------------------------------------


def test_contenders_take_turns_equally_often_on_all_ranks_and_end_together() -> None:
    def run(rank: int) -> tuple[dict[str, list[float]], list[str], list[float]]:
        order: list[str] = []
        parts: list[float] = []

        def contender(name: str) -> float:
            order.append(name)
            return float(len(order))

        contenders = {name: lambda name=name: contender(name) for name in "abc"}
        # rank 1's own budget would let it go on for an hour
        seen = take_turns(contenders, 1e-9 if rank == 0 else 3600, torch.device("cpu"), parts.append)
        return seen, order, parts

    (seen, order, parts), (_, other, _) = run_threads(2, run)
    assert order == other == [*"abcbcacab"] * 2 + [*"abc"]
    assert {name: len(values) for name, values in seen.items()} == dict.fromkeys("abc", LEAST)
    assert len(order) == 3 * (WARMUP + LEAST)
    assert seen["c"][0] == 3 * WARMUP + 1  # the third round begins with c, and the first two do not count
    assert parts[-1] == 1


@pytest.mark.parametrize("count", [6, 7, 20, 41, 100])
def test_an_interval_holds_the_median_with_95_percent_and_could_not_be_tighter(count: int) -> None:
    found = interval([float(value) for value in range(count)])

    def coverage(low: int) -> Fraction:
        """That the median of a distribution lies between the values of ranks ``low`` and its mirror, from 0."""
        return sum((Fraction(math.comb(count, k), 2**count) for k in range(low + 1, count - low)), Fraction(0))

    low = int(found.low)
    assert (found.low, found.high, found.median) == (low, count - 1 - low, (count - 1) / 2)
    assert coverage(low) >= Fraction(95, 100) > coverage(low + 1)


def test_an_interval_of_few_values_is_their_range() -> None:
    assert interval([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)


def test_a_line_through_points() -> None:
    reach = Reach(2, 1, 2)
    points = tuple(Point("ring", reach, n, 1e-3 + n / 2e9) for n in (1000, 10**5, 10**7))
    assert Link(where="all ranks", algorithm="ring", reach=reach, points=points).line() == pytest.approx((1e-3, 2e9))
    flat = tuple(Point("ring", reach, n, 1e-3 - n * 1e-12) for n in (1000, 10**5, 10**7))
    link = Link(where="all ranks", algorithm="ring", reach=reach, points=flat)
    assert link.line()[1] == math.inf and link.record()["bytes_per_second"] is None


def test_losses_of_what_models_return() -> None:
    x, y = torch.tensor([1.0, 3.0]), torch.tensor([2.0])
    assert loss_of(x).item() == 5
    assert loss_of({"out": x, "aux": [y, (torch.tensor([1]),)]}).item() == 9
    with pytest.raises(ValueError, match="the model returned tuple without a floating-point tensor"):
        loss_of((torch.tensor([1]), None))


def test_a_batch_that_the_model_does_not_take() -> None:
    cpu = torch.device("cpu")
    check_forward(lambda: torch.nn.Linear(3, 2), torch.ones(4, 3), "a batch of 4 x 3", cpu)
    with pytest.raises(ValueError, match="the model does not accept a batch of 4 x 5: mat1 and mat2 shapes"):
        check_forward(lambda: torch.nn.Linear(3, 2), torch.ones(4, 5), "a batch of 4 x 5", cpu)
    with pytest.raises(ValueError, match=r"not accept data:load: .*unexpected keyword argument 'image'"):
        check_forward(lambda: torch.nn.Linear(3, 2), {"image": torch.ones(4, 3)}, "data:load", cpu)


def test_batches_are_the_arguments_of_a_forward() -> None:
    model = torch.nn.Bilinear(2, 2, 1)
    x, y = torch.ones(1, 2), torch.zeros(1, 2)
    assert forward(model, (x, y)) == forward(model, {"input1": x, "input2": y}) == model(x, y)
    assert forward(torch.nn.Identity(), x) is x


def test_batches_keep_their_form() -> None:
    moved = move({"image": torch.ones(2), "sizes": (torch.ones(1), 3)}, torch.device("meta"))
    assert moved["image"].is_meta and moved["sizes"][0].is_meta and moved["sizes"][1] == 3


def test_recipes_of_two_levels_need_two_levels() -> None:
    assert default_recipes(1, 8) == default_recipes(8, 1) == ["local_bn", "sync_bn", "mabn", "lazy_bn"]
    assert "hierarchical_bn" in default_recipes(2, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model benched", "--model 'benched': need module:function"),
        ("--model benched:plain", "Linear has no batch norm layer, so there is nothing to synchronize"),
        ("--recipes sink_bn", "unknown recipe 'sink_bn' (did you mean 'sync_bn'?)"),
        ("--seconds 0", "--seconds 0: need more than 0."),
        ("--shape 3,x", "--shape '3,x': need whole numbers above 0, separated by commas, such as 3,224,224."),
        ("--json there/is/none.json", "there/is/none.json: there is no directory there/is."),
        ("--batch 0", "--batch 0: need at least 1."),
        ("--input benched:small --batch 3", "--input, and --shape with --batch, both define the input"),
        ("--input benched:data", "--input 'benched:data': module 'benched' has no function 'data'"),
    ],
)
def test_errors_come_before_any_rank_starts(
    job: Job,
    arguments: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(job.folder)
    monkeypatch.syspath_prepend(str(job.folder))
    assert cli.main(["bench", "--model", "benched:small", *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith("distnorm bench: error: ") and message in err
