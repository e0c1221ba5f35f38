"""``convert(..., fuse=True)``: what is found in a model's code, what is left alone, and that values stay."""

from __future__ import annotations

import copy
import inspect
import io
import logging
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm.fusion.fused_classes import Fused
from distnorm.layers.module import DistBatchNorm2d, DistNorm
from tests import blocks
from tests.blocks import FOUND, LEFT, Alive, Helper, Returned, Torchvision
from tests.support.pool import Pool


def made(kind: type[nn.Module], *, fuse: bool, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return distnorm.convert(kind().to(dtype), "sync_bn", fuse=fuse)


def epilogues(model: nn.Module) -> dict[str, str]:
    return {name: each.epilogue for name, each in model.named_modules() if isinstance(each, DistNorm) and each.epilogue}


def trained(model: nn.Module, *, steps: int = 2, seed: int = 0) -> list[Tensor]:
    """Outputs and gradients of some steps, and the buffers after them."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    found = []
    for _ in range(steps):
        x = torch.randn(3, 4, 6, 5, generator=generator, dtype=dtype).requires_grad_()
        y = model(x)
        (y * torch.randn(y.shape, generator=generator, dtype=dtype)).sum().backward()
        found += [y.detach(), x.grad]
    return [*found, *(each.grad for each in model.parameters() if each.grad is not None), *model.buffers()]


def same(one: list[Tensor], two: list[Tensor], tolerance: float = 1e-11) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def assert_change_is_respected(kind: type[nn.Module], change: Callable[[Any], object]) -> None:
    """A fused model and one that is not train alike after the ``change``, too."""
    runs = []
    for fuse in (True, False):
        model = made(kind, fuse=fuse)
        first = trained(model, steps=1)
        change(model)
        runs.append([*first, *trained(model, seed=1)])
    same(*runs)


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=str)
def test_what_is_found_gives_equal_values(kind: type[nn.Module], dtype: torch.dtype, tolerance: float) -> None:
    fused, plain = (made(kind, fuse=fuse, dtype=dtype) for fuse in (True, False))
    assert epilogues(fused) == FOUND[kind]
    same(trained(fused), trained(plain), tolerance)
    assert not epilogues(plain)


def test_norms_are_asked_for_their_tails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal values alone would not tell whether anything is fused."""
    asked = []
    forward = DistNorm.forward

    def ask(self: DistNorm, *args: Tensor, **options: bool) -> Tensor:
        asked.append(("residual" in options, {name: each for name, each in options.items() if name != "residual"}))
        return forward(self, *args, **options)

    monkeypatch.setattr(DistNorm, "forward", ask)
    model = made(Torchvision, fuse=True)
    model(torch.randn(2, 4, 3, 3, dtype=torch.float64))
    model.eval()(torch.randn(2, 4, 3, 3, dtype=torch.float64))
    training = [(False, {"relu": True}), (True, {"relu": True, "widen": False})]
    assert asked == [*training, (False, {}), (False, {})]


@pytest.mark.parametrize("kind", LEFT, ids=lambda kind: kind.__name__)
def test_what_could_be_seen_is_left_alone(kind: type[nn.Module]) -> None:
    with pytest.warns(UserWarning, match=rf"{kind.__name__}, no readable code passes the output"):
        fused = made(kind, fuse=True)
    assert not epilogues(fused)
    assert not any(isinstance(each, Fused) for each in fused.modules())
    same(trained(fused), trained(made(kind, fuse=False)))


def hook(model: nn.Module, seen: list[Tensor]) -> None:
    model.b.register_forward_hook(lambda _, __, output: seen.append(output.detach().clone()))


def change_relu(model: nn.Module, seen: list[Tensor]) -> None:
    model.relu = nn.Sigmoid()


def add_shortcut(model: nn.Module, seen: list[Tensor]) -> None:
    model.downsample = nn.Tanh()


def hook_relu(model: nn.Module, seen: list[Tensor]) -> None:
    model.relu.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().clone()))


def wrap_norm(model: nn.Module, seen: list[Tensor]) -> None:
    forward = model.a.forward
    model.a.forward = lambda x: 2 * forward(x)


