"""Moving statistics under mixed precision, bad values, second derivatives and compilation."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import distnorm
from distnorm import Recipe
from distnorm.methods import RMS, BatchNorm
from distnorm.policies import AllReduce, Chain, Moving, Policy, StaleMix, Warmup
from tests.moving.models import batch, build, loss_of, same, shared_state
from tests.support.threads import run_threads

pytestmark = pytest.mark.usefixtures("entries")

POLICIES: dict[str, Policy] = {
    "Moving": Moving(window=3),
    "blocking": Moving(window=3, staleness=0),
    "sum": Moving(window=3, loss_reduction="sum"),
    "StaleMix": StaleMix(window=2),
    "Warmup": Warmup(then=Moving(window=3), steps=3),
    "Chain": Chain(AllReduce(), Moving(window=3, axis="local")),
}
EVERY = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mabn", "lazy_bn"])
def test_bfloat16_autocast_trains(name):
    """The loss falls through warm-up and after it, and running statistics stay float32."""

    def run(rank: int) -> list[float]:
        generator = torch.Generator().manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.BatchNorm2d(4))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.rand(parameter.shape, generator=generator) - 0.3)
        distnorm.convert(model, name, warmup=5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        distnorm.attach(model, optimizer=optimizer)
        losses = []
        for step in range(25):
            x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step % 3 + rank))
            with torch.autocast("cpu", torch.bfloat16):
                loss = (model(x).float() - 0.5).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all(each.dtype == torch.float32 for each in model.buffers() if each.is_floating_point())
        return losses

    for losses in run_threads(2, run):
        assert all(map(math.isfinite, losses))
        assert sum(losses[20:]) < 0.8 * sum(losses[:5])


def test_float16_needs_the_loss_scale():
    model = distnorm.convert(nn.Sequential(nn.Identity(), nn.BatchNorm1d(4)), "mabn", warmup=0)
    x = torch.randn(8, 4).half().requires_grad_()
    with pytest.raises(RuntimeError, match=r"^1: float16 training with .*distnorm\.attach\(model, loss_scale="):
        model(x)
    with torch.no_grad():
        model(x)  # no cotangents, no scale
    model.eval()
    model(x).sum().backward()
    model.train()
    distnorm.attach(model, loss_scale=lambda: 1024.0)
    y = model(x)
    (y.float() * 1024).mean().backward()
    assert y.dtype == torch.float16 and x.grad.isfinite().all()


def test_float16_with_an_exact_recipe_needs_no_scale():
    layer = distnorm.convert(nn.BatchNorm1d(4), "sync_bn")
    layer(torch.randn(8, 4).half().requires_grad_()).float().sum().backward()


@pytest.mark.parametrize(("recipe", "per_pass"), [("mabn", 1), ("lazy_bn", 1), ("sync_bn", 0)])
def test_the_scale_is_asked_for_once_per_backward_pass(recipe: str, per_pass: int):
    """A GradScaler reads it from the GPU, and waits for that."""
    asked = []
    model = distnorm.convert(nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4)), recipe)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    distnorm.attach(model, optimizer=optimizer, loss_scale=lambda: asked.append(1) or 8.0)
    for step in range(3):
        (model(batch(step, 0)) ** 2).mean().mul(8).backward()
        optimizer.step()
    assert len(asked) == 3 * per_pass


@EVERY
def test_loss_scales_come_out_of_the_windows(policy):
    """A scale that varies by powers of two: the same windows and, once it is taken out, the same gradients."""
    scales = [2.0**power for power in (0, 10, 10, -3, 5, 16, 4, 4)]

    def run(rank: int, scaled: bool) -> tuple[list[Tensor], Any]:
        model = build(Recipe(method=RMS(), policy=policy))
        current = [1.0]
        distnorm.attach(model, loss_scale=lambda: torch.tensor(current[0]) if rank else current[0])
        gradients = []
        for step, scale in enumerate(scales):
            current[0] = scale if scaled else 1.0
            x = batch(step, rank).requires_grad_()
            model.zero_grad()
            (loss_of(model(x)) * current[0]).backward()
            gradients += [each / current[0] for each in (x.grad, *(p.grad for p in model.parameters()))]
        return gradients, shared_state(model)

    same(run_threads(2, run, True), run_threads(2, run, False))


# --- bad values ----------------------------------------------------------------------------------


def _with_bad(rank: int, policy: Policy, bad: float, backward_only: bool) -> tuple[Any, list[Tensor], dict[str, float]]:
    """Step 4 of rank 1 goes wrong; nobody updates the weights, as a gradient scaler would see to."""
    model = build(Recipe(method=BatchNorm(), policy=policy), layers=1)
    later = []
    for step in range(9):
        x = batch(step, rank)
        hurt = step == 4 and rank == 1
        if hurt and not backward_only:
            x[0, 2] = bad
        y = model[0][:2](x)
        (loss_of(y) * (bad if hurt and backward_only else 1.0)).backward()
        if step > 4:
            later.append(y.detach())
    return shared_state(model), [*later, *model.buffers()], distnorm.stats(model)


@pytest.mark.parametrize("backward_only", [False, True])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["Moving", "sum", "StaleMix", "Warmup", "Chain"])
def test_bad_values_are_dropped_on_every_rank_alike(name, bad, backward_only, caplog):
    results = run_threads(2, _with_bad, POLICIES[name], bad, backward_only)
    for state, values, stats in results:
        assert all(each.isfinite().all() for each in (*_tensors(state), *values))
        assert stats["0.1/dropped"] == (0 if backward_only else 1)
        same(values[-3:], results[0][1][-3:])
        assert stats["0.1/entries"] == results[0][2]["0.1/entries"]
    messages = [record.getMessage() for record in caplog.records if "NaN or Inf" in record.getMessage()]
    assert len(messages) == 2  # one per rank
    directions = {"backward"} if backward_only else {"forward", "backward"}
    assert all((f"0.1 ({each})" in messages[0]) == (each in directions) for each in ("forward", "backward"))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for child in children for tensor in _tensors(child)]


def test_a_blocking_window_stays_finite():
    for state, *_ in run_threads(2, _with_bad, POLICIES["blocking"], math.nan, False):
        assert all(each.isfinite().all() for each in _tensors(state))


def test_the_drop_is_logged_once(caplog):
    def run(rank: int) -> None:
        model = build(Recipe(method=RMS(), policy=Moving()), layers=1)
        for step in range(6):
            x = batch(step, rank)
            x[0] = math.nan
            loss_of(model(x)).backward()
            distnorm.state_dict(model)

    caplog.set_level(logging.WARNING, "distnorm")
    run_threads(1, run)
    assert len(caplog.records) == 1 and "those steps were left out" in caplog.text


# --- autograd and compilation --------------------------------------------------------------------


@EVERY
def test_second_derivatives_are_refused(policy):
    model = build(Recipe(method=RMS(), policy=policy), layers=1)
    x = batch(0, 0).requires_grad_()
    with pytest.raises(
        RuntimeError, match=r"0\.1: .* averages cotangents over steps, so there is no second derivative"
    ):
        torch.autograd.grad(model(x).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    "policy", [Warmup(then=Moving(window=3), steps=3), Warmup(then=StaleMix(), steps=2)], ids=["Moving", "StaleMix"]
)
def test_one_graph_across_the_switch(policy):
    """Also across the iteration from which RMS follows the running statistics."""
    recipe = Recipe(method=RMS(clip=5.0, clip_after=5), policy=policy, weights="centralized")
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, eager = build(recipe), build(recipe)
    forward = torch.compile(compiled, fullgraph=True, backend=counter)
    for step in range(9):
        seen = []
        for model, call in ((compiled, forward), (eager, eager)):
            x = batch(step, 0, size=4).requires_grad_()
            y = call(x)
            model.zero_grad()
            loss_of(y).backward()
            seen.append([y.detach(), x.grad, *(each.grad for each in model.parameters()), *model.buffers()])
        torch.testing.assert_close(*seen, rtol=1e-10, atol=1e-10)
    assert counter.frame_count == 1
    torch.testing.assert_close(shared_state(compiled), shared_state(eager), rtol=1e-10, atol=1e-10)
