"""The settings of a job: recipe, options, layers and so on, checked before the job starts.

An accelerate config holds them in a section ``distnorm_config:``, DeepSpeed's JSON in a section ``"distnorm":``. Flags
of ``distnorm.run`` and environment variables ``DISTNORM_*`` set the same and take precedence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from distnorm import recipes
from distnorm.attach import is_converted_by_call
from distnorm.convert import convert
from distnorm.recipe import Recipe
from distnorm.types import Transport
from distnorm.validation import (
    Options,
    Patterns,
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

OPTIONS_EXAMPLE = '{"size": 4}'
_SECTION_EXAMPLE = '{"source": "cfg.yaml", "section": {"recipe": "sync_bn"}}'
_SWITCHES = ("fuse", "ledger")
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the models of a job are converted.

    Args:
        recipe: a name, or a name with options as in ``group_bn(size=4)``.
        options: options of the named recipe.
        where: patterns of layer names (``fnmatch``); if empty, all layers.
        fuse: whether norms also compute the additions and ReLUs that follow them in the model's code.
        ledger: whether rank 0 prints the ledger of collectives when the job ends.
        transport: what sends statistics, as in ``convert``; None uses the value of ``DISTNORM_TRANSPORT``.
        source: where the settings come from, for error messages.

    Raises:
        ValueError: a value is not allowed; the message names source, key, what was given and what is allowed.
    """

    recipe: RecipeName = "sync_bn"
    options: Options = field(default_factory=dict)
    where: Patterns = ()
    fuse: bool = False
    ledger: bool = False
    transport: Transport | None = None
    source: str = field(default="distnorm", compare=False)

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
            section: the parsed section; ``where`` may be a list or a string separated by commas.
            source: names the file and the section in error messages.

        Raises:
            ValueError: the section is not a mapping, or has an unknown key or a value that is not allowed.
        """
        allowed = [each.name for each in fields(cls) if each.name != "source"]
        if not isinstance(section, Mapping):
            raise ValueError(f"{source}: need a mapping; allowed keys are {', '.join(allowed)}; got {shown(section)}.")
        for key in section:
            if key not in allowed:
                raise ValueError(
                    f"{source}: unknown key {shown(key)}{suggest(str(key), allowed)}; allowed are {', '.join(allowed)}."
                )
        values: dict[str, Any] = {key: _value_of(key, value) for key, value in section.items()}
        return cls(**values, source=source)

    def section(self) -> dict[str, object]:
        """Return the section that ``of`` reads: the recipe, and the settings that are not defaults."""
        section: dict[str, object] = {"recipe": self.recipe}
        if self.options:
            section["options"] = dict(self.options)
        if self.where:
            section["where"] = list(self.where)
        section |= {key: True for key in _SWITCHES if getattr(self, key)}
        if self.transport not in (None, "torch"):
            section["transport"] = self.transport
        return section

    def build(self) -> Recipe:
        """Build the recipe."""
        return recipes.build(self.recipe, **self.options)

    def convert(self, model: nn.Module, *, mesh: DeviceMesh | None = None) -> bool:
        """Convert ``model`` in place and return True; return False if it is converted already or has no batch norm.

        ``mesh`` holds the data-parallel ranks, if they are not all ranks.
        """
        if is_converted_by_call(model):
            return False
        if not any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in model.modules()):
            return False
        convert(model, self.build(), where=self.where or None, mesh=mesh, transport=self.transport, fuse=self.fuse)
        return True


def from_environment(environment: Mapping[str, str], flags: Mapping[str, object] | None = None) -> Settings | None:
    """Return the settings of this process: from ``flags``, then ``DISTNORM_*``, then the launcher's section.

    ``DISTNORM_RECIPE``, ``DISTNORM_OPTIONS`` (JSON), ``DISTNORM_WHERE`` (separated by commas), ``DISTNORM_FUSE``,
    ``DISTNORM_LEDGER``, ``DISTNORM_TRANSPORT``. If a source names a recipe, the options of later sources are dropped.
    None if no source sets anything.

    Raises:
        ValueError: as ``Settings.of``; or an unknown variable DISTNORM_*.
    """
    refuse_unknown_variables(environment)
    given = {key: value for key, value in (flags or {}).items() if value is not None}
    sections = [_read_section(environment)] if SECTION_VARIABLE in environment else []
    sections += [("environment DISTNORM_*", _read_variables(environment)), ("flags of distnorm.run", given)]
    sources: list[str] = []
    merged: dict[str, object] = {}
    for source, section in sections:
        if section:
            sources.append(source)
            if "recipe" in section:
                merged.pop("options", None)
            merged.update(section)
    return Settings.of(merged, ", ".join(sources)) if sources else None


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


def _value_of(key: str, value: object) -> object:
    if key == "where" and isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if key == "where" and isinstance(value, list) else value
