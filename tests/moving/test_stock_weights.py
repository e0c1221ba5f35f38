"""What a state_dict of centralized weights holds evaluates, in the stock model, as the trained model does."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.optim.swa_utils import AveragedModel

import distnorm
from distnorm import Recipe
from distnorm.layers.centralized import Centralized
from distnorm.layers.weights import centralized
from distnorm.methods import RMS
from distnorm.policies import Local
from tests.support.threads import run_threads

RMS_ALONE = Recipe(method=RMS(), policy=Local(), weights="centralized")
RECIPES: dict[str, Any] = {
    "rms": lambda model: distnorm.convert(model, RMS_ALONE),
    "mabn": lambda model: distnorm.convert(model, "mabn", warmup=2, window=3),
    "lazy_bn": lambda model: distnorm.convert(model, "lazy_bn", warmup=2),
    "sync_bn": lambda model: distnorm.convert(model, "sync_bn", weights="centralized"),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda each: torch.optim.SGD(each, 0.05, momentum=0.9, weight_decay=1e-2),
    "Adam": lambda each: torch.optim.Adam(each, 0.02, weight_decay=1e-2),
    "AdamW": lambda each: torch.optim.AdamW(each, 0.02),
    "Adagrad": lambda each: torch.optim.Adagrad(each, 0.05),
}
EVERY_RECIPE = pytest.mark.parametrize("recipe", RECIPES)
EVERY_OPTIMIZER = pytest.mark.parametrize("kind", OPTIMIZERS)


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    parts = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)]
    parts += [nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, 4), nn.BatchNorm1d(4)]
    model = nn.Sequential(*parts)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.1, 0.3, generator=generator)
    return model.to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(5, 3, 6, 6, generator=generator, dtype=torch.float64) + 1).to(dtype)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, after: Callable[[], None] | None = None
) -> None:
    model.train()
    for step in steps:
        optimizer.zero_grad()
        y = model(batch(step, next(model.parameters()).dtype))
        (y - torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)).square().mean().backward()
        optimizer.step()
        if after is not None:
            after()


def saved(model: nn.Module) -> dict[str, Tensor]:
    """As the script's own checkpoint."""
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


