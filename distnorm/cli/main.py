"""The ``distnorm`` command."""

from __future__ import annotations

import argparse
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence

from distnorm import recipes
from distnorm.cli import bench, config, launch, plan

_DESCRIPTION = """\
  distnorm recipes
  distnorm config --config_file cfg.yaml --recipe sync_bn
  distnorm launch --config_file cfg.yaml train.py

Synchronized batch norm for jobs that train with few samples per process.
"""
_EPILOG = """\
Help on one of them: distnorm bench --help.
Under torchrun, mpirun or srun: python -m distnorm.run --help.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["launch"]:
        return launch.main(given[1:])  # accelerate's own parser reads the rest
    parser = argparse.ArgumentParser(
        prog="distnorm", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command", title="commands")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, formatter_class=RawDescriptionHelpFormatter)

    listing = command("recipes", "list the recipes, or describe one")
    listing.description = (
        "  distnorm recipes lazy_bn\n\nDescribe a recipe and its options. Without a name, list all recipes."
    )
    listing.add_argument("name", nargs="?", help="a recipe's name")
    command("launch", "accelerate launch, with models converted")
    config.add_arguments(command("config", "write distnorm's section of accelerate's config file"))
    bench.add_arguments(command("bench", "measure each recipe with your model on your ranks"))
    plan.add_arguments(command("plan", "predict each recipe on any number of ranks"))
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
