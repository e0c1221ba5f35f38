"""The soak finds nothing in seconds, and would say so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults import soak

ROOT = Path(__file__).parents[2]
FLAT = [{"MiB": 400.0, "threads": 1, "descriptors": 4, "segments": 0}] * 100


def test_what_grows_is_found() -> None:
    assert soak.growth(FLAT) == []
    for what, more in (("MiB", 30), ("threads", 1), ("descriptors", 2), ("segments", 1)):
        assert soak.growth([*FLAT[1:], {**FLAT[0], what: FLAT[0][what] + more}]) == [
            f"{what}: {more} more than in the first half"
        ]


def test_what_is_wrong_is_no_success(capsys: pytest.CaptureFixture[str]) -> None:
    told = {"rounds": 100, "worst": 0.0, "counts": {"steps": 3}, "held": FLAT}
    assert soak.report([told] * 2) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    grown = {**told, "held": [*FLAT, {**FLAT[0], "threads": 9}]}
    assert soak.report([told, grown]) == 1
    assert "WRONG: rank 1: threads: 8 more" in capsys.readouterr().out


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.slow
def test_a_few_seconds() -> None:
    ran = run("-m", "tests.faults.soak", "--minutes", "0.1")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "nothing is wrong" in ran.stdout
