"""make bench: intervals and verdicts are what they say, tables those of the stored figures, and all of it runs."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import goals
import growth
import hosts
import joint
import measure
import models
import moving
import peers
import suite
import suite_tables
from measure import Interval
from suite import Job

from tests.support.threads import run_threads

ROOT = Path(__file__).parent.parent


def record(*results: object, not_run: str | None = None) -> dict[str, object]:
    where = {"date": "2026-01-02", "machine": "2 cores", "torch": "2.13", "load": 0.1, "commands": ["torchrun it.py"]}
    return where | {"not_run": not_run, "results": results}


def steps(**ms: float) -> dict[str, object]:
    return {"width": 16, "ms": {name: [value] * 8 for name, value in ms.items()}}


def test_the_page_shows_the_stored_figures():
    page = suite.PAGE.read_text()
    assert suite_tables.page_of(page, suite.read(suite.RESULTS)) == page


def test_stored_figures_are_few():
    stored = [path for path in (suite.RESULTS, suite.PAGE.with_name(suite_tables.PICTURE)) if path.exists()]
    assert sum(path.stat().st_size for path in stored) <= 100_000


def test_every_part_has_a_table_and_a_place():
    assert list(suite.PARTS) and set(suite.PARTS) == set(suite_tables.TABLES)
    markers = re.findall(r"<!-- (\S+):begin -->", suite.PAGE.read_text())
    assert sorted(markers) == sorted([*suite.PARTS, "goals"])


def test_a_table_by_hand():
    seen = steps(stock=100.0, local_bn=100.0, sync_bn=130.0, gather=160.0, naive=200.0)
    page = suite_tables.page_of(suite.PAGE.read_text(), {"hosts-16": record(seen)})
    section = page.partition("<!-- hosts-16:begin -->\n")[2].partition("<!-- hosts-16:end -->")[0]
    assert section.startswith(
        "2026-01-02, 2 cores, torch 2.13, load average at the start 0.1:\n\n```text\ntorchrun it.py\n"
    )
    assert "\n| `sync_bn` | 130.0 | 1.30 [1.30, 1.30] | 30.0 | 0.50 [0.50, 0.50] | 0.30 [0.30, 0.30] |\n" in section
    assert "\n| gather | 160.0 | 1.60 [1.60, 1.60] | 60.0 |  |  |\n" in section
    listed = page.partition("<!-- goals:begin -->\n")[2].partition("<!-- goals:end -->")[0].splitlines()
    assert [line.split(" | ")[1:] for line in listed[2:]] == [
        ["0.25", "0.500", "missed |"],
        ["0.2", "0.300", "missed |"],
        ["0.32", "0.812", "missed |"],
    ]


def test_a_part_that_did_not_run_says_why():
    assert suite_tables.section("growth", record(not_run="needs root")) == ["Not run: needs root."]
    assert suite_tables.section("growth", None) == ["not measured yet"]
    some = suite_tables.section("hosts-16", record(steps(stock=1.0), not_run="needs root"))
    assert some[-2:] == ["", "Not run: needs root."]


@pytest.mark.parametrize(
    ("found", "word"),
    [((0.5, 0.4, 0.7), "met"), ((0.7, 0.5, 0.9), "not excluded"), ((0.7, 0.65, 0.9), "missed"), ((0.6,) * 3, "met")],
)
def test_a_goal_fails_only_where_the_interval_excludes_it(found, word):
    assert goals.Goal("", 0.6, Interval(*found)).verdict == word


def test_prediction_may_err_on_both_sides():
    cases = [{"fit_ms": fit, "measured_ms": 10.0} for fit in (7.0, 8.0, 12.0, 13.0)]
    verdicts = [goal.verdict for goal in goals.plan_goals(record(*cases))]
    assert verdicts == ["missed", "met", "met", "missed"]


def test_the_interval_of_exposed_times_holds_their_ratio():
    """Of 60 experiments with a true ratio of 1/2, the 95 % interval leaves out few, and is not trivially wide."""
    draw = random.Random(1)
    inside, widths = 0, []
    for _ in range(60):
        base = [draw.gauss(100, 5) for _ in range(20)]
        ours, theirs = ([value + draw.gauss(mean, 5) for value in base] for mean in (20, 40))
        found = measure.exposed_ratio(ours, theirs, base)
        inside += found.low <= 0.5 <= found.high
        widths.append(found.high - found.low)
    assert inside >= 52
    assert sorted(widths)[30] < 0.3


def test_rounds_stop_at_their_limit_and_change_their_order():
    order = []
    contenders = {name: lambda name=name: order.append(name) or 1.0 for name in "abc"}
    options = measure.parser_of("", runs=50, warmup=1).parse_args(["--limit", "0"])
    seen = measure.rounds(contenders, options)
    assert {len(values) for values in seen.values()} == {measure.LEAST}
    assert "".join(order[:9]) == "abcbcacab"


def test_a_resnet50_is_one():
    norms = [layer.num_features for layer in models.resnet50(64).modules() if isinstance(layer, nn.BatchNorm2d)]
    assert (len(norms), sum(norms)) == (53, 26_560)
    # torchvision's 25,557,032, less 990 classes and all but 3x3 of the first convolution's 7x7 filters
    parameters = sum(each.numel() for each in models.resnet50(64).parameters())
    assert parameters == 25_557_032 - 990 * 2049 - (49 - 9) * 3 * 64


@pytest.mark.parametrize(("name", "norms"), [("resnet18", 17), ("resnet50", 49)])
def test_joint_norms_compute_the_same(name, norms):
    separate, both = (models.MODELS[name](4).double() for _ in range(2))
    both = joint.joined(both).double()
    assert sum(isinstance(layer, nn.BatchNorm2d) for layer in both.modules()) == norms
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(both(x), separate(x))
    for model in (separate, both):
        model(x).square().sum().backward()
    torch.testing.assert_close(both[0].weight.grad, separate[0].weight.grad)


@pytest.mark.parametrize("kind", [peers.GatherNorm, peers.NaiveNorm])
def test_peers_are_batch_norm_of_the_joined_batch(kind):
    x, cotangent = torch.randn(2, 6, 5, 4, 4, generator=torch.Generator().manual_seed(0)).unbind()
    stock = nn.BatchNorm2d(5)
    joined = x.clone().requires_grad_()
    y = stock(joined)
    y.backward(cotangent)

    def on_rank(rank: int) -> list[torch.Tensor]:
        layer = peers.replace_norms(nn.Sequential(nn.BatchNorm2d(5)), kind)[0]
        mine = x.chunk(2)[rank].clone().requires_grad_()
        out = layer(mine)
        out.backward(cotangent.chunk(2)[rank])
        return [out, mine.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]

    one, other = (list(each) for each in run_threads(2, on_rank))
    for mine, theirs, expected in zip(one[:2], other[:2], (y, joined.grad), strict=True):
        torch.testing.assert_close(torch.cat((mine, theirs)), expected, rtol=1e-4, atol=1e-5)
    for mine, theirs, expected in zip(one[2:4], other[2:4], (stock.weight.grad, stock.bias.grad), strict=True):
        torch.testing.assert_close(mine + theirs, expected, rtol=1e-4, atol=1e-5)
    for mine, expected in zip(one[4:], (stock.running_mean, stock.running_var), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


def test_tables_of_moving_statistics_by_hand():
    times = {"projection": 1.0}
    for at, name in enumerate(moving.METHODS):
        for extra, form in enumerate(moving.FORMS):
            base = 100.0 * (1 + at) + 10 * extra
            times |= {moving.key(name, form, local=True): base, moving.key(name, form): base * 1.5}
    place = {"width": 16, "batch": 4}
    full = {"ranks": 2, **place, "ms": {name: [value] * 6 for name, value in times.items()}}
    few = {name: values for name, values in full["ms"].items() if "none" not in name and "forward" not in name}
    results = [full, {"ranks": 4, **place, "delay_ms": 0.2, "ms": few}]
    rows = moving.table(results)[2:]
    assert len(rows) == 6 + 2
    assert rows[1] == "| `mabn` | forward | 2 | 16 | 4 | 0 | 165.0 | 110.0 | 1.50 [1.50, 1.50] |"
    assert rows[-1] == "| `lazy_bn` | projected | 4 | 16 | 4 | 0.2 | 330.0 | 220.0 | 1.50 [1.50, 1.50] |"
    weights = moving.weights_table(results)[2:]
    assert weights[0].split(" | ")[4:8] == ["100.0", "110.0", "1.10 [1.10, 1.10]", "120.0"]
    assert len(weights) == 2 and weights[0].endswith(" | 1.00 | 0.8 % [0.8 %, 0.8 %] |")
    found = goals.goals({"moving": record(*results)})
    assert [goal.verdict for goal in found] == ["missed"] * 2 + ["met"] + ["missed"] * 2


def test_axes_run_through_the_base_point():
    names = [*growth.RECIPES, *growth.PEERS]
    results = [
        {"ranks": 2, "delay_ms": 0.2, "points": [{"layers": n, "channels": 64, "ms": {}} for n in (10, 40, 160)]},
        {"ranks": 2, "delay_ms": 0.2, "points": [{"layers": 40, "channels": 16, "ms": {}}]},
        {"ranks": 8, "delay_ms": 0.2, "points": [{"layers": 40, "channels": 64, "ms": {}}]},
        {"ranks": 2, "delay_ms": 0, "points": [{"layers": 40, "channels": 64, "ms": {}}]},
    ]
    for result in results:
        for point in result["points"]:
            point["ms"] = {name: [float(10 * at)] * 6 for at, name in enumerate(names)}
    points = growth.points_of(results)
    assert growth.base_of(points) == (40, 64, 2, 0.2)
    values = {axis: [getattr(point, axis) for point in growth.along(points, axis)] for axis in growth.AXES}
    assert values == {"layers": [10, 40, 160], "channels": [16, 64], "ranks": [2, 8], "delay_ms": [0, 0.2]}
    assert growth.table(results)[2] == "| **10** | 64 | 2 | 0.2 | 0.00 | -10.0 [-10.0, -10.0] | 10.0 | 40.0 | 50.0 |"


def test_commands_are_those_of_the_launchers():
    job = Job("step", 4, {"contenders": ["a", "b"]})
    tail = "benchmarks/step.py --contenders a b"
    starts = {"torchrun --standalone --nproc_per_node 4": job}
    starts["python benchmarks/hosts.py 4 0.2 python"] = replace(job, delay_ms=0.2)
    starts["launch/mpirun.sh 4"] = replace(job, mpi=True)
    assert [" ".join(each.command()) for each in starts.values()] == [f"{start} {tail}" for start in starts]


def test_a_job_that_fails_is_told():
    with pytest.raises(RuntimeError, match=r"layer.py --widths none ended with 2:\n(.|\n)*invalid int value: 'none'"):
        suite.outcome(Job("layer", 1, {"widths": "none"}))


def test_a_smoke_run_does_not_touch_measured_figures():
    with pytest.raises(subprocess.CalledProcessError) as error:
        subprocess.run(
            [sys.executable, "benchmarks/suite.py", "--smoke"], cwd=ROOT, check=True, capture_output=True, text=True
        )
    assert "give it a --page and --results of its own" in error.value.stderr


@pytest.mark.parametrize(("user", "missing"), [(1000, "root"), (0, "a C compiler (cc)")])
def test_a_machine_without_hosts_says_why(monkeypatch, tmp_path, user, missing):
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert hosts.why_not() == f"a network between hosts needs {missing}"


@pytest.fixture
def with_hosts():
    reason = hosts.why_not()
    if reason is not None:
        pytest.skip(reason)


ROUND_TRIP = """
import os, socket, sys, time
if os.environ["RANK"] == "0":
    with socket.create_server(("10.77.0.1", 5000)) as server:
        peer = server.accept()[0]
        while word := peer.recv(1):
            peer.sendall(word)
