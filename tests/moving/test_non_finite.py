"""One broken batch does not outlive its step where a policy or a method would keep it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm import Recipe
from distnorm.autograd import normalize
from distnorm.kernels import cpu, dense
from distnorm.methods import RMS, BatchNorm, Method
from distnorm.policies import AllReduce, Local, Moving, Periodic, Policy, StaleMix, Warmup
from tests.moving.models import batch, build, loss_of, same
from tests.support.interpreter import INTERPRETED
from tests.support.threads import run_threads

# Triton's interpreter computes with NumPy, which warns of what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

HUGE = 1e30
"""Finite, but its square is beyond float32, which running statistics are kept in."""
BROKEN = [
    pytest.param(float("nan"), id="nan"),
    pytest.param(float("inf"), id="inf", marks=pytest.mark.slow),
    pytest.param(HUGE, id="huge"),
]
TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is made for Linux only"), *INTERPRETED


@pytest.fixture(params=["compiled", "aten", "plain", "graph", pytest.param("triton", marks=TRITON)])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which code computes the layers: C, ATen, the specification, a compiled graph, or Triton's interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "aten":
            for module in (dense, cpu):
                patch.setattr(module, "loops", lambda x_NCL: None)
        if request.param == "plain":
            patch.setattr(normalize, "suits", lambda *_: False)
        if request.param == "triton":
            from tests.support.gpu import gpu_pass

            patch.setattr(normalize, "new_pass", gpu_pass)
        yield request.param


GUARDED: dict[str, tuple[Method, Policy]] = {
    "mabn": (RMS(clip=5.0, clip_after=2), Warmup(then=Moving(window=3), steps=6)),
    "mabn, warm": (RMS(clip=5.0, clip_after=2), Warmup(then=Moving(window=3), steps=2)),
    "blocking": (RMS(), Moving(window=3, staleness=0)),
    "lazy_bn": (BatchNorm(), Warmup(then=StaleMix(), steps=6)),
    "lazy_bn, warm": (BatchNorm(), Warmup(then=StaleMix(), steps=2)),
    "clip alone": (RMS(clip=5.0, clip_after=2), AllReduce()),
    "clip, local": (RMS(clip=5.0, clip_after=2), Local()),
    "clip, periodic": (RMS(clip=5.0, clip_after=2), Periodic(every=2)),
}


def run_steps(model: nn.Module, rank: int, broken_at: int, value: float, dtype: torch.dtype) -> list[Tensor]:
    """Outputs of seven steps; rank 0's batch of one of them has a broken channel, and nobody steps an optimizer."""
    outputs = []
    for step in range(7):
        x = batch(step, rank, size=4).to(dtype)
        if step == broken_at and rank == 0:
            x[1, 2] = value
        y = model(x.requires_grad_())
        loss_of(y).backward()
        outputs.append(y.detach())
    return outputs


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("recipe", GUARDED.values(), ids=GUARDED.keys())
def test_a_broken_batch_leaves_nothing_behind(way: str, recipe: tuple[Method, Policy], value: float) -> None:
    method, policy = recipe
    layer = distnorm.convert(nn.BatchNorm1d(4), Recipe(method=method, policy=policy))
    model = torch.compile(layer, backend="aot_eager") if way == "graph" else layer
    outputs = run_steps(model, 0, 3, value, torch.float32)
    assert all(each.isfinite().all() for at, each in enumerate(outputs) if at != 3)
    assert all(each.isfinite().all() for each in layer.buffers())
    assert layer.running_var.max() < 1e3
    (state,) = distnorm.state_dict(layer)
    kept = state["reducer"].get("then", state["reducer"])
    for name in ("window", "others"):
        assert name not in kept or kept[name]["ring"].isfinite().all()


