"""The settings of a job: recipe, options, layers and so on, checked before the job starts.

An accelerate config holds them in a section ``distnorm_config:``, DeepSpeed's JSON in a section ``"distnorm":``. Flags
of ``distnorm.run`` and environment variables ``DISTNORM_*`` set the same and take precedence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from distnorm import messages, patterns, recipes
from distnorm.attach import is_converted_by_call
from distnorm.convert import convert
from distnorm.recipe import Recipe
from distnorm.selection import norms
from distnorm.transport.choice import chosen
from distnorm.types import Transport
from distnorm.validation import (
    Options,
    Patterns,
    PatternsByModel,
    RecipeName,
    admits,
    hints_of,
    read_json,
    refuse_unknown_variables,
    shown,
    suggest,
    words,
)

# docs/decisions.md#a-section-reaches-workers-in-one-variable
SECTION_VARIABLE = "DISTNORM_CONFIG"
"""Passes a config file's section from the launcher to its workers, as JSON: ``{"source": ..., "section": {...}}``."""

FLAGS_VARIABLE = "DISTNORM_FLAGS"
"""Passes the flags of ``distnorm.run`` to processes that the script starts, as JSON."""

OPTIONS_EXAMPLE = '{"size": 4}'
_SECTION_EXAMPLE = '{"source": "cfg.yaml", "section": {"recipe": "sync_bn"}}'
_FLAGS_EXAMPLE = '{"recipe": "mabn"}'
_SWITCHES = ("fuse", "ledger", "save_state")
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the models of a job are converted.

    Args:
        recipe: a name, or a name with options as in ``group_bn(size=4)``.
        options: options of the named recipe.
        where: patterns of layer names (``fnmatch``) for every model, or by the class of a model; if empty, all layers.
        fuse: whether norms also compute the additions and ReLUs that follow them in the model's code.
        ledger: whether rank 0 prints the ledger of collectives when the job ends.
        save_state: whether the state of moving statistics is kept beside checkpoints that the script writes itself.
        transport: what sends statistics, as in ``convert``; None uses the value of ``DISTNORM_TRANSPORT``.
        source: where the settings come from, for error messages.
        required: whether code asks for the conversion, so that a model that cannot be converted is an error.

    Raises:
        ValueError: a value is not allowed; the message names source, key, what was given and what is allowed.
    """

    recipe: RecipeName = "sync_bn"
    options: Options = field(default_factory=dict)
    where: Patterns | PatternsByModel = ()
    fuse: bool = False
    ledger: bool = False
    save_state: bool = False
    transport: Transport | None = None
    source: str = field(default="distnorm", compare=False)
    required: bool = field(default=False, compare=False)

    def __post_init__(self) -> None:
        """Validate."""
        hints = hints_of(Settings)
        for key in (each.name for each in fields(Settings)):
            value = getattr(self, key)
            if not admits(hints[key], value):
                raise ValueError(f"{self.source}: {key} must be {words(hints[key])}; got {shown(value)}.")
        try:
            self.build()
        except ValueError as error:
            raise ValueError(f"{self.source}: {error}") from None

    @classmethod
    def of(cls, section: object, source: str) -> Self:
        """Read a config file's section.

        Args:
            section: the parsed section; ``where`` may be a list, a mapping, or a text as ``patterns.read`` reads it.
            source: names the file and the section in error messages.

        Raises:
            ValueError: the section is not a mapping, or has an unknown key or a value that is not allowed.
        """
        if not isinstance(section, Mapping):
            raise ValueError(f"{source}: need a mapping; allowed keys are {', '.join(KEYS)}; got {shown(section)}.")
        for key in section:
            if key not in KEYS:
                raise ValueError(
                    f"{source}: unknown key {shown(key)}{suggest(str(key), KEYS)}; allowed are {', '.join(KEYS)}."
                )
        values: dict[str, Any] = dict(section)
        if "where" in values:
            try:
                values["where"] = patterns.read(values["where"])
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
        return cls(**values, source=source)

    def section(self) -> dict[str, object]:
        """Return the section that ``of`` reads: the recipe, and the settings that are not defaults."""
        section: dict[str, object] = {"recipe": self.recipe}
        if self.options:
            section["options"] = dict(self.options)
        if self.where:
            section["where"] = patterns.as_section(self.where)
        section |= {key: True for key in _SWITCHES if getattr(self, key)}
        if self.transport not in (None, "torch"):
            section["transport"] = self.transport
        return section

    def build(self) -> Recipe:
        """Build the recipe."""
        return recipes.build(self.recipe, **self.options)

    def convert(self, model: nn.Module, *, mesh: DeviceMesh | None = None) -> bool:
        """Convert ``model`` in place and return True; return False if it stays as it is, for any reason.

        ``mesh`` holds the data-parallel ranks, if they are not all ranks.

        Raises:
            ValueError: the model cannot be converted, and the settings are ``required``; or as ``attempt``.

        Warns:
            UserWarning: on the first rank, if the model cannot be converted.
        """
        reason = self.attempt(model, mesh=mesh)
        if reason and self.required:
            raise ValueError(f"{self.source}: {reason}")
        if reason:
            messages.warn(as_it_is(model, reason))
        return reason is None

    # docs/decisions.md#who-asks-for-a-conversion
    def attempt(self, model: nn.Module, *, mesh: DeviceMesh | None = None) -> str | None:
        """Convert ``model`` in place and return None; or leave it as it is and return the reason.

        The reason is empty if nothing is wrong: the model is converted already, has no batch norm, or ``where`` names
        others only.

        Raises:
            ImportError: ``transport="mpi"`` without mpi4py.
            ValueError: an environment variable is wrong.
        """
        names = [name for name, _ in norms(model)]
        wanted = patterns.of_model(self.where, model)
        if not names or wanted is None or is_converted_by_call(model):
            return ""
        if wanted and not patterns.select(wanted, names):
            return f"where={list(wanted)} selects none of {shown(names)}"
        chosen(self.transport)
        refuse_unknown_variables(os.environ)
        where = (lambda name, _: patterns.select(wanted, [name])) if wanted else None
        try:
            convert(model, self.build(), where=where, mesh=mesh, transport=self.transport, fuse=self.fuse)
        except ValueError as error:
            return str(error)
        return None if is_converted_by_call(model) else "its batch norms are subclasses that are left alone"


KEYS = tuple(each.name for each in fields(Settings) if each.name not in ("source", "required"))
"""The keys of a section, which are the flags of ``distnorm.run`` and ``distnorm config``, too."""


def as_it_is(model: nn.Module, reason: str) -> str:
    """Return the warning that ``model`` is not converted."""
    return f"distnorm: {type(model).__name__} is not converted and trains as it is: {reason}"


def from_environment(environment: Mapping[str, str], flags: Mapping[str, object] | None = None) -> Settings | None:
    """Return the settings of this process: from ``flags``, then ``DISTNORM_*``, then the launcher's section.

    Flags of the run module that started the script of this process come between ``flags`` and ``DISTNORM_*``.

    ``DISTNORM_RECIPE``, ``DISTNORM_OPTIONS`` (JSON), ``DISTNORM_WHERE`` (as ``patterns.read``), ``DISTNORM_FUSE``,
    ``DISTNORM_LEDGER``, ``DISTNORM_SAVE_STATE``, ``DISTNORM_TRANSPORT``. If a source names a recipe, the options of
    later sources are dropped. None if no source sets anything.

    Raises:
        ValueError: as ``Settings.of``; or an unknown variable DISTNORM_*.
    """
    refuse_unknown_variables(environment)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    sections = [_read_section(environment)] if SECTION_VARIABLE in environment else []
    sections.append(("environment DISTNORM_*", _read_variables(environment)))
    sections.append(("flags of distnorm.run", merge(inherited_flags(environment), given)))
    sources = [source for source, section in sections if section]
    return Settings.of(merge(*(section for _, section in sections)), ", ".join(sources)) if sources else None


def merge(*sections: Mapping[str, object]) -> dict[str, object]:
    """Return one section: later ones override earlier ones, and a recipe drops the options of earlier ones."""
    merged: dict[str, object] = {}
    for section in sections:
        if "recipe" in section:
            merged.pop("options", None)
        merged.update(section)
    return merged


def inherited_flags(environment: Mapping[str, str]) -> Mapping[str, object]:
    """Return the flags of the run module that started the script that started this process.

    Raises:
        ValueError: the variable holds something else.
    """
    source = f"environment {FLAGS_VARIABLE}"
    given = environment.get(FLAGS_VARIABLE, "{}")
    match read_json(given, source, _FLAGS_EXAMPLE):
        case dict(flags):
            return flags
    raise ValueError(f"{source}: need JSON such as '{_FLAGS_EXAMPLE}', as distnorm.run writes it; got {shown(given)}.")


def _read_section(environment: Mapping[str, str]) -> tuple[str, Mapping[str, object]]:
    """Return the source and the section that a launcher passes to its workers."""
    source = f"environment {SECTION_VARIABLE}"
    match read_json(environment[SECTION_VARIABLE], source, _SECTION_EXAMPLE):
        case {"source": str(named), "section": dict(section), **others} if not others:
            return named, section
    raise ValueError(
        f"{source}: need JSON such as '{_SECTION_EXAMPLE}', as `distnorm launch` writes it; got "
        f"{shown(environment[SECTION_VARIABLE])}."
    )


def _read_variables(environment: Mapping[str, str]) -> dict[str, object]:
    section: dict[str, object] = {}
    for key in ("recipe", "transport", "where"):
        if f"DISTNORM_{key.upper()}" in environment:
            section[key] = environment[f"DISTNORM_{key.upper()}"]
    for key in _SWITCHES:
        if f"DISTNORM_{key.upper()}" in environment:
            word = environment[f"DISTNORM_{key.upper()}"]
            section[key] = _WORDS.get(word.lower(), word)
    if "DISTNORM_OPTIONS" in environment:
        section["options"] = read_json(environment["DISTNORM_OPTIONS"], "environment DISTNORM_OPTIONS", OPTIONS_EXAMPLE)
    return section
