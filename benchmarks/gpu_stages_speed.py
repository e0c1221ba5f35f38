"""Stages (e) to (g): layers, whole steps, and a profile of the slowest layer."""

from __future__ import annotations

import cProfile
import fcntl
import io
import itertools
import math
import multiprocessing
import pstats
import threading
from contextlib import suppress
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
import torch._inductor.config
from gpu_contenders import LAYERS, STEPS, at_hand
from gpu_stages import (
    DTYPES,
    FORMATS,
    Trainer,
    Work,
    batch_of,
    burst,
    kernels,
    medians,
    model_of,
    recorded,
    start_group,
)
from gpu_units import RESULTS, Log, NotRunError, Phase, Unit, records
from torch import nn
from torch.profiler import ProfilerActivity, profile

from distnorm.kernels import gpu

# Channels, side of the image, layers of this size: ResNet-50 on images of 224 x 224.
SHAPES = [(64, 112, 1), (64, 56, 6), (256, 56, 4), (128, 56, 1), (128, 28, 7), (512, 28, 5), (256, 28, 1)]
SHAPES += [(256, 14, 11), (1024, 14, 7), (512, 14, 1), (512, 7, 5), (2048, 7, 4)]
BATCHES = (64, 8, 2)
TIMED = ("float32", "bfloat16")
PASSES = 8
"""Over memory: x twice and y once forward; x and dy twice and dx once backward."""

KERNEL_PASSES = {"sums_kernel": 1, "apply_kernel": 2, "cosums_kernel": 2, "combine_kernel": 3}
TABLE = "profile.txt"
COMPILE_THREADS = 4


def sizes(log: Log) -> list[tuple[int, int, int]]:
    """``SHAPES``, or one small one without a card."""
    return SHAPES if log.card else [(1, 4, 1)]


# --- (e) -----------------------------------------------------------------------------------------


def layer_works(log: Log, shape: tuple[int, ...], dtype: str, layout: str, *, grouped: bool) -> dict[str, Work]:
    """A forward and backward of one layer by each contender, on tensors of its own."""

    def work(layer: nn.Module) -> Work:
        x, dy = (torch.randn(shape, device=log.device).to(DTYPES[dtype], memory_format=FORMATS[layout]) for _ in "xy")
        leaves = [x.requires_grad_(), *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x), leaves, dy)

    makers = at_hand(LAYERS, grouped=grouped, card=log.card is not None)
    return {
        name: work(make(nn.Sequential(nn.BatchNorm2d(shape[1])).to(log.device))[0]) for name, make in makers.items()
    }


def compiling_unit(batch: int, dtype: str, layout: str) -> Unit:
    """Every layer once, so that Triton's cache has the kernels before anything is timed."""

    def unit(log: Log) -> None:
        with log.part("compiled"), kernels(log):
            log.need_card()
            for channels, side, _ in sizes(log):
                layer_works(log, (batch, channels, side, side), dtype, layout, grouped=False)["local_bn"]()

    return unit


def layers_unit(batch: int, dtype: str) -> Unit:
    """All sizes of ResNet-50's layers: issued from Python, what the host takes for it, and from a CUDA graph."""

    def unit(log: Log) -> None:
        grouped = start_group(log)
        with log.part("the kernels take these layers"):
            log.need_card()
            assert gpu.takes(torch.empty(1, 1, dtype=DTYPES[dtype], device="cuda"))
        for layout, (channels, side, times) in itertools.product(FORMATS, sizes(log)):
            shape = (batch, channels, side, side)
            moved = PASSES * batch * channels * side**2 * DTYPES[dtype].itemsize
            facts = {"batch": batch, "dtype": dtype, "layout": layout, "times": times, "moved": moved}
            name = f"{layout} {channels} x {side} x {side}"
            works = dict[str, Work]()
            with log.part(f"{name}, issued") as found, kernels(log):
                works = layer_works(log, shape, dtype, layout, grouped=grouped)
                seen = medians(log, works)
                found |= {**facts, "done": {one: each.done for one, each in seen.items()}}
                found["issued"] = {one: each.issued for one, each in seen.items()}
            graphs = dict[str, Work]()
            for one, work in works.items():
                with log.part(f"{name}, capture of {one}"):
                    log.need_card()
                    graphs[one] = recorded(work).replay
            with log.part(f"{name}, graph") as found:
                log.need_card()
                found |= {**facts, "done": {one: each.done for one, each in medians(log, graphs).items()}}

    return unit


def stage_e(card: bool) -> list[Phase]:
    """Layers of ResNet-50, forward and backward."""
    batches = BATCHES if card else (2,)
    kinds = itertools.product(batches, TIMED, FORMATS)
    compiling: dict[str, Unit] = {
        f"compile {batch} {dtype} {layout}": compiling_unit(batch, dtype, layout) for batch, dtype, layout in kinds
    }
    timed: dict[str, Unit] = {
        f"batch {batch} {dtype}": layers_unit(batch, dtype) for dtype, batch in itertools.product(TIMED, batches)
    }
    return [Phase(compiling, width=12 if card else 2, limit=60), Phase(timed, limit=45)]


# --- (f) -----------------------------------------------------------------------------------------


