"""Where a step of moving statistics ends: with backward passes, with the optimizer, or by hand."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distnorm
from tests.distributed import moving_jobs as moving
from tests.distributed.moving_jobs import WARM, Seen
from tests.support.pool import Pool

STEPS = 20
REMEDY = "distnorm.attach(model, optimizer=optimizer)"


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
@pytest.mark.parametrize("boundary", ["manual", "optimizer"])
def test_one_backward_per_step(pool: Pool, recipe: str, boundary: str) -> None:
    """Whoever ends the steps, the same steps end."""
    plain = pool.run(2, train, recipe, "backward")
    ranks = pool.run(2, train, recipe, boundary)
    moving.equal_on_all_ranks(ranks)
    for ours, expected in zip(ranks, plain, strict=True):
        moving.equal(tuple(ours), tuple(expected))


def train(rank: int, recipe: str, boundary: str) -> Seen:
    model = moving.net(recipe)
    optimizer = moving.adam(model)
    after = attached(model, optimizer, boundary)
    return moving.train(rank, moving.wrapped(model), range(STEPS), optimizer=optimizer, after=after)


def attached(model: nn.Module, optimizer: torch.optim.Optimizer, boundary: str) -> Callable[[int], None] | None:
    """Set up the boundary; returns what the loop must do after each step."""
    if boundary == "optimizer":
        distnorm.attach(model, optimizer=optimizer)
    if boundary == "manual":
        distnorm.attach(model, manual=True)
        return lambda _: distnorm.end_step(model)
    return None


def test_sgd_projects(pool: Pool) -> None:
    """With SGD, plain gradients take the place of projected ones; weights are kept centred either way."""
    forward, projected = (pool.run(2, train_with_sgd, each) for each in ("backward", "optimizer"))
    moving.equal_on_all_ranks(projected)
    for ours, expected in zip(projected, forward, strict=True):
        moving.close(ours.losses, expected.losses)
        moving.close(ours.window, expected.window)
        assert expected.parameters["conv2.weight"].mean((1, 2, 3)).abs().max() < 1e-15
        assert ours.parameters["conv2.weight"].mean((1, 2, 3)).abs().max() < 1e-15


def train_with_sgd(rank: int, boundary: str) -> Seen:
    model = moving.net("mabn")
    optimizer = moving.sgd(model)
    attached(model, optimizer, boundary)
    return moving.train(rank, moving.wrapped(model), range(STEPS), optimizer=optimizer)


@pytest.mark.parametrize("how", ["removed", "copied", "loaded"])
def test_projection_ends_with_the_optimizer_that_projects(how: str) -> None:
    """Whatever becomes of a model whose weights its optimizer keeps centred, they act centred."""
    model, stranger = moving.net("mabn"), moving.net("mabn")
    attachment = distnorm.attach(model, optimizer=moving.sgd(model))
    if how == "removed":
        attachment.remove()
    if how == "copied":
        model = deepcopy(model)
    with torch.no_grad():
        stranger.conv2.weight += 0.1
        if how == "loaded":
            model.load_state_dict(stranger.state_dict())
        else:
            model.conv2.weight.copy_(stranger.conv2.weight)
    x_NCS, _ = moving.batch(0, 0)
    moving.close(model.eval()(x_NCS), stranger.eval()(x_NCS))


@pytest.mark.parametrize("no_sync", [False, True], ids=["", "no_sync"])
def test_gradient_accumulation(pool: Pool, no_sync: bool) -> None:
    """A step of the window is one of the optimizer, over all its backward passes."""
    ranks = pool.run(2, accumulate, "optimizer", no_sync)
    moving.equal_on_all_ranks(ranks)
    for each in ranks:
        assert (each.state["step"], each.messages) == (STEPS, [])
        assert each.running["norm1.num_batches_tracked"] == WARM * 2 + STEPS - WARM - 1
        # Two ranks, two backward passes, 4 x 5 x 5 values per channel.
        moving.equal(each.in_flight[-5:-1], torch.tensor([400.0, 4, 400, 4], dtype=torch.float64))
        assert {step: each.collectives[step] for step in range(WARM, STEPS)} == dict.fromkeys(range(WARM, STEPS), 1)


def test_gradient_accumulation_by_default(pool: Pool) -> None:
    """Without ``attach`` every backward pass ends a step."""
    ranks = pool.run(2, accumulate, "backward", True)
    moving.equal_on_all_ranks(ranks)
    for each in ranks:
        assert (each.state["step"], each.messages) == (2 * STEPS, [])
        moving.equal(each.in_flight[-5:-1], torch.tensor([200.0, 2, 200, 2], dtype=torch.float64))


def test_no_sync_changes_nothing(pool: Pool) -> None:
    synced, unsynced = (pool.run(2, accumulate, "optimizer", each)[0] for each in (False, True))
    moving.close(unsynced.window, synced.window)
    moving.close(unsynced.parameters, synced.parameters)


def accumulate(rank: int, boundary: str, no_sync: bool) -> Seen:
    model = moving.net("mabn")
    optimizer = moving.adam(model)
    attached(model, optimizer, boundary)
    wrapped = moving.wrapped(model)
    with moving.listening() as messages, distnorm.Ledger(model) as ledger:
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in range(2):
                x_NCS, labels_N = moving.batch(rank, 2 * step + part)
                with wrapped.no_sync() if no_sync and part == 0 else nullcontext():
                    (F.cross_entropy(wrapped(x_NCS), labels_N) / 2).backward()
            optimizer.step()
        return moving.seen(model, [], messages, ledger)


class Maker(nn.Module):
    """Images out of noise."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(3, 4 * 25)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(4, 3, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(3)

    def forward(self, noise_NC: Tensor) -> Tensor:
        h_NCS = F.relu(self.norm1(self.stem(noise_NC).view(-1, 4, 5, 5)))
        return self.norm2(self.conv(h_NCS))


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_adversarial_training(pool: Pool, recipe: str) -> None:
    """Two models, two optimizers, and more backward passes than steps."""
    ranks = pool.run(2, train_adversaries, recipe, 30)
    for number in range(2):
        moving.equal_on_all_ranks([models[number] for models in ranks])
    for models in ranks:
        for each in models:
            assert (each.state["step"], each.messages) == (30, [])
        maker, judge = models
        assert {maker.collectives[step] for step in range(WARM, 30)} == {1}
        assert {judge.collectives[step] for step in range(WARM, 30)} == {1}
        # Per rank and step the judge sees real images, made ones, and made ones for the maker's loss.
        unit = 1 if recipe == "lazy_bn" else 100
        moving.equal(judge.in_flight[-5:-1], torch.tensor([6.0 * unit, 6, 6 * unit, 6], dtype=torch.float64))


