"""README and docs keep their word: code blocks run, commands work, generated tables are current, links lead on."""

from __future__ import annotations

import ast
import linecache
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import distnorm
from distnorm import Recipe, methods, nn, policies, settings, validation
from distnorm.methods import BatchNorm, Method
from distnorm.policies import AllReduce, Local, Policy
from tests.laws.ranks import answer_on_rank, random_case
from tests.support.threads import run_threads

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(make [\w-]+|distnorm \w+)`")
PACKAGES = (distnorm, methods, nn, policies)
NOT_OURS = {"distnorm/methods/power.py", "first.py", "train.py", "zero_to_fp32.py"}
"""Files that pages speak of, and that are the reader's or a framework's."""
TROUBLES = ROOT / "docs" / "troubleshooting.md"
LINK = re.compile(r"\]\(([^)#:]+)(?:#([^)]*))?\)")

# Commands that this very run is, or contains, and names of commands that take more words.
RUN_ELSEWHERE = {"make test", "make test-all", "make test-faults", "make integrations", "make bench"}
RUN_ELSEWHERE |= {"make zoo", "make scripts"}  # take an environment of their own, and up to an hour
RUN_ELSEWHERE |= {"make check", "make docs"}  # tests/test_site.py builds the site
RUN_ELSEWHERE |= {"distnorm launch", "distnorm config", "distnorm bench", "distnorm plan"}


def blocks(language: str) -> list[object]:
    return [
        pytest.param(text, id=f"{page.name}-{number}")
        for page in PAGES
        for number, (found, text) in enumerate(FENCE.findall(page.read_text()))
        if found == language
    ]


def commands() -> list[str]:
    lines = [line for block in blocks("bash") for line in block.values[0].splitlines()]
    lines += [command for page in PAGES for command in INLINE.findall(page.read_text())]
    return sorted({line for line in lines if line and not line.startswith("#")} - RUN_ELSEWHERE)


def execute(text: str) -> dict[str, object]:
    names: dict[str, object] = {"__name__": __name__}
    file = f"a documentation block, {hash(text)}"
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file  # convert reads code
    exec(compile(text, file, "exec", dont_inherit=True), names)
    return names


@pytest.mark.parametrize("text", blocks("python"))
def test_code_blocks_run(text):
    execute(text)


def test_the_method_in_contributing_obeys_the_first_law():
    names = execute(FENCE.findall((ROOT / "CONTRIBUTING.md").read_text())[0][1])
    power = names["Power"]()
    assert isinstance(power, Method)
    split = random_case((2, 3), (2,), mean=1.0, seed=0)
    joined = split._replace(inputs=[torch.cat(split.inputs)], cotangents=[torch.cat(split.cotangents)])
    ranks = run_threads(2, answer_on_rank, split, Recipe(method=power, policy=AllReduce()))
    alone = run_threads(1, answer_on_rank, joined, Recipe(method=power, policy=Local()))[0]
    for name in ("y", "dx", "ddx"):
        torch.testing.assert_close(torch.cat([getattr(each, name) for each in ranks]), getattr(alone, name))


def test_the_method_with_state_in_contributing_obeys_the_first_law_and_folds():
    names = execute(FENCE.findall((ROOT / "CONTRIBUTING.md").read_text())[1][1])
    recipe = Recipe(method=names["Leveled"](), policy=AllReduce())
    inputs = [torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(step)) for step in range(3)]

    def run(rank: int, ranks: int) -> torch.nn.Module:
        torch_model = torch.nn.Sequential(torch.nn.Conv1d(3, 3, 1), torch.nn.BatchNorm1d(3)).double()
        for parameter in torch_model[0].parameters():
            torch.nn.init.constant_(parameter, 0.5)
        model = distnorm.convert(torch_model, recipe)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for x in inputs:
            optimizer.zero_grad()
            (model(x.double().chunk(ranks)[rank]).pow(3).sum() / 90).backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
            optimizer.step()
        return model

    (alone,) = run_threads(1, run, 1)
    for each in run_threads(2, run, 2):
        torch.testing.assert_close(each.state_dict(), alone.state_dict())
    assert (alone[1].gain != 1).all() and (alone[1].level != 1).all()
    x = inputs[0].double()
    folded = distnorm.fold(alone)
    assert type(folded[1]) is torch.nn.Identity
    torch.testing.assert_close(folded(x), alone.eval()(x))


def test_the_policy_in_contributing_shares_the_layers_it_names():
    names = execute(FENCE.findall((ROOT / "CONTRIBUTING.md").read_text())[2][1])
    policy = names["OnlyNamed"](part="1")
    assert isinstance(policy, Policy)

    def run(rank: int) -> dict[str, int]:
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2))
        distnorm.convert(model, Recipe(method=BatchNorm(), policy=policy))
        with distnorm.Ledger(model) as ledger:
            model(torch.tensor([[0.0, 1.0], [float(rank), 3.0]])).sum().backward()
        return {name: tally.collectives for name, tally in ledger.layers.items()}

    assert run_threads(2, run) == [{"1": 2}] * 2


@pytest.mark.parametrize("script", ["docs/generate.py", "benchmarks/recipes_picture.py"])
def test_generated_parts_are_current(script):
    subprocess.run([sys.executable, script, "--check"], cwd=ROOT, check=True, timeout=60)


def test_everything_public_is_in_the_reference():
    page = (ROOT / "docs" / "reference.md").read_text()
    names = {f"{package.__name__}.{name}" for package in PACKAGES for name in package.__all__}
    names -= {f"distnorm.{name}" for name in ("methods", "nn", "policies", "recipes")}  # rooms, not objects
    names -= {f"distnorm.DistNorm{dims}d" for dims in (1, 2, 3)}  # older names of DistBatchNorm
    assert names <= set(re.findall(r"^### (\S+)$", page, re.MULTILINE))


def test_every_setting_is_listed():
    page = (ROOT / "docs" / "settings.md").read_text()
    words = set(re.findall(r"`([\w-]+)`", page))
    keys = {each.name for each in fields(settings.Settings)} - {"source", "required"}
    assert {*validation.VARIABLES, *keys, *(f"--{key.replace('_', '-')}" for key in keys)} <= words


FIGURE = re.compile(r"[+−]?\d+\.\d+(?: ± \d+\.\d+| \[[\d., ]+\])?")


def test_figures_are_those_of_the_pages_they_come_from():
    """In each row of the table, and each point of the list, of which recipe to take."""
    page = (ROOT / "docs" / "which-recipe.md").read_text().partition("## What each costs")[0]
    parts = [part for part in re.split(r"\n(?=\||\* |## )", page) if FIGURE.search(part)]
    assert len(parts) > 10
    for part in parts:
        named = [target for target, _ in LINK.findall(part) if target.endswith(".md")]
        text = re.sub(r"\s+", " ", " ".join((ROOT / "docs" / each).read_text() for each in named)).replace("**", "")
        figures = FIGURE.findall(re.sub(r"\s+", " ", part))
        missing = [each for each in figures if not re.search(rf"(?<![\d.]){re.escape(each)}(?!\d)", text)]
        assert not missing, f"{part}: not in {named}: {missing}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_files_that_pages_name_exist():
    """Between backticks, with a folder or without; of any folder, since pages say kernels/dense.py or dense.py."""
    folders = ("benchmarks", "distnorm", "docs", "examples", "tests")
    there = [path.as_posix() for folder in folders for path in (ROOT / folder).rglob("*.[pch]*")]
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for name in set(re.findall(r"`([\w/]+\.(?:py|c|h))`", text)) - NOT_OURS:
            assert any(path.endswith(f"/{name}") for path in there), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(page.read_text()):
        there = page.parent / target
        assert there.exists(), target
        headings = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, f"{target}#{anchor}"


def literals() -> list[str]:
    """Texts in the package, with … where values are put in."""
    trees = [ast.parse(path.read_text()) for path in sorted((ROOT / "distnorm").rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    parts = [node.values if isinstance(node, ast.JoinedStr) else [node] for node in nodes]
    return [
        "".join(str(each.value) if isinstance(each, ast.Constant) else "…" for each in each_text)
        for each_text in parts
        if all(isinstance(each, ast.Constant | ast.FormattedValue) for each in each_text)
    ]


def test_quoted_errors_are_those_of_the_source():
    quoted = [text.strip() for language, text in FENCE.findall(TROUBLES.read_text()) if language == "text"]
    assert len(quoted) > 30
    known = literals()
    for text in quoted:
        pieces = [piece.strip() for piece in text.split("…") if len(piece.strip()) > 3]
        assert sum(map(len, pieces)) > 15, f"too little of {text!r} is fixed"
        missing = [piece for piece in pieces if not any(piece in literal for literal in known)]
        assert not missing, text


@pytest.mark.parametrize("text", blocks("py"))
def test_excerpts_name_what_there_is(text):
    """They do not run by themselves. That is no excuse for naming what does not exist."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            for name in filter(lambda name: name.split(".")[0] == "distnorm", names):
                path = ROOT.joinpath(*name.split("."))
                source = path.with_suffix(".py") if path.with_suffix(".py").exists() else path / "__init__.py"
                imported = [each.name for each in node.names] if isinstance(node, ast.ImportFrom) else []
                for each in filter(lambda each: not path.joinpath(f"{each}.py").exists(), imported):
                    assert re.search(rf"^(class|def) {each}\b", source.read_text(), re.MULTILINE), f"{name}.{each}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "distnorm":
            assert hasattr(distnorm, node.attr) or (ROOT / "distnorm" / node.attr).exists(), node.attr


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_commands_work(command):
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": str(ROOT / ".venv"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]


def test_every_row_of_what_works_has_its_test() -> None:
    """By file and name; a row without one says so."""
    page = (ROOT / "docs" / "compatibility.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| situation")]
    assert len(rows) > 50
    for row in rows:
        found = re.search(r"`([\w/]+\.py)::(test_\w+)` \|$", row)
        if found is None:
            assert row.endswith("| none: a limit |"), row
            continue
        assert f"def {found[2]}(" in (ROOT / "tests" / found[1]).read_text(), row
