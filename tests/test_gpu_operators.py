"""The operators behind the kernels for GPUs: what they tell torch, what compilers make of them, how tensors are cut."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="Triton is made for Linux only")

from distnorm.kernels import gpu
from distnorm.kernels.gpu import apply, combine, cosums, moments, tiles
from tests.support.gpu import DEVICES, run_on
from tests.support.interpreter import INTERPRETED

pytestmark = INTERPRETED

EPS = 1e-5
SHAPES = ((64, 64, 112, 112), (2, 2048, 7, 7), (8, 3, 5), (1, 1), (7, 4096), (3, 1, 9999999))


@pytest.fixture(scope="module", params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    yield from run_on(request.param)


def four_operators(x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, running: list[Tensor]) -> tuple[Tensor, ...]:
    payload, pivot = torch.ops.distnorm.gpu_moments(x)
    y, saved, narrow = torch.ops.distnorm.gpu_apply(
        x, payload, pivot, weight, bias, None, [], running, None, 0.1, EPS, 1.0, 0, 2, 0
    )
    given = pivot, weight, saved, narrow, 2, 0
    cotangents, dweight, dbias, _ = torch.ops.distnorm.gpu_cosums(dy, x, None, *given)
    dx = torch.ops.distnorm.gpu_combine(dy, x, cotangents, payload[-1], pivot, saved, narrow, EPS, 2, 0)
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


@pytest.mark.parametrize("mask", [cosums.UNMASKED, cosums.BY_INPUT, cosums.BY_OUTPUT])
def test_operators_say_what_they_do(device: str, mask: int) -> None:
    """Schemas and fakes, by torch's own check."""
    x, dy = torch.rand(2, 4, 3, 5, device=device).unbind()
    running = [torch.zeros(3, device=device), torch.ones(3, device=device), torch.tensor(0, device=device)]
    payload, pivot = moments.moments(x)
    residual = dy if mask == cosums.BY_OUTPUT else None
    given = x, payload, pivot, None, None, residual, [], running, None, 0.1, EPS, 1.0, 0, 2, mask > 0
    y, saved, narrow = apply.apply(*given)
    kept = pivot, saved, narrow
    calls = {
        moments.moments: (x,),
        apply.apply: given,
        apply.update_running: (payload[:-1] / 20, payload[-1], torch.ones_like(payload[-1]), running, None, 0.1, 2),
        cosums.cosums: (dy, x, y, pivot, None, saved, narrow, 2, mask),
        combine.combine: (dy, x, payload[:-1].clone(), payload[-1], *kept, EPS, 2, mask % 2),
    }
    for operator, arguments in calls.items():
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
def test_every_kernel_compiles_for_a_card(tmp_path: Path) -> None:
    """By Triton's compiler and NVIDIA's assembler, which need no card and take less than the interpreter does."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.support.gpu_compile"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    loops = {"sums_kernel", "apply_kernel", "cosums_kernel", "combine_kernel"}
    assert {line[0] for line in lines} == loops | {"merge_kernel", "pull_kernel", "update_running_kernel"}
    assert all("vectors" in line for line in lines if "aligned" in line), done.stdout
    assert not any("spills" in line for line in lines if line[0] in loops), done.stdout


# --- how tensors are cut -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (128, 64, 1024, 1024), (1, 1000000, 2, 2)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_tiles_cover_every_value_once(shape: tuple[int, ...], memory_format: torch.memory_format) -> None:
    x = torch.empty(shape, device="meta")
    x = x.to(memory_format=memory_format) if x.dim() == 4 else x
    (blocks, splits), (outer, units, channels, count, planes, vector, rows, columns) = tiles.tiles_of(x)
    assert outer * units * vector * channels == x.numel()
    assert count == -(-outer // rows) * (-(-units * vector // columns) if planes else 1)
    assert blocks == (channels if planes else -(-channels // columns))
    assert rows * columns <= tiles.TILE and splits <= count
    assert count <= splits * (tiles.LONGEST + 1) or splits == 65535
    assert all(each & (each - 1) == 0 for each in (rows, columns))
    assert 1 <= splits <= 65535 and blocks < 2**31  # CUDA's grids are no larger


@pytest.mark.parametrize(
    ("shape", "taken"),
    [
        ((64, 2048, 1024, 1024), True),  # more values than 32 bits count, but not in a channel
        ((2048, 1, 1024, 1024), False),
        ((2, 1 << 20), False),
        ((0, 3), True),
    ],
)
def test_what_32_bits_cannot_count_is_left_to_torch(
    shape: tuple[int, ...], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "available", lambda: True)
    with FakeTensorMode():
        assert gpu.takes(torch.empty(shape, device="cuda")) is taken


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton can launch here")
def test_where_triton_cannot_launch_it_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTNORM_KERNELS", raising=False)
    gpu.available.cache_clear()
    with pytest.warns(UserWarning, match="Triton cannot launch"):
        assert not gpu.available()
    assert not gpu.available()


def test_equal_memory_is_not_copied() -> None:
    """Strides of dimensions of size 1 mean nothing."""
    contiguous, other = torch.empty(4, 3, 1, 1), torch.empty(4, 1, 1, 3).movedim(-1, 1)
    assert contiguous.stride() != other.stride()
    assert tiles.like(contiguous, other) is contiguous
    copied = tiles.like(torch.ones(4, 3, 2, 1), torch.empty(4, 2, 1, 3).movedim(-1, 1))
    assert copied.stride() == (6, 1, 3, 3) and copied.all()
