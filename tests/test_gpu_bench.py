"""The benchmark on GPUs, as far as a machine without one can tell: it says that it did not run, and forces sums."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOP = Path(__file__).parents[1]
FORCED = """
import torch
import torch.distributed as dist
from gpu_contenders import MOVING, SYNC
from torch import nn
import distnorm
from distnorm.diagnostics import Ledger

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
stock = nn.BatchNorm2d(4)
model = distnorm.convert(nn.Sequential(nn.BatchNorm2d(4)), SYNC)
with Ledger(model) as ledger:
    for _ in range(2):
        x = torch.randn(3, 4, 5, 5, requires_grad=True)
        y = model(x)
        y.square().sum().backward()
        torch.testing.assert_close(y, stock(x))
torch.testing.assert_close(model[0].running_var, stock.running_var)
assert set(MOVING) == {"mabn", "mabn, Local"}
print(ledger.collectives)
"""


def run(*command: str) -> str:
    environment = {"PYTHONPATH": f"{TOP}:{TOP / 'benchmarks'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


NO_CARD = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@NO_CARD
def test_without_a_card_a_file_says_so(tmp_path: Path) -> None:
    assert run("benchmarks/gpu.py", "--out", str(tmp_path / "table.md")) == "not run: no CUDA device\n"
    (left,) = tmp_path.iterdir()
    assert "Not run: no CUDA device" in left.read_text()


@NO_CARD
def test_figures_of_a_card_stay(tmp_path: Path) -> None:
    measured = tmp_path / "gpu-2000-01-01.md"
    measured.write_text("figures")
    run("benchmarks/gpu.py", "--out", str(tmp_path / "table.md"))
    assert list(tmp_path.iterdir()) == [measured]
    assert measured.read_text() == "figures"


def test_one_rank_is_made_to_use_its_collectives() -> None:
    assert run("-c", FORCED) == "4\n"
