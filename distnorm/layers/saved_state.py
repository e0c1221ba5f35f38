"""What a saved state belongs to, and whether it fits a conversion: asked before anything changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from distnorm.layers.layout import layout_of
from distnorm.layers.running_statistics import snapshot
from distnorm.policies.stored import anything, fields, whole
from distnorm.recipe import Recipe

VERSION = 1
"""Of the states that are written. Those of version 0 do not say their version, nor what they belong to."""

Layers = Sequence[tuple[str, _BatchNorm]]


def belonging(recipe: Recipe, layers: Layers) -> dict[str, Any]:
    """What a state of ``layers`` under ``recipe`` says of itself."""
    named = [[name, layer.num_features] for name, layer in layers]
    return {"version": VERSION, "recipe": repr(recipe), "memory": _memory(recipe), "layers": named}


# docs/decisions.md#state-is-checked-before-it-is-loaded
def check(state: object, recipe: Recipe, layers: Layers) -> None:
    """Whether ``state`` fits ``layers`` under ``recipe``. No collective.

    Raises:
        ValueError: it does not; the message says where they differ.
    """
    if not isinstance(state, dict):
        raise ValueError(f"distnorm: no state of a conversion but a {type(state).__name__}; save with state_dict.")
    version = state.get("version", 0)
    if type(version) is not int or not 0 <= version <= VERSION:
        raise ValueError(
            f"distnorm: state of version {version!r} given; this distnorm reads 0 to {VERSION}: update it."
        )
    if version:
        _compare(state, recipe, layers)
    layout = layout_of(layers, recipe.method)
    reducer = anything if layout.device.type == "meta" else recipe.policy.stores(layout)  # there, nothing has values
    numbers = {"rank": whole, "world_size": whole, "step": whole}
    try:
        fields({**numbers, "reducer": reducer}, running=_running(layers), feeders=_feeders)("state", state)
    except ValueError as error:
        raise ValueError(
            f"distnorm: the state given does not fit {recipe} with layers {[name for name, _ in layers]}: {error}. "
            "Load what this model and recipe wrote, or leave the state out to start cold."
        ) from None


def _memory(recipe: Recipe) -> str:
    memory = recipe.policy.memory
    return f"{type(recipe.method).__name__}, {memory}" if memory else ""


def _compare(state: dict[str, Any], recipe: Recipe, layers: Layers) -> None:
    mine = belonging(recipe, layers)
    if not mine.keys() <= state.keys():
        raise ValueError(f"distnorm: the state given lacks {sorted(mine.keys() - state.keys())}.")
    if state["memory"] != mine["memory"]:
        raise ValueError(
            f"distnorm: the state given is of recipe {state['recipe']}, the model was converted to {recipe}. What is "
            "kept over steps goes on under the same method and policy, whose window and warm-up may differ. Convert "
            "to that recipe, or leave the state out to start cold."
        )
    given = state["layers"] if isinstance(state["layers"], list) else [state["layers"]]
    for theirs, ours in zip_longest(given, mine["layers"]):
        if theirs != ours:
            raise ValueError(
                f"distnorm: the state given has layer {theirs} where the model has {ours} (name and features, in the "
                "order of conversion; None for no layer). Load the state of this model, or leave it out to start cold."
            )


def _running(layers: Layers) -> Callable[[str, object], None]:
    expected = {name: [list(each.shape) for each in buffers] for name, buffers in snapshot(layers).items()}

    def check(where: str, given: object) -> None:
        found = {name: _shapes(each) for name, each in given.items()} if isinstance(given, dict) else given
        if found != expected:
            raise ValueError(f"{where} has running statistics of {found}; need {expected}")

    return check


def _shapes(given: object) -> list[Any]:
    each = given if isinstance(given, list | tuple) else [given]
    return [list(one.shape) if isinstance(one, Tensor) else one for one in each]


def _feeders(where: str, given: object) -> None:
    if not (isinstance(given, list | tuple) and len(given) == 2):
        raise ValueError(f"{where} is {given!r}; need a list of names and a dict of lists of names")
    left, feeds = given
    lists = [left, *feeds.values()] if isinstance(feeds, dict) else [None]
    if not all(isinstance(each, list) and all(isinstance(name, str) for name in each) for each in lists):
        raise ValueError(f"{where} is {given!r}; need a list of names and a dict of lists of names")
