"""Write the generated parts of docs anew, or with --check fail if they are out of date."""

from __future__ import annotations

import argparse
import ast
import re
import sys
from pathlib import Path

import distnorm
from distnorm import Recipe, recipes
from distnorm.layers.layout import measure

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
    "gbn": "Yuan et al. 2019, reconstructed",
    "iebn": "Liang et al. 2020",
    "mixture_norm": "Kalayeh & Shah 2019, reconstructed",
    "layer_norm": "Ba et al. 2016",
    "group_norm": "Wu & He 2018",
    "instance_norm": "Ulyanov et al. 2016",
}
OTHER_METHODS = tuple(SOURCES)[8:]
"""Recipes of other methods than batch norm and RMS, in another file."""

# What docs/reference.md describes, by heading: modules, and the names in them.
OBJECTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Convert a model": {"distnorm.convert": ("convert", "revert", "register_converter")},
    "For inference": {"distnorm.fold": ("fold",)},
    "In the training loop": {
        "distnorm.attach": ("attach", "end_step", "sync_running_stats", "state_dict", "load_state_dict")
    },
    "Precondition gradients": {
        "distnorm.preconditioning.precondition": ("precondition",),
        "distnorm.preconditioning.handle": ("Preconditioner",),
    },
    "Look at what happens": {"distnorm.diagnostics.ledger": ("Ledger",), "distnorm.diagnostics.drift": ("stats",)},
    "Layers": {
        "distnorm.nn.sync_batch_norm": ("SyncBatchNorm",),
        "distnorm.nn.conditional": ("ConditionalBatchNorm", "ConditionalInstanceNorm"),
        "distnorm.nn.adain": ("AdaIN",),
        "distnorm.nn.spade": ("SPADE",),
        "distnorm.layers.module": (*("DistNorm", "DistBatchNorm1d", "DistBatchNorm2d", "DistBatchNorm3d"),),
    },
    "Recipes": {
        "distnorm.recipe": ("Recipe",),
        "distnorm.recipes": (*tuple(SOURCES)[:8], "available", "describe", "build", "parse"),
        "distnorm.method_recipes": OTHER_METHODS,
    },
    "Methods": {
        "distnorm.methods.batch_norm": ("BatchNorm",),
        "distnorm.methods.rms": ("RMS",),
        "distnorm.methods.gbn": ("L1", "Semideviation", "Range", "WorstCase"),
        "distnorm.methods.quantile": ("SQD", "MAD"),
        "distnorm.methods.iebn": ("IEBN",),
        "distnorm.methods.mixture": ("MixtureNorm",),
        "distnorm.methods.per_sample": ("LayerNorm", "GroupNorm", "InstanceNorm"),
        "distnorm.methods.base": ("Method", "ChannelAffine", "Declared", "Layer", "Share", "Shared"),
    },
    "Policies": {
        "distnorm.policies.local": ("Local",),
        "distnorm.policies.all_reduce": ("AllReduce",),
        "distnorm.policies.chain": ("Chain",),
        "distnorm.policies.periodic": ("Periodic",),
        "distnorm.policies.moving": ("Moving",),
        "distnorm.policies.stale_mix": ("StaleMix",),
        "distnorm.policies.warmup": ("Warmup",),
        "distnorm.policies.base": ("Policy", "Reducer"),
        "distnorm.policies.facts": ("Facts", "Completeness"),
    },
    "Frameworks": {
        "distnorm.integrations.accelerate": ("DistNormPlugin",),
        "distnorm.integrations.transformers": ("DistNormCallback",),
        "distnorm.integrations.lightning": ("DistNormSync",),
        "distnorm.integrations.deepspeed": ("enable",),
        "distnorm.integrations.mpi": ("init_process_group",),
        "distnorm.integrations.checkpoint": ("save", "load"),
    },
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
        cost = f"{collectives(recipe)} | {payload(recipe)} | {recipe.policy.facts.staleness}"
        rows.append(f"| `{each.name}` | {options} | {cost} | {SOURCES[each.name]} |")
    return rows


def collectives(recipe: Recipe) -> str:
    """Blocking ones for each of L layers, forward and backward, and asynchronous ones."""
    facts, shares = recipe.policy.facts, len(measure(recipe.method, 1).parts)
    blocking = f"{2 * shares * facts.collectives:g} L" if shares * facts.collectives else ""
    background = f"{facts.background:g} asynchronous" if facts.background else ""
    return " + ".join(part for part in (blocking, background) if part) or "0"


def payload(recipe: Recipe) -> str:
    """Bytes that a rank contributes: float64 sums forward, cotangents backward, for C channels in all; no counts."""
    one, two = (
        sum(part.forward + part.backward for part in measure(recipe.method, features).parts.values())
        for features in (1, 2)
    )
    uses = recipe.policy.facts.collectives + recipe.policy.facts.background
    return f"{8 * (two - one) * uses:g} C" if (two - one) * uses else "0"


def object_rows() -> list[str]:
    """A heading for every public object, with its first sentence; the site puts its docstring after it."""
    rows = []
    for heading, modules in OBJECTS.items():
        rows += ["", f"## {heading}"]
        for module, names in modules.items():
            path = f"{module.replace('.', '/')}.py"
            for name in names:
                rows += ["", f"### {public_name(module, name)}", "", first_sentence(path, name)]
                rows += [f"[{path}](../{path})", "", f"<!-- object: {module}.{name} -->"]
    return [*rows, ""]


def public_name(module: str, name: str) -> str:
    """How users reach ``name``."""
    for package in (distnorm, distnorm.methods, distnorm.nn, distnorm.policies):
        if name in package.__all__:
            return f"{package.__name__}.{name}"
    return f"{module}.{name}"


def first_sentence(path: str, name: str) -> str:
    """The first line of a docstring, read from the source: frameworks need not be there."""
    tree = ast.parse((ROOT / path).read_text())
    definition = next(node for node in tree.body if getattr(node, "name", None) == name)
    assert isinstance(definition, ast.ClassDef | ast.FunctionDef)
    return (ast.get_docstring(definition) or "").partition("\n")[0].replace("``", "`")


def filled(text: str, name: str, rows: list[str]) -> str:
    """``text`` with ``rows`` between the markers of the table ``name``."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(text):
        raise SystemExit(f"no markers {begin} ... {end}")
    return pattern.sub(lambda _: "\n".join([begin, *rows, end]), text)


PARTS = {"which-recipe.md": ("recipes", recipe_rows), "reference.md": ("objects", object_rows)}


def main() -> int:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if a page is out of date")
    check = parser.parse_args().check
    for name, (part, rows) in PARTS.items():
        page = ROOT / "docs" / name
        old = page.read_text()
        new = filled(old, part, rows())
        if check and new != old:
            print(f"docs/{name} is out of date: run make docs", file=sys.stderr)
            return 1
        page.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
