"""What is refused, whoever takes it: recipes, policies, methods and settings, from code, flags, variables and files."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn

import distnorm
from distnorm import recipes
from distnorm.cli.config_file import ConfigFile, read_options
from distnorm.methods import RMS, BatchNorm
from distnorm.policies import AllReduce, Local, Moving, Periodic, StaleMix, Warmup
from distnorm.recipe import Recipe
from distnorm.settings import SECTION_VARIABLE, Settings, from_environment
from distnorm.validation import VARIABLES, check_fields, checked, hints_of, shown, words

Monkey = pytest.MonkeyPatch

INFINITE, NAN = float("inf"), float("nan")
DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]
HUGE = 10**5000
NEVER = [True, "x", "", NAN, INFINITE, -INFINITE, 1j, [], {}, DEEP, HUGE, -HUGE, object(), b"1", nn.ReLU]
"""What no option takes, but for flags and names of an axis."""
NUMBERS = [-1, -(10**16), 10**16]


def takers() -> list[tuple[Callable[..., object], str]]:
    """Every recipe, policy and method, and each of what it takes."""
    named = [getattr(recipes, each.name) for each in recipes.available()]
    values = [AllReduce, Moving, StaleMix, Periodic, Warmup, RMS, Recipe]
    found = [(each, name) for each in [*named, *values] for name in inspect.signature(each).parameters]
    return [pair for pair in found if pair != (AllReduce, "process_group")]  # ``check_group`` says more of it


REST: dict[object, dict[str, object]] = {
    Periodic: {"every": 2},
    Warmup: {"then": Local()},
    Recipe: {"method": BatchNorm(), "policy": Local()},
}


@pytest.mark.parametrize(("taker", "name"), takers(), ids=lambda each: getattr(each, "__name__", each))
def test_no_taker_takes_what_is_none_of_its_kind(taker: Callable[..., object], name: str) -> None:
    for value in [*NEVER, *NUMBERS]:
        wanted = words(hints_of(taker)[name])
        fits = (
            isinstance(value, bool)
            if "true or false" in wanted
            else value == "x" and ("axis" in wanted or name == "name")
        )
        if fits:
            continue
        with pytest.raises(ValueError) as raised:
            taker(**{**REST.get(taker, {}), name: value})
        message = str(raised.value)
        assert f"{name}=" in message and f"need {wanted}." in message
        assert len(message) < 1000


@pytest.mark.parametrize(
    ("taker", "name", "edges", "beyond"),
    [
        (recipes.group_bn, "size", [1, 2**20], [0, 2**20 + 1]),
        (recipes.periodic_bn, "every", [1, 10**9], [0, 10**9 + 1, 1.0]),
        (recipes.mabn, "window", [1, 4096], [0, 4097, 2.0]),
        (recipes.mabn, "warmup", [0, 10**9], [-1, 10**9 + 1, None]),
        (recipes.mabn, "clip", [1, 1.0, 5, 1e6, None], [0.999, 1e7]),
        (recipes.lazy_bn, "window", [1, 4096], [0, 4097]),
        (Moving, "staleness", [0, 1], [2, -1, 1.0, False]),
        (RMS, "clip", [None, 1], [0]),
    ],
)
def test_edges(taker: Callable[..., object], name: str, edges: list[object], beyond: list[object]) -> None:
    for value in edges:
        taker(**{name: value})
    for value in beyond:
        with pytest.raises(ValueError, match=f"{taker.__name__}\\({name}="):
            taker(**{name: value})


def test_a_dataclass_and_a_function_of_ones_own() -> None:
    @dataclasses.dataclass
    class Mine:
        mode: Literal[1, "a"] = 1
        other: bool | None = None

    @checked
    def mine(mode: Literal["a"], other: bool = False) -> str:
        return mode

    check_fields(Mine(mode="a", other=None))
    for given in (True, 1.0, "b"):
        with pytest.raises(ValueError, match=rf'Mine\(mode={given!r}\): need 1 or "a"\.'):
            check_fields(Mine(mode=given))  # type: ignore[arg-type]
    assert mine("a") == "a"
    with pytest.raises(ValueError, match=r"mine\(mode='b'\): need \"a\"\."):
        mine("b")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mine\(other=1\): need true or false\."):
        mine("a", other=1)  # type: ignore[arg-type]


def test_what_convert_takes() -> None:
    for given in ({"fuse": "no"}, {"fuse": 1}, {"transport": True}):
        ((name, value),) = given.items()
        with pytest.raises(ValueError, match=rf"convert\({name}={value!r}\): need"):
            distnorm.convert(nn.BatchNorm1d(2), "sync_bn", **given)


# --- recipes as text -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        f"mabn(window={'-' * 100_000}1)",
        f"mabn(window={'[' * 300}{']' * 300})",
        f"mabn(window={'[' * 90}{']' * 90})",
        f"mabn(window={'(' * 100_000})",
        "mabn(window={[]: 1})",
        "mabn(**{'window': 4})",
        "mabn(**{3: 4})",
        "mabn(window=1\0)",
        "mabn(window=" + "9" * 5000 + ")",
        "mabn(window=" + "9" * 900 + ")",
        "mabn(window=open)",
        "mabn(4)",
        "group_bn(size=2, size=3)",
        "group_bn(size=2, axis='node', size=2)",
        "mabn(name='x')",
        "x" * 100_000,
        "(" * 100_000,
    ],
    ids=lambda text: text[:24],
)
def test_texts_that_are_no_recipes(text: str) -> None:
    for use in (recipes.parse, recipes.build, lambda each: distnorm.convert(nn.BatchNorm1d(2), each)):
        with pytest.raises(ValueError) as raised:
            use(text)
        assert len(str(raised.value)) < 1000
    with pytest.raises(ValueError, match=r"environment DISTNORM_\*: "):
        from_environment({"DISTNORM_RECIPE": text.replace("\0", "")} if "\0" not in text else {"DISTNORM_RECIPE": "x"})


def test_what_is_given_twice_is_named() -> None:
    with pytest.raises(ValueError, match=r"recipe 'group_bn\(size=2, size=3\)': 'size' is given twice\."):
        recipes.build("group_bn(size=2, size=3)")


def test_an_option_that_is_called_as_an_argument_of_build() -> None:
    with pytest.raises(ValueError, match="recipe 'mabn' has no option 'name'"):
        recipes.build("mabn", name="x")


# --- the environment -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("DISTNORM_RECPE", "DISTNORM_RECIPE"),
        ("DISTNORM_KERNEL", "DISTNORM_KERNELS"),
        ("DISTNORM_TRANPORT", "DISTNORM_TRANSPORT"),
        ("DISTNORM_CHEK", "DISTNORM_CHECK"),
        ("DISTNORM_recipe", None),
        ("DISTNORM_", None),
    ],
)
def test_a_variable_that_there_is_not(name: str, nearest: str | None) -> None:
    with pytest.raises(ValueError) as raised:
        from_environment({name: "mabn"})
    message = str(raised.value)
    assert message.startswith(f"environment: unknown variable {name!r}")
    assert nearest is None or f"(did you mean {nearest!r}?)" in message
    assert all(each in message for each in VARIABLES)


CONVERTS: dict[str, Callable[[], object]] = {
    "convert": lambda: distnorm.convert(nn.BatchNorm1d(2), "sync_bn"),
    "convert, without batch norm": lambda: distnorm.convert(nn.Linear(2, 2), "sync_bn"),
    "attach": lambda: distnorm.attach(distnorm.nn.SyncBatchNorm(2)),
    "a first forward": lambda: distnorm.nn.SyncBatchNorm(2)(torch.ones(3, 2)),
}


@pytest.mark.parametrize("do", CONVERTS.values(), ids=CONVERTS)
def test_nor_is_it_one_in_a_script_without_a_launcher(do: Callable[[], object], monkeypatch: Monkey) -> None:
    monkeypatch.setenv("DISTNORM_RECPE", "mabn")
    with pytest.raises(ValueError, match=r"unknown variable 'DISTNORM_RECPE' \(did you mean 'DISTNORM_RECIPE'\?\)"):
        do()


def test_a_model_is_as_it_was_where_a_variable_is_refused(monkeypatch: Monkey) -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    monkeypatch.setenv("DISTNORM_TRANPORT", "gloo")
    with pytest.raises(ValueError, match="DISTNORM_TRANPORT"):
        distnorm.convert(model, "sync_bn")
    assert type(model[0]) is nn.BatchNorm1d
    monkeypatch.delenv("DISTNORM_TRANPORT")
    for name in VARIABLES:  # all that there are are known here, too
        monkeypatch.setenv(name, {"DISTNORM_KERNELS": "aten", "DISTNORM_TRANSPORT": "torch"}.get(name, "0"))
    distnorm.convert(model, "sync_bn")(torch.ones(3, 2))


def test_all_variables_that_are_read_are_known() -> None:
    text = "".join(file.read_text() for file in Path(distnorm.__file__).parent.rglob("*.py"))
    assert set(re.findall(r'"(DISTNORM_[A-Z_]+)"', text)) == set(VARIABLES)
    assert SECTION_VARIABLE in VARIABLES


def test_others_variables_are_theirs() -> None:
    assert from_environment({"DISTNORMAL_X": "1", "NOT_DISTNORM_X": "1", "distnorm_x": "1"}) is None
    assert from_environment({"DISTNORM_KERNELS": "aten", "DISTNORM_CHECK": "1"}) is None


NO_JSON = ["", "{", "{'a': 1}", "[" * 100_000, '{"a": ' * 100_000, "9" * 5000, '{"a": 1, "a": 2}', "\ud800"]


@pytest.mark.parametrize("text", NO_JSON, ids=lambda text: ascii(text[:12]))
@pytest.mark.parametrize("name", ["DISTNORM_OPTIONS", "DISTNORM_CONFIG"])
def test_what_is_no_json_names_its_variable(name: str, text: str) -> None:
    with pytest.raises(ValueError) as raised:
        from_environment({name: text})
    message = str(raised.value)
    assert message.startswith(f"environment {name}: need JSON such as ")
    assert len(message) < 1000


NOT_CARRIED = ["[]", "3", "null", '"x"', "{}", '{"section": {}}', '{"source": 3, "section": {}}']
NOT_CARRIED += ['{"source": "a", "section": []}', '{"source": "a", "section": {}, "more": 1}']


@pytest.mark.parametrize("held", NOT_CARRIED)
def test_what_no_launcher_hands_on(held: str) -> None:
    with pytest.raises(ValueError, match=r"^environment DISTNORM_CONFIG: need JSON such as .* as `distnorm launch`"):
        from_environment({"DISTNORM_CONFIG": held})


@pytest.mark.parametrize("options", [{3: 4}, {None: 1}, {("a",): 1}, [4], "size", 3, None], ids=repr)
def test_options_that_have_no_names(options: object) -> None:
    with pytest.raises(ValueError, match="options must be a mapping of option names to values; got"):
        Settings.of({"recipe": "group_bn", "options": options}, "cfg")


@pytest.mark.parametrize("value", [DEEP, HUGE, NAN, True, "x"], ids=["deep", "huge", "nan", "true", "x"])
def test_a_section_with_a_value_that_is_none(value: object) -> None:
    for section in ({"recipe": "mabn", "options": {"window": value}}, {"where": value}, {"fuse": value}, value):
        if section in ({"fuse": True}, {"where": "x"}):
            continue
        with pytest.raises(ValueError, match=r"^cfg: ") as raised:
            Settings.of(section, "cfg")
        assert len(str(raised.value)) < 1000


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "section",
    [
        "{recipe: mabn, recipe: sync_bn}",
        "{recipe: group_bn, options: {size: 2, size: 3}}",
        "{recipe: mabn, options: {window: .nan}}",
        "{recipe: mabn, options: {window: yes}}",
        "{recipe: mabn, options: {1: 2}}",
        "[" * 2000 + "]" * 2000,
        "{recipe: mabn, options: {window: " + "9" * 5000 + "}}",
    ],
    ids=lambda text: text[:40],
)
def test_a_yaml_file(tmp_path: Path, section: str) -> None:
    pytest.importorskip("accelerate", reason="its config is checked by its own classes, too")
    path = tmp_path / "cfg.yaml"
    path.write_text(f"mixed_precision: 'no'\ndistnorm_config: {section}\n")
    with pytest.raises(ValueError) as raised:
        ConfigFile.read(str(path)).settings()
    assert str(raised.value).startswith(str(path)) and len(str(raised.value)) < 1000


@pytest.mark.parametrize("held", ['{"recipe": "mabn", "recipe": "sync_bn"}', "[" * 100_000, "9" * 5000])
def test_a_json_file(tmp_path: Path, held: str) -> None:
    path = tmp_path / "cfg.json"
    path.write_text(f'{{"distnorm_config": {held}}}')
    with pytest.raises(ValueError) as raised:
        ConfigFile.read(str(path)).settings()
    assert str(raised.value).startswith(str(path)) and len(str(raised.value)) < 1000


@pytest.mark.parametrize("pairs", [["size=2", "size=3"], ["size=" + "[" * 2000], ["size=" + "9" * 5000]])
def test_options_as_flags(pairs: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        read_options(pairs)
    assert "size" in str(raised.value) and len(str(raised.value)) < 1000


def test_whatever_it_is_it_can_be_shown() -> None:
    for value in [*NEVER, json.dumps("x" * 100_000), ["x" * 1000] * 1000]:
        assert len(shown(value)) < 3000
