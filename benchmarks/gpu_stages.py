"""What the stages of ``gpu_check.py`` share: the kernels, one rank's group, contenders, and clocks."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._dynamo  # layers need it at their first step: here it is imported once, for all forks
import torch.distributed as dist
from gpu_units import Log
from models import resnet18, resnet50
from torch import Tensor, nn
from torch.nn import functional

from distnorm.kernels.gpu.gpu_pass import GpuPass
from distnorm.methods import ChannelAffine
from distnorm.types import Affine

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
ROUNDS, BURST = 5, 10
WIDTH, IMAGE = 64, 56
"""A ResNet whose stem keeps its size: images of 56 give the layers behind it the sizes of ImageNet's."""

Work = Callable[[], object]


class Time(NamedTuple):
    """Milliseconds of one piece of work: until the device has done it, and until the host has issued it."""

    done: float
    issued: float


def gpu_pass(method: ChannelAffine, x: Tensor, affine: Affine) -> GpuPass:
    """As ``distnorm.kernels.passes.new_pass``, whatever the device is."""
    formula = method.formula(affine)
    assert formula is not None
    return GpuPass(formula, affine.eps)


@contextmanager
def kernels(log: Log, *, wanted: bool = True) -> Iterator[None]:
    """Layers on the kernels under test, on a CPU by Triton's interpreter; or on the plain path."""
    if wanted and log.card is not None:
        yield
        return
    layers: Any = mock.patch("distnorm.autograd.normalize.new_pass", gpu_pass)
    if not wanted:
        layers = mock.patch("distnorm.autograd.normalize.suits", lambda *given: False)
    with layers, mock.patch("distnorm.kernels.windows.in_triton", lambda *given: wanted):
        yield


def start_group(log: Log, ranks: int = 1, rank: int = 0, store: dist.Store | None = None) -> bool:
    """A job of NCCL's with one rank, or of gloo's; whether it can sum."""
    backend = "nccl" if log.card is not None and ranks == 1 else "gloo"
    # A machine without a network has this interface at least.
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    works = False
    with log.part(f"{backend}, {ranks} ranks" if ranks > 1 else backend) as found:
        dist.init_process_group(backend, store=store or dist.HashStore(), rank=rank, world_size=ranks)
        ones = torch.ones(3, dtype=torch.float64, device=log.device)
        dist.all_reduce(ones)
        found["sum"] = ones.tolist()
        assert found["sum"] == [float(ranks)] * 3
        works = True
    return works


def exact_convolutions() -> None:
    """No TF32: convolutions would differ more than norms do."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


# --- models --------------------------------------------------------------------------------------


def _small() -> nn.Module:
    torch.manual_seed(0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 10)
    return nn.Sequential(nn.Conv2d(3, 2, 3, bias=False), nn.BatchNorm2d(2), nn.ReLU(), *head)


def model_of(log: Log, depth: int) -> nn.Module:
    """A ResNet-18 or 50, equal weights at every call; on a CPU a few layers."""
    if log.card is None:
        return _small()
    return {18: resnet18, 50: resnet50}[depth](WIDTH).cuda()


def batch_of(log: Log, size: int, image: int = IMAGE) -> tuple[Tensor, Tensor]:
    """Images and labels."""
    generator = torch.Generator().manual_seed(1)
    side = image if log.card is not None else 6
    x = torch.randn(size, 3, side, side, generator=generator).to(log.device)
    return x, torch.arange(size, device=log.device) % 10


class Trainer:
    """A model that takes steps on one batch."""

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor], rate: float) -> None:
        """SGD with momentum."""
        self.model, self.batch = model, batch
        self.optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9)

    def step(self) -> Tensor:
        """Forward, backward and update; the loss. Gradients keep their memory, as CUDA graphs ask for."""
        x, labels = self.batch
        self.optimizer.zero_grad(set_to_none=False)
        loss = functional.cross_entropy(self.model(x), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


# --- clocks --------------------------------------------------------------------------------------


def burst(log: Log, work: Work, times: int = BURST) -> Time:
    """``work`` so many times in a row; gaps count."""
    log.synchronize()
    events = None if log.card is None else [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    began = time.perf_counter()
    if events is not None:
        events[0].record()
    for _ in range(times):
        work()
    if events is None:
        spent = (time.perf_counter() - began) * 1e3 / times
        return Time(spent, spent)
    events[1].record()
    issued = (time.perf_counter() - began) * 1e3 / times
    events[1].synchronize()
    return Time(events[0].elapsed_time(events[1]) / times, issued)


def medians(log: Log, works: dict[str, Work], times: int = BURST) -> dict[str, Time]:
    """Over rounds, in which the contenders take turns."""
    times, rounds = (times, ROUNDS) if log.card is not None else (1, 1)
    for work in works.values():
        burst(log, work, min(times, 3))
    seen: dict[str, list[Time]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            seen[name].append(burst(log, work, times))
    return {name: Time(*map(statistics.median, zip(*values, strict=True))) for name, values in seen.items()}


def recorded(work: Work, before: int = 3) -> torch.cuda.CUDAGraph:
    """``work`` as a CUDA graph, after ``before`` runs; the capture itself runs nothing.

    All on one side stream: gradients are accumulated where their nodes were made.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(before):
            work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # NCCL's watchdog asks for events of earlier collectives at any time; a capture refuses this to its own thread only.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        work()
    return graph
