"""What a policy keeps goes where the layers go, and outlives the forward that bound it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm import Recipe
from distnorm.attach import conversions_of
from distnorm.methods import RMS, BatchNorm
from distnorm.policies import AllReduce, Chain, Moving, Policy, StaleMix, Warmup
from tests.moving.models import batch, build, same, train, train_step
from tests.support.threads import run_threads

POLICIES: dict[str, Policy] = {
    "Moving": Moving(window=3),
    "Moving-1": Moving(window=1),
    "blocking": Moving(window=3, staleness=0),
    "StaleMix": StaleMix(window=2),
    "Warmup": Warmup(then=Moving(window=3), steps=2),
    "Warmup-StaleMix": Warmup(then=StaleMix(), steps=20),
    "Chain": Chain(AllReduce(), Moving(window=3)),
}
EVERY = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())


def held(value: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor that ``value`` and its attributes hold, however deep."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, dict):
        for name, each in value.items():
            yield from held(each, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        for at, each in enumerate(value):
            yield from held(each, f"{path}[{at}]")
    elif type(value).__module__.startswith("distnorm.") and hasattr(value, "__dict__"):
        yield from held(vars(value), path)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """What the model's only binding holds."""
    (conversion,) = conversions_of(model)
    found = dict(held(conversion.bound().reducer))
    assert found
    return found


def steps(model: nn.Module, device: str, count: int = 3) -> None:
    for step in range(count):
        model(batch(step, 0, size=4).to(device)).square().sum().backward()


def move(model: nn.Module, device: str) -> None:
    """As one does from and to the meta device, too."""
    on_meta = any(each.is_meta for each in model.parameters())
    _ = model.to_empty(device=device) if on_meta else model.to(device)


@EVERY
@pytest.mark.parametrize("way", [["cpu", "meta", "cpu"], ["meta", "cpu"], ["cpu", "cpu", "meta"]], ids=str)
def test_state_follows_the_layers(policy: Policy, way: list[str]) -> None:
    model = build(Recipe(method=RMS(), policy=policy))
    for device in way:
        move(model, device)
        steps(model, device)
        assert {name for name, each in state_of(model).items() if each.device.type != device} == set()
    state = distnorm.state_dict(model)
    distnorm.load_state_dict(model, state)
    steps(model, way[-1])


@EVERY
def test_a_model_may_move_between_attach_and_its_first_forward(policy: Policy) -> None:
    model = build(Recipe(method=RMS(), policy=policy)).to("meta")
    distnorm.attach(model)
    move(model, "cpu")
    steps(model, "cpu")
    assert all(each.device.type == "cpu" for each in state_of(model).values())


@EVERY
def test_a_round_trip_loses_nothing(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with a vector in flight, on two ranks: the copies stand for those to another device and back."""
    recipe = Recipe(method=BatchNorm(), policy=policy)

    def run(rank: int, moves: bool) -> list[dict[str, Tensor]]:
        model = build(recipe)
        seen = train(model, rank, range(5))
        if moves:
            reducer = model[0][1]._site.conversion.bound().reducer
            for part in memories(reducer):
                before = {name: each.clone() for name, each in held(part) if name.split(".")[-1] != "_payload"}
                part.bucket.to(torch.device("cpu"))
                same({name: each for name, each in held(part) if name in before}, before)
        return [*seen, *train(model, rank, range(5, 9))]

    same(run_threads(2, run, True), run_threads(2, run, False))


def memories(reducer: object) -> Iterator[object]:
    if hasattr(reducer, "bucket"):
        yield reducer
    for each in vars(reducer).values():
        for part in each if isinstance(each, list) else [each]:
            if hasattr(part, "reduce"):
                yield from memories(part)


# --- the first forward ---------------------------------------------------------------------------


@contextmanager
def float64_by_default() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "meta by default": lambda: torch.device("meta"),
    "float64 by default": float64_by_default,
}


@EVERY
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_the_first_forward_in_any_mode(policy: Policy, mode: Callable[[], AbstractContextManager[object]]) -> None:
    """Of statistics that no backward follows: everything after it is as after the same forward under ``no_grad``."""

    def run(entered: Callable[[], AbstractContextManager[object]]) -> list[dict[str, Tensor]]:
        model = build(Recipe(method=RMS(), policy=policy), dtype=torch.float32)
        x = batch(0, 0, size=4).float()
        with torch.no_grad(), entered():
            model(x)
        for name, each in state_of(model).items():
            assert not each.is_inference() and each.device.type == "cpu", name
        seen = [train_step(model, batch(step, 0).float()) for step in range(1, 5)]
        distnorm.load_state_dict(model, distnorm.state_dict(model))
        return [*seen, train_step(model, batch(5, 0).float())]

    same(run(mode), run(nullcontext))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
def test_a_step_ended_and_resumed_in_any_mode(mode: Callable[[], AbstractContextManager[object]]) -> None:
    model = build(Recipe(method=RMS(), policy=Warmup(then=Moving(window=3), steps=1)))
    distnorm.attach(model, manual=True)
    for step in range(4):
        train_step(model, batch(step, 0))
        with mode():
            distnorm.end_step(model)
            distnorm.load_state_dict(model, distnorm.state_dict(model))
    for name, each in state_of(model).items():
        assert not each.is_inference() and each.device.type == "cpu", name
