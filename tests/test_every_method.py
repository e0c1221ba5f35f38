"""What a converted layer does, for every recipe of a method beyond batch norm.

Equations are in tests/test_method_equations.py. Ranks, recomputation and compilation with every policy: tests/laws.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import distnorm
from distnorm import Recipe, recipes
from distnorm.methods import IEBN, MAD, SQD, BatchNorm, GroupNorm, MixtureNorm
from distnorm.policies import AllReduce, Local, Moving, StaleMix, Warmup

FOLDABLE = [
    *(f"gbn(deviation='{each}')" for each in ("sd", "mad", "l1", "range", "worst_case", "sqd", "semideviation")),
    "gbn(deviation='mad', policy='local')",
    "gbn(deviation='sqd', alpha=0.6, policy='local')",
    "gbn(policy='moving')",
    "gbn(deviation='l1', policy='stale')",
]
NOT_FOLDABLE = [
    *("iebn", "iebn(policy='local')", "iebn(policy='stale')"),
    *("mixture_norm", "mixture_norm(components=2, rounds=1, policy='moving')"),
]
PER_SAMPLE = ["layer_norm", "group_norm", "group_norm(groups=2, weights='standardized')", "instance_norm"]
EVERY = FOLDABLE + NOT_FOLDABLE + PER_SAMPLE


def model_of(recipe: str | None, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)]
    for norm in (layers[1], layers[4]):
        nn.init.constant_(norm.bias, 0.5)  # "worst_case" would let nothing pass the ReLU
    model = nn.Sequential(*layers).to(dtype)
    return model if recipe is None else distnorm.convert(model, recipes.parse(recipe))


def batch(step: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step)).to(dtype)


def trained(recipe: str, steps: int = 4, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = model_of(recipe, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch(step, dtype)).pow(3).mean().backward()
        optimizer.step()
    return model


def state_of(model: nn.Module) -> dict[str, Any]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("recipe", EVERY)
def test_training_changes_what_it_should(recipe: str) -> None:
    """Every parameter gets a gradient, and evaluation differs from training only where statistics run."""
    model = trained(recipe)
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())
    tracked = [name for name, buffer in model.named_buffers() if not name.endswith("num_batches_tracked")]
    before = model_of(recipe).state_dict()
    moved = [not torch.equal(model.state_dict()[name], before[name]) for name in tracked]
    assert not any(moved) if recipe in PER_SAMPLE else all(moved), dict(zip(tracked, moved, strict=True))
    x = batch(9)
    y = model(x)
    assert torch.equal(model.eval()(x), y) == (recipe in PER_SAMPLE)


@pytest.mark.parametrize("recipe", EVERY)
def test_copies_and_pickles(recipe: str) -> None:
    model, x = trained(recipe), batch(9)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    expected, evaluated = model(x), model.eval()(x)
    for each in copies:
        torch.testing.assert_close((each(x), each.eval()(x)), (expected, evaluated), rtol=0, atol=0)


@pytest.mark.parametrize("recipe", EVERY)
def test_a_state_dict_resumes(recipe: str) -> None:
    model = trained(recipe)
    other = model_of(recipe)
    other.load_state_dict(state_of(model))
    model.eval(), other.eval()
    torch.testing.assert_close(other(batch(9)), model(batch(9)), rtol=0, atol=0)


@pytest.mark.parametrize("recipe", EVERY)
def test_a_stock_checkpoint_evaluates_as_stock(recipe: str) -> None:
    """Where evaluation uses the running statistics and nothing else; the gate of iebn starts at 0.27."""
    stock = model_of(None)
    for step in range(3):
        stock(batch(step))
    model = model_of(recipe)
    model.load_state_dict(stock.state_dict())
    ours, theirs = model.eval()(batch(9)), stock.eval()(batch(9))
    if recipe in FOLDABLE or recipe.startswith("mixture"):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    else:
        assert ours.shape == theirs.shape and ours.isfinite().all() and not torch.allclose(ours, theirs)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", EVERY)
def test_recomputation(recipe: str, reentrant: bool) -> None:
    """Blocks called twice per step; buffers have moved when they are computed again."""

    def run(checkpointed: bool) -> list[Tensor]:
        model = trained(recipe, dtype=torch.float64)
        block = model[:3]
        x = batch(5, torch.float64).requires_grad_()
        for _ in range(2):
            twice = lambda x: block(x) + block(x * 1.5)  # noqa: E731
            y = checkpoint(twice, x, use_reentrant=reentrant) if checkpointed else twice(x)
            model[3:](y).pow(3).mean().backward()
        return [x.grad, *(parameter.grad for parameter in model.parameters()), *model.buffers()]

    torch.testing.assert_close(run(True), run(False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("recipe", EVERY)
def test_autocast(recipe: str) -> None:
    """Statistics are those of float32: output and gradients are as near as bfloat16 activations allow."""
    model, x = trained(recipe), batch(9)
    norm = model[1]
    h = model[0](x).detach()
    twin = copy.deepcopy(norm)
    given = h.bfloat16().requires_grad_()
    wide = given.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(given)
    expected = twin(wide)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2**-7, atol=2**-7)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(dy.bfloat16())
    expected.backward(dy.bfloat16().float())
    error = (given.grad.float() - wide.grad).norm() / wide.grad.norm()
    assert given.grad.dtype == torch.bfloat16 and error < 0.02
    with torch.autocast("cpu", torch.bfloat16):
        model(x).float().pow(3).mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    "recipe",
    [
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("gbn", "mixture_norm")),
        *("gbn(deviation='mad', policy='local')", "iebn", "group_norm"),
    ],
)
def test_compiled_with_inductors_front_end(recipe: str) -> None:
    """Training and evaluation as in eager mode; tests/laws/test_compiled.py has all methods on one graph."""
    compiled, eager = trained(recipe), trained(recipe)
    fast = torch.compile(compiled, backend="aot_eager")
    for step in range(2):
        torch.testing.assert_close(fast(batch(step)), eager(batch(step)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state_of(compiled), state_of(eager), rtol=1e-4, atol=1e-4)
    compiled.eval(), eager.eval()
    torch.testing.assert_close(fast(batch(9)), eager(batch(9)), rtol=1e-4, atol=1e-4)
    torch.compiler.reset()


@pytest.mark.parametrize("recipe", EVERY)
def test_folded_and_exported(recipe: str) -> None:
    """Foldable norms disappear; others stay, and export with the rest in evaluation."""
    model = trained(recipe, steps=8)
    x = batch(9)
    folded = distnorm.fold(model)
    expected = model.eval()(x).detach()
    torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    kept = [type(layer).__name__ for layer in folded.modules() if "Norm" in type(layer).__name__]
    assert len(kept) == (0 if recipe in FOLDABLE else 2)
    exported = torch.export.export(folded, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("recipe", EVERY)
def test_reverted(recipe: str) -> None:
    """To batch norm, to torch's GroupNorm, or not at all."""
    model = trained(recipe, steps=8)
    expected = model.eval()(batch(9))
    if recipe in NOT_FOLDABLE:
        with pytest.raises(RuntimeError, match=r"1: "):
            distnorm.revert(model)
        return
    distnorm.revert(model)
    assert type(model[1]) is (nn.GroupNorm if recipe in PER_SAMPLE else nn.BatchNorm2d)
    torch.testing.assert_close(model.eval()(batch(9)), expected, rtol=1e-5, atol=1e-5)
    assert not any(name.startswith("distnorm") for name in type(model[1]).__module__.split("."))


