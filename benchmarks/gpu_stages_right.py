"""Stages (a) to (c): what there is, every kernel against float64, and ten steps of a ResNet-18 against stock."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess

import torch
import triton
from gpu_contenders import RECIPES, can_run
from gpu_stages import DTYPES, FORMATS, Trainer, batch_of, exact_convolutions, kernels, medians, model_of, start_group
from gpu_units import Log, NotRunError, Phase, Unit
from torch import Tensor

import distnorm
from distnorm.kernels import gpu
from distnorm.kernels.gpu import apply, entries
from distnorm.kernels.gpu.gpu_pass import GpuPass
from distnorm.methods import RMS, BatchNorm, ChannelAffine
from distnorm.recipe import Recipe
from distnorm.types import RELU, Affine, Epilogue, Running
from tests.support.cases import EPS, REFERENCES, Case, Result, assert_within, limits, numbers

NVIDIA = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem,clocks.sm,clocks.mem"


# --- (a) -----------------------------------------------------------------------------------------


def versions(log: Log) -> None:
    """What is there, and whether Triton can launch: without it all layers would take the plain path."""
    with log.part("versions") as found:
        found |= {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
        found |= {"CUDA": torch.version.cuda, "cores": os.cpu_count()}
        found["cc"] = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    with log.part("card") as found:
        log.need_card()
        found["name"], found["capability"] = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
        found["cuDNN"], found["NCCL"] = torch.backends.cudnn.version(), torch.cuda.nccl.version()
        smi = ["nvidia-smi", f"--query-gpu={NVIDIA}", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip()
    with log.part("Triton launches") as found:
        log.need_card()
        from triton.runtime import driver

        found["target"] = str(driver.active.get_current_target())  # raises what gpu.available() only warns of
        assert gpu.available(), "DISTNORM_KERNELS is set, or Triton cannot launch"


def bandwidth(log: Log) -> None:
    """Bytes read and written per second by a copy of 2 GiB."""
    with log.part("copy") as found:
        log.need_card()
        source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        taken = medians(log, {"copy": lambda: target.copy_(source)})["copy"].done
        found["bytes_per_second"] = 2 * source.numel() / (taken * 1e-3)


def collectives(log: Log) -> None:
    """Whether a job of one rank can sum."""
    start_group(log)


def stage_a(card: bool) -> list[Phase]:
    """Versions, card, measured copy bandwidth, NCCL."""
    return [Phase({"versions": versions, "bandwidth": bandwidth, "collectives": collectives}, limit=25)]


# --- (b) -----------------------------------------------------------------------------------------

# Several programs per channel; odd; one program per channel.
SHAPES = [(64, 64, 56, 56), (33, 67, 7, 7), (4, 2048, 7, 7)]
SMALL = [(2, 3, 48, 48), (3, 5, 7, 7), (4, 2, 4, 4)]


Kind = tuple[ChannelAffine, bool, bool]
"""A method, whether a residual is added, and whether there is a ReLU."""

PLAIN: Kind = (BatchNorm(), False, False)
OTHERS: tuple[Kind, Kind] = ((BatchNorm(), True, True), (RMS(), False, True))


def kernel_unit(shape: tuple[int, ...], dtype: str, layout: str, other: Kind) -> Unit:
    """Batch norm as it is, and another kind."""

    def unit(log: Log) -> None:
        case = Case(shape, layout, layout, mean=5.0, dtype=DTYPES[dtype])
        for method, adds, relu in (PLAIN, other):
            name = f"{type(method).__name__}{' + residual' * adds}{', ReLU' * relu}"
            with log.part(name):
                judge(case._replace(method=method), log.device, adds=adds, relu=relu)

    return unit


def judge(case: Case, device: str, *, adds: bool, relu: bool) -> None:
    """Output, all gradients and running statistics by the law of accuracy of tests/support/cases.py."""
    x, dy, weight, bias = (each.to(device) for each in numbers(case))
    residual = numbers(case._replace(mean=0.0, seed=1))[0].to(device) if adds else None
    running = Running(torch.zeros_like(bias), torch.ones_like(bias), torch.tensor(0, device=device), 0.1)
    formula = case.method.formula(Affine(weight, bias, EPS))
    assert formula is not None
    passes = GpuPass(formula, EPS)
    y = passes.normalize(x, passes.sums(x), weight, bias, Epilogue(residual, RELU if relu else None), running)
    cotangents, dweight, dbias, dz = passes.pull(dy, x, y if relu else None, weight)
    ours = Result(y, passes.combine(dz, x, cotangents), dweight, dbias)

    leaves = wide_x, wide_weight, wide_bias = [each.double().requires_grad_() for each in (x, weight, bias)]
    truth = REFERENCES[type(case.method)]([wide_x], wide_weight, wide_bias, eps=EPS)
    before = truth.outputs[0] if residual is None else truth.outputs[0] + residual.double()
    # Within rounding of 0 the mask of the rounded output is as right as that of the exact one.
    passed = torch.where((y > 0) | (not relu), before, 0)
    after = before.relu() if relu else before
    expected = Result(after.detach(), *torch.autograd.grad(passed, leaves, dy.double()))
    rounding = 0.0 if case.dtype is torch.float32 else torch.finfo(case.dtype).eps
    assert_within(ours, expected, limits(case, x, dy, weight), rounding=rounding)
    if formula.kinds == 2:
        torch.testing.assert_close(running.mean_C, truth.running_mean.detach().float())
        torch.testing.assert_close(running.var_C, truth.running_var.detach().float())
    assert running.updates == 1 and (y.dtype, ours.dx.dtype) == (case.dtype, case.dtype)


def windows(log: Log) -> None:
    """The kernels of policies that remember steps, and of statistics that complete at a step's end."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float64).to(log.device)

    start, count, number, values, slots = 3, 300, 1, 310, 4
    newest, sums, outbox, scale = drawn(count), drawn(values), drawn(values + slots + 1), torch.tensor(2.0)
    filled, weight = torch.tensor([0, 2, 1, 1], device=log.device), torch.tensor(3.0, dtype=torch.float64)
    scale, weight, span = scale.to(log.device), weight.to(log.device), slice(start, start + count)
    with log.part("window"):
        entered, before = outbox.clone(), outbox
        out = entries.window(newest, weight, scale, 1.0, sums, filled, entered, start, count, number, True)
        mean = (sums[span] + newest / 2 / 3) / 3
        torch.testing.assert_close(out, torch.cat((mean * 6, weight.view(1))))
        torch.testing.assert_close(entered[span], before[span] + newest / 2)
        torch.testing.assert_close(entered[values + number], before[values + number] + 3)
    with log.part("mix"):
        entered = outbox.clone()
        out = entries.mix(newest, scale, 1.0, sums, entered, start, number)
        torch.testing.assert_close(out, newest + 2 * sums[span])
        torch.testing.assert_close(entered[span], outbox[span] + newest / 2)
    with log.part("push"):
        starts = torch.tensor([0, 3, 303, 306, 310], device=log.device)
        vector, ring, position = drawn(values + slots + 1) + 0.5, drawn(2, values), filled % 2
        dropped, kept, counts = torch.zeros_like(filled), ring.clone(), filled.clone()
        vector[304] = float("nan")  # of the third slot
        usable, following = entries.push(vector, starts, ring, counts, position, sums, dropped)
        assert usable.tolist() == [True, True, False, True] and dropped.tolist() == [0, 0, 1, 0]
        for slot in (0, 1, 3):
            part = slice(int(starts[slot]), int(starts[slot + 1]))
            kept[position[slot], part] = vector[part] / vector[values + slot]
            torch.testing.assert_close(sums[part], kept[:, part].sum(0))
        torch.testing.assert_close(ring, kept)
        assert counts.tolist() == [1, 2, 1, 2] and torch.equal(following, (position + usable) % 2)
    with log.part("update_running"):
        running = [torch.zeros(200, device=log.device), torch.ones(200, device=log.device), filled[0].clone()]
        means, total = drawn(400), torch.tensor(9.0, dtype=torch.float64, device=log.device)
        means[200:] += means[:200].square()
        apply.update_running(means, total, torch.ones_like(total), running, None, 0.1, 2)
        torch.testing.assert_close(running[0], (0.1 * means[:200]).float())
        var = (means[200:] - means[:200].square()) * 9 / 8
        torch.testing.assert_close(running[1], (0.9 + 0.1 * var).float())
        assert running[2] == 1


