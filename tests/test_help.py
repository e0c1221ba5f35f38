"""Help fits a screen, begins with an example, and its examples have options that there are."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import distnorm.run
from distnorm.cli import main as cli


@pytest.fixture(autouse=True)
def _screen(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")


def help_of(words, capsys) -> str:
    run, arguments = (distnorm.run.main, []) if words[:1] == ["run"] else (cli.main, words)
    try:
        run([*arguments, "--help"])
    except SystemExit as stopped:
        assert stopped.code == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def commands(capsys) -> list[str]:
    return re.findall(r"^    (\w+)  ", help_of([], capsys), re.MULTILINE)


SCREENS = ["", "recipes", "launch", "config", "bench", "plan", "run"]


def test_all_commands_are_looked_at(capsys):
    assert [*commands(capsys), "run"] == SCREENS[1:]


@pytest.mark.parametrize("name", SCREENS)
def test_it_fits_a_screen(name, capsys):
    lines = help_of([name] if name else [], capsys).splitlines()
    assert len(lines) <= 50
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize("name", SCREENS)
def test_an_example_comes_first(name, capsys):
    usage, empty, example = help_of([name] if name else [], capsys).splitlines()[:3]
    assert usage.startswith("usage: ") and not empty
    assert re.match(r"  (?=\S).*distnorm", example)


@pytest.mark.parametrize("name", SCREENS)
def test_examples_have_options_that_there_are(name, capsys):
    for line in re.findall(r"^  (\S.*)$", help_of([name] if name else [], capsys).split("\noptions:")[0], re.MULTILINE):
        command = re.search(r"distnorm(?:\.(run)| (\w+))(.*?)(?: train\.py.*)?$", line)
        if command is not None:
            text = help_of([command[1] or command[2]], capsys)
            for option in re.findall(r"--[\w-]+", command[3]):
                assert f"\n  {option} " in text or name in ("", "launch"), line


@pytest.mark.parametrize("module", ["distnorm", "distnorm.run"])
def test_as_a_process(module):
    shown = subprocess.run([sys.executable, "-m", module, "--help"], capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0
    assert shown.stdout.startswith("usage: ") and not shown.stderr