def train_adversaries(rank: int, recipe: str, steps: int) -> tuple[Seen, Seen]:
    torch.manual_seed(1)
    maker = distnorm.convert(Maker().double(), recipe, **moving.RECIPES[recipe])
    judge = moving.net(recipe)
    optimizers = moving.adam(maker), moving.adam(judge)
    for model, optimizer in zip((maker, judge), optimizers, strict=True):
        distnorm.attach(model, optimizer=optimizer)
    making, judging = moving.wrapped(maker), moving.wrapped(judge)
    real_N, made_N = torch.ones(4, dtype=torch.long), torch.zeros(4, dtype=torch.long)
    generator = torch.Generator().manual_seed(rank)
    with moving.listening() as messages, distnorm.Ledger(maker) as makers, distnorm.Ledger(judge) as judges:
        for step in range(steps):
            noise_NC = torch.randn(4, 3, generator=generator, dtype=torch.float64)
            made_NCS = making(noise_NC)
            optimizers[1].zero_grad()
            F.cross_entropy(judging(moving.batch(rank, step)[0]), real_N).backward()
            F.cross_entropy(judging(made_NCS.detach()), made_N).backward()
            optimizers[1].step()
            optimizers[0].zero_grad()
            F.cross_entropy(judging(made_NCS), real_N).backward()
            optimizers[0].step()
        return moving.seen(maker, [], messages, makers), moving.seen(judge, [], messages, judges)


class Dicts(nn.Module):
    """Outputs in a dictionary, one of which no loss uses."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x_NCS: Tensor, skip: bool = False) -> dict[str, Any]:
        h_NCS = self.net.backbone(x_NCS, skip)
        return {"logits": self.net.head(h_NCS.mean((2, 3))), "features": [h_NCS]}


@pytest.mark.parametrize("form", ["dictionary", "backbone"])
def test_form_of_the_forward(pool: Pool, form: str) -> None:
    """No hook on a root module: whatever is called and returned, steps end with backward passes."""
    plain = pool.run(2, train_bare, "root", -1, "backward")
    ranks = pool.run(2, train_bare, form, -1, "backward")
    for ours, expected in zip(ranks, plain, strict=True):
        moving.equal(tuple(ours), tuple(expected))


def test_a_backward_that_reaches_no_layer(pool: Pool) -> None:
    """Its rank ends a step less than the others: that is said, with the remedy."""
    for messages, finite in pool.run(2, fall_behind, timeout=20.0):
        assert [message for message in messages if "different times" in message and REMEDY in message] == messages
        assert len(messages) == 1
        assert finite


def fall_behind(rank: int) -> tuple[list[str], bool]:
    """Without looking at the state: the rank that is ahead could only wait for the other one."""
    model = moving.net("mabn")
    with moving.listening() as messages:
        steps_without_wrapper(rank, model, moving.adam(model), "root", WARM + 4, None)
    return messages, all(bool(value.isfinite().all()) for value in model.state_dict().values())


@pytest.mark.parametrize("boundary", ["optimizer", "manual"])
def test_a_backward_that_reaches_no_layer_where_the_optimizer_ends_steps(pool: Pool, boundary: str) -> None:
    ranks = pool.run(2, train_bare, "root", WARM + 4, boundary, timeout=20.0)
    moving.equal_on_all_ranks(ranks)
    for each in ranks:
        assert (each.state["step"], each.messages) == (STEPS, [])
        assert each.running["norm1.num_batches_tracked"] == STEPS - 1


def train_bare(rank: int, form: str, missing: int, boundary: str) -> Seen:
    model = moving.net("mabn")
    optimizer = moving.adam(model)
    after = attached(model, optimizer, boundary)
    with moving.listening() as messages, distnorm.Ledger(model) as ledger:
        steps_without_wrapper(rank, model, optimizer, form, missing, after)
        return moving.seen(model, [], messages, ledger)


def steps_without_wrapper(
    rank: int,
    model: moving.Net,
    optimizer: torch.optim.Optimizer,
    form: str,
    missing: int,
    after: Callable[[int], None] | None,
) -> None:
    """In step ``missing`` the last rank trains the head alone."""
    for step in range(STEPS):
        x_NCS, labels_N = moving.batch(rank, step)
        optimizer.zero_grad()
        if step == missing and rank == 1:
            logits_NC = model.head(x_NCS.new_ones(4, 4))
        elif form == "dictionary":
            logits_NC = Dicts(model)(x_NCS)["logits"]
        elif form == "backbone":
            logits_NC = model.head(model.backbone(x_NCS).mean((2, 3)))
        else:
            logits_NC = model(x_NCS)
        F.cross_entropy(logits_NC, labels_N).backward()
        moving.average_gradients(model)
        optimizer.step()
        if after is not None:
            after(step)