@pytest.mark.parametrize("change", [hook, change_relu, add_shortcut, hook_relu, wrap_norm])
def test_what_changes_afterwards_is_respected(change: Callable[[nn.Module, list[Tensor]], None]) -> None:
    runs = []
    for fuse in (True, False):
        model, seen = made(Torchvision, fuse=fuse), []
        first = trained(model, steps=1)
        change(model, seen)
        runs.append([*first, *trained(model, seed=1), *seen])
    same(*runs)


CHANGES = {
    "a flag": (blocks.Flags, lambda model: setattr(model, "activate", False)),
    "another flag": (blocks.Flags, lambda model: setattr(model, "late", True)),
    "a norm": (blocks.Flags, lambda model: setattr(model, "a", nn.Tanh())),
    "a slope": (blocks.WithOptions, lambda model: setattr(model.leaky, "negative_slope", 0.9)),
    "a layer": (blocks.WithOptions, lambda model: setattr(model, "leaky", nn.SiLU())),
    "a norm of a list": (blocks.Listed, lambda model: model.norms.__setitem__(1, nn.Tanh())),
    "a dropout": (blocks.Nothings, lambda model: setattr(model[2], "p", 1.0)),
    "what does nothing": (blocks.Nothings, lambda model: model.__setitem__(1, nn.Softplus())),
    "an alpha": (blocks.Nothings, lambda model: setattr(model[3], "alpha", 0.1)),
    "a hook": (blocks.Nothings, lambda model: model[1].register_forward_hook(lambda _, __, y: 2 * y)),
    "what is idle": (blocks.Idle, lambda model: setattr(model.drop, "p", 1.0)),
    "what is idle, nested": (blocks.Idle, lambda model: setattr(model, "pool", nn.Softplus())),
    "a hook of the activation": (
        blocks.Activated,
        lambda model: model.silu.register_forward_pre_hook(lambda _, given: (given[0] * 2,)),
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_of_what_activates_are_respected(name: str) -> None:
    assert_change_is_respected(*CHANGES[name])


def test_a_patched_function_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [made(blocks.Activated, fuse=fuse) for fuse in (True, False)]
    monkeypatch.setattr(torch.nn.functional, "hardswish", lambda x, inplace: torch.tanh(x))
    monkeypatch.setattr(nn.SiLU, "forward", lambda self, x: torch.sin(x))
    same(*map(trained, models))


def test_a_sum_of_two_dtypes_is_what_it_was() -> None:
    """``+=`` keeps the norm's dtype, ``+`` takes the wider one."""
    x = torch.randn(3, 4, 6, 5)
    for kind, dtype in ((Torchvision, torch.bfloat16), (Returned, torch.float32)):
        outputs = []
        for fuse in (True, False):
            model = made(kind, fuse=fuse, dtype=torch.float32)
            model.conv.register_forward_hook(lambda _, __, output: output.bfloat16())
            model.conv.register_forward_pre_hook(lambda _, given: (given[0].float(),))
            outputs.append(model(x))
            assert outputs[-1].dtype is dtype
        torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_a_shortcut_of_another_shape_is_spread() -> None:
    layer = distnorm.convert(nn.Sequential(nn.BatchNorm2d(4)), "local_bn")[0]
    x, residual = torch.randn(3, 4, 5, 5), torch.randn(4, 1, 1)
    expected = torch.relu(layer(x) + residual)
    torch.testing.assert_close(layer(x, residual=residual, relu=True), expected)
    torch.testing.assert_close(layer(x, residual=0.5), layer(x) + 0.5)


def test_evaluation_has_tails_too() -> None:
    layer = distnorm.convert(nn.Sequential(nn.BatchNorm2d(4)), "local_bn").eval()[0]
    x, residual = torch.randn(2, 3, 4, 5, 5).unbind()
    torch.testing.assert_close(layer(x, residual=residual, relu=True), torch.relu(layer(x) + residual))


def test_copies_and_pickles_are_fused_and_revert_leaves_nothing() -> None:
    model = made(Torchvision, fuse=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    expected = trained(made(Torchvision, fuse=False))
    for each in copies:
        assert isinstance(each, Fused) and type(each) is type(model)
        assert epilogues(each) == FOUND[Torchvision]
        same(trained(each), expected)
    distnorm.revert(model)
    assert type(model) is Torchvision and type(model.a) is nn.BatchNorm2d
    assert "epilogue" not in vars(model.a)
    assert repr(model) == repr(Torchvision())


@pytest.mark.parametrize("kind", [Torchvision, Helper])
def test_signatures_stay(kind: type[nn.Module]) -> None:
    fused, plain = (made(kind, fuse=fuse) for fuse in (True, False))
    assert inspect.signature(fused.forward) == inspect.signature(plain.forward)
    if kind is Helper:
        assert inspect.signature(fused.step) == inspect.signature(plain.step)


def test_a_norm_with_a_forward_of_its_own_is_left_alone() -> None:
    class Special(nn.BatchNorm2d):
        pass

    class Twice(DistBatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * super().forward(input)

    distnorm.register_converter(Special, Twice)
    model = Torchvision()
    model.a = Special(4)
    distnorm.convert(model, "local_bn", fuse=True)
    assert epilogues(model) == {"b": "residual, relu"}
    assert model(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)


def test_compiled_models_take_the_plain_version() -> None:
    model = made(Torchvision, fuse=True)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 4, 6, 5, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), model(x))


def test_tracebacks_name_the_lines_of_the_source() -> None:
    model = made(Torchvision, fuse=True)
    model.conv = nn.Identity()
    with pytest.raises(ValueError, match="the layer normalizes 4") as caught:
        model(torch.randn(2, 5, 3, 3, dtype=torch.float64))
    lines = [each.line for each in traceback.extract_tb(caught.tb) if each.filename == blocks.__file__]
    assert lines[-1] == "out = self.a(out)"


@pytest.mark.parametrize(
    "register",
    [
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ],
)
def test_hooks_on_all_modules_see_what_they_would_see_of_stock_layers(register) -> None:
    seen: list[tuple[str, float]] = []

    def note(module: nn.Module, *values: object) -> None:
        first = values[-1][0] if isinstance(values[-1], tuple) else values[-1]
        seen.append((type(module).__name__.replace("DistBatch", "Batch"), round(float(first.detach().min()), 6)))

    def run(fuse: bool) -> list[tuple[str, float]]:
        model = made(Torchvision, fuse=fuse)
        x = torch.randn(4, 4, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        handle = register(note)
        try:
            model(x).square().sum().backward()
        finally:
            handle.remove()
        return [seen.pop(0) for _ in range(len(seen))]

    assert run(True) == run(False)


def test_it_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "distnorm"):
        model = made(Alive, fuse=False)
        model = made(Torchvision, fuse=True)
    assert "2 of 2 norms are fused with their epilogues: a (relu), b (residual, relu)" in caplog.text
    assert "sync_bn, fused with residual, relu)" in repr(model)


def gradients(rank: int, fuse: bool, hooked: int, options: dict[str, object]) -> list[Tensor]:
    """Of a rank whose number of values is its own; hooks make one rank take the plain version."""
    torch.manual_seed(0)
    blocks = nn.Sequential(Torchvision(), Alive(), Torchvision()).double()
    model = distnorm.convert(blocks, "sync_bn", fuse=fuse, **options)
    if rank == hooked:
        hook(model[0], [])
    x = torch.randn(2 + rank, 4, 5, 5, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    model(x).square().sum().backward()
    return [*(each.grad for each in model.parameters() if each.grad is not None), *model.buffers()]


@pytest.mark.parametrize("options", [{}, {"overlap": True}], ids=["", "overlap"])
@pytest.mark.parametrize("hooked", [-1, 0])
def test_ranks_agree_whichever_version_they_run(pool: Pool, hooked: int, options: dict[str, object]) -> None:
    fused, plain = (pool.run(2, gradients, fuse, hooked, options) for fuse in (True, False))
    for ours, expected in zip(fused, plain, strict=True):
        same(ours, expected)
