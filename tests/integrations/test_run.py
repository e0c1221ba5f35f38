"""The command line of the run module, and plain scripts under each launcher with 2 real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from distnorm import run
from distnorm.settings import Settings

SCRIPTS = Path(__file__).parent / "scripts"
BIN = Path(sys.executable).parent

ACCELERATE_CONFIG = """
compute_environment: LOCAL_MACHINE
distributed_type: MULTI_GPU
use_cpu: true
num_processes: 2
num_machines: 1
machine_rank: 0
mixed_precision: 'no'
main_process_port: 0
"""


def _job(command: list[object], **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("DISTNORM_")}
    path = f"{BIN}{os.pathsep}{inherited['PATH']}"
    return subprocess.run(
        [str(each) for each in command],
        env={**inherited, "PATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def _reports(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert [each["processes"] for each in found] == [2, 2]
    return found


# --- the command line ----------------------------------------------------------------------------


class _Started(Exception):
    """What the script would have been run with."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    class Job:
        failed = False

    def install(settings: Settings | None) -> Job:
        monkeypatch.setattr(Job, "settings", settings, raising=False)
        return Job()

    def start(target: str, arguments: list[str]) -> None:
        raise _Started(Job.settings, target, arguments)  # type: ignore[attr-defined]

    for name in [name for name in os.environ if name.startswith("DISTNORM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(run, "install", install)
    monkeypatch.setattr(run, "convert_in_children", lambda *_: None)
    monkeypatch.setattr(run, "run_script", start)
    monkeypatch.setattr(run, "run_module", start)


@pytest.mark.parametrize(
    ("arguments", "settings", "target", "rest"),
    [
        ([__file__], None, __file__, []),
        ([__file__, "--recipe", "mabn", "--", "-m", "-h"], None, __file__, ["--recipe", "mabn", "--", "-m", "-h"]),
        (["--recipe", "mabn", __file__, "x"], Settings(recipe="mabn"), __file__, ["x"]),
        (["--recipe=mabn", "-m", "a.b", "-m", "x"], Settings(recipe="mabn"), "a.b", ["-m", "x"]),
        (["-m", "a", "--", "--where", "b"], None, "a", ["--", "--where", "b"]),
        (
            ["--local_rank=1", "--recipe", "mabn", __file__, "x"],
            Settings(recipe="mabn"),
            __file__,
            ["--local_rank=1", "x"],
        ),
        (["--local-rank", "1", __file__], None, __file__, ["--local-rank", "1"]),
        (
            ["--recipe", "group_bn", "--options", '{"size": 4}', "--where", "a.*, b", "--ledger", __file__],
            Settings(recipe="group_bn", options={"size": 4}, where=("a.*", "b"), ledger=True),
            __file__,
            [],
        ),
        (
            ["--save-state", "--recipe=lazy_bn", __file__, "--save-state"],
            Settings(recipe="lazy_bn", save_state=True),
            __file__,
            ["--save-state"],
        ),
    ],
)
def test_what_is_ours_and_what_is_the_scripts(
    arguments: list[str], settings: Settings | None, target: str, rest: list[str], started: None
) -> None:
    with pytest.raises(_Started) as stopped:
        run.main(arguments)
    assert stopped.value.args == (settings, target, rest)


def test_flags_come_before_the_environment_and_that_before_the_config(
    started: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"recipe": "group_bn", "options": {"size": 2}, "ledger": True, "where": ["a"]}
    monkeypatch.setenv("DISTNORM_CONFIG", json.dumps({"source": "cfg.yaml", "section": section}))
    monkeypatch.setenv("DISTNORM_WHERE", "b,c")
    with pytest.raises(_Started) as stopped:
        run.main(["--no-ledger", __file__])
    assert stopped.value.args[0] == Settings(recipe="group_bn", options={"size": 2}, where=("b", "c"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--recipe", "group_bm", __file__],
            "flags of distnorm.run: unknown recipe 'group_bm' (did you mean 'group_bn'?)",
        ),
        (["--recipe", "group_bn", "--options", '{"sizes": 4}', __file__], "has no option 'sizes'"),
        (["--options", "{size: 4}", __file__], "need JSON such as '{\"size\": 4}'; got '{size: 4}'"),
        (["--transport", "smoke", __file__], 'transport must be "torch" or "mpi" or "shm" or "sockets" or "gloo"'),
        (["--recip", "mabn", __file__], "unrecognized arguments: --recip"),
        (["--recipe"], "expected one argument"),
        (["-m"], "need a script to run"),
        ([], "need a script to run"),
        (["nowhere.py"], "can't open file"),
    ],
)
def test_a_wrong_call_exits_with_2_before_the_script_starts(
    arguments: list[str], message: str, started: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and not out
    assert err.splitlines()[-1].startswith("distnorm.run: error: ") and message in err


def test_a_wrong_environment_names_itself(
    started: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DISTNORM_LEDGER", "perhaps")
    with pytest.raises(SystemExit):
        run.main([__file__])
    assert capsys.readouterr().err == (
        "distnorm.run: error: environment DISTNORM_*: ledger must be true or false; got 'perhaps'.\n"
    )


@pytest.mark.parametrize(
    ("line", "reported"), [("raise KeyError('lost')", "KeyError: 'lost'"), ("raise SystemExit(3)", "SystemExit: 3")]
)
def test_the_launchers_report_shows_the_script(
    line: str, reported: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun prints this file; by itself it knows the module that it started, distnorm.run."""
    script, report = tmp_path / "train.py", tmp_path / "error.json"
    script.write_text(f"\n\n{line}\n")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(report))
    job = SimpleNamespace(failed=False)
    monkeypatch.setattr(run, "install", lambda *_: job)
    monkeypatch.setattr(run, "convert_in_children", lambda *_: None)
    monkeypatch.setattr(run, "end_job_after", lambda *_: None)
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # the script takes these
    for name, value in (("argv", [*sys.argv]), ("path", [*sys.path])):
        monkeypatch.setattr(sys, name, value)
    with pytest.raises((KeyError, SystemExit)):
        run.main([str(script)])
    message = json.loads(report.read_text())["message"]
    assert message["message"] == reported and job.failed
    stack = message["extraInfo"]["py_callstack"]
    assert f'File "{script}", line 3' in stack and "integrations/script.py" not in stack and "run.py" not in stack
    report.write_text("by @record in the script")
    with pytest.raises((KeyError, SystemExit)):
        run.main([str(script)])
    assert report.read_text() == "by @record in the script"


# --- one process ---------------------------------------------------------------------------------


def test_the_whole_module_shows_what_python_shows_and_one_warning(tmp_path: Path) -> None:
    script = tmp_path / "plain.py"
    script.write_text(
        "import sys, torch\nprint(sys.argv, __name__, __file__, sys.path[0])\nprint('x', file=sys.stderr)\n"
    )
    plain = _job([sys.executable, script, "--ledger"])
    ours = _job([sys.executable, "-m", "distnorm.run", "--recipe", "mabn", script, "--ledger"])
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout) == (0, plain.stdout)
    own_line, warning = (
        ours.stderr.removeprefix(plain.stderr).splitlines(),
        "distnorm.run: warning: nothing was converted",
    )
    assert ours.stderr.startswith(plain.stderr) and len(own_line) == 1
    assert own_line[0].startswith(warning) and "call distnorm.convert(model, 'mabn')" in own_line[0]
    assert "1 process" in own_line[0]


# --- two processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joined() -> dict[str, list[float]]:
    """Stock batch norm in this process, on the batches of both ranks joined; the task of scripts/run_train.py."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    images, classes = torch.randn(20, 8, 3, 8, 8), torch.randint(4, (20, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for x, y in zip(images, classes, strict=True):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    norm = model[1]
    return {
        "losses": losses,
        "running_mean": norm.running_mean.tolist(),
        "running_var": norm.running_var.tolist(),
        "weight": model[4].weight.flatten().tolist(),
    }


def _assert_equals_one_process(folder: Path, joined: dict[str, list[float]], first: str | None = None) -> None:
    for rank, report in enumerate(_reports(folder)):
        assert report["layer"] == "DistBatchNorm2d"
        assert report["arguments"] == [*([] if first is None else [first.format(rank)]), "--recipe", "z"]
        for name, values in joined.items():
            torch.testing.assert_close(torch.tensor(report[name]), torch.tensor(values), rtol=1e-5, atol=1e-5)


def _train(folder: Path, kind: str = "ddp") -> list[object]:
    return [SCRIPTS / "run_train.py", "--recipe", "z", folder, kind]


def test_torchrun(tmp_path: Path, joined: dict[str, list[float]]) -> None:
    launcher = ["torchrun", "--standalone", "--nproc_per_node", 2, "-m", "distnorm.run", "--ledger"]
    job = _job([*launcher, *_train(tmp_path)])
    assert job.returncode == 0, job.stderr
    _assert_equals_one_process(tmp_path, joined)
    own = [line for line in job.stderr.splitlines() if line.startswith("distnorm.run")]
    assert own == ["distnorm.run: Sequential: 1 layers converted to sync_bn", "distnorm.run: ledger of Sequential"]
    total = next(line for line in job.stderr.splitlines() if line.startswith("total"))
    assert total.split()[1] == "40"  # one forward, one backward, 20 steps


@pytest.mark.slow
def test_accelerate_launch(tmp_path: Path, joined: dict[str, list[float]]) -> None:
    (tmp_path / "cfg.yaml").write_text(ACCELERATE_CONFIG)
    launcher = ["accelerate", "launch", "--config_file", tmp_path / "cfg.yaml", "-m", "distnorm.run"]
    job = _job([*launcher, *_train(tmp_path, "accelerate")], ACCELERATE_USE_CPU="true")
    assert job.returncode == 0, job.stderr
    _assert_equals_one_process(tmp_path, joined)
    states = [torch.load(tmp_path / "state" / f"distnorm_state_{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert len(states) == 2  # save_state kept what each rank needs, with no line in the script


@pytest.mark.slow
def test_mpirun(tmp_path: Path, joined: dict[str, list[float]]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", 2, sys.executable, "-m", "distnorm.run"]
    job = _job([*launcher, *_train(tmp_path)], MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert job.returncode == 0, job.stderr
    _assert_equals_one_process(tmp_path, joined)
    assert job.stderr.count("layers converted to") == 1


@pytest.mark.slow
def test_deepspeed_hands_the_local_rank_to_the_script(tmp_path: Path, joined: dict[str, list[float]]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launcher = ["deepspeed", "--num_gpus", 2, "--master_port", port, "--module", "distnorm.run", "--recipe", "sync_bn"]
    job = _job([*launcher, *_train(tmp_path)], DS_ACCELERATOR="cpu")
    assert job.returncode == 0, job.stderr
    _assert_equals_one_process(tmp_path, joined, first="--local_rank={}")


def test_steps_are_the_optimizers(tmp_path: Path) -> None:
    options = ["--recipe", "mabn", "--options", '{"warmup": 3, "window": 4}']
    launcher = ["torchrun", "--standalone", "--nproc_per_node", 2, "-m", "distnorm.run", *options]
    job = _job([*launcher, SCRIPTS / "run_steps.py", tmp_path])
    assert job.returncode == 0, job.stderr
    first, second = _reports(tmp_path)
    assert first["steps"] == second["steps"] == {"accumulated": [6], "generator": [2], "critic": [4]}
    assert first["running_var"] == second["running_var"]
    assert first["warnings"] == ["distnorm.run: Linear has no batch norm layer to convert."]
    assert second["warnings"] == []


@pytest.mark.slow
def test_moving_statistics_beside_the_scripts_checkpoint(tmp_path: Path) -> None:
    """Rank 0 saves; its window is that of all ranks (docs/moving.md), so all of them go on bit for bit."""
    options = ["--save-state", "--recipe", "mabn", "--options", '{"warmup": 3, "window": 4}']
    launcher = ["torchrun", "--standalone", "--nproc_per_node", 2, "-m", "distnorm.run", *options]
    first = _job([*launcher, SCRIPTS / "run_checkpoint.py", tmp_path, "straight"])
    assert first.returncode == 0 and "start without a saved state" not in first.stderr, first.stderr
    assert [each.name for each in sorted(tmp_path.glob("last*"))] == ["last.pth", "last.pth.distnorm_state.pt"]
    second = _job([*launcher, SCRIPTS / "run_checkpoint.py", tmp_path, "resumed", "first"])
    assert second.returncode == 0, second.stderr
    assert _seen(tmp_path, "resumed") == _seen(tmp_path, "straight")
    assert second.stderr.count("all ranks start without a saved state") == 2  # in mode first, on both ranks
    assert "ranks [0] have one of step 7, ranks [1] have none" in second.stderr
    one, other = _seen(tmp_path, "first")
    assert one["values"] == other["values"] and one["losses"] != _seen(tmp_path, "straight")[0]["losses"]


@pytest.mark.slow
def test_moving_statistics_beside_a_sharded_checkpoint(tmp_path: Path) -> None:
    options = ["--save-state", "--recipe", "mabn", "--options", '{"warmup": 3, "window": 4}']
    launcher = ["torchrun", "--standalone", "--nproc_per_node", 2, "-m", "distnorm.run", *options]
    job = _job([*launcher, SCRIPTS / "run_checkpoint.py", tmp_path, "sharded", "sharded_resumed"])
    assert job.returncode == 0 and "start without a saved state" not in job.stderr, job.stderr
    assert _seen(tmp_path, "sharded_resumed") == _seen(tmp_path, "sharded")


def _seen(folder: Path, mode: str) -> list[dict[str, Any]]:
    """What ``run_checkpoint.py`` has seen on each rank."""
    return [json.loads((folder / f"{mode}{rank}.json").read_text()) for rank in (0, 1)]


def test_a_script_that_fails_under_torchrun(tmp_path: Path) -> None:
    launcher = ["torchrun", "--standalone", "--nproc_per_node", 2, "-m", "distnorm.run"]
    job = _job([*launcher, SCRIPTS / "run_fails.py", tmp_path])
    _reports(tmp_path)
    assert job.returncode == 1
    assert "LookupError: the data is gone" in job.stderr
    assert "script.py" not in job.stderr and "runpy" not in job.stderr  # frames of ours, of either
    summary = job.stderr.partition("Root Cause (first observed failure)")[2]
    assert "rank      : 1 " in summary and "exitcode  : 1 " in summary
    assert "LookupError: the data is gone" in summary  # @record wrote its file
    assert "nothing was converted" not in job.stderr


@pytest.mark.slow
def test_a_rank_that_is_killed_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """Rank 0 would wait for an hour."""
    launcher = ["torchrun", "--standalone", "--nproc_per_node", 2, "-m", "distnorm.run"]
    job = _job([*launcher, SCRIPTS / "run_killed.py", tmp_path])
    _reports(tmp_path)
    assert job.returncode == 1
    assert "nobody was killed" not in job.stdout
    assert "RuntimeError: 4: sharing forward statistics" in job.stderr
    assert "among ranks [0, 1] failed. Another rank has probably stopped" in job.stderr
    assert "exitcode  : -9" in job.stderr
    assert "nothing was converted" not in job.stderr
