"""A KeyboardInterrupt between two lines leaves no rank out of step, and no state half changed."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import distnorm
from distnorm import Recipe
from distnorm.attach import conversions_of
from distnorm.compat import uninterrupted
from distnorm.kernels import windows
from distnorm.layers import binding, running_statistics
from distnorm.methods import RMS, BatchNorm
from distnorm.policies import Moving, StaleMix, Warmup, bucket, entries, moving, stale_mix, warmup
from distnorm.policies.bucket import Bucket
from distnorm.transport import group
from tests.moving.models import batch, build, loss_of, same, shared_state, train
from tests.support.threads import run_threads

RECIPES = {
    "Moving": Recipe(method=RMS(), policy=Moving(window=3)),
    "StaleMix": Recipe(method=BatchNorm(), policy=StaleMix(window=2)),
}
EVERY = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def once(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, *, after: bool = False) -> None:
    """Interrupt the next call of a method, before or after what it does; later calls are plain."""
    original = getattr(owner, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(owner, name, original)
        if after:
            original(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(owner, name, interrupted)


@EVERY
@pytest.mark.parametrize(("name", "after"), [("_wait", False), ("_wait", True), ("_check_phase", False)])
def test_a_step_whose_end_was_interrupted_can_be_ended_again(recipe, name, after, monkeypatch):
    """While it waited for what completed: nothing is lost, neither that nor this step's own vector."""
    interrupted, plain = build(recipe), build(recipe)
    for model in (interrupted, plain):
        distnorm.attach(model, manual=True)
        for step in range(5):
            loss_of(model(batch(step, 0))).backward()
            if step == 4 and model is interrupted:
                once(monkeypatch, Bucket, name, after=after)
                with pytest.raises(KeyboardInterrupt):
                    distnorm.end_step(model)
            distnorm.end_step(model)
    same(shared_state(interrupted), shared_state(plain))
    same(dict(interrupted.named_buffers()), dict(plain.named_buffers()))


@EVERY
def test_a_vector_that_was_not_sent_is_sent_by_the_next_end(recipe):
    """On two ranks, interrupted before the collective on one of them: both stay in step."""

    def run(rank: int, interrupt: bool) -> Any:
        model = build(recipe)
        distnorm.attach(model, manual=True)
        group = conversions_of(model)[0].bound().reducer.bucket.group
        for step in range(5):
            loss_of(model(batch(step, rank))).backward()
            if step == 3 and rank == 1 and interrupt:
                plain = group.sum_async

                def fail(*_: Any) -> None:
                    raise KeyboardInterrupt

                group.sum_async = fail
                with pytest.raises(KeyboardInterrupt):
                    distnorm.end_step(model)
                group.sum_async = plain
            distnorm.end_step(model)
        return shared_state(model), dict(model.named_buffers())

    same(run_threads(2, run, True), run_threads(2, run, False))


