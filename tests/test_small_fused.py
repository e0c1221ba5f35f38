"""Fused modules whose norms were small run as they were written, and fused again once the norms are larger."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed import _composable as composable
from torch.utils.checkpoint import checkpoint

import distnorm
from distnorm.layers.module import DistNorm

C = 3
SMALL, LARGE = (2, C, 4, 5), (2, C, 120, 100)


class Coded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(C), nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(torch.relu(self.bn1(x)))
        y += x
        return torch.relu(y)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bns = nn.ModuleList([nn.BatchNorm2d(C), nn.BatchNorm2d(C)])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bns[0](x)) + torch.relu(self.bns[1](x))


class Child(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.sin())  # type: ignore[no-any-return]


class Parent(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def sequence() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(C, C, 1, bias=False), nn.BatchNorm2d(C), nn.ReLU(), nn.BatchNorm2d(C))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "code": Coded,
    "list": Listed,
    "sequence": sequence,
    "child": lambda: Parent(Child()),
    "a sequence as a child": lambda: Parent(sequence()),
    "a child in a sequence": lambda: nn.Sequential(Child(), nn.ReLU()),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For every call of a norm, whether it was told to compute an epilogue."""
    told: list[bool] = []
    forward = DistNorm.forward

    def ask(self: DistNorm, *args: Any, **options: Any) -> Tensor:
        told.append(bool(options))
        return forward(self, *args, **options)

    monkeypatch.setattr(DistNorm, "forward", ask)
    yield told


Run = Callable[[nn.Module, Tensor], Tensor]


def step(model: nn.Module, x: Tensor, run: Run = lambda model, x: model(x)) -> list[Tensor]:
    """The output, all gradients, and the buffers after a forward and backward pass."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(model, x)
    (y * y.detach().cos()).mean().backward()
    return [y.detach(), *(each.grad for each in (x, *model.parameters())), *model.buffers()]  # type: ignore[list-item]


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = KINDS[kind]()
    return model, distnorm.convert(copy.deepcopy(model), "local_bn", fuse=True)


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_version_follows_the_size(kind: str, asked: list[bool]) -> None:
    stock, fused = pair(kind)
    merged = []
    for shape in (SMALL, SMALL, LARGE, LARGE, SMALL, SMALL):
        asked.clear()
        x = torch.randn(shape)
        same(step(fused, x), step(stock, x))
        merged.append(any(asked))
    assert merged == [True, False, True, True, True, False]


REPETITIONS: dict[str, Run] = {
    "checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=False),  # type: ignore[no-any-return]
    "reentrant checkpoint": lambda model, x: checkpoint(model, x, use_reentrant=True),  # type: ignore[no-any-return]
}


@pytest.mark.parametrize("way", REPETITIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_repetition_follows_its_first_forward(kind: str, way: str) -> None:
    """A checkpoint fails if its repetition saves other tensors. Sizes change between, which changes what is noted."""
    stock, fused = pair(kind)
    run = REPETITIONS[way]
    for shape in (SMALL, SMALL, LARGE, SMALL):
        x = torch.randn(shape)
        same(step(fused, x, run), step(stock, x))
    small, large = (torch.randn(shape, requires_grad=True) for shape in (SMALL, LARGE))
    outputs = [run(fused, each) for each in (small, large, small)]
    for each in outputs:  # the notes are those of the last forward now
        each.sum().backward()


def test_each_norm_of_a_sequence_has_its_size(asked: list[bool]) -> None:
    model = nn.Sequential(nn.BatchNorm2d(C), nn.ReLU(), nn.AvgPool2d(20), nn.BatchNorm2d(C), nn.ReLU())
    fused = distnorm.convert(model, "local_bn", fuse=True)
    for _ in range(2):
        asked.clear()
        fused(torch.randn(LARGE))
    assert asked == [True, False]


def test_sizes_that_alternate_are_fused_where_they_are_large(asked: list[bool]) -> None:
    """As in a head that runs on every level of a pyramid."""
    fused = pair("code")[1]
    for _ in range(2):
        for shape in (LARGE, SMALL, SMALL):
            asked.clear()
            fused(torch.randn(shape))
            assert any(asked) or shape == SMALL


@pytest.mark.parametrize("kind", [*KINDS, "silu"])
def test_a_checkpoint_that_begins_in_a_hook(kind: str) -> None:
    """Whether the forward may be repeated is not known before hooks have run. Both versions save as many for a ReLU."""
    model = nn.Sequential(nn.BatchNorm2d(C), nn.SiLU()) if kind == "silu" else KINDS[kind]()
    fused = distnorm.convert(nn.Sequential(model), "local_bn", fuse=True)
    composable.checkpoint(fused[0])
    outputs = [fused(torch.randn(shape, requires_grad=True)) for shape in (SMALL, SMALL, LARGE, SMALL)]
    for each in outputs:
        each.sum().backward()


def test_a_forward_that_was_taken_while_small_fuses_later(asked: list[bool]) -> None:
    """Frameworks keep a module's forward, and put a wrapper in its place."""
    fused = pair("code")[1]
    fused(torch.randn(SMALL))
    fused(torch.randn(SMALL))
    fused.forward = functools.partial(fused.forward)
    asked.clear()
    fused(torch.randn(LARGE))
    assert all(asked)


@pytest.mark.parametrize("name", ["forward", "_old_forward"])
def test_a_bound_method_is_pickled_with_its_module(name: str) -> None:
    """It is looked up in a module that has nothing yet."""
    fused = pair("code")[1]
    fused(torch.randn(SMALL))
    setattr(fused, name, functools.partial(fused.forward))
    loaded, x = pickle.loads(pickle.dumps(fused)), torch.randn(SMALL)
    torch.testing.assert_close(loaded(x), fused(x))


class Changing(Child):
    pass


class ChangingSequence(nn.Sequential):
    pass


def changed(self: nn.Module, x: Tensor) -> Tensor:
    return sum(child(x) for child in self.children()) * 2.0  # type: ignore[return-value]


@pytest.mark.parametrize("make", [Changing, lambda: ChangingSequence(nn.BatchNorm2d(C))], ids=["code", "sequence"])
def test_code_that_is_edited_before_a_model_is_loaded(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = distnorm.convert(Parent(make()), "local_bn", fuse=True)
    fused(torch.randn(SMALL))
    saved = pickle.dumps(fused)
    owner = type(fused.body).__mro__[2]
    del fused
    gc.collect()  # classes of fused modules are shared
    monkeypatch.setattr(owner, "forward", changed)
    loaded, x = pickle.loads(saved), torch.randn(SMALL)
    for training in (True, False):
        loaded.train(training)
        expected = torch.relu(x + 2 * next(loaded.body.children())(x))
        torch.testing.assert_close(loaded(x), expected)


def test_hooks_on_saved_tensors_see_as_many(asked: list[bool]) -> None:
    """They decide before the forward whether it may be repeated, so it must not depend on the sizes of earlier ones."""
    fused = pair("code")[1]

    def saved() -> int:
        seen: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda each: seen.append(each) or each, lambda each: each):
            fused(torch.randn(SMALL, requires_grad=True))
        return len(seen)

    first = saved()
    assert saved() == first and all(asked)
