"""Write the generated tables of README.md and docs anew, or with --check fail if they are out of date."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from distnorm import Recipe, recipes

ROOT = Path(__file__).parent.parent
OPTIONS: dict[str, dict[str, object]] = {"group_bn": {"size": 4}}
SOURCES = {
    "local_bn": "Ioffe & Szegedy 2015, per rank",
    "sync_bn": "Peng et al. 2018; Zhang et al. 2018",
    "group_bn": "Ying et al. 2018",
    "hierarchical_bn": "our own construction; equals `sync_bn`",
    "periodic_bn": "our own construction",
}


def recipe_rows() -> list[str]:
    """One row per recipe: cost for a layer of C channels."""
    rows = [
        "| recipe | options | collectives per layer and step | bytes per layer and step | staleness | source |",
        "|---|---|---:|---:|---:|---|",
    ]
    for each in recipes.available():
        recipe = recipes.build(each.name, **OPTIONS.get(each.name, {}))
        options = ", ".join(f"`{name}`" for name in each.options) or "none"
        collectives = 2 * recipe.policy.collectives
        cost = f"{collectives:g} | {payload(recipe)} | {recipe.policy.staleness}"
        rows.append(f"| `{each.name}` | {options} | {cost} | {SOURCES[each.name]} |")
    return rows


def payload(recipe: Recipe) -> str:
    """Bytes a rank contributes: 2 C + 1 float64 sums forward and 2 C cotangents backward, per collective."""
    share = recipe.policy.collectives
    return f"{32 * share:g} C + {8 * share:g}" if share else "0"


def filled(text: str, name: str, rows: list[str]) -> str:
    """``text`` with ``rows`` between the markers of the table ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"no markers {begin} ... {end}")
    return pattern.sub(lambda _: "\n".join([begin, *rows, end]), text)


def main() -> int:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a table is out of date")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = filled(old, "recipes", recipe_rows())
    if check and new != old:
        print("README.md is out of date: run make docs", file=sys.stderr)
        return 1
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