@pytest.mark.parametrize("recipe", EVERY)
def test_empty_batches_of_evaluation(recipe: str) -> None:
    assert trained(recipe, steps=1).eval()(torch.zeros(0, 3, 8, 8)).shape == (0, 4, 4, 4)


@pytest.mark.parametrize("recipe", EVERY)
@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}], ids=str)
def test_layers_without_parameters_or_statistics(recipe: str, options: dict[str, bool]) -> None:
    layer = distnorm.convert(nn.BatchNorm2d(4, **options), recipes.parse(recipe))
    x = torch.randn(4, 4, 3, 3, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad.isfinite().all() and layer.eval()(x).isfinite().all()


MOVING = Warmup(then=Moving(window=16), steps=99)
STALE = Warmup(then=StaleMix(window=8), steps=16)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("gbn", Recipe(method=SQD(alpha=0.7), policy=AllReduce())),
        ("gbn(deviation='sd')", Recipe(method=BatchNorm(), policy=AllReduce())),
        ("gbn(alpha=0.9, policy='moving')", Recipe(method=SQD(alpha=0.9), policy=MOVING)),
        ("gbn(policy='local')", Recipe(method=SQD(exact=True), policy=Local())),
        ("gbn(deviation='mad', policy='local')", Recipe(method=MAD(exact=True), policy=Local())),
        ("iebn(policy='stale', weights='centralized')", Recipe(method=IEBN(), policy=STALE, weights="centralized")),
        ("mixture_norm(rounds=1)", Recipe(method=MixtureNorm(components=3, rounds=1), policy=AllReduce())),
        ("group_norm(groups=32)", Recipe(method=GroupNorm(groups=32), policy=Local())),
    ],
)
def test_what_a_name_stands_for(recipe: str, expected: Recipe) -> None:
    assert recipes.parse(recipe) == expected and recipes.parse(recipe).name == recipe


