"""Which torch is taken, what is said of another one, and what tests need of a bare machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from distnorm.compat import torch_version

ROOT = Path(__file__).parents[1]
SOURCES = [path for path in (ROOT / "distnorm").rglob("*.py") if path.name != "torch_version.py"]
PARTS = {name.rpartition(".")[2] for name in torch_version.PRIVATE + torch_version.PRIVATE_DISTRIBUTED}
# What private parts are reached by: torch's own modules and classes, by the names that the package gives them.
OWNERS = r"torch\._C|c10d|distributed_c10d|c10d\._world|DistributedDataParallel|process_group|world|_execution_engine"


def test_pip_reads_the_same_version() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert declared == [f"torch>={'.'.join(map(str, torch_version.OLDEST))}"]


def test_every_private_part_is_used_and_listed() -> None:
    text = "\n".join(path.read_text() for path in SOURCES)
    used = set(re.findall(rf"\b(?:{OWNERS})\.(_\w+|bound_device_id|queue_callback|default_pg_timeout)\b", text))
    assert used - {"_C", "_autograd", "_functorch"} <= PARTS
    assert {part for part in PARTS if not re.search(rf"\b{part}\b", text)} == set()


def test_this_torch_is_taken() -> None:
    torch_version.check_torch()


@pytest.mark.parametrize("version", ["2.10.0", "1.13.1+cu117", "2.0.0a0+git1234"])
def test_an_old_torch_is_named(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    words = rf"needs torch 2\.11 or newer, .*; found {re.escape(version)}\. Run pip install 'torch>=2\.11'"
    with pytest.raises(ImportError, match=words):
        torch_version.check_torch()


def test_a_newer_torch_is_taken_if_it_has_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "3.0.0.dev20270101+cpu")
    torch_version.check_torch()


@pytest.mark.parametrize("distributed", [True, False])
def test_missing_parts_are_named(monkeypatch: pytest.MonkeyPatch, distributed: bool) -> None:
    monkeypatch.setattr(torch_version, "PRIVATE", (*torch_version.PRIVATE, "_C._gone", "gone.too"))
    monkeypatch.setattr(torch_version, "PRIVATE_DISTRIBUTED", ("distributed._gone_as_well",))
    monkeypatch.setattr(torch.distributed, "is_available", lambda: distributed)
    with pytest.raises(ImportError, match=r"which lacks torch\._C\._gone, torch\.gone\.too.*Run pip install") as caught:
        torch_version.check_torch()
    assert torch.__version__ in str(caught.value)
    assert ("torch.distributed._gone_as_well" in str(caught.value)) == distributed


BARE = (
    *(
        "torch",
        "torchgen",
        "functorch",
        "triton",
        "numpy",
        "numpy.libs",
        "nvidia",
        "pytest",
        "_pytest",
        "pluggy",
        "py.py",
    ),
    *(
        "iniconfig",
        "packaging",
        "pygments",
        "sympy",
        "mpmath",
        "networkx",
        "filelock",
        "jinja2",
        "markupsafe",
        "fsspec",
    ),
    "typing_extensions.py",
)
"""torch with what it needs itself, Triton, and pytest."""


@pytest.mark.slow
def test_a_bare_machine_collects_the_tests_for_gpus(tmp_path: Path) -> None:
    packages = Path(torch.__file__).parents[1]
    for name in BARE:
        if (packages / name).exists():
            (tmp_path / name).symlink_to(packages / name)
    command = [sys.executable, "-S", "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("test_gpu_kernels.py", "test_gpu_layers.py", "test_gpu_operators.py"):
        assert f"tests/{name}::" in done.stdout
    assert "test_normalize.py:0: needs hypothesis, which is not installed" in done.stdout
    assert not re.search(r"SKIPPED.*tests/test_gpu_(kernels|layers|operators)", done.stdout)
