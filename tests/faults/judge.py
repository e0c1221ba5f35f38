"""Whether ranks ended as the table demands."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from tests.faults.actions import STOPPED_LONGER_S, STOPS
from tests.faults.faults import Fault, Kind
from tests.faults.rank import SAVES, STEPS, C, batch

SOON_S, PER_LOAD_S = 2.0, 1.0
"""How late an error may come that needs no waiting; with as much more as the machine is busy."""


@dataclass
class Found:
    """What is left of a job: by rank its exit code, its log and its output, and what it saved and saw in training."""

    codes: list[int | None]
    logs: list[list[dict[str, Any]]]
    outputs: list[str]
    left: list[str]
    saved: list[int | str]
    seen: list[Any]


@dataclass
class Judged:
    """By rank how it ended, after how many seconds, and with what text; and what is not as it must be."""

    kinds: list[str]
    seconds: list[float | None]
    texts: list[str]
    wrong: list[str] = field(default_factory=list)


def judge(found: Found, fault: Fault, transport: str, recipe: str, undisturbed: Found | None) -> Judged:
    """Compare what was ``found`` with what must be."""
    ends, says, within, _ = fault.must(transport, recipe)
    last = [log[-1] if log else {"event": "nothing"} for log in found.logs]
    kinds = [_kind(each, code) for each, code in zip(last, found.codes, strict=True)]
    judged = Judged(kinds, _seconds(found.logs), [each.get("text", "") for each in last])
    limit_s = SOON_S + PER_LOAD_S * os.getloadavg()[0] + (fault.timeout_s if within == "timeout" else 0.0)
    for rank, expected in enumerate(ends):
        wrong = _wrong(expected, rank, last[rank], found.codes[rank], says, last, undisturbed)
        if wrong:
            judged.wrong.append(f"rank {rank} must end {expected}: {wrong}; it printed\n{found.outputs[rank][-1500:]}")
        seconds, stopped_s = judged.seconds[rank], stopped(fault, rank)
        if seconds is not None and seconds > limit_s + stopped_s:
            judged.wrong.append(f"rank {rank} noticed after {seconds:.1f} s, more than {limit_s + stopped_s:.1f} s")
    judged.wrong += found.left
    judged.wrong += _wrong_files(found.saved, fault)
    if recipe == "sync_bn" and "right" in ends:
        judged.wrong += _wrong_values(found.seen)
    return judged


def stopped(fault: Fault, rank: int) -> float:
    """For how many seconds ``rank`` is stopped, and notices nothing."""
    return fault.timeout_s + STOPPED_LONGER_S if rank in STOPS.get(fault.do, ()) else 0.0


def _kind(last: dict[str, Any], code: int | None) -> str:
    if code is None:
        return "hangs"
    if last["event"] == "raised":
        return str(last["kind"])
    if code < 0:
        return signal.Signals(-code).name
    return "ends" if last["event"] == "ended" else f"exit code {code}"


def _seconds(logs: list[list[dict[str, Any]]]) -> list[float | None]:
    """From the fault, as the rank has seen it or else the first who has, to the exception."""
    faults = [[each["at"] for each in log if each["event"] == "fault"] for log in logs]
    started = [each["at"] for log in logs for each in log if each["event"] == "started"]
    first = min((at for each in faults for at in each), default=max(started, default=0.0))
    raised = [next((each["at"] for each in log if each["event"] == "raised"), None) for log in logs]
    since = [own[-1] if own else first for own in faults]
    return [None if at is None else at - begun for at, begun in zip(raised, since, strict=True)]


def _wrong(
    expected: Kind,
    rank: int,
    last: dict[str, Any],
    code: int | None,
    says: str,
    everyone: list[dict[str, Any]],
    undisturbed: Found | None,
) -> str:
    """Why this is not the ``expected`` end; empty if it is."""
    event, text = last["event"], last.get("text", "")
    if code is None:
        return "it hung"
    if expected == "right or error":
        expected = "right" if event == "ended" else "error"
    if expected in ("error", "own", "interrupt"):
        kind = {"own": "Injected", "interrupt": "KeyboardInterrupt"}.get(expected)
        if event != "raised" or (kind or last["kind"]) != last["kind"]:
            return f"exit code {code}, after {event} {text}"
        if expected == "error" and not re.search(says, text, re.DOTALL):
            return f"the text does not match {says!r}: {text}"
        return "" if code else "the exit code is 0"
    if expected in ("killed", "gone"):
        return "" if code == (-signal.SIGKILL if expected == "killed" else 0) else f"exit code {code}"
    if event != "ended" or code != 0:
        return f"exit code {code}, after {event} {text}"
    if any(each.get("running", last["running"]) != last["running"] for each in everyone):
        return "running statistics differ between ranks"
    if not last["finite"]:
        return "outputs are not finite"
    if expected == "right" and (undisturbed is None or last["state"] != undisturbed.logs[rank][-1].get("state")):
        return "parameters or running statistics are not those of the job to which nothing was done"
    return ""


def _wrong_files(saved: list[int | str], fault: Fault) -> list[str]:
    """A file is there from the first save on, and always one that can be read."""
    steps = {each + 1 for each in SAVES}
    wrong = [f"saved: {each}" for each in saved if each not in steps]
    if fault.at not in ("building", "binding", "loading") and len(saved) != 2:
        wrong.append(f"{len(saved)} files of 2 ranks")
    return wrong


def _wrong_values(seen: list[Any]) -> list[str]:
    """The first layer's outputs and its running mean, beside those of plain batch norm of the joined batch."""
    if len(seen) != 2:
        return ["nothing was seen of the first layer"]
    stock = nn.BatchNorm1d(C, affine=False).double()
    for step in range(STEPS):
        expected = stock(torch.cat([batch(rank, step) for rank in range(2)]))
        if not torch.allclose(torch.cat([each["y"][step] for each in seen]), expected, rtol=1e-10, atol=1e-10):
            return [f"outputs of step {step} are not those of plain batch norm"]
    same = [torch.allclose(each["mean"], stock.running_mean, rtol=1e-10, atol=1e-10) for each in seen]
    return [] if all(same) else ["running means are not those of plain batch norm"]
