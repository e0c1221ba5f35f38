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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_card_nothing_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    assert run("benchmarks/gpu.py", "--out", str(path)) == "not run: no CUDA device\n"
    assert not path.exists()


def test_one_rank_is_made_to_use_its_collectives() -> None:
    assert run("-c", FORCED) == "4\n"
