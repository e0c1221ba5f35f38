"""How slots enter windows on a GPU: in Triton's interpreter and in torch, against entries kept as lists, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="Triton is made for Linux only")

from distnorm import Recipe
from distnorm.compat.uninterrupted import Call, uninterrupted
from distnorm.kernels import windows
from distnorm.policies import Moving, StaleMix
from distnorm.types import EVERY_LAYER, Direction, Future, GlobalStatistics, Layout, Slot
from tests.moving import test_scaling, test_stale_mix
from tests.moving.conftest import interpret
from tests.moving.plans import follow, make_plan
from tests.moving.written_out import assert_all_close
from tests.support.interpreter import INTERPRETED
from tests.support.thinned import thinned
from tests.support.threads import run_threads

pytestmark = INTERPRETED

SIZES = {("a", "forward", ""): 3, ("a", "backward", ""): 2, ("b", "forward", ""): 300, ("b", "backward", ""): 257}
OTHER = 0.5
"""What the second rank contributes for each 1 of the first one."""

Policy = Moving | StaleMix
POLICIES: dict[str, Policy] = {
    "mean": Moving(window=3),
    "sum": Moving(window=3, loss_reduction="sum"),
    "one": Moving(window=1),
    "blocking": Moving(window=2, staleness=0),
    "blocking sum": Moving(window=2, staleness=0, loss_reduction="sum"),
    "mix": StaleMix(),
    "mix of 3": StaleMix(window=3),
}
EVERY = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
WAYS = ["triton", "torch"]


def take(way: str, patch: pytest.MonkeyPatch) -> None:
    if way == "triton":
        interpret(patch)
    else:
        patch.setattr(windows, "library", lambda: None)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        take(request.param, patch)
        yield request.param


@pytest.fixture
def interpreted() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        interpret(patch)
        yield


class Two:
    """Two ranks, of which one is here."""

    size, ranks = 2, (0, 1)

    def sum(self, payload: Tensor, slot: Slot) -> Tensor:
        return payload * (1 + OTHER)

    def sum_async(self, payload_: Tensor, slot: Slot, then: Callable[[Future], list[Call]]) -> Future:
        future = Future.completed(payload_.mul_(1 + OTHER))
        uninterrupted(*then(future))
        return future


def bind(policy: Policy, device: str = "cpu", sizes: dict[tuple[str, Direction], int] = SIZES) -> Any:
    topology: Any = SimpleNamespace(pair=lambda axis: (Two(), Two()))
    return policy.bind(topology, Layout(dict(sizes), torch.device(device)))


# --- written out ---------------------------------------------------------------------------------


@dataclass
class Sum:
    values: Tensor
    weight: float

    def good(self) -> bool:
        return bool(self.values.isfinite().all()) and self.weight > 0


def nothing(size: int) -> Sum:
    return Sum(torch.zeros(size, dtype=torch.float64), 0.0)


@dataclass
class Window:
    """Every entry by itself."""

    policy: Moving
    size: int
    entries: list[Tensor] = field(default_factory=list)
    flying: Sum | None = None
    dropped: int = 0

    def __post_init__(self) -> None:
        self.step = nothing(self.size)

    def call(self, values: Tensor, weight: float, scale: float) -> Tensor:
        """What the layer goes on with."""
        self.step = Sum(self.step.values + values / scale, self.step.weight + weight)
        used = [*self.entries, *([values / scale / weight] if weight else [])]
        mean = torch.stack(used).mean(0) if used else torch.zeros_like(values)
        return mean * weight * scale

    def end(self) -> None:
        completed, self.flying = (self.flying, self.step) if self.policy.facts.staleness else (self.step, None)
        self.step = nothing(self.size)
        if completed is None:
            return
        many = 1 + OTHER if self.policy.facts.staleness else 1  # a blocking sum has joined the ranks already
        self.dropped += not completed.values.isfinite().all()
        if completed.good():
            self.entries.append(completed.values * many / (completed.weight * many))
        self.entries = self.entries[max(0, len(self.entries) - (self.policy.window - 1)) :]


@dataclass
class Mix:
    """Per slot, what the other rank contributed on average to the steps that completed."""

    size: int
    window: int
    flying: Sum | None = None
    dropped: int = 0

    def __post_init__(self) -> None:
        self.step, self.others = nothing(self.size), list[Tensor]()

    def call(self, values: Tensor, weight: float, scale: float) -> Tensor:
        self.step = Sum(self.step.values + values / scale, self.step.weight + 1)
        return values + scale * (torch.stack(self.others).mean(0) if self.others else 0.0)

    def end(self) -> None:
        completed, self.flying, self.step = self.flying, self.step, nothing(self.size)
        if completed is not None:
            self.dropped += not completed.values.isfinite().all()
            if completed.good():
                self.others = [*self.others, completed.values * OTHER / (completed.weight * OTHER)][-self.window :]


def written(policy: Policy) -> dict[tuple[str, Direction], Window | Mix]:
    if isinstance(policy, Moving):
        return {key: Window(policy, size) for key, size in SIZES.items()}
    return {key: Mix(size + (key[1] == "forward"), policy.window) for key, size in SIZES.items()}


class Case:
    """A reducer and the lists that it should agree with, call by call."""

    def __init__(self, policy: Policy) -> None:
        self.policy, self.reducer, self.slots = policy, bind(policy), written(policy)
        self.generator = torch.Generator().manual_seed(0)
        self.step = 0

    def run(self, layer: str, count: float, scale: Tensor | float, *, bad: float | None = None) -> None:
        """One forward and backward, with ``bad`` among the first values of both."""
        blocking = isinstance(self.policy, Moving) and not self.policy.staleness
        many = 1 + OTHER if blocking else 1.0
        payload = self._draw(layer, "forward", bad)
        given = torch.cat((payload, torch.tensor([count]).double()))
        shared = self.reducer.reduce(given, Slot(layer, "forward", self.step))
        if isinstance(self.policy, StaleMix):
            wanted = self.slots[layer, "forward", ""].call(given, 1.0, 1.0)
        else:
            wanted = self.slots[layer, "forward", ""].call(payload * many, count * many, 1.0)
            wanted = torch.cat((wanted, torch.tensor([count * many]).double()))
        torch.testing.assert_close(shared, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)
        slot = Slot(layer, "backward", self.step, forward_count=shared[-1], loss_scale=scale)
        cotangents = self._draw(layer, "backward", bad)
        answer = self.reducer.reduce(cotangents, slot)
        per_value = isinstance(self.policy, Moving) and self.policy.loss_reduction == "sum"
        # A sum of counts would be N K; the policy sends each rank's part of N.
        weight = count * many / (2 if blocking else 1) if per_value else 1.0
        wanted = self.slots[layer, "backward", ""].call(cotangents * many, weight * many, float(scale))
        torch.testing.assert_close(answer, wanted, rtol=1e-12, atol=1e-12, equal_nan=True)

    def _draw(self, layer: str, direction: Direction, bad: float | None) -> Tensor:
        values = torch.randn(SIZES[layer, direction, ""], generator=self.generator, dtype=torch.float64)
        if bad is not None:
            values[1] = bad
        return values

    def end(self) -> list[GlobalStatistics]:
        completed: list[GlobalStatistics] = self.reducer.end_step(Slot(EVERY_LAYER, "forward", self.step))
        self.step += 1
        for slot in self.slots.values():
            slot.end()
        return completed


SCALES = torch.tensor(0.3), 1.0, 1000.1, torch.tensor(2.0**16, dtype=torch.float64)


@EVERY
@pytest.mark.parametrize("scale", thinned(SCALES, every=2), ids=str)
def test_windows_are_what_is_written_out(way: str, policy: Policy, scale: Tensor | float) -> None:
    """Slots that begin anywhere, called never, once and twice a step; without values; several programs to a slot."""
    case = Case(policy)
    for step in range(7):
        for layer, count in (("a", 4.0), ("b", 3.0 + step), ("a", 0.0), ("b", 5.0))[: 1 + step % 4]:
            case.run(layer, count, scale)
        case.end()


@EVERY
@pytest.mark.parametrize("bad", thinned((float("nan"), float("inf")), every=2))
def test_bad_values_stay_in_their_slot_and_step(way: str, policy: Policy, bad: float) -> None:
    case = Case(policy)
    for step in range(6):
        case.run("a", 4.0, 2.0, bad=bad if step == 1 else None)
        case.run("b", 3.0, 2.0)
        case.end()
    dropped = [slot.dropped for slot in case.slots.values()]
    assert dropped == [1, 1, 0, 0] == case.reducer.bucket.dropped.tolist()


@EVERY
def test_what_lands_is_what_is_written_out(way: str, policy: Policy) -> None:
    """The mean over the window, or the completed entry; how many values it rests on; whether it completed."""
    case = Case(policy)
    for step in range(5):
        before = {key: slot.flying for key, slot in case.slots.items()}
        case.run("b", 3.0 + step, 2.0)
        if step == 2:
            case.run("a", 4.0, 1.0, bad=float("nan"))
        if step == 3:
            case.run("a", 4.0, 1.0)
        completed = case.end()
        if step == 0 or (isinstance(policy, Moving) and not policy.staleness):
            assert not completed
            continue
        assert [each.layer for each in completed] == ["a", "b"]
        for each in completed:
            slot, sent = case.slots[each.layer, "forward", ""], before[each.layer, "forward", ""]
            assert bool(each.weight) is sent.good()
            if not sent.good():
                continue
            if isinstance(slot, Window):
                means = torch.stack(slot.entries or [sent.values / sent.weight]).mean(0)
                total = sent.weight * (1 + OTHER)
            else:
                means, total = sent.values[:-1] / sent.values[-1], sent.values[-1].item() * (1 + OTHER)
            torch.testing.assert_close(each.means, means, rtol=1e-12, atol=1e-12)
            assert each.total == pytest.approx(total, rel=1e-12)


SMALL = settings(max_examples=3)
"""The interpreter takes its time."""


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("staleness", [0, 1])
@SMALL
@given(method=test_scaling.METHODS, reduction=test_scaling.REDUCTIONS, seed=test_scaling.SEEDS)
def test_layers_of_several_ranks_move_as_is_written_out(staleness, method, reduction, seed):
    policy = Moving(window=3, staleness=staleness, loss_reduction=reduction)
    plan = make_plan(seed, 2, together=staleness == 0)
    found = run_threads(2, follow, plan, Recipe(method=method, policy=policy))
    assert_all_close(found, test_scaling.write_out(plan, 2, method, policy))


@pytest.mark.usefixtures("interpreted")
@SMALL
@given(method=test_scaling.METHODS, seed=test_scaling.SEEDS, window=st.sampled_from([1, 3]))
def test_layers_of_several_ranks_mix_as_is_written_out(method, seed, window):
    plan = make_plan(seed, 3, together=False)
    plan = plan._replace(extras=[None] * len(plan.steps))
    found = run_threads(3, follow, plan, Recipe(method=method, policy=StaleMix(window=window)))
    assert_all_close(found, test_stale_mix.write_out(plan, 3, method, window), 1e-8)