def steps_unit(batch: int) -> Unit:
    """Steps of a ResNet-50 by each contender."""

    def unit(log: Log) -> None:
        trainers = dict[str, Trainer]()
        for name, make in at_hand(STEPS, grouped=start_group(log), card=log.card is not None).items():
            with log.part(f"{name}: first step"), kernels(log):
                trainer = Trainer(make(model_of(log, 50)), batch_of(log, batch), 1e-3)
                trainer.step()
                trainers[name] = trainer
        with log.part("steps") as found, kernels(log):
            seen = medians(log, {name: trainer.step for name, trainer in trainers.items()}, 5)
            found |= {"batch": batch, "done": {name: each.done for name, each in seen.items()}}
            found["issued"] = {name: each.issued for name, each in seen.items()}

    return unit


def compiled_unit(name: str, together: Barrier) -> Unit:
    """Steps under ``torch.compile``: contenders compile side by side, and are timed one by one."""

    def unit(log: Log) -> None:
        grouped = start_group(log)
        for batch in (8, 64, 2) if log.card else (2,):
            with log.part(f"batch {batch}") as found:
                makers = at_hand({name: STEPS[name]}, grouped=grouped, card=log.card is not None)
                if name not in makers:
                    raise NotRunError("no card, or no group to sum in")
                torch._inductor.config.compile_threads = COMPILE_THREADS
                model = makers[name](model_of(log, 50))
                model.compile(dynamic=False, backend="inductor" if log.card else "aot_eager")
                trainer = Trainer(model, batch_of(log, batch), 1e-3)
                trainer.step()
                log.synchronize()
                with suppress(threading.BrokenBarrierError):  # another one has failed, or is too slow to wait for
                    together.wait(60 if log.card else 1)
                with (log.folder / RESULTS).open() as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    found |= {"batch": batch, "done": medians(log, {name: trainer.step}, 5)[name].done}

    return unit


def stage_f(card: bool) -> list[Phase]:
    """Whole steps of ResNet-50, ``torch.compile`` too."""
    names = ("BatchNorm2d", "SyncBatchNorm", "local_bn", "sync_bn") if card else ("BatchNorm2d", "local_bn")
    together = multiprocessing.get_context("fork").Barrier(len(names))
    compiled: dict[str, Unit] = {f"compiled: {name}": compiled_unit(name, together) for name in names}
    steps: dict[str, Unit] = {f"batch {batch}": steps_unit(batch) for batch in ((8, 2, 64) if card else (2,))}
    return [Phase(steps, limit=45), Phase(compiled, width=len(names), limit=90)]


# --- (g) -----------------------------------------------------------------------------------------


def slowest(log: Log) -> dict[str, Any]:
    """The layers of stage (e) at batch 64 that take longest, of all their kind, beyond what their bytes take."""
    found = [each for each in records(log.folder) if each["stage"] == "e" and each["part"].endswith(", graph")]
    found = [each for each in found if each["state"] == "ok" and each["batch"] == 64]
    copies = [each for each in records(log.folder) if each["part"] == "copy" and each["state"] == "ok"]
    if not found or not copies:
        return {"batch": 64, "dtype": "float32", "layout": "contiguous", "part": "contiguous 256 x 56 x 56, graph"}
    rate = copies[-1]["bytes_per_second"] / 1e3  # bytes per millisecond
    return max(found, key=lambda each: each["times"] * (each["done"]["local_bn"] - each["moved"] / rate))


def profile_kernels(log: Log) -> None:
    """Of the slowest layer: the time and the bytes per second of each kernel."""
    with log.part("kernels") as found:
        log.need_card()
        layer = slowest(log)
        channels, side = (int(each) for each in layer["part"].removesuffix(", graph").split(" ", 1)[1].split(" x ")[:2])
        shape = (layer["batch"], channels, side, side)
        work = layer_works(log, shape, layer["dtype"], layer["layout"], grouped=False)["local_bn"]
        burst(log, work)
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
            burst(log, work, 20)
        averages = seen.key_averages()
        one_pass = math.prod(shape) * DTYPES[layer["dtype"]].itemsize
        found |= {"shape": shape, "dtype": layer["dtype"], "layout": layer["layout"]}
        found["kernels"] = rows = dict[str, dict[str, float]]()
        for each in averages:
            micros = each.self_device_time_total / max(each.count, 1)
            if micros and each.device_type == torch.autograd.DeviceType.CUDA:
                passes = KERNEL_PASSES.get(each.key, 0)
                rows[each.key] = {"microseconds": micros, "bytes_per_second": passes * one_pass / (micros * 1e-6)}
        table = averages.table(sort_by="self_device_time_total", row_limit=30, max_name_column_width=60)
        (log.folder / TABLE).write_text(f"{shape} {layer['dtype']} {layer['layout']}\n{table}\n")


def profile_host(log: Log) -> None:
    """What Python does for a small layer of ``sync_bn`` and of ``local_bn``."""
    grouped = start_group(log)
    shape = (2, 256, 14, 14) if log.card else (2, 1, 4, 4)
    with kernels(log):
        works = layer_works(log, shape, "float32", "contiguous", grouped=grouped)
        for name in ("local_bn", "sync_bn"):
            with log.part(name) as found:
                burst(log, works[name])
                profiler = cProfile.Profile()
                found["microseconds_unprofiled"] = burst(log, works[name], 100 if log.card else 1).issued * 1e3
                with torch.autograd.set_multithreading_enabled(False):  # the backward pass, too, in this thread
                    profiler.runcall(burst, log, works[name], 100 if log.card else 1)
                text = io.StringIO()
                pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(25)
                with (log.folder / TABLE).open("a") as file:
                    file.write(f"--- host, {name} {shape}\n{text.getvalue()}\n")


def stage_g(card: bool) -> list[Phase]:
    """A profile of the slowest layer, and of the host's part."""
    return [Phase({"kernels": profile_kernels, "host": profile_host}, limit=45)]
