"""State of another model or recipe is refused by name, with nothing changed."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import nn

import distnorm
from distnorm import Recipe
from distnorm.attach import conversions_of
from distnorm.methods import RMS
from distnorm.policies import Moving
from tests.moving.models import build, train
from tests.support.threads import run_threads

State = list[dict[str, Any]]


def widths(*features: int) -> nn.Module:
    return nn.Sequential(*[nn.BatchNorm1d(each) for each in features])


def converted(model: nn.Module, recipe: str = "mabn", **options: Any) -> nn.Module:
    return distnorm.convert(model, recipe, **options)


def written_out(state: Any) -> Any:
    """With numbers in place of tensors."""
    if isinstance(state, dict):
        return {key: written_out(each) for key, each in state.items()}
    return (
        [written_out(each) for each in state]
        if isinstance(state, list)
        else str(getattr(state, "tolist", lambda: state)())
    )


def refused(model: nn.Module, state: Any, *words: str) -> None:
    """By name, and with nothing changed: neither now nor when the layers are bound."""
    bound = all(each.binding is not None for each in conversions_of(model))
    before = deepcopy(distnorm.state_dict(model)) if bound else None
    with pytest.raises(ValueError) as error:
        distnorm.load_state_dict(model, state)
    for word in words:
        assert word in str(error.value)
    if before is not None:
        assert written_out(distnorm.state_dict(model)) == written_out(before)
    else:
        assert distnorm.state_dict(model)[0]["step"] == 0


def build_stock() -> nn.Module:
    return distnorm.revert(build(Recipe(method=RMS(), policy=Moving())))


def unversioned(state: dict[str, Any]) -> dict[str, Any]:
    """As it was written before states had a version."""
    return {key: value for key, value in state.items() if key not in ("version", "recipe", "memory", "layers")}


# --- what does not fit ---------------------------------------------------------------------------

OTHERS = {
    "lazy_bn into mabn": ("lazy_bn", "mabn", {}),
    "mabn into lazy_bn": ("mabn", "lazy_bn", {}),
    "sync_bn into mabn": ("sync_bn", "mabn", {}),
    "mabn into sync_bn": ("mabn", "sync_bn", {}),
    "mabn into hierarchical_bn": ("mabn", "hierarchical_bn", {}),
    "mabn of sums": ("mabn", "mabn", {"loss_reduction": "sum"}),
}


@pytest.mark.parametrize(("writer", "reader", "options"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("old", [False, True], ids=["", "without a version"])
def test_another_recipe_is_refused(writer, reader, options, bound, old):
    model = converted(widths(4, 8)[:1], writer)
    train(model, 0, range(3))
    state = [unversioned(each) for each in distnorm.state_dict(model)] if old else distnorm.state_dict(model)
    other = converted(widths(4, 8)[:1], reader, **options)
    if bound:
        train(other, 0, range(2))
    if old and options:
        return  # nothing in such a file tells
    refused(other, state, *(["fit"] if old else ["state given is of recipe", "the model was converted to"]))


@pytest.mark.parametrize(("writer", "reader"), [("sync_bn", "hierarchical_bn"), ("group_bn", "sync_bn")])
@pytest.mark.parametrize("old", [False, True], ids=["", "without a version"])
def test_recipes_that_remember_nothing_go_on_from_each_other(writer, reader, old):
    def run(rank: int) -> int:
        models = [converted(build_stock(), each, **({"size": 2} if each == "group_bn" else {})) for each in both]
        train(models[0], rank, range(3))
        state = distnorm.state_dict(models[0])
        distnorm.load_state_dict(models[1], [unversioned(each) for each in state] if old else state)
        train(models[1], rank, range(1))
        return distnorm.state_dict(models[1])[0]["step"]

    both = writer, reader
    assert run_threads(2, run) == [4, 4]


@pytest.mark.parametrize(
    ("given", "here", "words"),
    [
        ((4, 8), (8, 4), ("['0', 4]", "['0', 8]")),
        ((4, 8), (4,), ("['1', 8]", "None")),
        ((4,), (4, 8), ("['1', 8]", "None")),
        ((4, 4), (4, 5), ("['1', 4]", "['1', 5]")),
    ],
    ids=str,
)
@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn", "sync_bn"])
def test_other_layers_are_refused(recipe, given, here, words):
    state = distnorm.state_dict(converted(widths(*given), recipe))
    refused(converted(widths(*here), recipe), state, *words)
    bound = converted(widths(*here), recipe)
    distnorm.attach(bound)
    refused(bound, state, *words)


@pytest.mark.parametrize(("given", "here"), [((4, 8), (8, 4)), ((4, 8), (4,)), ((4, 4), (4, 5))], ids=str)
@pytest.mark.parametrize("recipe", ["mabn", "lazy_bn"])
def test_other_layers_are_refused_without_a_version(recipe, given, here):
    state = [unversioned(each) for each in distnorm.state_dict(converted(widths(*given), recipe))]
    refused(converted(widths(*here), recipe), state, "does not fit")


def test_layers_of_another_name_are_refused():
    state = distnorm.state_dict(converted(nn.Sequential(nn.BatchNorm1d(4))))
    refused(converted(nn.ModuleDict({"norm": nn.BatchNorm1d(4)})), state, "['0', 4]", "['norm', 4]")


def test_all_conversions_or_none():
    """The second of two does not fit: the first one keeps what it has."""
    model = nn.Sequential(converted(widths(4)), converted(widths(4), "lazy_bn"))
    fresh = nn.Sequential(converted(widths(4)), converted(widths(4), "lazy_bn"))
    train(model, 0, range(3))
    train(fresh, 0, range(1))
    state = distnorm.state_dict(model)
    refused(fresh, [state[0], state[0]], "the state given is of recipe")


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    def edit(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return edit


def _without(*path: str) -> Callable[[dict[str, Any]], Any]:
    def edit(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return edit


THEN = ("reducer", "then")
DAMAGE = {
    "a newer version": (_set("version", value=2), "version 2"),
    "a version of another kind": (_set("version", value="1"), "version '1'"),
    "no reducer": (_without("reducer"), "reducer"),
    "no step": (_without("step"), "step"),
    "no layers": (_without("layers"), "layers"),
    "no window": (_without(*THEN, "window"), "window"),
    "no ring": (_without(*THEN, "window", "ring"), "ring"),
    "no outbox": (_without(*THEN, "bucket", "outbox"), "outbox"),
    "a number for a window": (_set(*THEN, "window", value=3), "window"),
    "a step of text": (_set("step", value="3"), "step"),
    "a negative step": (_set("step", value=-3), "step"),
    "a wide outbox": (_set(*THEN, "bucket", "outbox", value=torch.zeros(1)), "outbox"),
    "integers in flight": (_set(*THEN, "bucket", "in_flight", value=torch.zeros(11, dtype=torch.int64)), "in_flight"),
    "a position outside": (_set(*THEN, "window", "position", value=torch.tensor([0, 99])), "position"),
    "a negative position": (_set(*THEN, "window", "position", value=torch.tensor([0, -1])), "position"),
    "too many entries": (_set(*THEN, "window", "filled", value=torch.tensor([16, 1])), "filled"),
    "narrow running statistics": (_set("running", "0", value=[torch.ones(1)] * 3), "running"),
    "no running statistics": (_set("running", value={}), "running"),
    "feeders of another kind": (_set("feeders", value=[3]), "feeders"),
}


@pytest.mark.parametrize(("damage", "word"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_changes_nothing(damage, word):
    model = converted(widths(4))
    train(model, 0, range(3))
    state = deepcopy(distnorm.state_dict(model))
    damage(state[0])
    refused(model, state, word)


@pytest.mark.parametrize("given", [None, {}, "text", [3], [None], [{}], torch.zeros(3)], ids=repr)
def test_what_is_no_state_at_all(given):
    refused(converted(widths(4)), given, "distnorm: ", "state")