else:
    for _ in range(100):
        try:
            peer = socket.create_connection(("10.77.0.1", 5000))
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    seen = []
    for _ in range(10):
        started = time.perf_counter()
        peer.sendall(b"x")
        peer.recv(1)
        seen.append(time.perf_counter() - started)
    print(f"{min(seen):.4f}", file=open(sys.argv[1], "w"))
"""


@pytest.mark.usefixtures("with_hosts")
def test_packets_take_as_long_as_told(tmp_path):
    out = tmp_path / "seconds"
    assert hosts.run(2, 20, [sys.executable, "-c", ROUND_TRIP, str(out)]) == 0
    assert 0.04 <= float(out.read_text()) < 0.06


@pytest.mark.usefixtures("with_hosts")
def test_a_rank_that_fails_ends_the_others():
    assert hosts.run(2, 0, ["sh", "-c", 'test "$RANK" = 0 && exec sleep 100; exit 5']) == 5


@pytest.mark.slow
def test_the_whole_suite_runs(tmp_path):
    """Every part at tiny sizes on real ranks; those between hosts say why they did not run where that is so."""
    page, results = tmp_path / "page.md", tmp_path / "results.jsonl"
    page.write_text(suite.PAGE.read_text())
    options = ["--smoke", "--page", str(page), "--results", str(results)]
    subprocess.run([sys.executable, "benchmarks/suite.py", *options], cwd=ROOT, check=True, timeout=880)
    records = suite.read(results)
    assert list(records) == list(suite.PARTS)
    for part, found in records.items():
        expected = [job for job in suite.shrunk(suite.PARTS[part]) if job.delay_ms is None or not found["not_run"]]
        assert found["not_run"] == hosts.why_not() or not any(job.delay_ms is not None for job in suite.PARTS[part])
        assert len(found["results"]) == len(found["commands"]) == len(expected), part
        assert {result.get("ranks", 1) for result in found["results"]} <= {1, 2}
    assert records["joint"]["results"][0]["collectives"] == {"separate": 40, "joint": 34}
    assert "not measured yet" not in page.read_text()
