"""Checkpoint files: one bad file fails all ranks at once, by name; a save replaces the old file or leaves it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import distnorm
from distnorm.integrations import checkpoint
from tests.support.pool import Pool
from tests.support.threads import run_threads, run_threads_all

SCRIPT = Path(__file__).parents[1] / "integrations/scripts/killed_saves.py"


def converted(recipe: str = "mabn", features: int = 4, **options: Any) -> nn.Module:
    return distnorm.convert(nn.Sequential(nn.BatchNorm1d(features)), recipe, **options)


def step_of(model: nn.Module) -> int:
    return int(distnorm.state_dict(model)[0]["step"])


def trained(rank: int, steps: int = 2, **options: Any) -> nn.Module:
    model = converted(**options)
    distnorm.attach(model, manual=True)
    for _ in range(steps):
        model(torch.randn(4, 4)).sum().backward()
        distnorm.end_step(model)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run_threads(3, lambda rank: checkpoint.save([trained(rank)], folder))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


class Evil:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (f"{os.environ['TRAP']}",)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def rewrite(edit: Callable[[Any], Any]) -> Callable[[Path], None]:
    return lambda path: torch.save(edit(torch.load(path, weights_only=True)), path)


def rename_layer(state: Any) -> Any:
    state["models"][0][0]["layers"] = [["other", 4]]
    return state


BAD: dict[str, Callable[[Path], Any]] = {
    "truncated": truncate,
    "empty": lambda path: path.write_bytes(b""),
    "garbage": lambda path: path.write_bytes(os.urandom(5000)),
    "text": lambda path: path.write_text("a checkpoint"),
    "another dict": lambda path: torch.save({"epoch": 3}, path),
    "a list": lambda path: torch.save([1, 2], path),
    "a tensor": lambda path: torch.save(torch.zeros(3), path),
    "a dict of another shape": lambda path: torch.save({"world_size": 3, "models": {}}, path),
    "no states": rewrite(lambda state: {**state, "models": [[None]]}),
    "more models": rewrite(lambda state: {**state, "models": state["models"] * 2}),
    "another layer": rewrite(rename_layer),
    "a plain pickle": lambda path: path.write_bytes(pickle.dumps({"world_size": 3, "models": []})),
    "a pickle that runs": lambda path: path.write_bytes(pickle.dumps(Evil())),
    "a file that runs": lambda path: torch.save(Evil(), path),
    "unreadable": lambda path: (path.unlink(), path.symlink_to("/proc/self/mem")),
}


@pytest.mark.parametrize("damage", BAD.values(), ids=BAD)
@pytest.mark.parametrize("bad", [0, 1])
def test_a_bad_file_fails_all_ranks_at_once(folder, damage, bad, monkeypatch, tmp_path):
    monkeypatch.setenv("TRAP", str(tmp_path / "trap"))
    damage(checkpoint.file_of(folder, bad))
    models = [converted() for _ in range(3)]

    def run(rank: int) -> None:
        checkpoint.load([models[rank]], folder)

    start = time.monotonic()
    outcomes = run_threads_all(3, run, timeout=120.0)
    assert time.monotonic() - start < 60
    for outcome in outcomes:
        assert type(outcome) is ValueError, outcome
        for word in ("1 of 3 ranks", f"rank {bad}: ", f"distnorm_state_{bad}.pt", "no rank has loaded any"):
            assert word in str(outcome)
        assert len(str(outcome)) < 1500
    assert not (tmp_path / "trap").exists()
    assert [step_of(model) for model in models] == [0, 0, 0]


def test_several_bad_files_are_all_named(folder):
    for rank in (0, 2):
        truncate(checkpoint.file_of(folder, rank))
    for outcome in run_threads_all(3, lambda rank: checkpoint.load([converted()], folder), timeout=60.0):
        assert "2 of 3 ranks" in str(outcome) and "rank 0: " in str(outcome) and "rank 2: " in str(outcome)


def test_another_recipe_on_one_rank_fails_all(folder):
    def run(rank: int) -> None:
        checkpoint.load([converted("lazy_bn" if rank == 1 else "mabn")], folder)

    for outcome in run_threads_all(3, run, timeout=60.0):
        assert "rank 1: " in str(outcome) and "the state given is of recipe" in str(outcome)


def test_a_bad_file_of_rank_0_where_others_need_it(folder):
    """At another world size all ranks read rank 0's."""
    truncate(checkpoint.file_of(folder, 0))
    for outcome in run_threads_all(2, lambda rank: checkpoint.load([converted()], folder), timeout=60.0):
        assert "2 of 2 ranks" in str(outcome) and str(outcome).count("distnorm_state_0.pt") == 2


def test_one_process_names_its_file(folder):
    truncate(checkpoint.file_of(folder, 0))
    with pytest.raises(ValueError, match=r"1 of 1 ranks .* rank 0: .*distnorm_state_0.pt"):
        checkpoint.load([converted()], folder)


@pytest.mark.parametrize("missing", [0, 1])
def test_a_missing_file_starts_all_ranks_cold_or_warm(folder, missing):
    checkpoint.file_of(folder, missing).unlink()

    def run(rank: int) -> int:
        model = converted()
        checkpoint.load([model], folder)
        return step_of(model)

    assert run_threads(3, run) == [0 if missing == 0 else 2] * 3


def load_in_a_job(rank: int, folder: str) -> float:
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"rank 1: .*distnorm_state_1.pt"):
        checkpoint.load([converted()], folder)
    return time.monotonic() - start


def test_real_ranks_hear_of_it_long_before_the_timeout(pool: Pool, tmp_path):
    run_threads(2, lambda rank: checkpoint.save([trained(rank)], tmp_path))
    truncate(checkpoint.file_of(tmp_path, 1))
    assert max(pool.run(2, load_in_a_job, str(tmp_path), group_timeout=100.0)) < 50


# --- saving --------------------------------------------------------------------------------------


def test_a_process_that_is_killed_while_it_saves(tmp_path):
    command = [sys.executable, str(SCRIPT), str(tmp_path)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True).stdout
    (line,) = [each for each in output.splitlines() if each.startswith("RESULT ")]
    found = json.loads(line.removeprefix("RESULT "))
    watched = found.pop("watched")
    assert list(found) == ["writing", "written", "renaming", "renamed"]
    for stage, seen in found.items():
        expected = 4 if stage == "renamed" else 3
        assert seen == {"signal": 9, "seen": expected, "step": expected, "then": 5, "files": ["distnorm_state_0.pt"]}
    assert watched == sorted(watched) and watched[-1] == 11


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "^C"])
@pytest.mark.parametrize("place", ["torch.save", "os.fsync", "pathlib.Path.replace"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error, place):
    checkpoint.save([trained(0, 1)], tmp_path)
    before = checkpoint.file_of(tmp_path, 0).read_bytes()

    def fail(*_: object) -> None:
        raise error

    model = trained(0, 3)
    monkeypatch.setattr(place, fail)
    with pytest.raises(type(error)):
        checkpoint.save([model], tmp_path)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["distnorm_state_0.pt"]
    assert checkpoint.file_of(tmp_path, 0).read_bytes() == before


def test_what_is_written_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """File, name, folder: in this order."""
    calls = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        calls.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        calls.append(f"{path.name} -> {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    checkpoint.save([trained(0)], tmp_path)
    name = "distnorm_state_0.pt"
    assert calls == [f"{name}.new", f"{name}.new -> {name}", tmp_path.name]
    umask = os.umask(0)
    os.umask(umask)
    assert checkpoint.file_of(tmp_path, 0).stat().st_mode & 0o777 == 0o666 & ~umask
