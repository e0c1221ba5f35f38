"""The package as users install it: built without a network, and at work outside of the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TRAIN = """
import sys
from pathlib import Path
import torch
import distnorm
from distnorm.kernels.native import library

here = Path(sys.argv[1])
assert Path(distnorm.__file__).is_relative_to(here), distnorm.__file__
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
before = [each.clone() for each in model.parameters()]
distnorm.convert(model, "mabn", window=2, warmup=1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
model(torch.randn(4, 3, 8, 8)).square().mean().backward()
optimizer.step()
assert library() is not None, "no kernels in C"
assert all(each.isfinite().all() and not each.equal(old) for each, old in zip(model.parameters(), before))
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    words = [str(each) for each in command]
    ended = subprocess.run(
        words, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def build(source: Path, folder: Path, target: str) -> Path:
    """A wheel or an sdist of ``source``, by the build backend that the environment has."""
    run(sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", folder, cwd=source)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"), "wheel")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the package and nothing else; torch is the environment's."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, wheel, cwd=folder)
    return folder


def names_in(wheel: Path) -> set[str]:
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.startswith("distnorm-")}


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    sources = {path for path in (ROOT / "distnorm").rglob("*") if path.suffix in (".py", ".c", ".h")}
    sources.add(ROOT / "distnorm" / "py.typed")
    assert len([path for path in sources if path.suffix == ".c"]) > 3
    assert names_in(wheel) == {path.relative_to(ROOT).as_posix() for path in sources}


def test_the_sdist_builds_the_same_wheel(wheel, tmp_path):
    sdist = build(ROOT, tmp_path / "sdist", "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    for name in ("Makefile", "constraints.txt", "mkdocs.yml", "docs/index.md", "launch/mpirun.sh", "tests/zoo.py"):
        assert (source / name).exists(), name
    assert names_in(build(source, tmp_path / "again", "wheel")) == names_in(wheel)


def test_it_trains_outside_of_the_checkout(installed, tmp_path):
    """On kernels that are compiled from the wheel's own sources."""
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    cache = tmp_path / "cache"
    run(sys.executable, script, installed, cwd=tmp_path, PYTHONPATH=str(installed), XDG_CACHE_HOME=str(cache))
    assert [path.suffix for path in (cache / "distnorm").iterdir()] == [".so"]


def test_the_installed_command(installed, tmp_path):
    command = installed / "bin" / "distnorm"
    shown = run(sys.executable, command, "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert shown.startswith("usage: distnorm")
