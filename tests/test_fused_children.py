"""``convert(..., fuse=True)`` where a module ends in a norm, and the code that follows stands in its caller."""

from __future__ import annotations

import copy
import gc
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import distnorm
from distnorm.fusion import plans
from distnorm.fusion.fused_classes import Fused, fused_class
from distnorm.layers.module import DistNorm
from tests import child_blocks as blocks
from tests.child_blocks import (
    FOUND,
    LEFT,
    LEFT_CHILDREN,
    Adds,
    ConvBlock,
    Inverted,
    ShortcutLast,
    Timm,
    Unit,
    conv_norm,
)
from tests.test_fuse import assert_change_is_respected, epilogues, made, same, trained

EACH = pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, set[str]]]:
    """The calls of norms: the name of the layer, and the options that it was given."""
    told: list[tuple[str, set[str]]] = []
    forward = DistNorm.forward

    def ask(self: DistNorm, *args: Any, **options: Any) -> Tensor:
        told.append((self._site.name, {*options} - {"parameter", "widen"}))
        return forward(self, *args, **options)

    monkeypatch.setattr(DistNorm, "forward", ask)
    return told


@EACH
def test_what_is_found_gives_equal_values_in_the_same_order(kind: type[nn.Module], asked: list[Any]) -> None:
    fused, plain = (made(kind, fuse=fuse) for fuse in (True, False))
    assert epilogues(fused) == FOUND[kind]
    found = trained(fused)
    calls, asked[:] = list(asked), []
    same(found, trained(plain))
    assert [name for name, _ in calls] == [name for name, _ in asked]
    assert {name for name, options in calls if options} == set(FOUND[kind])
    asked.clear()
    same(trained(fused.eval(), steps=1), trained(plain.eval(), steps=1))
    assert not any(options for _, options in asked)


@pytest.mark.parametrize("kind", LEFT, ids=lambda kind: kind.__name__)
def test_what_could_be_seen_is_left_alone(kind: type[nn.Module]) -> None:
    with pytest.warns(UserWarning, match="fused nothing"):
        fused = made(kind, fuse=True)
    assert not epilogues(fused)
    same(trained(fused), trained(made(kind, fuse=False)))


@pytest.mark.parametrize("kind", LEFT_CHILDREN, ids=lambda kind: kind.__name__)
def test_children_that_do_more_are_left_alone(kind: type[nn.Module]) -> None:
    def make() -> nn.Module:
        return Adds(kind())

    with pytest.warns(UserWarning, match="fused nothing"):
        fused = made(make, fuse=True)  # type: ignore[arg-type]
    assert not epilogues(fused)
    same(trained(fused), trained(made(make, fuse=False)))  # type: ignore[arg-type]


# --- what changes later --------------------------------------------------------------------------


def hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda _, __, output: output * 2)


