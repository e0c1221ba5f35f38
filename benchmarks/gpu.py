"""Norm layers and whole steps on an NVIDIA card, beside torch's own: layers of ResNet-50, NCCL with one rank.

Run ``make bench-gpu``, on a machine with torch and Triton and nothing else; it takes less than 8 minutes and writes one
dated file. A group of one rank needs no collective, so it is told to be one of two: ``sync_bn`` and torch's
SyncBatchNorm both pass NCCL in every layer. Without a card nothing is measured, and a file says so, unless an earlier
run on a card has left one.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from gpu_contenders import layers, resnets
from measure import markdown
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

FOLDER = Path(__file__).parents[1] / "docs" / "benchmarks"
NOT_RUN = "gpu-not-run.md"
NO_FIGURES = """# Norms on a GPU

Not run: no CUDA device was at hand. `make bench-gpu` on a machine with an NVIDIA card, torch and Triton replaces this
file by a dated one.
"""
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Channels, side of the image, layers of this size: ResNet-50 on images of 224 x 224.
SHAPES = [(64, 112, 1), (64, 56, 6), (256, 56, 4), (128, 56, 1), (128, 28, 7), (512, 28, 5), (256, 28, 1)]
SHAPES += [(256, 14, 11), (1024, 14, 7), (512, 14, 1), (512, 7, 5), (2048, 7, 4)]
BATCHES = (2, 8, 64)
PASSES = 8
"""Over memory: x twice and y once forward; x and dy twice and dx once backward."""

ROUNDS, BURST = 5, 10
WIDTH, IMAGE = 64, 56
"""The ResNet-50's stem keeps its size, so that images of 56 give the layers behind it the sizes of ImageNet's."""

Work = Callable[[], object]


def milliseconds(work: Work, times: int = BURST) -> float:
    """Of one ``work``, on the device's clock, issued ``times`` times in a row; gaps count."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times


def medians(works: dict[str, Work], times: int = BURST) -> dict[str, float]:
    """The median over rounds, in which the contenders take turns."""
    for work in works.values():
        milliseconds(work, 3)
    seen: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(ROUNDS):
        for name, work in works.items():
            seen[name].append(milliseconds(work, times))
    return {name: statistics.median(values) for name, values in seen.items()}


def recorded(work: Work) -> Work:
    """``work`` as a CUDA graph: what is left is the device's own time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def bandwidth() -> float:
    """Bytes read and written per second by a copy of 2 GiB."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (medians({"copy": lambda: target.copy_(source)})["copy"] * 1e-3)


# --- layers --------------------------------------------------------------------------------------


def layer_works(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> dict[str, Work]:
    """A forward and backward of one layer by each contender, on tensors of its own."""

    def work(layer: nn.Module) -> Work:
        x, dy = (torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=memory_format) for _ in range(2))
        leaves = [x.requires_grad_(), *layer.parameters()]
        return lambda: torch.autograd.grad(layer(x), leaves, dy)

    return {name: work(layer) for name, layer in layers(shape[1]).items()}


def layer_rows(batch: int, dtype: str, layout: str, copy: float) -> tuple[list[list[str]], list[list[str]]]:
    """All 53 layers together, issued from Python and from a graph; and each shape's share of the copy's bandwidth."""
    totals: dict[str, dict[str, float]] = {}
    shares = []
    for channels, side, times in SHAPES:
        shape = (batch, channels, side, side)
        works = layer_works(shape, DTYPES[dtype], FORMATS[layout])
        eager = medians(works)
        graphs = medians({name: recorded(work) for name, work in works.items()})
        for way, seen in (("eager", eager), ("graph", graphs)):
            for name, value in seen.items():
                row = totals.setdefault(way, {})
                row[name] = row.get(name, 0.0) + times * value
        moved = PASSES * batch * channels * side * side * DTYPES[dtype].itemsize
        shares.append(
            [f"{channels} x {side} x {side}", str(batch), dtype, layout]
            + [f"{graphs[name] * 1e3:.1f}" for name in graphs]
            + [f"{moved / (graphs['local_bn'] * 1e-3) / copy:.0%}"]
        )
    rows = [
        [way, str(batch), dtype, layout]
        + [f"{value:.3f}" for value in row.values()]
        + [f"{row['sync_bn'] / row['SyncBatchNorm']:.2f}", f"{row['local_bn'] / row['BatchNorm2d']:.2f}"]
        for way, row in totals.items()
    ]
    return rows, shares


def launches() -> list[list[str]]:
    """What one layer of ``sync_bn`` launches, by the profiler."""
    layer = layers(256)["sync_bn"]
    x = torch.randn(64, 256, 56, 56, device="cuda", requires_grad=True)
    y = layer(x)
    torch.autograd.grad(y, x, x.detach())
    found = []
    for direction in ("forward", "backward"):
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            if direction == "forward":
                y = layer(x)
            else:
                torch.autograd.grad(y, [x, *layer.parameters()], x.detach())
            torch.cuda.synchronize()
        names = [each.name for each in seen.events() if each.device_type == torch.autograd.DeviceType.CUDA]
        ours = [name for name in names if "nccl" not in name.lower()]
        found.append([direction, str(len(ours)), "; ".join(name[:60] for name in ours)])
    return found


