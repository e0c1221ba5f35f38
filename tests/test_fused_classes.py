"""Modules that ``fuse=True`` gave classes of their own: copies, other classes on top, and code that changes later."""

from __future__ import annotations

import abc
import copy
import inspect
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

import distnorm
from distnorm.fusion.fused_classes import Fused
from distnorm.layers.module import DistNorm
from tests.blocks import Helper, Named, Returned, Sequence, Torchvision
from tests.test_fuse import epilogues, made, same, trained

X = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bool]]:
    """For every call of a norm, whether it was told to do a relu."""
    told: list[bool] = []
    forward = DistNorm.forward

    def ask(self: DistNorm, *args: Any, **options: bool) -> Tensor:
        told.append(options.get("relu", False))
        return forward(self, *args, **options)

    monkeypatch.setattr(DistNorm, "forward", ask)
    yield told


def saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


# --- copies --------------------------------------------------------------------------------------

SHALLOW = [copy.copy, lambda module: module._replicate_for_data_parallel()]
DEEP = [copy.deepcopy, saved, *(lambda module, p=p: pickle.loads(pickle.dumps(module, p)) for p in (0, 2, 5))]


@pytest.mark.parametrize("kind", [Torchvision, Sequence, Helper])
@pytest.mark.parametrize("way", SHALLOW, ids=["copy", "replica"])
def test_a_shallow_copy_runs_with_its_own_parts(
    way: Callable[[nn.Module], nn.Module], kind: type[nn.Module], asked: list[bool]
) -> None:
    model, other = made(kind, fuse=True), made(kind, fuse=False)
    shallow = way(model)
    shallow._modules = dict(other._modules)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(3)
    expected = other(X)
    asked.clear()
    torch.testing.assert_close(shallow(X), expected)
    assert any(asked) and type(shallow) is type(model)
    torch.testing.assert_close(model(X), made(kind, fuse=False)(X))


T = TypeVar("T")
registered: dict[str, type] = {}


class Registered(Torchvision):
    def __init_subclass__(cls, *, key: str, **options: Any) -> None:
        super().__init_subclass__(**options)
        registered[key] = cls


class Slotted(Torchvision):
    __slots__ = ("note",)


class Reduced(Torchvision):
    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.size = size

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.size,), vars(self)


class Stateful(Torchvision):
    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "note": "saved"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        assert state.pop("note") == "saved"
        super().__setstate__(state)


class Typed(Torchvision, abc.ABC, Generic[T]):
    pass


AUTHORS = [Torchvision, Sequence, Registered, Slotted, Reduced, Stateful, Typed]


@pytest.mark.parametrize("kind", AUTHORS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("way", DEEP, ids=["deepcopy", "save", "pickle 0", "pickle 2", "pickle 5"])
def test_a_deep_copy_is_fused_and_reverts(
    way: Callable[[nn.Module], nn.Module], kind: type[nn.Module], asked: list[bool]
) -> None:
    model = made(kind, fuse=True)
    expected = trained(made(kind, fuse=False))
    other = way(model)
    assert type(other) is type(model) is not kind and isinstance(other, kind) and epilogues(other) == epilogues(model)
    asked.clear()
    same(trained(other), expected)
    assert any(asked) and not registered
    assert type(distnorm.revert(other)) is kind and type(distnorm.revert(model)) is kind


def test_the_class_is_called_as_the_authors() -> None:
    model = made(Torchvision, fuse=True)
    for name in ("__name__", "__qualname__", "__module__", "__doc__"):
        assert getattr(type(model), name) == getattr(Torchvision, name)
    assert type(model) is type(made(Torchvision, fuse=True)) and type(model) is not type(made(Returned, fuse=True))
    assert inspect.getsource(model.forward) == inspect.getsource(Torchvision.forward)


def test_a_slice_of_a_sequence_is_fused(asked: list[bool]) -> None:
    model, other = (
        distnorm.convert(
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).double(), "local_bn", fuse=fuse
        )
        for fuse in (True, False)
    )
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(model[1:](X), other[1:](X))
    assert asked == [True, False]


# --- what comes before a version -----------------------------------------------------------------


def doubled(self: nn.Module, x: Tensor) -> Tensor:
    return 2 * self.a(x)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_class_that_is_patched_is_heeded(monkeypatch: pytest.MonkeyPatch, when: str, mode: bool) -> None:
    models = []
    if when == "before":
        monkeypatch.setattr(Torchvision, "forward", doubled)
    for fuse in (True, False):
        if fuse and when == "before":
            with pytest.warns(UserWarning, match="fused nothing"):
                models.append(made(Torchvision, fuse=True))
        else:
            models.append(made(Torchvision, fuse=fuse))
    monkeypatch.setattr(Torchvision, "forward", doubled)
    same(*(trained(model.train(mode), steps=1) for model in models))


def test_a_method_or_a_base_that_is_patched_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Derived(Helper):
        pass

    models = [made(Derived, fuse=fuse) for fuse in (True, False)]
    monkeypatch.setattr(Helper, "step", lambda self, x: torch.tanh(self.a(x)))
    same(*(trained(model) for model in models))