CHANGES: dict[str, tuple[type[nn.Module], Callable[[Any], object]]] = {
    "a hook of the child": (Inverted, lambda model: hook(model.conv)),
    "a hook of its norm": (Inverted, lambda model: hook(model.conv[2])),
    "a hook of a norm far below": (Unit, lambda model: hook(model.body.conv2.bn)),
    "a hook of a child between": (Unit, lambda model: hook(model.body.conv2)),
    "a backward hook": (Unit, lambda model: model.body.register_full_backward_hook(lambda _, dx, __: (dx[0] * 2,))),
    "a flag of the child": (
        Unit,
        lambda model: vars(model.body.conv2).update(activate=True, act=torch.tanh),
    ),
    "another child": (Unit, lambda model: setattr(model.body, "conv2", nn.Tanh())),
    "more in a sequence": (Inverted, lambda model: model.conv.append(nn.Tanh())),
    "less in a sequence": (Inverted, lambda model: model.conv.pop(2)),
    "a forward of the child": (Unit, lambda model: setattr(model.body, "forward", torch.sin)),
    "an activation of the norm": (Timm, lambda model: setattr(model.conv_pwl.bn, "act", nn.Tanh())),
    "a drop of the norm": (Timm, lambda model: setattr(model.bn, "drop", nn.Softplus())),
    "another activation of the norm": (Timm, lambda model: setattr(model.conv_pw.bn, "act", nn.Tanh())),
    "an alias": (Timm, lambda model: setattr(model.conv_pwl, "aa", nn.Tanh())),
    "what was absent": (Timm, lambda model: setattr(model, "shortcut", nn.Tanh())),
    "what did nothing": (Timm, lambda model: setattr(model, "drop_path", nn.Softplus())),
    "what was present": (ShortcutLast, lambda model: setattr(model, "downsample", None)),
    "a hook of the norm that is added to": (ShortcutLast, lambda model: hook(model.bn2)),
    "what had no effects": (blocks.CalledPool, lambda model: setattr(model.shortcut, "1", nn.Softplus())),
    "a frozen child": (Unit, lambda model: model.body.eval()),
    "a shortcut with more": (blocks.CalledIdentity, lambda model: model.shortcut.append(nn.Softplus())),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_later_is_respected(name: str) -> None:
    assert_change_is_respected(*CHANGES[name])


@pytest.mark.parametrize("owner", [ConvBlock, blocks.Gelu, blocks.Nothing, nn.Sequential, nn.Identity])
def test_classes_that_are_patched_later_are_heeded(owner: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (Unit, blocks.Renamed, blocks.Outer)
    models = [[made(kind, fuse=fuse) for kind in kinds] for fuse in (True, False)]
    monkeypatch.setattr(owner, "forward", lambda self, x: torch.sin(x))
    for fused, plain in zip(*models, strict=True):
        if not any(isinstance(each, owner) for each in plain.modules()):
            continue
        torch.testing.assert_close(fused(X), plain(X))


def test_a_function_that_is_patched_later_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [made(blocks.Renamed, fuse=fuse) for fuse in (True, False)]
    monkeypatch.setattr(F, "gelu", torch.sin)
    same(*map(trained, models))


def test_a_child_that_is_compiled_by_itself_is_called() -> None:
    model, other = (made(Inverted, fuse=fuse) for fuse in (True, False))
    seen = []
    for each in (model, other):
        each.conv._compiled_call_impl = lambda x: (seen.append(1), 2 * x)[1]
    torch.testing.assert_close(model(X), other(X))
    assert len(seen) == 2


def test_hooks_on_all_modules_see_the_children() -> None:
    model, seen = made(Unit, fuse=True), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        model(X)
    finally:
        handle.remove()
    assert set(seen) == set(model.modules())


# --- copies --------------------------------------------------------------------------------------

X = torch.randn(3, 4, 6, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


@pytest.mark.parametrize("kind", [Inverted, Unit, ShortcutLast, blocks.Outer], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_fused_and_revert(
    way: Callable[[nn.Module], nn.Module], kind: type[nn.Module], asked: list[Any]
) -> None:
    model = made(kind, fuse=True)
    kinds = {name: type(each) for name, each in kind().named_modules()}
    other = way(model)
    assert [type(each) for each in other.modules()] == [type(each) for each in model.modules()]
    asked.clear()
    same(trained(other), trained(made(kind, fuse=False)))
    assert {name for name, options in asked if options} == set(FOUND[kind])
    for each in (model, other):
        distnorm.revert(each)
        assert {name: type(part) for name, part in each.named_modules()} == kinds
        assert not any(isinstance(part, Fused) or "epilogue" in vars(part) for part in each.modules())


def test_a_pickle_where_the_source_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a frozen application: the classes are made again, without fused versions."""

    class Read(Inverted):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.unit(x)

    class Below(ConvBlock):
        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x)

    models = []
    for fuse in (True, False):
        torch.manual_seed(0)
        model = Read()
        model.unit = Below()
        models.append(distnorm.convert(model.double(), "local_bn", fuse=fuse))
    model, other = models
    assert epilogues(model)["unit.bn"] == "residual"
    wanted = [(each, type(each)) for each in (model, model.unit)]
    distnorm.revert(model)
    distnorm.convert(model, "local_bn")
    monkeypatch.setattr(plans, "rewrite", lambda *_, **__: None)
    for module, fused in wanted:
        base = type(f"Again{type(module).__name__}", (type(module),), {})
        module.__class__ = fused_class(base, vars(fused)["_wanted"])
    torch.testing.assert_close(model(X), other(X))


def test_a_replica_runs_its_own_children(asked: list[Any]) -> None:
    model, other = made(Unit, fuse=True), made(Unit, fuse=False)
    replica = model._replicate_for_data_parallel()
    replica._modules = {name: copy.deepcopy(child) for name, child in model._modules.items()}
    with torch.no_grad():
        for parameter in (*replica.body.parameters(), *other.body.parameters()):
            parameter.mul_(3)
    asked.clear()
    torch.testing.assert_close(replica(X), other(X))
    assert any(options for _, options in asked)


def test_signatures_and_plain_calls_stay() -> None:
    model, other = made(Unit, fuse=True), made(Unit, fuse=False)
    for fused, plain in zip(model.modules(), other.modules(), strict=True):
        assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    torch.testing.assert_close(model.body(X), other.body(X))
    with pytest.raises(TypeError, match="unexpected keyword"):
        model.body(X, residual=X)


def test_nothing_is_kept_alive() -> None:
    model = made(Unit, fuse=True)
    model(X)
    weight = torch.utils.weak.WeakTensorKeyDictionary({model.body.conv2.bn.weight: 1})
    del model
    gc.collect()
    assert not len(weight)


# --- what a sum is -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ShortcutLast, blocks.Called, blocks.TwoBranches, Inverted], ids=lambda k: k.__name__)
def test_a_sum_of_two_dtypes_is_what_it_was(kind: type[nn.Module]) -> None:
    """``x += norm(y)`` keeps the dtype of x, ``x + norm(y)`` takes the wider one."""

    def cast(module: nn.Module, dtype: torch.dtype) -> None:
        module.register_forward_hook(lambda _, __, output: output.to(dtype))

    for dtypes in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
        outputs = []
        for fuse in (True, False):
            model = made(kind, fuse=fuse, dtype=torch.float32)
            convolutions = [each for each in model.modules() if isinstance(each, nn.Conv2d)]
            for each, dtype in zip(convolutions, dtypes, strict=False):
                cast(each, dtype)
                each.register_forward_pre_hook(lambda _, given: (given[0].float(),))
            outputs.append(model(X.float()))
        assert outputs[0].dtype is outputs[1].dtype
        torch.testing.assert_close(*outputs)


class Broadcast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.pool = conv_norm(), nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(x)
        return y + self.body(x)


def test_a_summand_that_is_spread() -> None:
    fused, plain = (made(Broadcast, fuse=fuse) for fuse in (True, False))
    assert epilogues(fused) == {"body.1": "residual"}
    same(trained(fused), trained(plain))


# --- compilers, scripts, tracers -----------------------------------------------------------------


@pytest.mark.parametrize("kind", [Inverted, ShortcutLast], ids=lambda kind: kind.__name__)
def test_tracers_and_scripts_see_the_plain_code(kind: type[nn.Module]) -> None:
    model, other = made(kind, fuse=True), made(kind, fuse=False)
    traced = torch.fx.symbolic_trace(model)
    torch.testing.assert_close(traced(X), other(X))
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), other(X))
    scripted = torch.jit.script(model.eval())
    torch.testing.assert_close(scripted(X), model(X))


# --- cost ----------------------------------------------------------------------------------------


def test_what_is_asked_is_linear_in_the_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tower of sequences that end in one norm, with an addition above."""

    def questions(depth: int) -> int:
        body: nn.Module = conv_norm()
        for _ in range(depth):
            body = nn.Sequential(nn.Conv2d(4, 4, 1), body)
        model = made(lambda: Adds(body), fuse=True)  # type: ignore[arg-type]
        assert "residual" in epilogues(model).values()
        asked.clear()
        model(X)
        return len(asked)

    asked: list[object] = []
    ask = plans.is_norm
    monkeypatch.setattr(plans, "is_norm", lambda child: (asked.append(child), ask(child))[1])
    few, many = questions(4), questions(8)
    assert questions(16) - many == 2 * (many - few)
