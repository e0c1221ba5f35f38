"""The operators behind the kernels for GPUs: what they tell torch, and what native compilers make of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is made for Linux only")

from distnorm.kernels.gpu import apply, combine, cosums, moments
from tests.support.gpu import DEVICES, run_on

EPS = 1e-5


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from run_on(request.param)


def four_operators(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, running: list[Tensor]) -> tuple[Tensor, ...]:
    wire, pivot = torch.ops.distnorm.gpu_moments(x)
    y, saved, narrow = torch.ops.distnorm.gpu_apply(
        x, wire, pivot, weight, bias, None, [], running, None, 0.1, EPS, 1.0, 0, 2, False
    )
    given = pivot, weight, saved, narrow, 2, 0
    cotangents, dweight, dbias = torch.ops.distnorm.gpu_cosums(dy, x, None, *given)
    dx, _ = torch.ops.distnorm.gpu_combine(dy, x, None, cotangents, wire[-1], pivot, saved, narrow, EPS, 2, 0, False)
    return y, dx, dweight, dbias


def test_operators_enter_compiled_graphs(device: str) -> None:
    torch.manual_seed(0)
    tensors = [torch.rand(size, device=device) for size in ((4, 3, 5), (4, 3, 5), (3,), (3,))]
    traces = []
    for run in (four_operators, torch.compile(four_operators, fullgraph=True, backend="aot_eager")):
        running = [torch.zeros(3, device=device), torch.ones(3, device=device), torch.tensor(0, device=device)]
        traces.append([*run(*tensors, running), *running])
    for compiled, eager in zip(*traces, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_operators_say_what_they_do(device: str) -> None:
    """Schemas and fakes, by torch's own check."""
    x, dy = torch.rand(2, 4, 3, 5, device=device).unbind()
    running = [torch.zeros(3, device=device), torch.ones(3, device=device), torch.tensor(0, device=device)]
    wire, pivot = moments.moments(x)
    given = x, wire, pivot, None, None, None, [], running, None, 0.1, EPS, 1.0, 0, 2, True
    y, saved, narrow = apply.apply(*given)
    kept = pivot, saved, narrow
    calls = {
        moments.moments: (x,),
        apply.apply: given,
        apply.absorb: (wire[:-1] / 20, wire[-1], torch.ones_like(wire[-1]), running, None, 0.1, 2),
        cosums.cosums: (dy, x, y, pivot, None, saved, narrow, 2, 2),
        combine.combine: (dy, x, y, wire[:-1].clone(), wire[-1], *kept, EPS, 2, 2, True),
    }
    for operator, arguments in calls.items():
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_every_kernel_compiles_for_a_card(tmp_path: Path) -> None:
    """By Triton's compiler and NVIDIA's assembler, which need no card and take less than the interpreter does."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.support.gpu_compile"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    loops = {"sums_kernel", "apply_kernel", "cosums_kernel", "combine_kernel"}
    assert {line[0] for line in lines} == loops | {"merge_kernel", "pull_kernel", "absorb_kernel"}
    assert all("vectors" in line for line in lines if "aligned" in line), done.stdout
    assert not any("spills" in line for line in lines if line[0] in loops), done.stdout
