"""What must hold of every model that is converted; values are those of the stock model, in float64."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import distnorm
from distnorm.kernels import stock as small_layers
from distnorm.layers.module import DistNorm
from tests.models.case import (
    RATE,
    Case,
    Given,
    Trace,
    difference,
    evaluate,
    scaled,
    state,
    steady,
    step,
    train,
)
from tests.support.threads import run_threads

STEPS = 3
CLOSE = 1e-9
"""How far apart two ways of computing the same in float64 may come to be."""
WIDE = 1e-3
"""The same where rounding alone moves the stock model further."""
DRAWS = 3
"""Inputs in float32: a value that rounds to the other side of a kink moves gradients far more than rounding does."""
COMPILED = 2
"""Classes of modules that are compiled: tracing takes a second for each two or three norms."""
MOVING = {"mabn": "mabn(window=2, warmup=1)", "lazy_bn": "lazy_bn(window=2, warmup=1)"}
"""Their windows are in use in the second of three steps."""


@dataclass
class Subject:
    """A case, and what was found out about it."""

    case: Case
    differences: dict[str, float] = field(default_factory=dict)
    one_step: bool = False
    """Whether only the first step was compared, since rounding moves the stock model too far in more."""

    @cached_property
    def reference(self) -> Trace:
        """What the stock model does."""
        return train(self.case.make(), self.case, STEPS)

    def converted(self, recipe: str = "sync_bn", *, fuse: bool = False) -> nn.Module:
        """A converted model."""
        return distnorm.convert(self.case.make(), recipe, fuse=fuse)

    @cached_property
    def moved(self) -> list[Trace]:
        """What the stock model does if its inputs move by a few units in the last place, up and down."""
        return [train(self.case.make(), self.case, STEPS, scale=scale) for scale in (1 + 1e-15, 1 - 1e-15)]

    @property
    def noise(self) -> float:
        """How far the stock model moves then, in the steps that are compared."""
        if self.one_step:
            return max(difference(first(each), first(self.reference)) for each in self.moved)
        return max(difference(each, self.reference) for each in self.moved)

    def close(self, name: str, given: Trace, expected: Trace) -> None:
        """Note how far apart they are. The bound is wider only where rounding alone moves the stock model as far."""
        found = difference(given, expected)
        if found > CLOSE and first(expected) and (self.one_step or self.noise > WIDE):
            self.one_step = True
            found = difference(first(given), first(expected))
        self.differences[name] = found
        assert found <= CLOSE or found <= min(100 * self.noise, WIDE), f"{name}: {found:.1e} apart"


def first(trace: Trace) -> Trace:
    """What the first of several steps showed."""
    return {name: value for name, value in trace.items() if name.endswith(", step 0")}


def values(subject: Subject) -> None:
    """Three steps of ``sync_bn`` on one rank are the stock model's."""
    subject.close("sync_bn", train(subject.converted(), subject.case, STEPS), subject.reference)


def fused(subject: Subject) -> None:
    """So are those of ``local_bn``, fused; then ``revert`` gives the stock model back, which trains on as that does."""
    model = subject.converted("local_bn", fuse=True)
    subject.close("fused", train(model, subject.case, STEPS), subject.reference)
    stock = subject.case.make()
    stock.load_state_dict(model.state_dict(), strict=True)
    reverts(subject, model, "reverted")
    given = subject.case.draw(STEPS)
    subject.close("after revert", step(model, given) | state(model), step(stock, given) | state(stock))


def moving(subject: Subject) -> None:
    """Recipes with moving statistics train, and evaluate alike when reverted."""
    for name, recipe in MOVING.items():
        model = subject.converted(recipe, fuse=True)
        trace = train(model, subject.case, STEPS)
        assert all(bool(each.isfinite().all()) for each in trace.values()), f"{name}: not finite"
        reverts(subject, model, name)


def reverts(subject: Subject, model: nn.Module, name: str) -> None:
    """Revert ``model``, in place: same classes and attributes as before, same output in evaluation."""
    given, stock = subject.case.draw(0), subject.case.make()
    before = evaluate(model, given)
    distnorm.revert(model)
    subject.close(f"{name}, reverted", evaluate(model, given), before)
    for (where, mine), (_, theirs) in zip(model.named_modules(), stock.named_modules(), strict=True):
        same = type(mine) is type(theirs) or type(mine).__mro__[1:] == type(theirs).__mro__[1:]  # parametrized: its own
        assert same, f"{name}: {where} reverts to {type(mine)}, was {type(theirs)}"
        assert not vars(theirs).keys() - vars(mine).keys(), f"{name}: {where} lost attributes"
        added = {each for each in vars(mine).keys() - vars(theirs).keys() if "distnorm" in repr(vars(mine)[each])}
        assert not added, f"{name}: {where} keeps {sorted(added)}"


