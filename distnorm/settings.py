"""What a user sets where a job is configured: recipe, options, layers and so on. Checked before a job starts.

The same section stands in an accelerate config (``distnorm_config:``) and in DeepSpeed's JSON (``"distnorm":``); flags
of ``distnorm.run`` and environment variables ``DISTNORM_*`` say the same and come first.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Self, get_args

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from distnorm import recipes
from distnorm.convert import convert
from distnorm.grid import Recipe
from distnorm.module import DistNorm
from distnorm.suggest import suggest
from distnorm.types import Transport

SECTION_VARIABLE = "DISTNORM_CONFIG"
"""Carries a config file's section from the launcher to its workers, as JSON: ``{"source": ..., "section": {...}}``."""

_SWITCHES = ("fuse", "ledger")
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a job's models are to be converted.

    Args:
        recipe: a name, or a name with options as in ``group_bn(size=4)``.
        options: options of the named recipe.
        where: patterns of layer names (``fnmatch``); none means all layers.
        fuse: whether norms take over the additions and ReLUs that follow them in the model's code.
        ledger: whether rank 0 prints the ledger of collectives when the job ends.
        transport: who carries statistics, as ``convert`` takes it; None is what ``DISTNORM_TRANSPORT`` says.
        source: where the settings come from, for error messages.

    Raises:
        ValueError: a value that is not allowed; the message names source, key, what was given and what is allowed.
    """

    recipe: str = "sync_bn"
    options: Mapping[str, object] = field(default_factory=dict)
    where: tuple[str, ...] = ()
    fuse: bool = False
    ledger: bool = False
    transport: Transport | None = None
    source: str = field(default="distnorm", compare=False)

    def __post_init__(self) -> None:
        """Validate."""
        if not isinstance(self.recipe, str):
            raise self._wrong("recipe", self.recipe, "a recipe's name, such as sync_bn")
        if not isinstance(self.options, Mapping):
            raise self._wrong("options", self.options, "a mapping of option names to values")
        if not isinstance(self.where, tuple) or not all(isinstance(each, str) for each in self.where):
            raise self._wrong("where", self.where, "a list of patterns of layer names")
        for key in _SWITCHES:
            if not isinstance(getattr(self, key), bool):
                raise self._wrong(key, getattr(self, key), "true or false")
        if self.transport not in (None, *get_args(Transport)):
            raise self._wrong("transport", self.transport, " or ".join(get_args(Transport)))
        try:
            self.build()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.source}: {error}") from None

    @classmethod
    def of(cls, section: object, source: str) -> Self:
        """Read a config file's section.

        Args:
            section: what the file holds; lists and strings are taken for ``where``.
            source: names the file and the section.

        Raises:
            ValueError: no mapping, an unknown key, or a value that is not allowed.
        """
        allowed = [each.name for each in fields(cls) if each.name != "source"]
        if not isinstance(section, Mapping):
            raise ValueError(f"{source}: expected a mapping with keys out of {', '.join(allowed)}; got {section!r}.")
        for key in section:
            if key not in allowed:
                raise ValueError(
                    f"{source}: unknown key {key!r}{suggest(str(key), allowed)}; allowed are {', '.join(allowed)}."
                )
        values: dict[str, Any] = {key: _value_of(key, value) for key, value in section.items()}
        return cls(**values, source=source)

    def section(self) -> dict[str, object]:
        """What ``of`` reads: the settings that are not defaults, and the recipe."""
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
        """The recipe itself."""
        return recipes.build(self.recipe, **self.options)

    def convert(self, model: nn.Module, *, mesh: DeviceMesh | None = None) -> bool:
        """Convert ``model`` in place, unless it is converted already; whether there was something to convert.

        ``mesh`` holds the data-parallel ranks, if they are not all.
        """
        modules = list(model.modules())
        if any(isinstance(each, DistNorm) for each in modules):
            return False
        if not any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in modules):
            return False
        convert(model, self.build(), where=self.where or None, mesh=mesh, transport=self.transport, fuse=self.fuse)
        return True

    def _wrong(self, key: str, given: object, allowed: str) -> ValueError:
        return ValueError(f"{self.source}: {key} must be {allowed}; got {given!r}.")


def from_environment(environment: Mapping[str, str], flags: Mapping[str, object] | None = None) -> Settings | None:
    """Settings of this process: ``flags``, then ``DISTNORM_*``, then the section that a launcher handed on.

    ``DISTNORM_RECIPE``, ``DISTNORM_OPTIONS`` (JSON), ``DISTNORM_WHERE`` (separated by commas), ``DISTNORM_FUSE``,
    ``DISTNORM_LEDGER``, ``DISTNORM_TRANSPORT``. A recipe from a source drops the options of the sources after it. None
    if no source says anything.

    Raises:
        ValueError: as ``Settings.of``.
    """
    carried = json.loads(environment[SECTION_VARIABLE]) if SECTION_VARIABLE in environment else {}
    layers = [(carried.get("source", ""), carried.get("section", {}))]
    layers.append(("environment DISTNORM_*", _read_variables(environment)))
    layers.append(("flags of distnorm.run", {key: value for key, value in (flags or {}).items() if value is not None}))
    sources: list[str] = []
    merged: dict[str, object] = {}
    for source, section in layers:
        if section:
            sources.append(source)
            if "recipe" in section:
                merged.pop("options", None)
            merged.update(section)
    return Settings.of(merged, ", ".join(sources)) if sources else None


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
        try:
            section["options"] = json.loads(environment["DISTNORM_OPTIONS"])
        except json.JSONDecodeError as error:
            raise ValueError(
                f"environment DISTNORM_OPTIONS: need JSON such as '{{\"size\": 4}}'; "
                f"got {environment['DISTNORM_OPTIONS']!r} ({error})."
            ) from None
    return section


def _value_of(key: str, value: object) -> object:
    if key == "where" and isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if key == "where" and isinstance(value, list) else value
