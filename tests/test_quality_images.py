"""The study on a user's own pictures: it reads them, trains on real ranks, goes on where it stopped, and reports."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import quality_images
import quality_images_report
import staleness
from pictures import load_pictures
from quality_images import Cell, contender_of

import distnorm
from distnorm import Recipe
from distnorm.methods import RMS
from distnorm.policies import AllReduce
from tests.support.threads import run_threads

ROOT = Path(__file__).parent.parent
JOB = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def made_up(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise, brighter for class 1."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 2, count)
    images = generator.integers(0, 128, (count, 8, 8, 3)) + 127 * labels[:, None, None, None]
    return images.astype(np.uint8), labels.astype(np.uint8)


def write_arrays(path: Path, **changed: np.ndarray) -> Path:
    arrays = dict(zip(("train_images", "train_labels"), made_up(26, 0), strict=True))
    arrays |= dict(zip(("test_images", "test_labels"), made_up(10, 1), strict=True))
    np.savez(path, **(arrays | changed))
    return path


def job(*command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*JOB, *command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran


def study(*options: str) -> str:
    return job("benchmarks/quality_images.py", *options).stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two epochs of three contenders on two ranks; the second call has two of the four cells of the first and more."""
    folder = tmp_path_factory.mktemp("images")
    data, output = write_arrays(folder / "noise.npz"), folder / "runs.jsonl"
    fixed = ["--data", str(data), "--output", str(output), "--epochs", "2"]
    mabn = 'mabn(window=2, warmup=1,weights = "none")'
    said = study(*fixed, "--contenders", "stock", "sync_bn", "--seeds", "3", "--rates", "0.05", "0.1")
    assert "4 of 4 runs are to be done" in said
    said = study(*fixed, "--contenders", "sync_bn", mabn, "--seeds", "3", "--rates", "0.1")
    assert "1 of 2 runs are to be done" in said
    return output


@pytest.mark.slow
def test_every_run_has_one_line_that_says_what_ran(results):
    entries = [json.loads(line) for line in results.read_text().splitlines()]
    mabn = "mabn(window=2, warmup=1, weights='none')"
    ran = [("stock", 0.05), ("sync_bn", 0.05), ("stock", 0.1), ("sync_bn", 0.1), (mabn, 0.1)]
    assert [(entry["contender"], entry["rate"]) for entry in entries] == ran
    assert [entry["collectives_per_step"] for entry in entries] == [0, 12, 0, 12, 1]
    for entry in entries:
        assert entry["data"].startswith("noise-")
        assert (entry["seed"], entry["batch"], entry["ranks"], entry["epochs"]) == (3, 2, 2, 2)
        assert entry["steps_per_epoch"] == 26 // 4
        assert len(entry["accuracies"]) == len(entry["losses"]) == 2
        assert all(0 <= each <= 100 for each in entry["accuracies"])
        assert all(math.isfinite(each) for each in entry["losses"])
        assert entry["seconds"] > 0 and entry["torch"] == torch.__version__ and "cores" in entry["host"]
    assert len({tuple(entry["losses"]) for entry in entries}) == len(entries)


@pytest.mark.slow
def test_the_report_has_a_table_per_setting(results):
    script = [sys.executable, "benchmarks/quality_images_report.py", str(results), "--reference", "stock"]
    ran = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True)
    headings = [line for line in ran.stdout.splitlines() if line.startswith("noise-")]
    assert [heading.rpartition(", ")[2] for heading in headings] == ["learning rate 0.05", "learning rate 0.1"]
    rows = [line.split(" | ")[0] for line in ran.stdout.splitlines() if line.startswith("| `")]
    assert rows == ["| `stock`", "| `sync_bn`"] * 2 + ["| `mabn(window=2, warmup=1, weights='none')`"]


def test_differences_are_paired_by_seed():
    one, other = [51.5, 50.0, 53.25], [50.0, 51.0, 49.5]
    setting = {"data": "noise", "epochs": 1, "batch": 2, "ranks": 2, "rate": 0.1}
    cost = {"collectives_per_step": 1.0, "seconds": 2.0}
    runs = {
        Cell(contender=name, seed=seed, **setting): cost | {"accuracies": [0.0, value]}
        for name, values in (("mabn", [*one, 99.0]), ("sync_bn", other))
        for seed, value in enumerate(values)
    }
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    mean, half = (expected.low + expected.high) / 2, (expected.high - expected.low) / 2
    row, reference = quality_images_report.table(runs, "sync_bn")[2:]
    assert row.split(" | ")[1:4] == ["4", "63.4 ± 37.8", f"+{mean:.1f} ± {half:.1f}"]
    assert reference.split(" | ")[3] == ""


def test_equal_recipes_have_one_name():
    assert contender_of('sync_bn( weights="centralized")') == "sync_bn(weights='centralized')"
    assert contender_of("stock") == "stock"
    with pytest.raises(argparse.ArgumentTypeError, match="did you mean 'mabn'"):
        contender_of("mabm")


def test_images_are_standardized_by_those_of_training(tmp_path):
    pictures = load_pictures(write_arrays(tmp_path / "noise.npz"), 32, 0.2)
    raw = torch.from_numpy(made_up(26, 0)[0]).double().permute(0, 3, 1, 2)
    other = torch.from_numpy(made_up(10, 1)[0]).double().permute(0, 3, 1, 2)
    mean, std = raw.mean((0, 2, 3), keepdim=True), raw.std((0, 2, 3), keepdim=True)
    torch.testing.assert_close(pictures.train.images.double(), (raw - mean) / std, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pictures.validation.images.double(), (other - mean) / std, rtol=1e-5, atol=1e-5)
    assert pictures.validation.labels.tolist() == made_up(10, 1)[1].tolist()


