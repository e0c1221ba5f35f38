"""README and docs keep their word: code blocks run, commands work, generated tables are current, links lead on."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import distnorm
from distnorm import Recipe
from distnorm.methods import BatchNorm, Method
from distnorm.policies import AllReduce, Local, Policy
from tests.laws.ranks import answer_on_rank, random_case
from tests.support.threads import run_threads

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`(make [\w-]+|distnorm \w+)`")
LINK = re.compile(r"\]\(([^)#:]+)\)")

# Commands that this very run is, or contains.
RUN_ELSEWHERE = {"make test", "make test-all"}


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
    exec(compile(text, "a documentation block", "exec", dont_inherit=True), names)
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


def test_the_policy_in_contributing_shares_the_layers_it_names():
    names = execute(FENCE.findall((ROOT / "CONTRIBUTING.md").read_text())[1][1])
    policy = names["OnlyNamed"](part="1")
    assert isinstance(policy, Policy)

    def run(rank: int) -> dict[str, int]:
        model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2))
        distnorm.convert(model, Recipe(method=BatchNorm(), policy=policy))
        with distnorm.Ledger(model) as ledger:
            model(torch.tensor([[0.0, 1.0], [float(rank), 3.0]])).sum().backward()
        return {name: tally.collectives for name, tally in ledger.layers.items()}

    assert run_threads(2, run) == [{"1": 2}] * 2


def test_generated_tables_are_current():
    subprocess.run([sys.executable, "docs/generate.py", "--check"], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    missing = [target for target in LINK.findall(page.read_text()) if not (page.parent / target).exists()]
    assert not missing


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", commands())
def test_commands_work(command):
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin:/bin"
    environment = {"PATH": path, "HOME": str(ROOT / ".venv"), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        shlex.split(command), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
