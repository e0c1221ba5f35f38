"""Stages (d) and (h): what a card alone can tell of waiting, launches, graphs and two processes; and its tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_contenders import RECIPES, SYNC, can_run
from gpu_stages import Trainer, batch_of, exact_convolutions, kernels, model_of, recorded, start_group
from gpu_units import Log, NotRunError, Phase, Unit
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import distnorm
from distnorm.recipe import Recipe

ROOT = Path(__file__).parents[1]
SETTLED = 6
"""Steps after which every recipe of ``RECIPES`` is past its warm-up."""

REPLAYS = 2
MOST_LAUNCHES = 4
"""In each direction, with the copy that NCCL sums in place, without NCCL's own (docs/performance.md)."""


def trainer_of(log: Log, recipe: Recipe, *, fuse: bool) -> Trainer:
    """A ResNet-18 in training."""
    return Trainer(
        distnorm.convert(model_of(log, 18), recipe, fuse=fuse), batch_of(log, 16 if log.card else 4, 32), 0.01
    )


def waits_unit(name: str, *, fuse: bool) -> Unit:
    """Whether a step makes the host wait for the card."""

    def unit(log: Log) -> None:
        if not can_run(name, grouped=start_group(log), card=True):
            raise NotRunError("no group to sum in")
        with log.part("no host synchronization"), kernels(log):
            trainer = trainer_of(log, RECIPES[name], fuse=fuse)
            for _ in range(SETTLED if log.card else 1):
                trainer.step()
            log.need_card()
            log.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                for _ in range(2):
                    trainer.step()
            finally:
                torch.cuda.set_sync_debug_mode("default")

    return unit


def launches(log: Log) -> None:
    """What one layer of ``sync_bn`` launches, by the profiler."""
    start_group(log)
    shape = (64, 256, 56, 56) if log.card else (2, 1, 4, 4)
    with kernels(log):
        layer = distnorm.convert(nn.Sequential(nn.BatchNorm2d(shape[1])).to(log.device), SYNC)
        x = torch.randn(shape, device=log.device, requires_grad=True)
        leaves, dy = [x, *layer.parameters()], x.detach().clone()
        torch.autograd.grad(layer(x), leaves, dy)
        for direction in ("forward", "backward"):
            with log.part(direction) as found:
                y = layer(x) if direction == "backward" else None
                names = launched(log, lambda y=y: layer(x) if y is None else torch.autograd.grad(y, leaves, dy))
                log.need_card()
                ours = [name for name in names if "nccl" not in name.lower()]
                found |= {"launches": len(ours), "names": names}
                assert any("sums_kernel" in name for name in ours), "the layer took the plain path"
                assert len(ours) <= MOST_LAUNCHES


def launched(log: Log, work: Any) -> list[str]:
    """The names of everything that ``work`` gives the device to do."""
    log.synchronize()
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * (log.card is not None)]
    with profile(activities=activities) as seen:
        work()
        log.synchronize()
    return [each.name for each in seen.events() if each.device_type == torch.autograd.DeviceType.CUDA]


def replays_unit(name: str, *, fuse: bool) -> Unit:
    """Whether whole steps, optimizer included, are the same when they are replayed from a graph."""

    def unit(log: Log) -> None:
        exact_convolutions()
        if not can_run(name, grouped=start_group(log), card=True):
            raise NotRunError("no group to sum in")
        with log.part("replayed steps equal issued ones") as found, kernels(log):
            replayed, issued = (trainer_of(log, RECIPES[name], fuse=fuse) for _ in range(2))
            losses = [issued.step() for _ in range(3 + REPLAYS if log.card else 1)]
            kept: list[Tensor] = []
            if log.card is None:
                kept.append(replayed.step())
            else:
                graph = recorded(lambda: kept.append(replayed.step()), before=3)
                for _ in range(REPLAYS):
                    graph.replay()
            found["losses"] = float(kept[-1]), float(losses[-1])
            pairs = zip(replayed.model.state_dict().values(), issued.model.state_dict().values(), strict=True)
            found["difference"] = worst = max(_apart(*pair) for pair in pairs)
            assert worst < 1e-3
            log.need_card()

    return unit


def _apart(one: Tensor, two: Tensor) -> float:
    """Relative difference of two tensors."""
    one, two = one.double(), two.double()
    return float((one - two).norm() / two.norm().clamp_min(1e-6))


