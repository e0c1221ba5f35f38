"""Processes that a script starts by itself convert as the first one does."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distnorm.integrations import children
from distnorm.settings import Settings

SCRIPTS = Path(__file__).parent / "scripts"


@pytest.mark.parametrize("method", ["spawn", pytest.param("fork", marks=pytest.mark.slow)])
def test_processes_of_torch_multiprocessing(tmp_path: Path, method: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DISTNORM_")}
    ours = ["-m", "distnorm.run", "--recipe", "sync_bn"]
    job = subprocess.run(
        [sys.executable, *ours, str(SCRIPTS / "children_spawned.py"), str(tmp_path), method],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert job.returncode == 0, job.stderr
    lines = [each for each in job.stderr.splitlines() if each.startswith("distnorm.run")]
    assert lines == ["distnorm.run: Sequential: 1 layers converted to sync_bn"]  # and the parent warns of nothing
    expected = torch.tensor(_running_var_of_one_process())
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert (found["processes"], found["layer"]) == (2, "DistBatchNorm1d")
        torch.testing.assert_close(torch.tensor(found["running"]), expected, rtol=1e-5, atol=1e-5)


def _running_var_of_one_process() -> list[float]:
    """Stock batch norm, on the task of scripts/children_spawned.py."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in torch.randn(5, 8, 4):
        model(batch).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    values: list[float] = model[1].running_var.tolist()
    return values


def test_what_a_new_process_is_given_can_be_pickled() -> None:
    given = children.Converting(print, Settings(recipe="mabn", options={"window": 4}), ("--recipe", "mabn"))
    assert pickle.loads(pickle.dumps(given)) == given


def test_commands_of_lightning_go_through_the_run_module() -> None:
    launcher = SimpleNamespace(
        _basic_subprocess_cmd=lambda: ["python", "-m", "pkg.train", "--devices", "2"],
        _hydra_subprocess_cmd=lambda local_rank: (["python", "train.py", f"hydra.rank={local_rank}"], "folder"),
    )
    children._run_again_with(launcher, ("--recipe", "mabn"))
    ours = ["python", "-m", "distnorm.run", "--recipe", "mabn"]
    assert launcher._basic_subprocess_cmd() == [*ours, "-m", "pkg.train", "--devices", "2"]
    assert launcher._hydra_subprocess_cmd(local_rank=1) == ([*ours, "train.py", "hydra.rank=1"], "folder")


def test_lightning_makes_its_commands_as_we_expect() -> None:
    """Read, not imported: that takes seconds. tests/integrations/test_table.py runs such a job."""
    (top,) = importlib.util.find_spec("lightning").submodule_search_locations
    launcher = Path("strategies", "launchers", "subprocess_script.py")
    fabric, pytorch = (ast.parse((Path(top) / part / launcher).read_text()) for part in ("fabric", "pytorch"))
    names = {"_basic_subprocess_cmd": [], "_hydra_subprocess_cmd": ["local_rank"]}
    made = {each.name: [one.arg for one in each.args.args] for each in fabric.body if isinstance(each, ast.FunctionDef)}
    assert made.items() >= names.items()
    module = "lightning.fabric.strategies.launchers.subprocess_script"
    (imported,) = (each for each in pytorch.body if isinstance(each, ast.ImportFrom) and each.module == module)
    assert names.keys() <= {each.name for each in imported.names}  # copies what we have put there
    for tree in (fabric, pytorch):
        assert names.keys() <= {each.func.id for each in ast.walk(tree) if isinstance(each, ast.Call)
                                and isinstance(each.func, ast.Name)}  # fmt: skip
