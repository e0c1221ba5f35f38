"""Moving statistics in mixed precision: what autocast and a loss scale do to windows."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import distnorm
from tests.distributed import moving_jobs as moving
from tests.distributed.moving_jobs import WARM, WINDOW, Seen
from tests.support.pool import Pool

STEPS = 20


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_bfloat16(pool: Pool, recipe: str) -> None:
    ranks = pool.run(2, train_mixed, recipe, torch.bfloat16, None, ())
    moving.equal_on_all_ranks([each.seen for each in ranks])
    exact = pool.run(2, train_mixed, recipe, torch.float32, None, ())
    for ours, expected in zip(ranks, exact, strict=True):
        torch.testing.assert_close(ours.seen.running, expected.seen.running, rtol=0.05, atol=0.05)
        assert ours.seen.messages == []
        assert not torch.equal(ours.seen.parameters["head.bias"], expected.seen.parameters["head.bias"])


class Mixed(NamedTuple):
    """A training with a loss scale, which ended at ``scale``."""

    seen: Seen
    scale: float
    dropped: list[int]


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_float16_windows_hold_no_loss_scale(pool: Pool, recipe: str) -> None:
    low, high = (pool.run(2, train_mixed, recipe, torch.float16, scale, ()) for scale in (2.0**4, 2.0**9))
    for ranks in (low, high):
        moving.equal_on_all_ranks([each.seen for each in ranks])
    for ours, expected in zip(high, low, strict=True):
        assert (ours.scale, expected.scale) == (2.0**9, 2.0**4)
        torch.testing.assert_close(ours.seen.in_flight, expected.seen.in_flight, rtol=0.05, atol=0.02)
        assert ours.dropped == [0, 0, 0, 0]


@pytest.mark.parametrize("step", [2, WARM + 4], ids=["warming up", "moving"])
@pytest.mark.parametrize("boundary", ["backward", "optimizer"])
@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_float16_overflow(pool: Pool, recipe: str, boundary: str, step: int) -> None:
    """One rank's cotangents overflow: all ranks leave them out, and skip the optimizer's step."""
    ranks = pool.run(2, train_mixed, recipe, torch.float16, 2.0**8, (step,), boundary)
    moving.equal_on_all_ranks([each.seen for each in ranks])
    for each in ranks:
        assert each.scale == 2.0**7
        assert each.seen.state["step"] == STEPS
        assert each.dropped == ranks[0].dropped
        assert max(each.dropped) == 1
        assert [message for message in each.seen.messages if "NaN or Inf" in message and "norm1" in message]
        assert each.seen.in_flight.isfinite().all()
        if recipe == "mabn":
            assert each.seen.window["ring"].isfinite().all()
            assert each.seen.window["filled"].tolist() == [WINDOW - 1] * 4


def train_mixed(
    rank: int,
    recipe: str,
    dtype: torch.dtype,
    scale: float | None,
    overflows: tuple[int, ...],
    boundary: str = "backward",
) -> Mixed:
    """Train under autocast; in the steps of ``overflows`` the last rank's loss is huge."""
    model = moving.net(recipe, dtype=torch.float32)
    optimizer = moving.adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    distnorm.attach(model, optimizer=optimizer if boundary == "optimizer" else None, loss_scale=scaler.get_scale)
    wrapped: DistributedDataParallel = moving.wrapped(model)
    with moving.listening() as messages, distnorm.Ledger(model) as ledger:
        for step in range(STEPS):
            x_NCS, labels_N = moving.batch(rank, step, torch.float32)
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                loss = F.cross_entropy(wrapped(x_NCS).float(), labels_N)
            scaler.scale(loss * (1e30 if step in overflows and rank == 1 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
        found = moving.seen(model, [], messages, ledger)
    return Mixed(found, scaler.get_scale(), found.moving["bucket"]["dropped"].tolist())
