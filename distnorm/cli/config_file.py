"""Read and write distnorm's section of accelerate's config file.

accelerate refuses unknown keys, so it is given the file without the section. When the section is written, all other
lines stay unchanged.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from distnorm.settings import Settings
from distnorm.validation import refuse_duplicates, shown, suggest, unique_keys

SECTION = "distnorm_config"

_Span = tuple[int, int]


def default_path() -> str:
    """Return the path of accelerate's default config file.

    Raises:
        ImportError: accelerate is not installed.
    """
    try:
        from accelerate.commands.config import default_config_file
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    return str(default_config_file)


@dataclass(frozen=True)
class ConfigFile:
    """A config file: its path, its text, and the values in it."""

    path: str
    text: str
    values: dict[str, Any]

    @classmethod
    def read(cls, path: str) -> Self:
        """Read YAML, or JSON if the name ends with ``.json``.

        Raises:
            ImportError: accelerate is not installed.
            ValueError: there is no such file, or it does not hold a mapping; the message names file and line.
        """
        if not os.path.isfile(path):
            raise ValueError(f"{path} is not a file. `accelerate config --config_file {path}` creates one.")
        try:
            text = Path(path).read_bytes().decode()  # bytes, so that line ends are kept
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} cannot be read: {error}.") from None
        file = cls(path, text, _parse(path, text))
        file._check_keys()
        return file

    def settings(self) -> Settings | None:
        """Return the settings in the section; None if there is no section.

        Raises:
            ValueError: as ``Settings.of``.
        """
        if SECTION not in self.values:
            return None
        return Settings.of(self.values[SECTION], self.source)

    @property
    def source(self) -> str:
        """The file and the section, for messages."""
        return f"{self.path}, section {SECTION}"

    def for_accelerate(self) -> dict[str, Any]:
        """Return the values without the section."""
        return {key: value for key, value in self.values.items() if key != SECTION}

    def replaced(self, section: Mapping[str, object] | None) -> str:
        """Return the text with another section, or with none; nothing else changes.

        Raises:
            ValueError: the layout of the file does not allow that.
        """
        wanted = self.for_accelerate() if section is None else {**self.for_accelerate(), SECTION: dict(section)}
        if _is_json(self.path):
            return json.dumps(wanted, indent=2) + "\n"
        text = self._splice("" if section is None else dump(dict(section)))
        try:
            unchanged = _parse(self.path, text) == wanted
        except ValueError:
            unchanged = False
        if not unchanged:
            raise ValueError(f"{self.path}: cannot insert {SECTION} into this layout; write one key per line.")
        return text

    def _splice(self, block: str) -> str:
        start, end, indent = self._place()
        newline = "\r\n" if "\r\n" in self.text else "\n"
        lines = [indent + line + newline for line in block.splitlines()]
        before, after = self.text[:start], self.text[end:]
        if lines and before and not before.endswith("\n"):
            before += newline
        return before + "".join(lines) + after

    def _place(self) -> tuple[int, int, str]:
        """Return where the section starts and ends in the text, and the indentation of top-level keys."""
        pairs = _yaml().compose(self.text, Loader=_yaml().SafeLoader).value
        indent = " " * pairs[0][0].start_mark.column if pairs else ""
        keys = [key.value for key, _ in pairs]
        if SECTION not in keys:
            return len(self.text), len(self.text), indent
        start, end = _whole_lines(self.text, *_span(pairs, keys.index(SECTION)))
        return start, end, indent

    def _check_keys(self) -> None:
        """Raise for a misspelt section, for which accelerate would suggest to upgrade."""
        from accelerate.commands.config.config_args import ClusterConfig, SageMakerConfig

        known = {SECTION, *ClusterConfig.__dataclass_fields__, *SageMakerConfig.__dataclass_fields__}
        for key in self.values:
            hint = suggest(str(key), [SECTION])
            if key not in known and hint:
                raise ValueError(f"{self.path}: unknown key {key!r}{hint}.")
        if SECTION in self.values and not _is_json(self.path):
            root = _yaml().compose(self.text, Loader=_yaml().SafeLoader)
            _refuse_yaml_duplicates(self.source, next(value for key, value in root.value if key.value == SECTION))


def read_options(pairs: Sequence[str]) -> dict[str, object]:
    """Parse options of the form ``key=value``, with values in YAML.

    Raises:
        ValueError: an option does not have this form, or is given twice.
    """
    options: dict[str, object] = {}
    refuse_duplicates([pair.partition("=")[0] for pair in pairs])
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not (key and equals):
            raise ValueError(f"option {pair!r}: need key=value, such as size=4.")
        try:
            options[key] = _yaml().safe_load(text)
        except (_yaml().YAMLError, ValueError, RecursionError):
            raise ValueError(f"option {shown(pair)}: {shown(text)} is not a value in YAML; put it in quotes.") from None
    return options


def dump(section: object) -> str:
    """Format the section as YAML, with its key."""
    return str(_yaml().safe_dump({SECTION: section}, sort_keys=False))


def _span(pairs: list[tuple[Any, Any]], index: int) -> _Span:
    """Return the span from a key to the next one, or to the end of its value."""
    end = pairs[index + 1][0].start_mark if index + 1 < len(pairs) else pairs[index][1].end_mark
    return pairs[index][0].start_mark.index, end.index


def _whole_lines(text: str, start: int, end: int) -> _Span:
    """Return the span of lines from ``start`` to the last one before ``end`` that is neither empty nor a comment."""
    start = text.rfind("\n", 0, start) + 1
    lines = text[start:end].splitlines(keepends=True)
    while lines and (not lines[-1].strip() or lines[-1].lstrip().startswith("#")):
        lines.pop()
    length = sum(map(len, lines))
    rest = text.find("\n", start + length - 1)
    return start, rest + 1 if rest >= 0 else len(text)


def _parse(path: str, text: str) -> dict[str, Any]:
    yaml = _yaml()
    try:
        values = json.loads(text, object_pairs_hook=unique_keys) if _is_json(path) else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg}.") from None
    except yaml.YAMLError as error:
        raise ValueError(_where_yaml_stops(path, error)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: need a mapping of keys to values, as `accelerate config` writes it.")
    return values


def _refuse_yaml_duplicates(source: str, node: Any) -> None:
    """Raise for duplicate keys, of which YAML's loader would silently use the last one."""
    if isinstance(node, _yaml().MappingNode):
        try:
            refuse_duplicates([key.value for key, _ in node.value])
        except ValueError as error:
            raise ValueError(f"{source}: {error}.") from None
        for _, value in node.value:
            _refuse_yaml_duplicates(source, value)


def _where_yaml_stops(path: str, error: Any) -> str:
    problem, context = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
    if problem is None:
        return f"{path}: {error}."
    begun = f", {error.context} that begins in line {context.line + 1}" if context else ""
    return f"{path}, line {problem.line + 1}: {error.problem}{begun}."


def _is_json(path: str) -> bool:
    return path.endswith(".json")  # as in accelerate


def _yaml() -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise _not_installed(error) from None
    return yaml


def _not_installed(error: ModuleNotFoundError) -> ImportError:
    package = (error.name or "accelerate").partition(".")[0]
    return ImportError(f"{package} is not installed: pip install 'distnorm[accelerate]'.")