def test_a_patched_method_takes_what_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its defaults are its own."""

    def step(self: Helper, x: Tensor, *, factor: float = 3.0) -> Tensor:
        return factor * self.a(x)

    models = [made(Helper, fuse=fuse) for fuse in (True, False)]
    monkeypatch.setattr(Helper, "step", step)
    same(*(trained(model) for model in models))
    assert inspect.signature(models[0].step) == inspect.signature(models[1].step)


@pytest.mark.parametrize("owner", [F, nn.ReLU])
def test_a_relu_that_is_patched_is_heeded(monkeypatch: pytest.MonkeyPatch, owner: Any) -> None:
    kind = Named if owner is F else Torchvision
    models = [made(kind, fuse=fuse) for fuse in (True, False)]
    if owner is F:
        monkeypatch.setattr(F, "relu", torch.sigmoid)
    else:
        monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: torch.sigmoid(x))
    same(*(trained(model) for model in models))


def test_a_forward_of_the_module_itself_comes_first() -> None:
    model = made(Torchvision, fuse=True)
    plain = model.forward
    model.forward = lambda x: 2 * plain(x)
    other = made(Torchvision, fuse=False)
    torch.testing.assert_close(model(X), 2 * other(X))
    distnorm.revert(model)
    torch.testing.assert_close(model(X), 2 * Torchvision.forward(model, X))


def test_revert_leaves_what_others_keep() -> None:
    model = made(Torchvision, fuse=True)
    model._original_forward = model.forward
    distnorm.revert(model)
    torch.testing.assert_close(model._original_forward(X), model(X))


# --- accelerate ----------------------------------------------------------------------------------


def prepared(fuse: bool) -> nn.Module:
    model = made(Torchvision, fuse=fuse, dtype=torch.float32)
    return Accelerator(mixed_precision="bf16", cpu=True).prepare(model)


@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
def test_accelerate_unwraps(mode: bool, asked: list[bool]) -> None:
    model, other = prepared(True).train(mode), made(Torchvision, fuse=False, dtype=torch.float32).train(mode)
    model(X.float())
    asked.clear()
    unwrapped = Accelerator(cpu=True).unwrap_model(model, keep_fp32_wrapper=False)
    torch.testing.assert_close(unwrapped(X.float()), other(X.float()), rtol=1e-5, atol=1e-5)
    assert asked[:2] == [mode, mode] and unwrapped is model
    assert inspect.signature(unwrapped.forward) == inspect.signature(other.forward)


def test_accelerate_wraps_what_is_reverted_then() -> None:
    model, other = prepared(True), prepared(False)
    distnorm.revert(model)
    distnorm.revert(other)
    torch.testing.assert_close(model(X.float()), other(X.float()), rtol=0, atol=0)
    unwrapped = Accelerator(cpu=True).unwrap_model(model, keep_fp32_wrapper=False)
    torch.testing.assert_close(unwrapped(X.float()), Torchvision.forward(model, X.float()))


# --- classes on top ------------------------------------------------------------------------------


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Scaled(Torchvision):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.a(x * self.scale) + x)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_fused_module_that_is_parametrized(order: str, asked: list[bool]) -> None:
    model, other = Scaled().double(), Scaled().double()
    other.load_state_dict(model.state_dict())
    distnorm.convert(other, "sync_bn")
    if order == "after":
        distnorm.convert(model, "sync_bn", fuse=True)
    for each in (model, other):
        parametrize.register_parametrization(each, "scale", Doubled())
    if order == "before":
        distnorm.convert(model, "sync_bn", fuse=True)
    copied = copy.deepcopy(model)
    for each in (model, copied):
        torch.testing.assert_close(each(X), other(X))
    assert asked == [True, False, True, False]
    assert type(distnorm.revert(copied)).__bases__ == (Scaled,)
    parametrize.remove_parametrizations(model, "scale")
    assert isinstance(model, Fused) and type(distnorm.revert(model)) is Scaled


# --- what others put on the class ----------------------------------------------------------------


@pytest.mark.parametrize("before", [False, True], ids=["new", "changed"])
def test_attributes_of_the_class_stay_with_the_authors(before: bool) -> None:
    """``type(self).calls += 1`` in code that does not know of the class made here."""

    class Counted(Torchvision):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.a(x) + x)

    if before:
        Counted.calls = 1
    model, other = made(Counted, fuse=True), made(Counted, fuse=True)
    type(model).calls = getattr(type(model), "calls", 0) + 1
    assert other.calls == 1 + before
    distnorm.revert(model)
    assert Counted.calls == model.calls == other.calls == 1 + before
    distnorm.revert(other)
    assert Counted.calls == 1 + before and made(Counted, fuse=True).calls == 1 + before


def test_a_forward_put_on_the_class_made_here_stays() -> None:
    class Patched(Torchvision):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.a(x) + x)

    model, other = made(Patched, fuse=True), made(Patched, fuse=False)
    type(model).forward = doubled
    type(other).forward = doubled
    torch.testing.assert_close(model(X), other(X))
    torch.testing.assert_close(distnorm.revert(model)(X), distnorm.revert(other)(X))
    assert Patched.forward is doubled


def test_code_that_is_loaded_again_is_heeded() -> None:
    """IPython's autoreload puts the new code into the old function."""

    class Reloaded(Torchvision):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.a(x) + x)

    models = [made(Reloaded, fuse=fuse) for fuse in (True, False)]
    same(*(trained(model) for model in models))
    Reloaded.forward.__code__ = doubled.__code__
    same(*(trained(model) for model in models))
    torch.testing.assert_close(models[0](X), 2 * models[0].a(X))
