"""Processes that a script starts by itself convert as the first one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from distnorm.integrations import children
from distnorm.settings import Settings, from_environment

SCRIPTS = Path(__file__).parent / "scripts"
STARTUP = Path(children.__file__).parent / "startup"


@pytest.mark.parametrize(
    "way", ["programs", *(pytest.param(way, marks=pytest.mark.slow) for way in ("spawn", "fork", "torchrun"))]
)
def test_processes_of_the_script(tmp_path: Path, way: str) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DISTNORM_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    ours = ["-m", "distnorm.run", "--recipe", "sync_bn"]
    job = subprocess.run(
        [sys.executable, *ours, str(SCRIPTS / "children_spawned.py"), str(tmp_path), way],
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


def test_the_environment_reaches_grandchildren(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script with no torch in it: the chain of processes, the other ``sitecustomize``, the path."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.of_the_user = True\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delenv("DISTNORM_FLAGS", raising=False)
    monkeypatch.setattr(children, "_note_started_processes", lambda _: None)
    children.convert_in_children(SimpleNamespace(), {"recipe": "mabn", "where": None})
    look = (
        "import os, sys; print(sys.of_the_user, 'torch' in sys.modules, 'distnorm' in sys.modules, "
        "os.environ['DISTNORM_FLAGS'], sum('startup' in each for each in sys.path), len(sys.meta_path))"
    )
    again = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {look!r}])"
    shown = [
        subprocess.run([sys.executable, *flags, "-c", program], capture_output=True, text=True)
        for flags, program in (([], look), ([], again), (["-S"], "import sys; print('of_the_user' in vars(sys))"))
    ]
    assert [each.stderr for each in shown] == ["", "", ""]
    finders = len(sys.meta_path)
    expected = f"True False False {json.dumps({'recipe': 'mabn'})} 0"
    assert shown[0].stdout == shown[1].stdout and shown[0].stdout.startswith(expected), finders
    assert shown[2].stdout == "False\n"  # Python without its site: nothing is converted there


def test_a_run_module_converts_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own flags come before those of the one that started the script."""
    for name in [name for name in os.environ if name.startswith("DISTNORM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DISTNORM_FLAGS", json.dumps({"recipe": "mabn", "options": {"window": 4}, "save_state": True}))
    assert from_environment(os.environ) == Settings(recipe="mabn", options={"window": 4}, save_state=True)
    assert from_environment(os.environ, {"recipe": "local_bn"}) == Settings(recipe="local_bn", save_state=True)
    script = tmp_path / "train.py"
    script.write_text("import sys\nprint('_distnorm_import_hook' in sys.modules)\n")
    monkeypatch.setenv("PYTHONPATH", f"{STARTUP}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    command = [sys.executable, "-m", "distnorm.run", str(script)]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("command", "starts"),
    [
        (["/usr/bin/python3", "train.py"], True),
        ([Path(sys.executable), "train.py"], True),
        ("torchrun train.py", True),
        ([b"mpirun", b"-n", b"2", b"./train"], True),
        (["git", "rev-parse", "HEAD"], False),
        ("nvidia-smi", False),
    ],
)
def test_which_programs_may_wrap_models(command: object, starts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.multiprocessing.spawn

    spawn = sys.modules["torch.multiprocessing.spawn"]
    monkeypatch.setattr(subprocess.Popen, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(os, "system", os.system)
    for module in (spawn, torch.multiprocessing):
        monkeypatch.setattr(module, "start_processes", module.start_processes)
    job = SimpleNamespace(is_one_of_several=False)
    children._note_started_processes(job)
    subprocess.Popen.__init__(object(), args=command)
    assert job.is_one_of_several is starts
