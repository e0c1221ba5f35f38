"""Named recipes: what they are, and what a config file can get wrong about them."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError

import pytest

from distnorm import recipes
from distnorm.methods import RMS, BatchNorm, Method
from distnorm.policies import AllReduce, Chain, Local, Periodic, Policy
from distnorm.recipe import Recipe

NAMES = [
    "local_bn",
    "sync_bn",
    "group_bn",
    "hierarchical_bn",
    "periodic_bn",
    "mabn",
    "hierarchical_mabn",
    "lazy_bn",
    "gbn",
    "iebn",
    "mixture_norm",
    "layer_norm",
    "group_norm",
    "instance_norm",
]
BY_NAME = [
    ("local_bn", {}, Local(), "local_bn"),
    ("sync_bn", {}, AllReduce(), "sync_bn"),
    ("group_bn", {"size": 4}, AllReduce(group_size=4), "group_bn(size=4)"),
    ("group_bn", {"axis": "node"}, AllReduce(axis="node"), "group_bn(axis='node')"),
    ("hierarchical_bn", {}, Chain(AllReduce(axis="local"), AllReduce(axis="node")), "hierarchical_bn"),
    (
        "hierarchical_bn",
        {"local": "inner", "node": "outer"},
        Chain(AllReduce(axis="inner"), AllReduce(axis="outer")),
        "hierarchical_bn(local='inner', node='outer')",
    ),
    ("periodic_bn", {}, Periodic(every=8), "periodic_bn"),
    ("periodic_bn", {"every": 3}, Periodic(every=3), "periodic_bn(every=3)"),
]
VALUES: list[Method | Policy] = [
    BatchNorm(),
    RMS(),
    AllReduce(),
    AllReduce(group_size=2),
    AllReduce(axis="node"),
    Local(),
    Chain(AllReduce(axis="local"), AllReduce(axis="node")),
    Chain(AllReduce(axis="node"), AllReduce(axis="local")),
    Periodic(every=2),
    Periodic(every=2, policy=AllReduce(group_size=2)),
]


@pytest.mark.parametrize(("name", "options", "policy", "full_name"), BY_NAME)
def test_build(name: str, options: dict[str, object], policy: Policy, full_name: str) -> None:
    recipe = recipes.build(name, **options)
    assert recipe == Recipe(method=BatchNorm(), policy=policy)
    assert recipe.name == full_name
    assert recipe == getattr(recipes, name)(**options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "synch_bn",
            {},
            r"^unknown recipe 'synch_bn' \(did you mean 'sync_bn'\?\); allowed are local_bn, sync_bn, group_bn",
        ),
        ("SYNC-BN-9000", {}, r"^unknown recipe 'SYNC-BN-9000'; allowed are local_bn"),
        ("", {}, r"^unknown recipe ''; allowed are"),
        (
            "group_bn",
            {"sizes": 4},
            r"^recipe 'group_bn' has no option 'sizes' \(did you mean 'size'\?\); its options are size, axis, weights",
        ),
        ("group_bn", {"zzz": 4}, r"^recipe 'group_bn' has no option 'zzz'; its options are size, axis, weights"),
        ("sync_bn", {"size": 4}, r"^recipe 'sync_bn' has no option 'size'; its options are weights"),
        ("group_bn", {}, r"either size or axis; got size=None, axis=None"),
        ("group_bn", {"size": 2, "axis": "node"}, r"either size or axis; got size=2, axis='node'"),
        ("group_bn", {"size": 0}, r"size=0\): need a whole number of ranks, at least 1"),
        ("group_bn", {"size": -2}, r"size=-2\): need a whole number of ranks"),
        ("group_bn", {"size": "4"}, r"size='4'\): need a whole number of ranks"),
        ("group_bn", {"size": 2.0}, r"size=2.0\): need a whole number of ranks"),
        ("periodic_bn", {"every": 0}, r"every=0\): need a whole number of steps, at least 1"),
        ("periodic_bn", {"every": 1.5}, r"every=1.5\): need a whole number of steps"),
        ("periodic_bn", {"every": None}, r"every=None\): need a whole number of steps"),
        ("group_bn", {"axis": 1}, "axis"),
        ("hierarchical_bn", {"local": None}, "axis|local"),
    ],
)
def test_what_a_config_can_get_wrong(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipes.build(name, **options)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"method": "bn", "policy": Local()}, r"Recipe\(method='bn'\): need a distnorm method"),
        ({"method": BatchNorm, "policy": Local()}, r"need a distnorm method, such as BatchNorm\(\)"),
        ({"method": BatchNorm(), "policy": AllReduce}, r"need a distnorm policy, such as AllReduce\(\)"),
        ({"method": BatchNorm(), "policy": RMS()}, r"Recipe\(policy=RMS\(.*\)\): need a distnorm policy"),
        (
            {"method": BatchNorm(), "policy": Local(), "weights": "centred"},
            r"Recipe\(weights='centred'\): need \"none\" or \"centralized\" or \"standardized\" or \"normalized\"",
        ),
    ],
)
def test_a_recipe_names_the_field_that_is_wrong(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AllReduce(axis="node", group_size=2), r"one of .*; given are \['axis', 'group_size'\]"),
        (lambda: Chain(AllReduce()), "two or more policies"),
        (lambda: Chain(AllReduce(), BatchNorm()), "two or more policies"),
        (lambda: Periodic(every=2, policy="sync"), r"Periodic\(policy='sync'\): need a distnorm policy"),
    ],
)
def test_policies_validate(build: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value", [*VALUES, *(recipes.build(name, **options) for name, options, *_ in BY_NAME)], ids=repr
)
def test_values_are_frozen_and_travel(value: object) -> None:
    for name in ("every", "parts", "group_size", "method", "anything"):
        with pytest.raises((FrozenInstanceError, TypeError)):
            setattr(value, name, 1)
    for other in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert other == value and hash(other) == hash(value) and repr(other) == repr(value)


def test_values_that_differ_compare_and_print_differently() -> None:
    assert len(set(VALUES)) == len({repr(value) for value in VALUES}) == len(VALUES)
    every_recipe = {Recipe(method=method, policy=policy) for method in VALUES[:2] for policy in VALUES[2:]}
    assert len(every_recipe) == len({repr(recipe) for recipe in every_recipe}) == 2 * (len(VALUES) - 2)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_repr_is_how_it_is_written(value: object) -> None:
    names = {kind.__name__: kind for kind in (BatchNorm, RMS, AllReduce, Local, Chain, Periodic, Recipe)}
    assert eval(repr(value), names) == value
    if isinstance(value, Policy):
        recipe = Recipe(method=RMS(), policy=value, name="mine")
        assert eval(repr(recipe), names) == recipe
        rest = "weights='none', momentum=None, overlap=False"
        assert repr(recipe) == f"Recipe(method={RMS()!r}, policy={value!r}, {rest})"


def test_the_name_takes_no_part_in_comparisons() -> None:
    plain = Recipe(method=BatchNorm(), policy=AllReduce())
    assert recipes.build("sync_bn") == plain and hash(recipes.build("sync_bn")) == hash(plain)
    assert plain.name is None


# --- descriptions --------------------------------------------------------------------------------


def test_available_lists_every_recipe() -> None:
    listed = recipes.available()
    assert [each.name for each in listed] == NAMES
    for each in listed:
        assert each == recipes.describe(each.name)
        assert each.summary and each.summary.endswith(".") and "\n" not in each.summary
        assert each.text.startswith(each.summary)
        assert all(option in each.text for option in each.options) or each.name == "periodic_bn"


WEIGHTS = "'none' | 'centralized' | 'standardized' | 'normalized' = 'none'"


def test_options_with_their_defaults() -> None:
    assert recipes.describe("sync_bn").options == {
        "weights": WEIGHTS,
        "overlap": "bool = False",
    }
    group = {"size": "int | None = None", "axis": "str | None = None", "weights": WEIGHTS}
    assert recipes.describe("group_bn").options == group
    nodes = {"local": "str = 'local'", "node": "str = 'node'", "weights": WEIGHTS}
    assert recipes.describe("hierarchical_bn").options == nodes
    assert recipes.describe("periodic_bn").options == {"every": "int = 8", "weights": WEIGHTS}


def test_describing_an_unknown_recipe() -> None:
    with pytest.raises(ValueError, match=r"unknown recipe 'groop_bn' \(did you mean 'group_bn'\?\)"):
        recipes.describe("groop_bn")


@pytest.mark.parametrize("text", ["sync_bn", "group_bn(size=4)", "sync_bn(weights='centralized')", "mabn(window=8)"])
def test_names_can_be_read_back(text: str) -> None:
    recipe = recipes.parse(text)
    assert recipe.name == text
    assert recipes.parse(recipe.name) == recipe


@pytest.mark.parametrize("text", ["group_bn(4)", "group_bn(size=four)", "a.b()", "sync_bn)(", "1()"])
def test_what_is_not_a_recipe(text: str) -> None:
    with pytest.raises(ValueError, match="need a name, or a name with options"):
        recipes.parse(text)