def stage_b(card: bool) -> list[Phase]:
    """Every kernel compiled and compared with float64: three shapes, three dtypes, both layouts."""
    units: dict[str, Unit] = {}
    for row, (shape, dtype) in enumerate(itertools.product(SHAPES if card else SMALL, DTYPES)):
        for column, layout in enumerate(FORMATS):
            name = f"{'x'.join(map(str, shape))} {dtype} {layout}"
            units[name] = kernel_unit(shape, dtype, layout, OTHERS[(row + column) % 2])
    # Side by side: the compiler takes a second or more for each variant of each kernel.
    return [Phase({"windows": windows, **units}, width=len(units) + 1 if card else 2, limit=50)]


# --- (c) -----------------------------------------------------------------------------------------

STEPS, RATE = 10, 0.01
CLOSE = 1e-3
"""Largest relative difference of a loss after ten steps in float32, without TF32."""


def losses(log: Log, recipe: Recipe | None, *, fuse: bool = False) -> list[float]:
    """Of steps of a ResNet-18 on one batch; without a recipe it stays as it is."""
    model = model_of(log, 18)
    trainer = Trainer(
        model if recipe is None else distnorm.convert(model, recipe, fuse=fuse),
        batch_of(log, 16 if log.card else 4, 32),
        RATE,
    )
    found = [trainer.step() for _ in range(STEPS if log.card else 4)]
    return [float(each) for each in found]


def training_unit(name: str, recipe: Recipe) -> Unit:
    """Its losses beside those of stock and of the same recipe on the plain path."""

    def unit(log: Log) -> None:
        exact_convolutions()
        if not can_run(name, grouped=start_group(log), card=True):
            raise NotRunError("no group to sum in")
        plain = list[float]()
        with log.part("plain path") as found, kernels(log, wanted=False):
            found["losses"] = plain = losses(log, recipe)
        stock = losses(log, None)
        for fuse in (False, True):
            with log.part("fused" if fuse else "kernels") as found, kernels(log):
                ours = losses(log, recipe, fuse=fuse)
                found |= {"losses": ours, "stock": stock}
                # Moving statistics are not stock's; nor are RMS and centred weights.
                wanted = stock if name in ("sync_bn", "local_bn") else plain
                worst = max(abs(one - two) / max(abs(two), 0.1) for one, two in zip(ours, wanted, strict=True))
                found["difference"] = worst
                assert worst < CLOSE, f"{worst} from {'stock' if wanted is stock else 'the plain path'}: {wanted}"

    return unit


def stage_c(card: bool) -> list[Phase]:
    """Ten training steps of a ResNet-18 by each recipe, fused and not."""
    return [Phase({name: training_unit(name, each) for name, each in RECIPES.items()}, width=4 if card else 2)]
