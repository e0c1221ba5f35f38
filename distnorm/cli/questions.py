"""The questions of ``distnorm config``. An empty answer keeps the value in brackets; a wrong one is asked again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from distnorm import patterns, recipes
from distnorm.cli.config_file import ConfigFile, read_options
from distnorm.settings import Settings


def ask(file: ConfigFile) -> Settings:
    """Ask for the section of ``file``, with its current values as defaults.

    Raises:
        ValueError: the current section is not allowed, or the input ends.
    """
    now = file.settings() or Settings()
    for each in recipes.available():
        print(f"  {each.name}: {each.summary}")
    section: dict[str, Any] = {"recipe": _ask("recipe", now.recipe, _recipe)}

    def checked(key: str, value: object) -> object:
        Settings.of({**section, key: value}, file.source)
        return value

    takes = {} if "(" in section["recipe"] else recipes.describe(section["recipe"]).options
    if takes:
        kinds = ", ".join(f"{option}: {kind}" for option, kind in takes.items())
        before = now.options if section["recipe"] == now.recipe else {}
        written = " ".join(f"{key}={json.dumps(value)}" for key, value in before.items())
        section["options"] = _ask(
            f"options as key=value, of {kinds}", written, lambda text: checked("options", read_options(text.split()))
        )
    section["where"] = _ask(
        "layers, as patterns separated by commas, * for all",
        patterns.written(now.where) or "*",
        lambda text: checked("where", () if text == "*" else text),
    )
    section["fuse"] = _ask(
        "norms also compute the additions and ReLUs that follow", "yes" if now.fuse else "no", _yes_or_no
    )
    section["ledger"] = _ask("ledger of collectives when the job ends", "yes" if now.ledger else "no", _yes_or_no)
    section["save_state"] = _ask(
        "moving statistics beside the script's own checkpoints", "yes" if now.save_state else "no", _yes_or_no
    )
    section["transport"] = _ask("transport", now.transport or "torch", lambda text: checked("transport", text))
    return Settings.of(section, file.source)


def _ask(question: str, default: str, read: Callable[[str], object]) -> Any:
    while True:
        try:
            answer = input(f"{question} [{default}]: ").strip()
        except EOFError:
            raise ValueError("the input ended before all questions were answered; nothing was written.") from None
        try:
            return read(answer or default)
        except ValueError as error:
            print(error)


def _recipe(text: str) -> str:
    if "(" in text:
        recipes.parse(text)
    else:
        recipes.describe(text)
    return text


def _yes_or_no(text: str) -> bool:
    words = {"yes": True, "y": True, "no": False, "n": False}
    if text.lower() not in words:
        raise ValueError(f"{text!r}: answer yes or no.")
    return words[text.lower()]
