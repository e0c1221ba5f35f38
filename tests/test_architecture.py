"""docs/architecture.md keeps to the code: rooms, arrows, calls, words and paths are there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "distnorm"
PAGE = (ROOT / "docs" / "architecture.md").read_text()
FLOORS, *WAYS = re.findall(r"^```mermaid\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
ROOMS = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
ROOMS -= {"__init__"}


def arrows() -> list[tuple[str, str]]:
    return re.findall(r"^\s*(\w+) --> (\w+)$", FLOORS, re.MULTILINE)


def calls(way: str) -> list[tuple[str, str, str]]:
    files = dict(re.findall(r"participant (\w+) as (\S+)", way))
    return [(files[a], files[b], name) for a, b, name in re.findall(r"(\w+)->>(\w+): (\w+)\(", way)]


def section(title: str) -> str:
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def imports(room: str) -> set[str]:
    """The rooms that ``room`` imports, anywhere in its files."""
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else (PACKAGE / room).rglob("*.py")
    text = "\n".join(path.read_text() for path in files)
    found = set(re.findall(r"^\s*(?:from|import) distnorm\.(\w+)", text, re.MULTILINE))
    for names in re.findall(r"^\s*from distnorm import (.*)$", text, re.MULTILINE):
        found |= set(re.findall(r"\w+", names))
    return found


def test_every_room_is_named():
    assert {name for arrow in arrows() for name in arrow} == ROOMS
    assert set(re.findall(r"^\| `distnorm/(\w+?)(?:\.py|/)` \|", section("The floors"), re.MULTILINE)) == ROOMS


def test_rooms_are_listed_from_the_top_down():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    floors = settings["tool"]["importlinter"]["contracts"][0]["layers"]
    height = {room: -floor for floor, rooms in enumerate(floors) for room in re.findall(r"\w+", rooms)}
    assert set(height) == ROOMS
    assert all(height[above] > height[below] for above, below in arrows())


@pytest.mark.parametrize("arrow", arrows(), ids=" to ".join)
def test_every_arrow_is_an_import(arrow):
    above, below = arrow
    assert below in imports(above)


@pytest.mark.parametrize("call", [call for way in WAYS for call in calls(way)], ids=lambda call: " ".join(call))
def test_every_message_is_a_call(call):
    caller, called, name = call
    assert re.search(rf"\b{name}\(", (PACKAGE / caller).read_text())
    assert re.search(rf"def {name}\(", (PACKAGE / called).read_text())


def test_both_ways_are_drawn():
    exact, moving = map(calls, WAYS)
    assert ("policies/all_reduce.py", "transport/group.py", "sum") in exact
    assert ("policies/bucket.py", "transport/group.py", "sum_async") in moving


def test_paths_exist():
    missing = [
        path for path in re.findall(r"`((?:\w+/)+[\w.]*|[\w-]+\.(?:yml|toml))`", PAGE) if not (ROOT / path).exists()
    ]
    assert not missing


def test_words_are_explained_once():
    words = [
        word for cell in re.findall(r"^\| ([^|]*) \|", section("Words"), re.MULTILINE) for word in cell.split(", ")
    ]
    assert len(words) == len(set(words)) > 30


def test_there_is_much_to_add():
    assert len(re.findall(r"^\| an? ", section("To add something"), re.MULTILINE)) >= 10


def questions() -> list[tuple[str, str]]:
    """What CONTRIBUTING.md asks a stranger, and where or what the answer is."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.findall(r"^\d+\. (.*?\?)\n +\*(.*?)\*$", text, re.DOTALL | re.MULTILINE)


def test_a_stranger_finds_every_answer_on_this_page():
    where = [answer for question, answer in questions() if question.startswith("Where")]
    what = [question for question, _ in questions() if question.startswith("What")]
    assert (len(where), len(what)) == (6, 2)
    for answer in where:
        paths = re.findall(r"`(distnorm[^`]+)`", answer)
        assert paths and all((ROOT / path).exists() and path in PAGE for path in paths), answer
    for question in what:
        word = re.search(r"`([^`]+)`", question)[1]
        assert re.search(rf"^\| (?:[^|]*, )?{word}(?:, [^|]*)? \|", section("Words"), re.MULTILINE), word