@pytest.mark.parametrize("name", ["clip alone", "clip, periodic"])
def test_what_is_left_out_is_as_if_it_had_not_been(way: str, name: str) -> None:
    """Running statistics and their count: those of the other steps."""
    method, policy = GUARDED[name]
    broken = distnorm.convert(nn.BatchNorm1d(4), Recipe(method=method, policy=policy))
    expected = {"mean": torch.zeros(4), "var": torch.ones(4), "steps": 0}
    run_steps(torch.compile(broken, backend="aot_eager") if way == "graph" else broken, 0, 2, HUGE, torch.float32)
    for step in range(7):
        if step != 2 and not (isinstance(policy, Periodic) and step % 2):
            expected["var"] = 0.9 * expected["var"] + 0.1 * batch(step, 0, size=4).float().square().mean(0)
            expected["steps"] += 1
    torch.testing.assert_close(broken.running_var, expected["var"])
    assert broken.num_batches_tracked == expected["steps"]


@pytest.mark.parametrize("method", [BatchNorm(), RMS()], ids=["BatchNorm", "RMS"])
@pytest.mark.parametrize("policy", [AllReduce(), Local()], ids=["AllReduce", "Local"])
def test_exact_recipes_do_as_stock_does(way: str, method: Method, policy: Policy) -> None:
    """Their forward reads no running statistics: NaN in them says what has happened."""
    layer = distnorm.convert(nn.BatchNorm1d(4), Recipe(method=method, policy=policy))
    stock = nn.BatchNorm1d(4)
    model = torch.compile(layer, backend="aot_eager") if way == "graph" else layer
    run_steps(model, 0, 3, float("nan"), torch.float32)
    run_steps(stock, 0, 3, float("nan"), torch.float32)
    same(layer.running_var.isnan(), stock.running_var.isnan())
    same(layer.num_batches_tracked, stock.num_batches_tracked)


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("recipe", GUARDED.values(), ids=GUARDED.keys())
def test_all_ranks_judge_alike(recipe: tuple[Method, Policy], value: float) -> None:
    method, policy = recipe

    def run(rank: int) -> tuple[list[Tensor], list[Tensor], bool]:
        layer = distnorm.convert(nn.BatchNorm1d(4), Recipe(method=method, policy=policy))
        outputs = run_steps(layer, rank, 3, value, torch.float32)
        return outputs, [each.clone() for each in layer.buffers()], layer._site.conversion.bound().agrees

    found = run_threads(2, run)
    for outputs, buffers, agrees in found:
        assert all(each.isfinite().all() for at, each in enumerate(outputs) if at != 3)
        assert all(each.isfinite().all() for each in buffers)
        if agrees:
            same(buffers, found[0][1])


@pytest.mark.parametrize("then", [Moving(window=3), StaleMix()], ids=["Moving", "StaleMix"])
@pytest.mark.parametrize("steps", [1, 4])
def test_broken_cotangents(then: Policy, steps: int) -> None:
    """In the warm-up or after it: statistics of that step are kept, cotangents are not."""
    model = build(Recipe(method=RMS(), policy=Warmup(then=then, steps=steps)), layers=1)
    for step in range(7):
        y = model(batch(step, 0, size=4).requires_grad_())
        (loss_of(y) * (float("nan") if step == 2 else 1.0)).backward()
        model.zero_grad()
    state = distnorm.state_dict(model)[0]["reducer"]["then"]
    assert state["bucket"]["dropped"].tolist() == [0, 1]
    x = batch(7, 0, size=4).requires_grad_()
    loss_of(model(x)).backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_a_step_that_the_scaler_skipped_in_the_warm_up_counts() -> None:
    """As in the paper's code, where every forward does; its entry is left out."""
    recipe = Recipe(method=RMS(), policy=Warmup(then=Moving(window=4), steps=3))
    model = build(recipe, layers=1, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    distnorm.attach(model, optimizer=optimizer, loss_scale=scaler.get_scale)
    for step in range(4):
        x = batch(step, 0, size=4).float()
        x[0, 0] = float("inf") if step == 1 else x[0, 0]
        optimizer.zero_grad()
        scaler.scale(loss_of(model(x))).backward()
        scaler.step(optimizer)
        scaler.update()
    binding = model[0][1]._site.conversion.bound()
    window = binding.reducer.state_dict()["then"]["window"]
    assert binding.step == 4
    assert window["filled"].tolist() == [2, 2] and window["ring"].isfinite().all()
    assert model[0][1].running_var.isfinite().all()