def states(subject: Subject) -> None:
    """Strict state_dicts fit both ways, with the keys in their order."""
    model, stock, given = subject.converted(fuse=True), subject.case.make(), subject.case.draw(0)
    assert list(model.state_dict()) == list(stock.state_dict()), "the state_dict has other keys"
    optimizer = torch.optim.SGD(stock.parameters(), RATE)
    step(stock, given)
    optimizer.step()
    model.load_state_dict(stock.state_dict(), strict=True)
    subject.close("stock's state", evaluate(model, given), evaluate(stock, given))
    train(model, subject.case, 1)
    stock.load_state_dict(model.state_dict(), strict=True)
    subject.close("converted state", evaluate(stock, given), evaluate(model, given))


def ranks(subject: Subject) -> None:
    """Two ranks with ``sync_bn`` compute what one does with both batches."""
    joined = subject.case.draw(0, 2 * subject.case.batch)
    stock = steady(subject.case.make())
    expected = step(stock, joined)
    models = [steady(subject.converted(fuse=True)) for _ in range(2)]

    def on_rank(rank: int) -> Trace:
        mine = {name: each.chunk(2)[rank] if isinstance(each, torch.Tensor) else each for name, each in joined.items()}
        seen = step(models[rank], mine, rank=rank, ranks=2)
        for name, value in seen.items():
            if name.startswith("gradient"):
                dist.all_reduce(value)
        return seen

    one, other = run_threads(2, on_rank, timeout=240)
    both = {name: each if name.startswith("gradient") else torch.cat((each, other[name])) for name, each in one.items()}
    subject.close("two ranks", both | state(models[0]), expected | state(stock))


def deepcopies(model: nn.Module) -> nn.Module:
    """A copy."""
    return copy.deepcopy(model)


def pickles(model: nn.Module) -> nn.Module:
    """Another copy."""
    found: nn.Module = pickle.loads(pickle.dumps(model))
    return found


def compiles(model: nn.Module) -> nn.Module:
    """A copy in which a module of each of the smallest classes that hold norms is compiled by ``aot_eager``."""
    torch.compiler.reset()
    copied = copy.deepcopy(steady(model))
    holders = {type(each): each for each in copied.modules() if any(isinstance(n, _BatchNorm) for n in each.children())}
    for module in sorted(holders.values(), key=norms)[:COMPILED]:
        module.compile(backend="aot_eager")
    return copied


def norms(model: nn.Module) -> int:
    """How many batch norms it has."""
    return sum(isinstance(each, _BatchNorm) for each in model.modules())


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": deepcopies,
    "pickle": pickles,
    "aot_eager": compiles,
}
"""Ways to another model that computes the same."""


def copied(subject: Subject, way: str, *, of_stock: bool = False) -> None:
    """A step of the copy is the model's."""
    model = subject.case.make() if of_stock else subject.converted(fuse=True)
    given = subject.case.draw(0)
    other = COPIES[way](model)
    found = step(other, given) | state(other)
    subject.close(f"{way} of stock" if of_stock else way, found, step(model, given) | state(model))


def single(subject: Subject) -> None:
    """In float32, where layers have kernels of their own, a fused step is about as exact as the stock model's."""
    drawn = [subject.case.draw(number) for number in range(DRAWS)]
    exact = [step(steady(subject.case.make()), given) for given in drawn]
    theirs = max(map(narrow, [subject.case.make() for _ in drawn], drawn, exact))
    few, small_layers.FEW_VALUES = small_layers.FEW_VALUES, 0
    try:
        found = min(map(narrow, [subject.converted("local_bn", fuse=True) for _ in drawn], drawn, exact))
    finally:
        small_layers.FEW_VALUES = few
    subject.differences["float32"] = found
    assert found <= max(10 * theirs, 1e-4), f"float32: {found:.1e} apart, the stock model {theirs:.1e}"


def narrow(model: nn.Module, given: Given, exact: Trace) -> float:
    """How far off a step in float32 is."""
    torch.set_default_dtype(torch.float32)
    try:
        return difference(step(steady(model.float()), scaled(given, 1.0, torch.float32)), exact)
    finally:
        torch.set_default_dtype(torch.float64)


def counts(case: Case) -> tuple[int, int, int]:
    """Norms, how many are converted, how many fused."""
    model = case.make()
    before = norms(model)
    distnorm.convert(model, "local_bn", fuse=True)
    converted = [each for each in model.modules() if isinstance(each, DistNorm)]
    return before, len(converted), sum(bool(each.epilogue) for each in converted)


CHECKS: dict[str, Callable[[Subject], None]] = {
    "values": values,
    "fused": fused,
    "moving": moving,
    "states": states,
    "ranks": ranks,
    "single": single,
}