def in_stock(state: dict[str, Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    stock = net(dtype)
    stock.load_state_dict(state, strict=True)
    return stock.eval()(batch(99, dtype)).detach()


def evaluated(model: nn.Module) -> Tensor:
    return model.eval()(batch(99, next(model.parameters()).dtype)).detach()


@EVERY_RECIPE
@EVERY_OPTIMIZER
@pytest.mark.parametrize("attached", [False, True])
def test_the_stock_model_evaluates_as_the_trained_one(recipe: str, kind: str, attached: bool) -> None:
    model = RECIPES[recipe](net())
    optimizer = OPTIMIZERS[kind](model.parameters())
    if attached:
        distnorm.attach(model, optimizer=optimizer)
    train(model, optimizer, range(7))
    y = evaluated(model)
    torch.testing.assert_close(in_stock(saved(model)), y, rtol=0, atol=1e-9)
    assert isinstance(model[0], Centralized) and isinstance(model[3], Centralized)
    for name, dims in (("0.weight", (1, 2, 3)), ("7.weight", (1,))):
        assert model.state_dict()[name].mean(dims).abs().max() < 1e-12
    groups = model.state_dict()["3.weight"].unflatten(0, (2, 4))  # [group, in, out / groups, ...]
    assert groups.mean((1, 3, 4)).abs().max() < 1e-12
    torch.testing.assert_close(evaluated(copy.deepcopy(model)), y)
    torch.testing.assert_close(evaluated(pickle.loads(pickle.dumps(model))), y)
    torch.testing.assert_close(evaluated(distnorm.revert(model)), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@EVERY_OPTIMIZER
def test_narrow_parameters(kind: str, dtype: torch.dtype) -> None:
    model = RECIPES["rms"](net(dtype))
    train(model, OPTIMIZERS[kind](model.parameters()), range(7))
    y = evaluated(model)
    tolerance = 1e-5 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(in_stock(saved(model), dtype), y, rtol=tolerance, atol=tolerance)


@EVERY_OPTIMIZER
def test_the_trajectory_is_that_of_a_projection_after_every_step(kind: str) -> None:
    """Against plain autograd on functional layers, with an optimizer and a projection of its own."""
    layers = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3), nn.BatchNorm1d(3)]
    model = nn.Sequential(*layers).double()
    weights = [model[place].weight.detach().clone().requires_grad_() for place in (0, 3)]
    rest = [
        parameter.detach().clone().requires_grad_()
        for name, parameter in model.named_parameters()
        if name not in ("0.weight", "3.weight")
    ]
    bias0, scale0, shift0, bias1, scale1, shift1 = rest
    distnorm.convert(model, "local_bn", weights="centralized")
    # Without weight decay in the gradient, so that an optimizer sees the same with the mean in the weight or out of it.
    optimizers = [OPTIMIZERS[kind](each) for each in (list(model.parameters()), [*weights, *rest])]
    for optimizer in optimizers:
        optimizer.param_groups[0]["weight_decay"] = 0
    for step in range(6):
        x = batch(step).flatten(1)[:, :5]
        h = x @ (weights[0] - weights[0].mean(1, keepdim=True)).T + bias0
        h = torch.tanh((h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() * scale0 + shift0)
        h = h @ (weights[1] - weights[1].mean(1, keepdim=True)).T + bias1
        expected = (h - h.mean(0)) / (h.var(0, correction=0) + 1e-5).sqrt() * scale1 + shift1
        y = model(x)
        torch.testing.assert_close(y, expected, rtol=1e-8, atol=1e-8)
        for optimizer, loss in zip(optimizers, (y, expected), strict=True):
            optimizer.zero_grad()
            loss.pow(3).mean().backward()
            optimizer.step()
        with torch.no_grad():
            for weight in weights:
                weight -= weight.mean(1, keepdim=True)
        for place, weight in zip((0, 3), weights, strict=True):
            torch.testing.assert_close(model[place].weight, weight, rtol=1e-8, atol=1e-8)


@EVERY_RECIPE
@EVERY_OPTIMIZER
def test_saving_and_copying_change_nothing(recipe: str, kind: str) -> None:
    models = [RECIPES[recipe](net()) for _ in range(2)]
    optimizers = [OPTIMIZERS[kind](each.parameters()) for each in models]
    saved(models[0]), copy.deepcopy(models[0])
    for step in range(6):
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, range(step, step + 1))
        saved(models[0]), copy.deepcopy(models[0]), evaluated(models[0])
    torch.testing.assert_close(models[0].state_dict(), models[1].state_dict(), rtol=0, atol=0)


@EVERY_RECIPE
@EVERY_OPTIMIZER
@pytest.mark.parametrize("attached", [False, True])
def test_resuming_goes_on_bit_for_bit(recipe: str, kind: str, attached: bool) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = RECIPES[recipe](net())
        optimizer = OPTIMIZERS[kind](model.parameters())
        if attached:
            distnorm.attach(model, optimizer=optimizer)
        return model, optimizer

    straight, optimizer = start()
    train(straight, optimizer, range(5))
    ours, state, theirs = distnorm.state_dict(straight), saved(straight), copy.deepcopy(optimizer.state_dict())
    train(straight, optimizer, range(5, 8))
    resumed, again = start()
    distnorm.load_state_dict(resumed, ours)  # in either order
    resumed.load_state_dict(state)
    again.load_state_dict(theirs)
    torch.testing.assert_close(evaluated(resumed), in_stock(state))
    train(resumed, again, range(5, 8))
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_gradient_steps_by_hand() -> None:
    """Nobody calls an optimizer: what is saved is centred all the same."""
    model = RECIPES["rms"](net())
    for step in range(4):
        model(batch(step)).pow(3).mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad.sign()  # not a projected step
                parameter.grad = None
    torch.testing.assert_close(in_stock(saved(model)), evaluated(model), rtol=0, atol=1e-9)


# Averages ---------------------------------------------------------------------------------------------------


class ModelEma(nn.Module):
    """Works as timm's: a copy whose state_dict's values are moved in place towards the model's."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(model).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        for ours, theirs in zip(self.module.state_dict().values(), model.state_dict().values(), strict=True):
            ours.copy_(self.decay * ours + (1 - self.decay) * theirs)


class ModelEmaV3(ModelEma):
    """By parameters, in one operation, and buffers apart."""

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), 1 - self.decay)
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)


class Averaged(AveragedModel):
    """torch's, with the names of the others."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True)

    def update(self, model: nn.Module) -> None:
        self.update_parameters(model)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("kind", ["Adam", "SGD"])
@pytest.mark.parametrize("average", [ModelEma, ModelEmaV3, Averaged])
def test_averages_hold_centred_weights(average: Any, kind: str, before: bool) -> None:
    """The first average is the untrained weight, of which little is left in the end."""
    model = net()
    ema = average(model, 0.1) if before else None
    RECIPES["rms"](model)
    ema = average(model, 0.1) if ema is None else ema
    expected = {}
    train(model, OPTIMIZERS[kind](model.parameters()), range(3))

    def update() -> None:
        ema.update(model)
        for name, value in model.named_parameters():
            expected[name] = expected.get(name, 0) * 0.1 + value.detach() * 0.9

    train(model, OPTIMIZERS[kind](model.parameters()), range(3, 15), after=update)
    found = dict(ema.module.named_parameters())
    assert not torch.equal(found["0.weight"], model[0].weight)
    torch.testing.assert_close(found["0.weight"], expected["0.weight"], rtol=1e-9, atol=1e-9)
    state = {name: value for name, value in saved(ema.module).items()}
    assert state["0.weight"].mean((1, 2, 3)).abs().max() < 1e-9
    torch.testing.assert_close(in_stock(state), evaluated(ema.module), rtol=0, atol=1e-9)


def test_an_average_of_the_untrained_model_is_centred_from_the_start() -> None:
    model = RECIPES["rms"](net())
    ema = ModelEma(model, 0.999)
    train(model, OPTIMIZERS["Adam"](model.parameters()), range(5), after=lambda: ema.update(model))
    state = saved(ema.module)
    assert state["0.weight"].mean((1, 2, 3)).abs().max() < 1e-12
    torch.testing.assert_close(in_stock(state), evaluated(ema.module), rtol=0, atol=1e-9)


# What is in flight ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_one_rank_saves_what_is_in_flight(recipe: str) -> None:
    def run(rank: int, saves: bool) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        model = RECIPES[recipe](net())
        optimizer = OPTIMIZERS["Adam"](model.parameters())
        distnorm.attach(model, optimizer=optimizer)  # threads number their backward passes together
        for step in range(6):
            x = batch(10 * step + rank)
            optimizer.zero_grad()
            model(x).pow(2).mean().backward()
            for parameter in model.parameters():  # ranks share gradients
                torch.distributed.all_reduce(parameter.grad)
            optimizer.step()
            if saves and rank == 0:
                saved(model), evaluated(model), model.train()
        live = {name: buffer.clone() for name, buffer in model.named_buffers()}
        state = saved(model)
        moved = [name for name, values in live.items() if not torch.equal(state[name], values)]
        assert set(moved) == {name for name in live if not (recipe == "mabn" and "mean" in name)}, moved
        torch.testing.assert_close(dict(model.named_buffers()), live, rtol=0, atol=0)
        return evaluated(model), in_stock(state), state

    for each in run_threads(2, run, True):
        torch.testing.assert_close(each[0], each[1], rtol=0, atol=1e-9)
    assert all(
        torch.equal(each, other)
        for each, other in zip(
            *(
                [values for name, values in found[2].items() if "running" in name]
                for found in run_threads(2, run, False)
            ),
            strict=True,
        )
    )


def test_what_is_in_flight_is_what_completes() -> None:
    """Saved right after a step: the running statistics that the model has one step later, with the next step's sums."""
    model = RECIPES["mabn"](net())
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    train(model, optimizer, range(6))
    state = saved(model)
    train(model, optimizer, range(6, 7))
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(state[name], buffer)


@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_compiled_evaluation_has_what_is_in_flight(recipe: str) -> None:
    model = RECIPES[recipe](net())
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    train(model, optimizer, range(6))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for step in range(6, 9):
        y = evaluated(model)
        torch.testing.assert_close(in_stock(saved(model)), y, rtol=0, atol=1e-9)
        torch.testing.assert_close(compiled.eval()(batch(99)), y)
        train(model, optimizer, range(step, step + 1))


def test_what_is_in_flight_outlives_the_job() -> None:
    """A script that saves after it has destroyed its process group."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model = RECIPES["mabn"](net())
    train(model, OPTIMIZERS["Adam"](model.parameters()), range(6))
    live = model[1].running_var.clone()
    torch.distributed.destroy_process_group()
    state = saved(model)
    assert not torch.equal(state["1.running_var"], live)
    torch.testing.assert_close(in_stock(state), evaluated(model), rtol=0, atol=1e-9)


def test_what_was_loaded_evaluates_as_it_is() -> None:
    """Nothing of the run before, still in flight, mixes with the best checkpoint."""
    model = RECIPES["mabn"](net())
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    train(model, optimizer, range(5))
    best = saved(model)
    train(model, optimizer, range(5, 9))
    model.load_state_dict(best)
    torch.testing.assert_close(evaluated(model), in_stock(best))
    torch.testing.assert_close(saved(model), best, rtol=0, atol=0)


# Tools that put something in the place of a weight -----------------------------------------------------------

TOOLS: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], Any]]] = {
    "weight_norm": (weight_norm, nn.utils.remove_weight_norm),
    "spectral_norm": (spectral_norm, nn.utils.remove_spectral_norm),
    "prune": (
        lambda module: prune.l1_unstructured(module, "weight", 0.4),
        lambda module: prune.remove(module, "weight"),
    ),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning", "ignore:.*weight_norm.*:DeprecationWarning")
@pytest.mark.parametrize("when", ["before", "after", "trained"])
@pytest.mark.parametrize("tool", TOOLS)
def test_weights_made_of_other_parameters_are_left_alone(tool: str, when: str) -> None:
    put_on, take_off = TOOLS[tool]
    model = net()
    if when == "before":
        put_on(model[0])
    RECIPES["rms"](model)
    if when == "trained":
        train(model, OPTIMIZERS["Adam"](model.parameters()), range(2))
    if when != "before":
        put_on(model[0])
    train(model, OPTIMIZERS["Adam"](model.parameters()), range(4))
    stock = net()
    put_on(stock[0])
    stock.load_state_dict(saved(model))
    y = evaluated(model)
    torch.testing.assert_close(stock.eval()(batch(99)), y, rtol=0, atol=1e-9)
    torch.testing.assert_close(evaluated(distnorm.revert(model)), y)
    take_off(model[0])
    torch.testing.assert_close(evaluated(model), y)
    assert tool != "prune" or (model.state_dict()["0.weight"] == 0).any()


@pytest.mark.parametrize("tool", [parametrizations.weight_norm, parametrizations.spectral_norm])
@pytest.mark.parametrize("trained", [False, True])
def test_parametrized_after_convert(
    tool: Callable[[nn.Module], Any], trained: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = RECIPES["rms"](net())
    if trained:
        train(model, OPTIMIZERS["Adam"](model.parameters()), range(2))
    tool(model[0])
    train(model, OPTIMIZERS["Adam"](model.parameters()), range(4))
    assert trained or "the weights of 0 are not centred: they are computed from other parameters" in caplog.text
    stock = net()
    tool(stock[0])
    stock.load_state_dict(saved(model))
    torch.testing.assert_close(stock.eval()(batch(99)), evaluated(model), rtol=0, atol=1e-9)


def test_layers_can_be_scripted_for_evaluation() -> None:
    model = RECIPES["rms"](net())
    train(model, OPTIMIZERS["Adam"](model.parameters()), range(3))
    model.eval()
    x = batch(99)
    y = model[0](x)
    torch.testing.assert_close(torch.jit.script(model[0])(x), y)
    h = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(nn.Sequential(model[3]))(h), model[3](h))


def test_one_parameter_of_two_layers_is_left_alone() -> None:
    model = net()
    tied = nn.Conv2d(3, 8, 3).double()
    tied.weight = model[0].weight
    whole = nn.ModuleDict({"model": model, "tied": tied})
    RECIPES["rms"](whole)
    assert model[0] not in centralized(whole) and model[3] in centralized(whole)


def test_stock_statistics_keep_the_weights_as_they_are() -> None:
    """Of batch norm too, whose evaluation a centred weight would change."""
    stock = net()
    train(stock, OPTIMIZERS["Adam"](stock.parameters()), range(3))
    y, state = evaluated(stock), saved(stock)
    for recipe in RECIPES.values():
        model = recipe(copy.deepcopy(stock))
        torch.testing.assert_close(evaluated(model), y)
        torch.testing.assert_close(saved(model), state, rtol=0, atol=0)
        torch.testing.assert_close(evaluated(distnorm.revert(model)), y)


def test_frozen_norms_keep_the_weights_as_they_are(caplog: pytest.LogCaptureFixture) -> None:
    """Fine-tuning with norms in evaluation, whose statistics belong to the stock weights."""
    stock = net()
    train(stock, OPTIMIZERS["Adam"](stock.parameters()), range(3))
    model = RECIPES["mabn"](copy.deepcopy(stock))
    for each in (stock, model):
        each.train()
        for layer in each.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                layer.eval()
        optimizer = torch.optim.SGD(each.parameters(), 0.01)
        for step in range(3):
            optimizer.zero_grad()
            each(batch(step)).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(evaluated(model), evaluated(stock))
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]
