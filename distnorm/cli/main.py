"""The ``distnorm`` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from distnorm import recipes
from distnorm.cli import bench, config, launch, plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["launch"]:
        return launch.main(given[1:])  # accelerate's own parser reads the rest
    parser = argparse.ArgumentParser(
        prog="distnorm", description="Synchronized normalization for distributed training."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("recipes", help="list the recipes, or describe one")
    listing.add_argument("name", nargs="?", help="a recipe's name")
    commands.add_parser("launch", help="accelerate launch, with models converted by the settings in the config file")
    config.add_arguments(commands.add_parser("config", help="write distnorm's section into accelerate's config file"))
    bench.add_arguments(commands.add_parser("bench", help="measure what each recipe costs on this cluster"))
    plan.add_arguments(commands.add_parser("plan", help="predict what each recipe costs on any number of ranks"))
    chosen = parser.parse_args(given)
    if chosen.command == "bench":
        return bench.main(chosen, given)
    if chosen.command == "plan":
        return plan.main(chosen)
    return config.main(chosen) if chosen.command == "config" else _recipes(parser, chosen.name)


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
