"""Check that a saved state fits a conversion, by version, recipe, layers and shapes, before it is loaded."""

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
"""The version of the states that are written. States of version 0 have neither a version nor recipe and layers."""

Layers = Sequence[tuple[str, _BatchNorm]]


def header(recipe: Recipe, layers: Layers) -> dict[str, Any]:
    """Return the part of a state that identifies ``recipe`` and ``layers``."""
    named = [[name, layer.num_features] for name, layer in layers]
    return {"version": VERSION, "recipe": repr(recipe), "memory": _memory(recipe), "layers": named}


# docs/decisions.md#state-is-checked-before-it-is-loaded
def check(state: object, recipe: Recipe, layers: Layers) -> None:
    """Raise unless ``state`` fits ``layers`` under ``recipe``. Issues no collective.

    Raises:
        ValueError: the message says where they differ.
    """
    if not isinstance(state, dict):
        raise ValueError(
            f"distnorm: need the state of a conversion, as distnorm.state_dict returns it; got a "
            f"{type(state).__name__}."
        )
    version = state.get("version", 0)
    if type(version) is not int or not 0 <= version <= VERSION:
        raise ValueError(
            f"distnorm: the state given has version {version!r}; this release of distnorm reads versions 0 to "
            f"{VERSION}. Update distnorm."
        )
    if version:
        _compare(state, recipe, layers)
    layout = layout_of(layers, recipe.method)
    reducer = anything if layout.device.type == "meta" else recipe.policy.stores(layout)  # meta tensors have no values
    numbers = {"rank": whole, "world_size": whole, "step": whole}
    try:
        fields({**numbers, "reducer": reducer}, running=_running(layers), feeders=_feeders)("state", state)
    except ValueError as error:
        raise ValueError(
            f"distnorm: the state given does not fit {recipe} with layers {[name for name, _ in layers]}: {error}. "
            "Load a state of this model and recipe, or omit the state to start cold."
        ) from None


def _memory(recipe: Recipe) -> str:
    memory = recipe.policy.memory
    return f"{type(recipe.method).__name__}, {memory}" if memory else ""


def _compare(state: dict[str, Any], recipe: Recipe, layers: Layers) -> None:
    mine = header(recipe, layers)
    if not mine.keys() <= state.keys():
        raise ValueError(f"distnorm: the state given lacks {sorted(mine.keys() - state.keys())}.")
    if state["memory"] != mine["memory"]:
        raise ValueError(
            f"distnorm: the state given is of recipe {state['recipe']}, the model was converted to {recipe}. Only the "
            "window and the warm-up of the two may differ. Convert to that recipe, or omit the state to start cold."
        )
    given = state["layers"] if isinstance(state["layers"], list) else [state["layers"]]
    for theirs, ours in zip_longest(given, mine["layers"]):
        if theirs != ours:
            raise ValueError(
                f"distnorm: the state given has layer {theirs} where the model has {ours} (name and features, in the "
                "order of conversion; None for no layer). Load the state of this model, or omit it to start cold."
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
