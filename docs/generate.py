"""Write the generated tables of README.md and docs anew, or with --check fail if they are out of date."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from distnorm import Recipe, recipes
from distnorm.policies import Policy

ROOT = Path(__file__).parent.parent
OPTIONS: dict[str, dict[str, object]] = {"group_bn": {"size": 4}}
SOURCES = {
    "local_bn": "Ioffe & Szegedy 2015, per rank",
    "sync_bn": "Peng et al. 2018; Zhang et al. 2018",
    "group_bn": "Ying et al. 2018",
    "hierarchical_bn": "our own construction; equals `sync_bn`",
    "periodic_bn": "our own construction",
    "mabn": "Yan et al. 2020, here shared across ranks",
    "hierarchical_mabn": "our own construction",
    "lazy_bn": "our own construction",
}


def recipe_rows() -> list[str]:
    """One row per recipe: what a step of a model costs."""
    rows = [
        "| recipe | options | collectives per step | bytes per step | staleness | source |",
        "|---|---|---|---|---:|---|",
    ]
    for each in recipes.available():
        recipe = recipes.build(each.name, **OPTIONS.get(each.name, {}))
        options = ", ".join(f"`{name}`" for name in each.options) or "none"
        cost = f"{collectives(recipe.policy)} | {payload(recipe)} | {recipe.policy.facts.staleness}"
        rows.append(f"| `{each.name}` | {options} | {cost} | {SOURCES[each.name]} |")
    return rows


def collectives(policy: Policy) -> str:
    """Blocking ones for each of L layers, forward and backward, and asynchronous ones."""
    blocking = f"{2 * policy.facts.collectives:g} L" if policy.facts.collectives else ""
    background = f"{policy.facts.background:g} asynchronous" if policy.facts.background else ""
    return " + ".join(part for part in (blocking, background) if part) or "0"


def payload(recipe: Recipe) -> str:
    """Bytes that a rank contributes: float64 sums with a count forward, cotangents backward, for C channels in all."""
    kinds = 2 if recipe.method.centred else 1
    uses = recipe.policy.facts.collectives + recipe.policy.facts.background
    return f"{16 * kinds * uses:g} C" if uses else "0"


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
