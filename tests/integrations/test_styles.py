"""Scripts in the styles of other projects, with 2 real processes; ``make scripts`` runs all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integrations import scripts_table, table
from tests.integrations.scripts_table import NAME, SCRIPTS, STYLES, WAYS
from tests.integrations.styles import pictures


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "data"
    pictures.write(folder)
    return folder


def start(data: Path, *command: str, processes: int = 2) -> tuple[dict[str, object], list[str]]:
    """The result of adversarial.py, and what else is on stderr of ours."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DISTNORM_")}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    job = subprocess.run(
        [*launcher, *command, "--dataroot", str(data)],
        env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    (result,) = (line.removeprefix("RESULT ") for line in job.stdout.splitlines() if line.startswith("RESULT "))
    return json.loads(result), [line for line in job.stderr.splitlines() if "distnorm" in line]


@pytest.mark.slow
def test_two_models_of_which_one_cannot_be_converted(data: Path) -> None:
    where = ["--where", "Generator: main.*; *.Discriminator: *; Encoder: a.*, b"]
    ours = ["-m", "distnorm.run", "--recipe", "sync_bn", *where]
    result, lines = start(data, *ours, str(STYLES / "adversarial.py"), "--own-norm")
    assert result["world_size"] == 2 and result["norms"] == ["DistBatchNorm2d", "ScaledNorm"]
    said, warned = ([line for line in lines if line.startswith("distnorm.run: ") is ours] for ours in (True, False))
    assert "did not convert unknown subclasses of batch norm: 1 __main__.ScaledNorm" in warned[0]
    assert "Discriminator is not converted and trains as it is: its batch norms are subclasses" in warned[1]
    assert len(warned) == 2  # on rank 0 only
    assert said == [
        "distnorm.run: Generator: 2 layers converted to sync_bn",
        "distnorm.run: 1 other Generator built alike keeps stock layers. With all values of the wrapped one (EMA, "
        "teacher) it evaluates alike.",
        "distnorm.run: warning: the patterns ['Encoder: a.*', 'Encoder: b'] selected no norm layer of any model that "
        "the script wrapped: Discriminator, Generator.",
    ]


@pytest.mark.slow
def test_two_models_and_an_average_train_as_on_the_joined_batch(data: Path) -> None:
    script = str(STYLES / "adversarial.py")
    expected, _ = start(data, script, "--batchSize", "8", processes=1)
    found, _ = start(data, "-m", "distnorm.run", script)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)


def test_the_committed_table_is_whole() -> None:
    lines = table._between(table.PAGE.read_text(), NAME)[1].strip().splitlines()[4:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = [
        [f"`{script.name}`", how, f"`{recipe}`" if recipe else ""]
        for script in SCRIPTS
        for how, recipe in WAYS
        if not (how == "distnorm launch" and script.starts_itself)
    ]
    assert [each[:3] for each in cells] == rows
    for name, _, recipe, value, difference, _ in cells:
        assert value == "passes" or float(value) >= 0
        if recipe == "`sync_bn`" and value != "passes":
            assert float(difference) <= 1e-4, name


def test_pictures_are_equal_for_all(data: Path, tmp_path: Path) -> None:
    pictures.write(tmp_path)
    names = sorted(path.relative_to(data) for path in data.rglob("*.png"))
    assert len(names) == pictures.CLASSES * pictures.EACH
    assert all((tmp_path / name).read_bytes() == (data / name).read_bytes() for name in names)
    assert scripts_table.difference([1.0, 2.0], [1.0, 1.0]) == 0.5
