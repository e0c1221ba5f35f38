"""The ``distnorm`` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from distnorm import recipes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="distnorm", description="Synchronized normalization for distributed training."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("recipes", help="list the recipes, or describe one")
    listing.add_argument("name", nargs="?", help="a recipe's name")
    chosen = parser.parse_args(arguments)
    return _recipes(parser, chosen.name)


def _recipes(parser: argparse.ArgumentParser, name: str | None) -> int:
    if name is None:
        for each in recipes.available():
            options = ", ".join(f"{option}: {kind}" for option, kind in each.options.items())
            print(f"{each.name + '(' + options + ')'}\n    {each.summary}")
        return 0
    try:
        each = recipes.describe(name)
    except ValueError as error:
        parser.error(str(error))
    print(each.text)
    return 0