def test_a_skipped_step_ends_though_asking_for_the_loss_scale_was_interrupted():
    scales, asked = [4.0], []

    def scale() -> float:
        asked.append(scales[-1])
        if len(asked) == 2:
            raise KeyboardInterrupt
        return scales[-1]

    model = build(RECIPES["Moving"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    distnorm.attach(model, optimizer=optimizer, loss_scale=scale)
    loss_of(model(batch(0, 0))).backward()
    scales.append(2.0)  # Inf was found: the scaler skips the step, and its scale falls
    with pytest.raises(KeyboardInterrupt):
        model(batch(1, 0))
    model(batch(1, 0))
    assert distnorm.state_dict(model)[0]["step"] == 1


def test_attaching_all_conversions_or_none():
    """The second of two cannot be bound: the first one's steps end as before."""
    model = nn.Sequential(build(RECIPES["Moving"]), build(RECIPES["Moving"]))
    first, second = conversions_of(model)

    def fail(_: Any) -> None:
        raise KeyboardInterrupt

    second.bind = fail
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(KeyboardInterrupt):
        distnorm.attach(model, optimizer=optimizer, loss_scale=lambda: 3.0)
    assert first.ends_with_backward and first.loss_scale is None and not first.optimizers
    assert not optimizer._optimizer_step_post_hooks


def test_an_optimizer_goes_on_ending_steps_if_attaching_it_again_is_interrupted(monkeypatch):
    model = build(RECIPES["Moving"])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    distnorm.attach(model, optimizer=optimizer)
    once(monkeypatch, torch.optim.Optimizer, "register_step_post_hook")
    with pytest.raises(KeyboardInterrupt):
        distnorm.attach(model, optimizer=optimizer)
    loss_of(model(batch(0, 0))).backward()
    optimizer.step()
    assert distnorm.state_dict(model)[0]["step"] == 1


def test_steps_end_with_backward_passes_if_taking_hooks_off_is_interrupted():
    model = build(RECIPES["Moving"])
    attachment = distnorm.attach(model, optimizer=torch.optim.SGD(model.parameters(), 0.1), loss_scale=lambda: 2.0)

    def fail() -> None:
        raise KeyboardInterrupt

    attachment._undo.insert(0, fail)
    with pytest.raises(KeyboardInterrupt):
        attachment.remove()
    train(model, 0, range(2))
    assert distnorm.state_dict(model)[0]["step"] == 2


def test_what_was_loaded_is_not_forgotten_if_binding_is_interrupted(monkeypatch):
    trained = build(RECIPES["Moving"])
    train(trained, 0, range(4))
    model = build(RECIPES["Moving"])
    distnorm.load_state_dict(model, distnorm.state_dict(trained))
    once(monkeypatch, distnorm.layers.binding.Binding, "load")
    with pytest.raises(KeyboardInterrupt):
        model(batch(4, 0))
    model(batch(4, 0))
    assert distnorm.state_dict(model)[0]["step"] == 4


@pytest.mark.parametrize("place", ["restore", "fold_means"])
def test_stock_running_statistics_are_folded_though_that_was_interrupted(place, monkeypatch):
    layer = distnorm.convert(nn.BatchNorm1d(2).double(), "mabn")
    layer.running_mean.fill_(3.0)
    once(monkeypatch, distnorm.layers.running_statistics, place)
    x = torch.ones(4, 2, dtype=torch.float64)
    with pytest.raises(KeyboardInterrupt):
        layer(x)
    with torch.no_grad():
        layer(x)
    assert not layer.running_mean.any()
    momentum = 0.02
    torch.testing.assert_close(layer.running_var, torch.full_like(layer.running_var, (1 - momentum) * 10 + momentum))


# --- at every line -------------------------------------------------------------------------------

EVERYWHERE = (uninterrupted, binding, bucket, entries, group, moving, running_statistics, stale_mix, warmup, windows)
"""Modules in which the end of a step is interrupted."""

MANY = 10**6


class InterruptAt:
    """Raises at the n-th line, or instruction, of ``EVERYWHERE`` that this thread comes to."""

    def __init__(self, number: int, event: str) -> None:
        self.left, self.event = number, event
        self.files = {each.__file__ for each in EVERYWHERE}

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        frame.f_trace_opcodes = self.event == "opcode"
        if event == self.event:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
        return self


class Twins:
    """One rank's model, which goes on from the same state again and again."""

    def __init__(self, rank: int, recipe: Recipe, *, loading: bool) -> None:
        self.rank, self.loading = rank, loading
        self.model = model = build(recipe, layers=1)
        distnorm.attach(model, manual=True)
        for step in range(2):
            self.step(step)
        self.state = distnorm.state_dict(model)
        self.buffers = {name: value.clone() for name, value in model.state_dict().items()}
        if loading:  # into a longer warm-up: what was sent completes in a step that sends nothing
            longer = Warmup(then=recipe.policy.then, steps=4)
            self.model = build(Recipe(method=recipe.method, policy=longer), layers=1)
            distnorm.attach(self.model, manual=True)

    def step(self, number: int, at: InterruptAt | None = None) -> None:
        """Rank 1 interrupts its end, and goes on: ends it again if that had not begun."""
        loss_of(self.model(batch(number, self.rank))).backward()
        sys.settrace(at if self.rank == 1 else None)
        try:
            distnorm.end_step(self.model)
        except KeyboardInterrupt:
            (conversion,) = conversions_of(self.model)
            if conversion.bound().step == number and conversion.bound()._ending is None:
                distnorm.end_step(self.model)
        finally:
            sys.settrace(None)

    def run(self, at: InterruptAt) -> Any:
        """What the model is after steps of which one was interrupted."""
        distnorm.load_state_dict(self.model, self.state)
        self.model.load_state_dict(self.buffers)
        self.step(2, at if self.loading else None)
        self.step(3, None if self.loading else at)
        self.step(4)
        (conversion,) = conversions_of(self.model)
        buffers = {name: each.clone() for name, each in self.model.named_buffers()}
        return shared_state(self.model), conversion.bound().step, buffers


EXACT_FIRST = {
    name: Recipe(method=each.method, policy=Warmup(then=each.policy, steps=1)) for name, each in RECIPES.items()
}


@pytest.mark.parametrize("recipe", EXACT_FIRST.values(), ids=EXACT_FIRST)
@pytest.mark.parametrize("kernels", ["compiled", pytest.param("aten", marks=pytest.mark.slow)])
@pytest.mark.parametrize("loading", [False, True], ids=["", "into a longer warm-up"])
@pytest.mark.parametrize("event", ["line", pytest.param("opcode", marks=pytest.mark.slow)])
def test_a_step_ends_once_wherever_that_is_interrupted(recipe, kernels, loading, event, monkeypatch):
    """As on a twin that nobody has interrupted, to the bit, on both ranks."""
    if kernels == "aten":
        monkeypatch.setattr(windows, "library", lambda: None)

    def run(rank: int) -> list[Any]:
        twins, counting = Twins(rank, recipe, loading=loading), InterruptAt(MANY, event)
        found, told = [twins.run(counting)], [None, None]
        dist.all_gather_object(told, MANY - counting.left)
        assert told[1] > 50
        return found + [twins.run(InterruptAt(number, event)) for number in range(told[1])]

    for plain, *interrupted in run_threads(2, run, timeout=120.0):
        for each in interrupted:
            same(each, plain)
