"""Conditional norms, AdaIN and SPADE in models: bound, converted, reverted, copied, saved, compiled, traced."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import distnorm
from distnorm import recipes
from distnorm.attach import conversions_of
from distnorm.nn import SPADE, AdaIN, ConditionalBatchNorm, ConditionalInstanceNorm
from distnorm.settings import Settings
from tests.conditional import draw, one_hot_map
from tests.support.thinned import thinned
from tests.support.threads import run_threads

N, C, K = 4, 3, 5
IDS = torch.tensor([4, 0, 4, 2])


class Generator(nn.Module):
    """Of class and map: two equal conditional norms, two SPADEs, a norm of its own."""

    def __init__(self, recipe: Any = "sync_bn") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.first = nn.Conv2d(2, C, 1), ConditionalBatchNorm(C, K, recipe)
        self.second, self.plain = ConditionalBatchNorm(C, K, recipe), nn.BatchNorm2d(C)
        self.last, self.map = SPADE(C, 2, recipe, hidden=4), SPADE(C, 2, recipe, hidden=4)

    def forward(self, x: Tensor, ids: Tensor, map: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(self.conv(x), ids)), ids)
        return self.map(torch.relu(self.last(self.plain(x), map)), map)


INPUTS = draw(N, 2, 6, 6).float(), IDS, one_hot_map(N, 2, 3, 3).float()
NORMS = ["first.norm", "second.norm", "plain", "last.norm", "map.norm"]
BUILT = ["ConditionalBatchNorm(3, 5)", "SPADE(3, 2)"]


def trained(model: nn.Module, steps: int = 4) -> nn.Module:
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(steps):
        model(*INPUTS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def tallies(model: nn.Module) -> tuple[dict[str, int], int]:
    """Collectives by layer of one step, on one of two ranks, and how many conversions there were."""

    def step(rank: int) -> tuple[dict[str, int], int]:
        mine = copy.deepcopy(model)
        distnorm.attach(mine)
        with distnorm.Ledger(mine) as ledger:
            trained(mine, 1)
        return {name: tally.collectives for name, tally in ledger.layers.items()}, len(conversions_of(mine))

    first, second = run_threads(2, step)
    assert first == second
    return first


def test_layers_bind_one_by_one_or_as_one_model() -> None:
    """As they were built they are known by what they are; in a converted model, by their place."""
    alone = {BUILT[0]: 4, BUILT[1]: 4}
    assert tallies(Generator()) == (alone, 4)
    joined = dict.fromkeys(NORMS, 2), 1
    assert tallies(distnorm.convert(Generator(), "sync_bn")) == joined
    assert tallies(distnorm.convert(Generator(None), "sync_bn")) == joined
    assert tallies(distnorm.convert(distnorm.revert(Generator("mabn")), "sync_bn")) == joined


def test_a_moving_model_sends_one_vector() -> None:
    recipe = recipes.build("mabn", window=2, warmup=1)

    def run(rank: int) -> dict[str, int]:
        model = distnorm.convert(Generator(recipe), recipe)
        trained(model, 2)
        with distnorm.Ledger(model) as ledger:
            trained(model, 1)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        return {name: tally.collectives for name, tally in ledger.layers.items()}

    (only,) = {tuple(each.values()) for each in run_threads(2, run)}
    assert only == (1,)


def test_weights_before_conditional_norms_are_centred() -> None:
    """Where a label or a map goes to the norm as well; convolutions within SPADE feed no norm."""
    model = trained(distnorm.convert(Generator(None), "mabn", window=2, warmup=1))
    assert model.conv.weight.sum((1, 2, 3)).abs().max() < 1e-6
    for conv in (model.last.beta, model.map.gamma, model.last.shared):
        assert conv.weight.sum((1, 2, 3)).abs().max() > 1e-2


def test_layers_of_instances_send_nothing() -> None:
    def run(rank: int) -> int:
        layers = [ConditionalInstanceNorm(2, K), AdaIN(), SPADE(2, 2, "instance_norm", hidden=4)]
        model = distnorm.convert(nn.ModuleList([*layers, nn.BatchNorm2d(2)]), "sync_bn")
        with distnorm.Ledger(model) as ledger:
            for layer, other in zip(layers, (IDS, INPUTS[0], INPUTS[2]), strict=True):
                layer(INPUTS[0], other).sum().backward() if list(layer.parameters()) else layer(INPUTS[0], other)
        return ledger.collectives

    assert run_threads(2, run) == [0, 0]


def test_another_recipe_asks_for_revert() -> None:
    model = Generator()
    with pytest.raises(ValueError, match=r"first\.norm: already converted to .* Call distnorm\.revert"):
        distnorm.convert(model, "mabn")
    assert {each.is_provisional for each in conversions_of(model)} == {True}


def test_settings_convert_models_with_layers_that_were_built() -> None:
    """They do not pass for a model that the script has converted; those that it has are left alone."""
    model = Generator()
    assert Settings.of({"recipe": "sync_bn"}, "test").convert(model)
    assert {each._site.name for each in model.modules() if isinstance(each, distnorm.DistNorm)} == set(NORMS)
    assert not Settings.of({"recipe": "mabn"}, "test").convert(model)
    with pytest.warns(UserWarning, match=r"first\.norm: already converted to"):
        assert not Settings.of({"recipe": "mabn"}, "test").convert(Generator())


def test_bound_layers_stay_as_they_are() -> None:
    model = trained(Generator("mabn(window=2)"))
    bound = model.first.norm._site
    distnorm.convert(model, "mabn", window=2)
    assert model.first.norm._site is bound and model.plain._site.name == "plain"


def test_a_part_can_be_chosen() -> None:
    model = distnorm.convert(Generator(), "sync_bn", where=["first.*"])
    names = [model.first.norm._site.name, model.second.norm._site.name, type(model.plain)]
    assert names == ["first.norm", BUILT[0], nn.BatchNorm2d]


@pytest.mark.parametrize("convert", [False, True], ids=["as built", "converted"])
def test_revert_leaves_stock_norms_inside(convert: bool) -> None:
    model = Generator()
    if convert:
        distnorm.convert(model, "sync_bn")
    keys = list(trained(model).state_dict())
    y = model.eval()(*INPUTS)
    distnorm.revert(model)
    assert {type(model.get_submodule(name)) for name in NORMS} == {nn.BatchNorm2d}
    torch.testing.assert_close(model(*INPUTS), y, rtol=0, atol=0)
    assert list(trained(model.train()).state_dict()) == keys


@pytest.mark.parametrize("recipe", ["sync_bn", "mabn(window=2, warmup=1)"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_copies_train_alike(way: str, recipe: str) -> None:
    model = Generator(recipe)
    if way == "state_dict":
        twin = Generator(recipe)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        twin.load_state_dict(model.state_dict())
    else:
        twin = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert [each.is_provisional for each in conversions_of(twin)] == [True] * 4
    torch.testing.assert_close(trained(twin).state_dict(), trained(model).state_dict(), rtol=0, atol=0)


def test_what_is_kept_over_steps_is_saved() -> None:
    model = trained(Generator("mabn(window=2, warmup=1)"))
    file = io.BytesIO()
    torch.save([model.state_dict(), distnorm.state_dict(model)], file)
    file.seek(0)
    twin = Generator("mabn(window=2, warmup=1)")
    state, moving = torch.load(file)
    twin.load_state_dict(state)
    distnorm.load_state_dict(twin, moving)
    torch.testing.assert_close(trained(twin).state_dict(), trained(model).state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("recipe", thinned(["sync_bn", "mabn(window=2, warmup=1)", "local_bn"], every=3))
def test_one_compiled_graph(recipe: str) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, eager = Generator(recipe), Generator(recipe)
    model.compile(fullgraph=True, backend=counter)
    torch.testing.assert_close(trained(model).state_dict(), trained(eager).state_dict(), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


def test_instances_in_a_compiled_graph() -> None:
    torch.compiler.reset()
    for layer, other in (ConditionalInstanceNorm(2, K), IDS), (AdaIN(0.5), INPUTS[0] + 1):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(INPUTS[0], other), layer(INPUTS[0], other))


def test_traced_and_exported() -> None:
    model = trained(Generator()).eval()
    y = model(*INPUTS)
    graph = torch.fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"][1:3] == ["first", "second"]
    torch.testing.assert_close(graph(*INPUTS), y)
    torch.testing.assert_close(torch.export.export(model, INPUTS).module()(*INPUTS), y)