# --- steps ---------------------------------------------------------------------------------------


def step_of(model: nn.Module, batch: int) -> tuple[Work, Callable[[], Tensor]]:
    """A training step, and its forward and backward alone, which returns the loss."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    x = torch.randn(batch, 3, IMAGE, IMAGE, device="cuda")
    labels = torch.arange(batch, device="cuda") % 10

    def gradients() -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        loss = functional.cross_entropy(model(x), labels)
        loss.backward()
        return loss.detach()

    def step() -> None:
        gradients()
        optimizer.step()

    return step, gradients


def step_rows(batch: int) -> list[list[str]]:
    """Steps of a ResNet-50 by each contender."""
    seen = medians({name: step_of(model, batch)[0] for name, model in resnets(WIDTH).items()}, 5)
    pairs = ("sync_bn", "SyncBatchNorm"), ("sync_bn, fused", "sync_bn"), ("mabn", "mabn, Local")
    ratios = [seen[one] / seen[other] for one, other in pairs]
    return [[str(batch), *(f"{value:.2f}" for value in seen.values()), *(f"{each:.3f}" for each in ratios)]]


def waits() -> str:
    """Whether a step of ``sync_bn`` makes the host wait for the card."""
    step, _ = step_of(resnets(WIDTH)["sync_bn"], 8)
    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    except RuntimeError as error:
        return f"it waits: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no wait"


def replays() -> str:
    """Whether forward and backward of ``sync_bn``, replayed from a graph, give the same loss and gradients."""
    model = resnets(WIDTH)["sync_bn"]
    _, gradients = step_of(model, 8)
    loss = gradients()
    expected = [loss, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]
    kept: list[Tensor] = []

    def keep() -> None:
        kept[:] = [gradients()]

    recorded(keep)()
    torch.cuda.synchronize()
    given = [*kept, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]
    worst = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(given, expected, strict=True))
    return f"largest relative difference {worst:.1e} over the loss and {len(expected) - 1} gradients"


# --- the file ------------------------------------------------------------------------------------


def machine() -> list[str]:
    """What was measured on, and with."""
    import triton

    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")[0]
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}, Triton {triton.__version__}"
    return [f"{torch.cuda.get_device_name()}, driver {driver or 'unknown'}, {versions}."]


def report(limit: float) -> list[str]:
    """Everything, as lines of Markdown; no combination of layers begins after ``limit`` seconds."""
    began = time.perf_counter()
    copy = bandwidth()
    lines = ["# Norms on a GPU", "", *machine(), f"A copy moves {copy / 1e12:.2f} TB/s."]
    lines += ["", "## Launches of a `sync_bn` layer, without NCCL's", ""]
    lines += markdown(["", "launches", "names"], launches())
    lines += ["", f"Host synchronization in a step of ResNet-50: {waits()}.", "", f"Graph replay: {replays()}."]
    lines += ["", f"## Steps of ResNet-50 (images of {IMAGE} x {IMAGE}), ms", ""]
    names = list(resnets(WIDTH))
    titles = ["batch", *names, "`sync_bn` over SyncBatchNorm", "fused over `sync_bn`", "`mabn` over `Local`"]
    lines += markdown(titles, [row for batch in BATCHES[:2] for row in step_rows(batch)])
    sums, shares, skipped = [], [], []
    for batch in BATCHES:
        for dtype in DTYPES:
            for layout in FORMATS:
                if time.perf_counter() - began > limit:
                    skipped.append(f"{batch}, {dtype}, {layout}")
                    continue
                two = layer_rows(batch, dtype, layout, copy)
                sums += two[0]
                shares += two[1]
    names = list(layers(4))
    titles = ["issued", "batch", "dtype", "layout", *names, "`sync_bn` over SyncBatchNorm", "`local_bn` over stock"]
    lines += ["", "## All 53 layers of ResNet-50, forward and backward, ms", "", *markdown(titles, sums, 4)]
    lines += ["", f"Not run for lack of time: {'; '.join(skipped) or 'nothing'}."]
    titles = ["layer", "batch", "dtype", "layout", *names, "`local_bn`: share of the copy's bandwidth"]
    lines += ["", "## Each layer from a graph, microseconds", "", *markdown(titles, shares, 4)]
    return [*lines, "", f"Took {time.perf_counter() - began:.0f} s."]


def not_run(folder: Path) -> None:
    """Say that there are no figures, and leave a file that says it where there is none with figures."""
    print("not run: no CUDA device")
    if not [path for path in folder.glob("gpu-*.md") if path.name != NOT_RUN]:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NOT_RUN).write_text(NO_FIGURES)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write the file."""
    parser = argparse.ArgumentParser(description="Time norms on an NVIDIA card.")
    parser.add_argument("--out", type=Path, help=f"the file; by default a dated one in {FOLDER}")
    parser.add_argument("--limit", type=float, default=400, help="seconds after which no further layers are measured")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        not_run(options.out.parent if options.out else FOLDER)
        return
    torch.cuda.set_device(0)
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    lines = report(options.limit)
    path = options.out or FOLDER / f"gpu-{datetime.date.today().isoformat()}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    path.with_name(NOT_RUN).unlink(missing_ok=True)
    print("\n".join(lines))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
