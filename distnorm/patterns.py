"""Which layers of which models to convert, as flags, variables and config files say it.

Either patterns of layer names for every model, ``backbone.*,neck.*``, or patterns by the class of a model,
``Generator: backbone.*; Discriminator: *``. In JSON and YAML these are a list, and a mapping of lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from distnorm.layers.class_swap import underlying
from distnorm.validation import Patterns, PatternsByModel, read_json, refuse_duplicates, shown

Wanted = Patterns | PatternsByModel

_EXAMPLE = '{"Generator": ["backbone.*"], "Discriminator": ["*"]}'


def read(given: object) -> Any:
    """Return what ``given`` says, with lists as tuples. What is neither text, list nor mapping is returned as it is.

    Raises:
        ValueError: a text that does not have one of the forms; the message says which there are.
    """
    if isinstance(given, str):
        return _read_text(given)
    if isinstance(given, Mapping):
        return {name: _listed(patterns) for name, patterns in given.items()}
    return _listed(given)


def written(wanted: Wanted) -> str:
    """Return the text that ``read`` reads as ``wanted``."""
    if not isinstance(wanted, Mapping):
        return ",".join(wanted)
    return "; ".join(f"{name}: {','.join(patterns)}" for name, patterns in wanted.items())


def as_section(wanted: Wanted) -> list[str] | dict[str, list[str]]:
    """Return ``wanted`` as JSON and YAML have it."""
    if not isinstance(wanted, Mapping):
        return list(wanted)
    return {name: list(patterns) for name, patterns in wanted.items()}


def of_model(wanted: Wanted, model: nn.Module) -> Patterns | None:
    """Return the patterns for ``model``; empty for all of its layers, None if others are named and it is not.

    A model is named by its class, with or without the module, and both may be patterns. The first that fits counts.
    """
    if not isinstance(wanted, Mapping):
        return wanted
    names = _names_of(model)
    return next((each for key, each in wanted.items() if select([key], names)), None)


def select(patterns: Iterable[str], names: Iterable[str]) -> bool:
    """Return whether any of ``patterns`` selects any of ``names``, which are without what ``torch.compile`` adds."""
    plain = [name.replace("_orig_mod.", "") for name in names]
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in plain)


class Unused:
    """The patterns that have selected no layer of any model yet."""

    def __init__(self, wanted: Wanted) -> None:
        """Start with all of ``wanted``."""
        entries = wanted.items() if isinstance(wanted, Mapping) else [("", wanted)]
        self._left = [(key, pattern) for key, patterns in entries for pattern in patterns]

    def note(self, model: nn.Module, layers: Iterable[str]) -> None:
        """Take off what selects one of the ``layers`` of ``model``, by name."""
        layers, names = list(layers), _names_of(model)
        self._left = [
            (key, pattern)
            for key, pattern in self._left
            if (key and not select([key], names)) or not select([pattern], layers)
        ]

    def texts(self) -> list[str]:
        """Return the patterns that are left, with their models."""
        return [f"{key}: {pattern}" if key else pattern for key, pattern in self._left]


def _read_text(text: str) -> Any:
    if text.lstrip().startswith("{"):
        return read(read_json(text, "where", _EXAMPLE))
    entries = [each.strip() for each in text.split(";") if each.strip()]
    if len(entries) <= 1 and ":" not in text:
        return _listed(text.replace(";", ""))
    pairs = [tuple(part.strip() for part in each.partition(":")) for each in entries]
    if not all(name and patterns for name, _, patterns in pairs):
        raise ValueError(
            f"where={shown(text)}: need patterns of layer names, 'backbone.*,neck.*', or the class of each model with "
            "its patterns, 'Generator: backbone.*; Discriminator: *'."
        )
    try:
        refuse_duplicates([name for name, *_ in pairs])
    except ValueError as error:
        raise ValueError(f"where={shown(text)}: {error}.") from None
    return {name: _listed(patterns) for name, _, patterns in pairs}


def _listed(patterns: object) -> object:
    if isinstance(patterns, str):
        return tuple(part.strip() for part in patterns.split(",") if part.strip())
    return tuple(patterns) if isinstance(patterns, list) else patterns


def _names_of(model: nn.Module) -> set[str]:
    """Return the names of the class of ``model``, and of what ``torch.compile`` has wrapped."""
    classes = {underlying(each) for each in (model, getattr(model, "_orig_mod", model))}
    names = {name for cls in classes for name in (cls.__name__, cls.__qualname__)}
    return names | {f"{cls.__module__}.{cls.__qualname__}" for cls in classes}
