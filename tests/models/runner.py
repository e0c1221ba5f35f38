"""Each model in a process of its own, with the libraries imported already: one that crashes or hangs ends itself."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

import distnorm
from tests.models import checks
from tests.models.case import Case, call, leaves
from tests.models.checks import CHECKS, COPIES, Subject
from tests.models.zoo import cases

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import measure

LIBRARIES = ("tests.models.operators", "timm", "torchvision", "pytorchcv.model_provider", "segmentation_models_pytorch")
LIBRARIES += ("monai.networks.nets", "ultralytics", "transformers")
PATIENCE = 300
"""Seconds that one model may take."""

Record = dict[str, Any]


def examine(case: Case) -> Record:
    """All checks of a model, and why some fail."""
    torch.set_default_dtype(torch.float64)
    subject, reasons = Subject(case), []
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        unfit = attempt(lambda: [subject.reference])
        if unfit:
            return {"reasons": [f"the stock model: {unfit}"]}
        norms, converted, fused = checks.counts(case)
        for name, check in CHECKS.items():
            if name == "ranks" and case.whole:
                reasons.append(f"two ranks: not run, {case.whole}")
            elif failed := attempt(lambda check=check: check(subject)):
                reasons.append(f"{name}: {failed}")
        for way in COPIES:
            if failed := attempt(lambda way=way: checks.copied(subject, way)):
                same = attempt(lambda way=way: checks.copied(subject, way, of_stock=True))
                reasons.append(f"{way}: the stock model too, {same}" if same else f"{way}: {failed}")
    if subject.one_step:
        reasons.append("one step: in more, rounding alone moves the stock model too far to compare")
    worst = max(subject.differences, key=lambda name: subject.differences[name] if name != "float32" else -1.0)
    if checks.CLOSE < subject.differences[worst] <= checks.WIDE:
        reasons.append(f"rounding: the stock model moves by {subject.noise:.0e} if its inputs move by 1e-15")
    reasons += left_alone([str(each.message) for each in said])
    found = {"norms": norms, "converted": converted, "fused": fused, "difference": subject.differences[worst]}
    return found | {"float32": subject.differences.get("float32"), "reasons": reasons}


def attempt(check: Callable[[], object]) -> str | None:
    """What went wrong, in a line."""
    try:
        check()
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        text = lines[0] if lines else ""
        return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}"
    return None


def left_alone(said: Iterable[str]) -> list[str]:
    """What distnorm says of norms that it does not convert."""
    words = "distnorm.convert did not convert unknown subclasses of batch norm: "
    found = {text.removeprefix(words).partition(". To convert")[0] for text in said if text.startswith(words)}
    return [f"left alone: {each}" for each in sorted(found)]


def timed(case: Case) -> Record:
    """Milliseconds of a step of plain SGD in float32: stock, ``local_bn`` and ``local_bn`` fused take turns."""
    contenders = {
        "stock": stepper(case, lambda model: model),
        "local_bn": stepper(case, lambda model: distnorm.convert(model, "local_bn")),
        "fused": stepper(case, lambda model: distnorm.convert(model, "local_bn", fuse=True)),
    }
    options = measure.parser_of("", runs=40, warmup=2).parse_args(["--limit", "1"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ms = measure.rounds(contenders, options)
    ratios = {name: measure.ratio(ms[name], ms["stock"]).median for name in ("local_bn", "fused")}
    return {"ms": statistics.median(ms["stock"]), "rounds": len(ms["stock"]), **ratios}


def stepper(case: Case, prepare: Callable[[nn.Module], nn.Module]) -> Callable[[], float]:
    """A function that takes a step and returns its milliseconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = prepare(case.make())
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    given = case.draw(0, case.timed_batch) if case.timed is None else case.timed(case.timed_batch)

    def step() -> float:
        started = time.perf_counter()
        optimizer.zero_grad()
        losses = [y.square().mean() for _, y in leaves(call(model, given)) if y.requires_grad]
        torch.stack(losses).sum().backward()
        optimizer.step()
        return (time.perf_counter() - started) * 1e3

    return step


STAGES: dict[str, Callable[[Case], Record]] = {"values": examine, "times": timed}


def _child(key: str, stage: str, pipe: Connection) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # libraries are talkative
    try:
        pipe.send(STAGES[stage](cases()[key]))
    except Exception as error:
        pipe.send({"reasons": [f"{type(error).__name__}: {error}"]})


def run(keys: Iterable[str], stage: str, tell: Callable[[str, Record], None], jobs: int = 1) -> None:
    """Run a stage of these cases, ``jobs`` at a time, and tell what was found of each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *LIBRARIES])

    def one(key: str) -> None:
        ours, theirs = context.Pipe(duplex=False)
        started = time.perf_counter()
        process = context.Process(target=_child, args=(key, stage, theirs))
        process.start()
        theirs.close()
        try:
            found = ours.recv() if ours.poll(PATIENCE) else {"reasons": [f"takes more than {PATIENCE} s"]}
        except EOFError:
            process.join()
            found = {"reasons": [f"the process ended with {process.exitcode}"]}
        process.kill()
        process.join()
        tell(key, {**found, "seconds": round(time.perf_counter() - started, 1)})

    with ThreadPoolExecutor(jobs) as threads:
        for each in [threads.submit(one, key) for key in keys]:
            each.result()