def test_other_data_have_another_name(tmp_path):
    name = load_pictures(write_arrays(tmp_path / "noise.npz"), 32, 0.2).name
    labels = 1 - made_up(10, 1)[1]
    assert load_pictures(write_arrays(tmp_path / "noise.npz", test_labels=labels), 32, 0.2).name != name
    assert load_pictures(write_arrays(tmp_path / "noise.npz"), 8, 0.5).name == name


def test_a_folder_of_classes_is_split_the_same_way_each_time(tmp_path):
    for label, name in enumerate(("bright", "dark")):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for number in range(10):
            shade = 200 - 100 * label + number
            suffix = ("png", "JPG")[number % 2]
            image = Image.new("L", (12, 9), shade).convert("L" if number % 3 else "RGB")
            image.save(tmp_path / name / f"deeper/{number}.{suffix}")
        (tmp_path / name / "notes.txt").write_text("no picture")
    first, second = (load_pictures(tmp_path, 8, 0.2) for _ in range(2))
    assert first.train.images.shape == (16, 3, 8, 8) and first.validation.images.shape == (4, 3, 8, 8)
    assert sorted(first.validation.labels.tolist()) == [0, 0, 1, 1]
    bright = first.train.images.mean((1, 2, 3)) > 0
    assert bright.tolist() == [label == 0 for label in first.train.labels.tolist()]
    shades = torch.cat((first.train.images, first.validation.images)).mean((1, 2, 3))
    assert len({f"{shade:.2f}" for shade in shades.tolist()}) == 20  # nothing twice
    assert first.name == second.name and torch.equal(first.validation.images, second.validation.images)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_images": np.zeros((4, 8, 8, 3), np.float32)}, "train_images is float32 of shape .* need uint8"),
        ({"test_images": np.zeros((4, 8, 8), np.uint8)}, r"test_images is uint8 of shape \(4, 8, 8\)"),
    ],
)
def test_other_arrays_are_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        load_pictures(write_arrays(tmp_path / "noise.npz", **changed), 32, 0.2)


def test_missing_arrays_and_empty_folders_are_named(tmp_path):
    np.savez(tmp_path / "part.npz", train_images=np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match="holds train_images; it lacks train_labels, test_images, test_labels"):
        load_pictures(tmp_path / "part.npz", 32, 0.2)
    with pytest.raises(ValueError, match="has 0 folders, with 0 pictures to train on"):
        load_pictures(tmp_path, 32, 0.2)


def test_equal_seeds_give_equal_weights():
    one, same, other = (quality_images.build_network(seed, 3, 5) for seed in (0, 0, 1))
    for first, second in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(one[0].weight, other[0].weight)
    norms = [layer.num_features for layer in one if isinstance(layer, nn.BatchNorm2d)]
    assert norms == [16, 16, 32, 32, 64, 64] and one(torch.zeros(2, 3, 32, 32)).shape == (2, 5)


@pytest.mark.slow
def test_staleness_is_told_layer_by_layer(tmp_path):
    data = write_arrays(tmp_path / "noise.npz")
    options = ["--data", str(data), "--contender", "mabn(window=2, warmup=1)", "--steps", "8", "--every", "2"]
    rows = [line.strip("| ").split(" | ") for line in job("benchmarks/staleness.py", *options).stdout.splitlines()]
    assert [row[0] for row in rows[2:]] == ["1", "2", "3", "4", "5", "6"]
    for statistics, cosine, size, radial, *_ in [[float(each) for each in row[1:]] for row in rows[2:]]:
        assert statistics > 0 and -1 <= cosine < 1 and size > 0 and 0 < radial < 1


def test_gradients_of_exact_statistics_are_those_of_their_twin():
    exact = staleness.exact(distnorm.recipes.parse("mabn(weights='none')"))
    assert exact == Recipe(method=RMS(), policy=AllReduce(), momentum=0.02)
    assert staleness.exact(distnorm.recipes.parse("sync_bn")) == distnorm.recipes.parse("sync_bn")
    assert staleness.warmup_of(distnorm.recipes.parse("mabn(window=4, warmup=10)")) == 9


def test_what_is_compared_are_averages_over_ranks():
    networks = [[quality_images.build_network(0, 3, 2) for _ in range(2)] for _ in range(2)]

    def on_rank(rank):
        network, twin = networks[rank]
        both = distnorm.convert(network, "mabn(window=2, warmup=1)"), distnorm.convert(twin, "sync_bn")
        for each in both:
            each(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(rank))).sum().backward()
        for ours, theirs in zip(*map(staleness.convolutions, both), strict=True):
            ours.weight.grad = ours.weight.detach() * 2
            theirs.weight.grad = ours.weight.detach() * (rank + 0.5)  # on average the weight itself
        found = defaultdict(list)
        staleness.compare(*both, found)
        return found

    for found in run_threads(2, on_rank):
        for layer in range(6):
            assert found["cosine", layer] == pytest.approx([1.0])
            assert found["size", layer] == pytest.approx([2.0], rel=1e-5)
            assert found["radial", layer] == pytest.approx([1.0])