@pytest.mark.parametrize(
    ("recipe", "options", "message"),
    [
        ("gbn", {"deviation": "iqr"}, r'gbn\(deviation=\'iqr\'\): need "sd" or "mad" or "l1"'),
        ("gbn", {"alpha": 0.0}, r"gbn\(alpha=0.0\): need a number above 0 and below 1"),
        ("gbn", {"alpha": 1}, r"gbn\(alpha=1\): need a number above 0 and below 1"),
        ("gbn", {"alpha": float("nan")}, r"gbn\(alpha=nan\)"),
        ("gbn", {"deviation": "mad", "alpha": 0.5}, r'deviation="mad", alpha=0.5\): only deviation="sqd" has an alpha'),
        (
            "gbn",
            {"policy": "lazy"},
            r'gbn\(policy=\'lazy\'\): need "local" or "sync" or "hierarchical"',
        ),
        ("gbn", {"deviation": "range", "policy": "moving"}, r"Range\(\).*maxima"),
        ("gbn", {"deviation": "worst_case", "policy": "stale"}, r"WorstCase\(\).*maxima"),
        ("mixture_norm", {"components": 0}, r"components=0\): need a whole number of components, at least 1"),
        ("mixture_norm", {"components": 2.0}, r"components=2.0\)"),
        ("mixture_norm", {"rounds": 0}, r"rounds=0\): need a whole number of rounds, at least 1"),
        ("group_norm", {"groups": 0}, r"groups=0\): need a whole number of groups, at least 1"),
        ("iebn", {"groups": 2}, r"recipe 'iebn' has no option 'groups'"),
    ],
)
def test_what_a_config_can_get_wrong(recipe: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.build(recipe, **options)


@pytest.mark.parametrize(("groups", "divisor"), [(3, 2), (16, 8), (32, 8)])
def test_groups_that_do_not_divide_name_the_layer(groups: int, divisor: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    message = rf"^1: group_norm\(groups={groups}\) cannot divide 8 channels.*such as {divisor}"
    with pytest.raises(ValueError, match=message):
        distnorm.convert(model, "group_norm", groups=groups)
    assert type(model[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("recipe", ["gbn", "iebn", "mixture_norm", "layer_norm"])
def test_an_input_that_the_method_does_not_take(recipe: str) -> None:
    layer = distnorm.convert(nn.Sequential(nn.BatchNorm1d(4)), recipe)[0]
    with pytest.raises(TypeError, match=r"^0: given 2 inputs"):
        layer(torch.zeros(2, 4), torch.zeros(2, 4))
