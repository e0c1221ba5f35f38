"""Check values against the type hint of the field or argument that receives them.

Values from code, flags, environment variables and files all end in fields of dataclasses and arguments of functions.
Their hints say what is allowed: ``bool``, ``str`` (not empty), a ``Literal``, a class, ``None``, unions of these, and
``Annotated`` with a rule of this file. True is not a number, NaN is in no range, and an empty text is not allowed.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache, wraps
from reprlib import Repr
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

P = ParamSpec("P")
T = TypeVar("T")

VARIABLES = (
    "DISTNORM_RECIPE",
    "DISTNORM_OPTIONS",
    "DISTNORM_WHERE",
    "DISTNORM_FUSE",
    "DISTNORM_LEDGER",
    "DISTNORM_SAVE_STATE",
    "DISTNORM_TRANSPORT",
    "DISTNORM_CHECK",
    "DISTNORM_KERNELS",
    "DISTNORM_CONFIG",
    "DISTNORM_FLAGS",
)
"""All that there are: another one is a misspelt one, which would be ignored."""

_SHOWN = Repr()
_SHOWN.maxstring = _SHOWN.maxother = 200


# docs/decisions.md#values-are-checked-by-type-hints
@dataclass(frozen=True)
class Rule:
    """A predicate for allowed values, and their description for messages."""

    admits: Callable[[Any], bool]
    words: str


def whole(of: str, low: int, high: int) -> Rule:
    """Return the rule for a whole number ``of`` something, from ``low`` to ``high``."""
    words = f"a whole number of {of}, at least {low} and at most {high}"
    return Rule(lambda value: type(value) is int and low <= value <= high, words)


def number(low: int, high: int) -> Rule:
    """Return the rule for a number from ``low`` to ``high``."""
    words = f"a number, at least {low} and at most {high}"
    return Rule(lambda value: _is_number(value) and low <= value <= high, words)


def kind(of: type, words: str) -> Rule:
    """Return the rule for instances of a class, described by ``words``."""
    return Rule(lambda value: isinstance(value, of) and value != "", words)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


Window = Annotated[int, whole("steps", 1, 4096)]
Period = Annotated[int, whole("steps", 1, 10**9)]
Steps = Annotated[int, whole("steps", 0, 10**9)]
Staleness = Annotated[int, whole("steps in flight", 0, 1)]
Ranks = Annotated[int, whole("ranks", 1, 2**20)]
Clip = Annotated[float, number(1, 10**6)]
Momentum = Annotated[
    float, Rule(lambda value: _is_number(value) and 0 < value <= 1, "the newest value's weight, in (0, 1]")
]
Level = Annotated[float, Rule(lambda value: _is_number(value) and 0 < value < 1, "a number above 0 and below 1")]
Components = Annotated[int, whole("components", 1, 64)]
Rounds = Annotated[int, whole("rounds", 1, 64)]
Groups = Annotated[int, whole("groups", 1, 2**20)]
Axis = Annotated[str, kind(str, "the name of an axis")]
RecipeName = Annotated[str, kind(str, "a recipe's name, such as sync_bn")]
Options = Annotated[
    Mapping[str, object],
    Rule(
        lambda value: isinstance(value, Mapping) and all(isinstance(key, str) for key in value),
        "a mapping of option names to values",
    ),
]
Patterns = Annotated[
    tuple[str, ...],
    Rule(
        lambda value: isinstance(value, tuple) and all(isinstance(each, str) for each in value),
        "a list of patterns of layer names",
    ),
]
PatternsByModel = Annotated[
    Mapping[str, tuple[str, ...]],
    Rule(
        lambda value: (
            isinstance(value, Mapping)
            and bool(value)
            and all(isinstance(key, str) and each and admits(Patterns, each) for key, each in value.items())
        ),
        "a mapping of the classes of models to such lists",
    ),
]


def check(owner: str, hints: Mapping[str, Any], given: Mapping[str, object]) -> None:
    """Raise if a value in ``given`` is not allowed by the hint of the same name.

    Raises:
        ValueError: the message says what was given to ``owner``, and what is allowed.
    """
    for name, value in given.items():
        if not admits(hints[name], value):
            raise ValueError(f"{owner}({name}={shown(value)}): need {words(hints[name])}.")


def check_fields(value: Any) -> None:
    """Raise if a field of a dataclass is not allowed by its hint.

    Raises:
        ValueError: as ``check``.
    """
    given = {each.name: getattr(value, each.name) for each in fields(value)}
    check(type(value).__name__, hints_of(value.__class__), given)


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Return ``function`` with a check of its arguments against their hints."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        check(function.__name__, hints_of(function), signature.bind(*args, **kwargs).arguments)
        return function(*args, **kwargs)

    return call


@cache
def hints_of(owner: Any) -> dict[str, Any]:
    """Return the hints of a class or function, with their rules."""
    return get_type_hints(owner, include_extras=True)


def admits(hint: Any, value: object) -> bool:
    """Return whether ``hint`` allows ``value``."""
    origin = get_origin(hint)
    if origin is Annotated:
        return bool(hint.__metadata__[0].admits(value))
    if origin in (Union, UnionType):
        return any(admits(each, value) for each in get_args(hint))
    if origin is Literal:
        return any(type(value) is type(each) and value == each for each in get_args(hint))
    return isinstance(value, hint) and value != ""


def words(hint: Any) -> str:
    """Describe the values that ``hint`` allows."""
    origin = get_origin(hint)
    if origin is Annotated:
        return str(hint.__metadata__[0].words)
    if origin in (Union, UnionType):
        return " or ".join(words(each) for each in get_args(hint))
    if origin is Literal:
        return " or ".join(json.dumps(each) for each in get_args(hint))
    named = {NoneType: "None", bool: "true or false", str: "a text that is not empty"}
    return named.get(hint, f"a {hint.__name__}")


def written(hint: Any) -> str:
    """Return ``hint`` as source text, without its rule."""
    if get_origin(hint) is Annotated:
        return written(hint.__origin__)
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(written(each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return " | ".join(map(repr, get_args(hint)))
    return "None" if hint is NoneType else str(hint.__name__)


def shown(value: object) -> str:
    """Return the repr of ``value`` for a message, shortened."""
    try:
        return _SHOWN.repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; very deep nesting
        return f"<{type(value).__name__}>"


def read_json(text: str, source: str, example: str) -> Any:
    """Parse ``text`` as JSON.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has a key twice; the message begins with ``source``.
    """
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: need JSON such as '{example}'; got {shown(text)} ({error}).") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the mapping of ``pairs``.

    Raises:
        ValueError: as ``refuse_duplicates``.
    """
    refuse_duplicates([key for key, _ in pairs])
    return dict(pairs)


def refuse_duplicates(keys: list[Any]) -> None:
    """Raise if one of ``keys`` is there twice, since a mapping would silently drop one of the two values.

    Raises:
        ValueError: the message names the key.
    """
    for at, key in enumerate(keys):
        if key in keys[:at]:
            raise ValueError(f"{shown(key)} is given twice")


def suggest(given: str, allowed: Iterable[str]) -> str:
    """Return `` (did you mean 'sync_bn'?)`` for the closest allowed word, or an empty text if none is close."""
    near = difflib.get_close_matches(given, list(allowed), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """Raise where ``environment`` has a variable DISTNORM_* that there is not.

    Raises:
        ValueError: naming the variable, the nearest one that there is, and all of them.
    """
    for name in environment:
        if name.startswith("DISTNORM_") and name not in VARIABLES:
            raise ValueError(
                f"environment: unknown variable {shown(name)}{suggest(name, VARIABLES)}; allowed are "
                f"{', '.join(VARIABLES)}."
            )
