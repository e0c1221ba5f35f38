"""The quality study: its grid is whole, every contender trains on real ranks, and its intervals are what they say."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from scipy import stats
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import quality
import quality_report
import study
from digits_task import DEMO, build_network, distort, scanner_of, seeded
from quality import CONTENDERS, Cell

ROOT = Path(__file__).parent.parent

JOB = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "benchmarks/quality.py"]


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    """Three steps of every contender on two ranks, and of one more, where the run before it has its line already."""
    output = tmp_path_factory.mktemp("quality") / "results.jsonl"
    recorded = {"difficulty": 1, "batch": 2, "contender": "stock", "seed": 0, "rate": quality.RATE, "accuracy": 12.34}
    output.write_text(json.dumps(recorded) + "\n")
    options = ["--study", "comparison", "--steps", "3", "--limit", "12", "--output", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*JOB, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "1319 of 1320 runs are to be done" in ran.stderr
    first, *others = [json.loads(line) for line in output.read_text().splitlines()]
    assert first == recorded
    return others


@pytest.mark.slow
def test_a_recorded_run_is_not_run_again(entries):
    assert (entries[11]["difficulty"], entries[11]["contender"]) == (1, "group_norm")
    assert len(entries) == 12


@pytest.mark.slow
def test_every_contender_trains_on_two_ranks(entries):
    entries = entries[:11]
    assert [entry["contender"] for entry in entries] == list(CONTENDERS)
    assert {(entry["difficulty"], entry["batch"], entry["seed"]) for entry in entries} == {(2, 2, 0)}
    assert {entry["steps"] for entry in entries} == {3}
    for entry in entries:
        assert math.isfinite(entry["final_loss"])
        assert 0 <= entry["accuracy"] <= 100


@pytest.mark.slow
def test_contenders_normalize_differently(entries):
    losses = {entry["contender"]: entry["final_loss"] for entry in entries[:11]}
    assert losses["stock"] == losses["local_bn"]  # they differ only in the running statistics that evaluate
    assert losses["sync_bn"] == losses["lazy_bn(window=1, weights='none')"]  # whose first 16 steps are exact
    assert losses["sync_bn(weights='centralized')"] == losses["lazy_bn(window=1)"]
    assert losses["mabn"] == losses["hierarchical_mabn"]  # exact for 99 steps
    assert len(set(losses.values())) == len(losses) - 4


def test_the_grid_is_whole():
    cells = quality.comparison()
    assert len(set(cells)) == len(cells) == 11 * 3 * 4 * 10
    assert Counter(cell.seed for cell in cells) == dict.fromkeys(range(10), 11 * 3 * 4)
    assert Counter((cell.difficulty, cell.batch) for cell in cells) == {
        (level, batch): 110 for level in (1, 2, 3) for batch in (1, 2, 4, 8)
    }
    known = {"stock", "group_norm", "local_bn", "sync_bn", "mabn", "lazy_bn(window=1)", "hierarchical_mabn"}
    assert set(CONTENDERS) >= known
    assert {cell.seed for cell in cells[: len(cells) // 10]} == {0}  # whole seeds, one after the other


def test_nothing_was_chosen_on_seeds_of_the_comparison():
    compared = {cell.seed for cell in quality.comparison()}
    assert not compared & {cell.seed for cell in quality.rates() + quality.tuning()}
    assert quality.RATE in quality.RATES


def test_alike_scanners_change_nothing_and_levels_grow():
    images = torch.randn(3, 1, 8, 8)
    for rank in range(2):
        torch.testing.assert_close(scanner_of(rank, 2, quality.DIFFICULTIES[1]).scan(images), images)
    assert quality.DIFFICULTIES[2] == DEMO
    first, second, third = (quality.DIFFICULTIES[level] for level in (1, 2, 3))
    assert first.gain_range < second.gain_range < third.gain_range
    assert first.offset_range < second.offset_range < third.offset_range
    assert first.noise == second.noise < third.noise


def test_noise_of_a_difficulty_is_the_noise_in_its_images():
    images = torch.zeros(400, 1, 8, 8)
    spread = [float(distort(images, seeded(0), DEMO._replace(noise=noise)).std()) for noise in (0.0, 0.1, 0.4)]
    assert spread == pytest.approx([0, 0.1, 0.4], rel=0.02)


def test_every_layer_normalizes_more_than_one_value_at_batch_1():
    seen = []
    network = build_network(0, quality.DEPTH, quality.GRID)
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0][:, 0].numel()))
    network(torch.zeros(1, 1, 8, 8))
    assert sorted(seen) == [16, 16, 64, 64, 64]


def test_group_norm_replaces_every_batch_norm():
    network = quality.normalized(build_network(0, quality.DEPTH, quality.GRID), "group_norm")
    kinds = Counter(type(layer) for layer in network.modules())
    assert kinds[nn.BatchNorm2d] == 0
    assert kinds[nn.GroupNorm] == 5


def test_accuracy_counts_correct_answers():
    answers = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        answers[1].weight.zero_()
        answers[1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    assert quality.accuracy_of(answers, torch.zeros(4, 1, 8, 8), torch.tensor([1, 0, 1, 1])) == 75


ONE, OTHER = [91.5, 90.0, 93.25, 88.0, 95.5], [90.0, 91.0, 91.25, 85.5, 92.0]


def test_intervals_are_those_of_the_paired_t_test():
    accuracies = {Cell(2, 2, contender, seed): OTHER[seed] for contender in CONTENDERS for seed in range(5)}
    accuracies |= {Cell(2, 2, "mabn", seed): value for seed, value in enumerate(ONE)}
    found = quality_report.difference(accuracies, 2, 2, "mabn", "sync_bn")
    expected = stats.ttest_rel(ONE, OTHER).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(expected.low)
    assert found.mean + found.half == pytest.approx(expected.high)


def test_interval_of_a_mean_by_the_table_of_student():
    found = quality_report.interval([1.0, 2.0, 3.0, 4.0, 5.0])  # spread sqrt(2.5); t(0.975, 4) = 2.776445
    assert found.mean == 3
    assert found.half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)


def test_a_seed_counts_once_every_contender_has_run_it():
    accuracies = {Cell(1, 4, contender, seed): 50.0 for contender in CONTENDERS for seed in range(3)}
    del accuracies[Cell(1, 4, "stock", 1)]
    assert quality_report.complete(accuracies, 1, 4) == [0, 2]
    assert quality_report.headings(accuracies, 1)[2] == "batch 4 (2 seeds)"


@pytest.mark.parametrize(
    ("shift", "spread", "word"),
    [(0.0, 0.1, "yes"), (-2.0, 0.1, "no"), (-0.5, 3.0, "open")],
)
def test_the_goal_is_judged_by_the_interval(shift, spread, word):
    accuracies = {Cell(2, 2, contender, seed): 90.0 for contender in CONTENDERS for seed in range(10)}
    for seed in range(10):
        accuracies[Cell(2, 2, "mabn", seed)] += shift + spread * (-1) ** seed
    row = next(row for row in quality_report.goal_rows(accuracies) if row.startswith("| 2 |"))
    assert row.split(" | ")[1].endswith(f": {word}")


def test_the_page_shows_the_recorded_runs():
    recorded = {cell: entry["accuracy"] for cell, entry in study.read_results(quality.RESULTS, Cell)}
    page = quality_report.PAGE.read_text()
    assert quality_report.page_of(page, recorded) == page
