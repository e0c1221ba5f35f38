"""What config files, environment variables and flags say: which comes first, and what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from torch import nn

import distnorm
from distnorm import DistNorm
from distnorm.policies import AllReduce
from distnorm.settings import Settings, from_environment

FILE = "cfg.yaml, section distnorm_config"


def carried(**section: object) -> dict[str, str]:
    """What a launcher hands on."""
    return {"DISTNORM_CONFIG": json.dumps({"source": FILE, "section": section})}


# --- a section -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (
            {"recipes": "mabn"},
            ["unknown key 'recipes'", "mean 'recipe'?", "recipe, options, where, fuse, ledger, save_state"],
        ),
        ({"source": "me"}, ["unknown key 'source'"]),
        ({3: 4}, ["unknown key 3"]),
        ("mabn", ["need a mapping", "got 'mabn'"]),
        (None, ["need a mapping", "got None"]),
        ({"recipe": "sinc_bn"}, ["unknown recipe 'sinc_bn'", "did you mean 'sync_bn'?", "lazy_bn"]),
        ({"recipe": 3}, ["recipe must be a recipe's name", "got 3"]),
        ({"recipe": "group_bn(size=)"}, ["recipe 'group_bn(size=)': need a name"]),
        ({"recipe": "mabn", "options": [4]}, ["options must be a mapping", "got [4]"]),
        ({"recipe": "mabn", "options": {"windows": 4}}, ["no option 'windows'", "did you mean 'window'?", "warmup"]),
        ({"recipe": "mabn", "options": {"window": "four"}}, ["window='four'", "whole number"]),
        ({"recipe": "group_bn"}, ["group_bn: need either size or axis"]),
        (
            {"recipe": "group_bn(size=4)", "options": {"axis": "node"}},
            ["recipe 'group_bn(size=4)' has options in its name, and separate options too: axis", "in one place"],
        ),
        ({"where": 3}, ["where must be a list of patterns", "got 3"]),
        ({"where": ["a", 3]}, ["where must be a list of patterns", "got ('a', 3)"]),
        ({"ledger": "perhaps"}, ["ledger must be true or false", "got 'perhaps'"]),
        ({"save_state": "beside"}, ["save_state must be true or false", "got 'beside'"]),
        ({"save_states": True}, ["unknown key 'save_states'", "mean 'save_state'?"]),
        ({"transport": "smoke"}, ['transport must be "torch" or "mpi"', "got 'smoke'"]),
    ],
)
def test_what_is_not_allowed_is_named_with_its_source(section: object, words: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        Settings.of(section, FILE)
    message = str(raised.value)
    assert message.startswith(f"{FILE}: ")
    for word in words:
        assert word in message


@pytest.mark.parametrize("given", ["a.*, b,", ["a.*", "b"]])
def test_patterns_are_a_list_or_have_commas_between(given: object) -> None:
    assert Settings.of({"where": given}, FILE).where == ("a.*", "b")


@pytest.mark.parametrize(
    "section",
    [
        {"recipe": "sync_bn"},
        {"recipe": "group_bn(size=4)"},
        {"recipe": "mabn", "options": {"window": 8, "weights": "none"}, "where": ["backbone.*"], "ledger": True},
        {"recipe": "sync_bn", "transport": "mpi"},
        {"recipe": "sync_bn", "transport": "shm"},
        {"recipe": "sync_bn", "fuse": True, "ledger": True, "save_state": True},
    ],
)
def test_a_section_is_what_settings_make_of_it(section: dict[str, Any]) -> None:
    settings = Settings.of(section, FILE)
    assert settings.section() == section
    assert Settings.of(json.loads(json.dumps(settings.section())), "elsewhere") == settings


def test_an_empty_section_is_the_defaults() -> None:
    assert Settings.of({}, FILE) == Settings()
    assert Settings().section() == {"recipe": "sync_bn"}


# --- one source after the other ------------------------------------------------------------------


def test_nobody_says_anything() -> None:
    assert from_environment({"PATH": "/bin"}) is None
    assert from_environment({}, {"recipe": None, "ledger": None}) is None
    assert from_environment(carried()) is None


def test_flags_then_variables_then_the_section() -> None:
    environment = carried(recipe="mabn", where=["file"], ledger=True, transport="mpi")
    environment |= {"DISTNORM_WHERE": "variable", "DISTNORM_LEDGER": "off", "DISTNORM_FUSE": "no"}
    settings = from_environment(environment, {"where": "flag", "recipe": None, "fuse": True})
    assert settings == Settings(recipe="mabn", where=("flag",), fuse=True, ledger=False, transport="mpi")
    assert settings.source == f"{FILE}, environment DISTNORM_*, flags of distnorm.run"


@pytest.mark.parametrize(
    ("variables", "flags", "recipe", "options"),
    [
        ({}, {}, "mabn", {"window": 4}),
        ({"DISTNORM_RECIPE": "lazy_bn"}, {}, "lazy_bn", {}),
        ({"DISTNORM_RECIPE": "mabn"}, {}, "mabn", {}),
        ({}, {"recipe": "lazy_bn"}, "lazy_bn", {}),
        ({"DISTNORM_OPTIONS": '{"warmup": 3}'}, {}, "mabn", {"warmup": 3}),
        ({"DISTNORM_RECIPE": "lazy_bn", "DISTNORM_OPTIONS": '{"warmup": 3}'}, {}, "lazy_bn", {"warmup": 3}),
        ({"DISTNORM_RECIPE": "lazy_bn"}, {"options": {"warmup": 2}}, "lazy_bn", {"warmup": 2}),
    ],
)
def test_a_recipe_drops_the_options_of_sources_behind_it(
    variables: dict[str, str], flags: dict[str, object], recipe: str, options: dict[str, object]
) -> None:
    settings = from_environment(carried(recipe="mabn", options={"window": 4}) | variables, flags)
    assert settings == Settings(recipe=recipe, options=options)


@pytest.mark.parametrize("word", ["1", "true", "Yes", "ON"])
def test_words_for_yes(word: str) -> None:
    assert from_environment({"DISTNORM_LEDGER": word}) == Settings(ledger=True)
    assert from_environment({"DISTNORM_FUSE": word}) == Settings(fuse=True)
    assert from_environment({"DISTNORM_SAVE_STATE": word}) == Settings(save_state=True)


@pytest.mark.parametrize(
    ("variables", "flags", "message"),
    [
        ({"DISTNORM_OPTIONS": "{size: 4}"}, {}, "environment DISTNORM_OPTIONS: need JSON such as '{\"size\": 4}'"),
        ({"DISTNORM_OPTIONS": "[4]", "DISTNORM_RECIPE": "mabn"}, {}, "environment DISTNORM_*: options must be"),
        ({"DISTNORM_RECIPE": "group_bn(size=4)"}, {"options": {"size": 2}}, "has options in its name"),
        ({"DISTNORM_TRANSPORT": "smoke"}, {}, 'environment DISTNORM_*: transport must be "torch" or "mpi"'),
    ],
)
def test_what_is_wrong_is_named_with_all_sources(
    variables: dict[str, str], flags: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        from_environment(variables, flags)
    assert message in str(raised.value)


# --- a model -------------------------------------------------------------------------------------


def test_models_are_converted_once_and_where_it_says() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    settings = Settings(recipe="group_bn(size=2)", where=("1",))
    assert settings.convert(model)
    assert [isinstance(each, DistNorm) for each in model] == [False, True]
    assert model[1].recipe.policy == AllReduce(group_size=2)
    assert not settings.convert(model)
    assert not settings.convert(nn.Linear(2, 2))


def test_convert_takes_the_name_that_a_recipe_has() -> None:
    named = distnorm.convert(nn.BatchNorm1d(2), "group_bn(size=2)")
    apart = distnorm.convert(nn.BatchNorm1d(2), "group_bn", size=2)
    assert named.recipe == apart.recipe and named.recipe.name == "group_bn(size=2)"
    with pytest.raises(ValueError, match="has options in its name, and separate options too: size"):
        distnorm.convert(nn.BatchNorm1d(2), "group_bn(size=2)", size=4)
