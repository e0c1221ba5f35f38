"""``distnorm config``: write, show or remove distnorm's section in accelerate's config file."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any, get_args

from distnorm.cli.config_file import SECTION, ConfigFile, default_path, dump, read_options
from distnorm.cli.questions import ask
from distnorm.settings import KEYS, Settings
from distnorm.types import Transport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command's arguments."""
    parser.usage = "distnorm config [--config_file FILE] [options]"
    parser.description = """\
  distnorm config --config_file cfg.yaml --recipe mabn --option window=8

Write distnorm's section into accelerate's config file; all other lines stay as
they are. Without options it asks. Where it cannot ask, it shows and checks the
section that is there. Start the job by `distnorm launch`.
"""
    add = parser.add_argument
    add("--config_file", "--config-file", metavar="FILE", help="default: accelerate's own")
    add("--recipe", metavar="NAME", help="see `distnorm recipes`")
    add(
        "--option",
        action="append",
        metavar="KEY=VALUE",
        dest="options",
        help="an option of the recipe; may be repeated",
    )
    add(
        "--where",
        nargs="+",
        metavar="PATTERN",
        help="layers to convert, such as 'backbone.*', or 'Net: backbone.*'; default: all",
    )
    add("--fuse", action=argparse.BooleanOptionalAction, help="norms do the ReLU and addition that follow them")
    add("--ledger", action=argparse.BooleanOptionalAction, help="rank 0 prints the collectives at the end")
    add(
        "--save-state",
        action=argparse.BooleanOptionalAction,
        help="keep moving statistics beside the script's checkpoints",
    )
    add("--transport", metavar="NAME", help=f"transport of statistics: {', '.join(get_args(Transport))}")
    add("--remove", action="store_true", help="take the section out")


def main(chosen: argparse.Namespace) -> int:
    """Run the command; return 0, or 2 after an error message."""
    try:
        _run(chosen)
    except (ImportError, ValueError, OSError) as error:
        print(f"distnorm config: error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(chosen: argparse.Namespace) -> None:
    file = ConfigFile.read(chosen.config_file or _default())
    flags = {key: value for key in KEYS if (value := getattr(chosen, key)) is not None}
    if chosen.remove:
        _remove(file, flags)
        return
    if flags:
        settings = Settings.of(_merged(file, flags), file.source)
    elif sys.stdin.isatty():
        settings = ask(file)
    else:
        _show(file)
        return
    _write(file, file.replaced(settings.section()))
    _show(ConfigFile.read(file.path))
    option = f" --config_file {chosen.config_file}" if chosen.config_file else ""
    print(f"Start jobs with `distnorm launch{option}`; `accelerate launch` refuses a file with this section.")


def _default() -> str:
    path = default_path()
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist: `accelerate config` creates it. Or give a file with --config_file.")
    return path


def _remove(file: ConfigFile, flags: dict[str, Any]) -> None:
    if flags:
        raise ValueError(f"--remove removes the whole section; do not give {', '.join(flags)}.")
    if SECTION not in file.values:
        raise ValueError(f"{file.path} has no section {SECTION}.")
    _write(file, file.replaced(None))
    print(f"{file.path} has no section {SECTION} any more.")


def _show(file: ConfigFile) -> None:
    settings = file.settings()
    if settings is None:
        raise ValueError(f"{file.path} has no section {SECTION}; write one with --recipe, such as --recipe sync_bn.")
    print(f"{file.path}:\n{dump(file.values[SECTION])}", end="")


def _merged(file: ConfigFile, flags: dict[str, Any]) -> object:
    """Return the current section, overridden by ``flags``; a recipe in ``flags`` drops the current options."""
    current = file.values.get(SECTION, {})
    if not isinstance(current, dict):
        return current  # Settings.of raises for it
    section, given = dict(current), dict(flags)
    options = read_options(given.pop("options", []))
    if "recipe" in given:
        section.pop("options", None)
    section.update(given)
    if "where" in given and len(given["where"]) == 1:
        (section["where"],) = given["where"]  # which may have patterns for several models
    if options:
        before = section.get("options")
        section["options"] = {**(before if isinstance(before, dict) else {}), **options}
    return section


def _write(file: ConfigFile, text: str) -> None:
    Path(file.path).write_bytes(text.encode())