# --- two processes -------------------------------------------------------------------------------

PARTS = (3, 5), (4, 0)
"""What the two ranks have of each batch; the second is empty on one of them."""


def rank_unit(rank: int, path: str) -> Unit:
    """One of two ranks on one device over gloo: ``sync_bn`` against stock on the joined batch."""

    def unit(log: Log) -> None:
        if not start_group(log, 2, rank, dist.FileStore(path, 2)):
            raise NotRunError("no group to sum in")
        with log.part("sync_bn of two ranks is the joined batch's"), kernels(log):
            ours = distnorm.convert(nn.BatchNorm2d(3), "sync_bn").to(log.device)
            stock = nn.BatchNorm2d(3).to(log.device)
            for sizes in PARTS:
                torch.manual_seed(0)
                x, dy = torch.randn(2, sum(sizes), 3, 4, 5).add(2).to(log.device).unbind()
                mine = slice(sizes[0] * rank, sum(sizes[: rank + 1]))
                whole, part = x.clone().requires_grad_(), x[mine].clone().requires_grad_()
                expected, y = stock(whole), ours(part)
                expected.backward(dy)
                y.backward(dy[mine])
                assert whole.grad is not None
                torch.testing.assert_close(y, expected[mine])
                torch.testing.assert_close(part.grad, whole.grad[mine])
            for mine_C, all_C in zip(ours.parameters(), stock.parameters(), strict=True):
                dist.all_reduce(mine_C.grad)
                torch.testing.assert_close(mine_C.grad, all_C.grad, rtol=1e-4, atol=1e-4)
            for now, then in zip(ours.buffers(), stock.buffers(), strict=True):
                torch.testing.assert_close(now, then)

    return unit


def stage_d(card: bool) -> list[Phase]:
    """No host synchronization, launches per layer, steps from a CUDA graph, two processes on one card."""
    path = f"{tempfile.mkdtemp()}/store"
    pair: dict[str, Unit] = {f"gloo, rank {rank}": rank_unit(rank, path) for rank in range(2)}
    kinds = [(name, False) for name in RECIPES] + [("sync_bn", True), ("local_bn", True)]
    waits: dict[str, Unit] = {f"waits: {name}{', fused' * fuse}": waits_unit(name, fuse=fuse) for name, fuse in kinds}
    graphs: dict[str, Unit] = {
        f"graph: {name}{', fused' * fuse}": replays_unit(name, fuse=fuse)
        for name, fuse in kinds
        if name in ("sync_bn", "local_bn")
    }
    width = 6 if card else 2
    return [Phase({"launches": launches, **pair, **waits, **graphs}, width=width, limit=45)]


# --- (h) -----------------------------------------------------------------------------------------

SHARDS = 12
SUMMARY = re.compile(r"(\d+) (passed|failed|errors?|skipped)")


def tests(log: Log) -> None:
    """``pytest -m gpu`` in several processes, whose kernels compile side by side; without a card it collects."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    place: Any = {"cwd": ROOT, "env": environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    names = list[str]()
    with log.part("collected") as found:
        files = [] if log.card else ["tests/test_gpu_operators.py"]
        done = subprocess.run([*command, "--collect-only", *files], check=False, **place)
        names = [line for line in done.stdout.splitlines() if "::" in line and not line.startswith("SKIPPED")]
        found["tests"] = len(names)
        assert not done.returncode and names, done.stdout
    with log.part("passed") as found, tempfile.TemporaryDirectory() as folder:
        log.need_card()
        jobs = []
        for shard in range(SHARDS):
            path = Path(folder, str(shard))
            path.write_text("\n".join(names[shard::SHARDS]))
            jobs.append(subprocess.Popen([*command, f"@{path}"], **place))
        outputs = [job.communicate()[0] for job in jobs]
        print(*outputs, sep="\n")
        found["counts"] = counts = dict[str, int]()
        for output in outputs:
            for number, what in SUMMARY.findall(output.strip().splitlines()[-1]):
                counts[what] = counts.get(what, 0) + int(number)
        found["failures"] = [line for output in outputs for line in output.splitlines() if line.startswith("FAILED")]
        assert not any(job.returncode for job in jobs), "log.txt has the whole output"


def stage_h(card: bool) -> list[Phase]:
    """``pytest -m gpu``."""
    return [Phase({"pytest": tests}, limit=240)]
