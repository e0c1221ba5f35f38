"""docs/decisions.md and the code agree: pointers lead to records, and records name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "decisions.md").read_text()
RECORDS = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", TEXT, re.DOTALL | re.MULTILINE))
PARTS = ["**Context.**", "**Decision.**", "**Consequence.**"]
POINTER = re.compile(r"docs/decisions\.md#([\w-]+)")
PATH = re.compile(r"\b(?:distnorm|tests|benchmarks)/[\w/.]+\w(?:::\w+)?|\b[\w/]+\.py\b")
OF_OTHERS = {"zero_to_fp32.py"}  # DeepSpeed's


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def pointers(folder: str) -> set[str]:
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".c", ".h")]
    return {found for path in files for found in POINTER.findall(path.read_text())}


def test_pointers_lead_to_records() -> None:
    assert pointers("distnorm") | pointers("tests") <= set(map(anchor, RECORDS))


def test_every_record_has_code_that_rests_on_it() -> None:
    assert set(map(anchor, RECORDS)) <= pointers("distnorm") | pointers("tests")


def test_headings_have_anchors_of_their_own() -> None:
    headings = re.findall(r"^### (.+)", TEXT, re.MULTILINE)
    assert len(set(map(anchor, headings))) == len(headings) > 50


@pytest.mark.parametrize("heading", RECORDS)
def test_records_say_context_decision_and_consequence(heading: str) -> None:
    assert re.findall(r"^\*\*\w+\.\*\*", RECORDS[heading], re.MULTILINE) == PARTS


def test_records_name_modules_and_tests_that_exist() -> None:
    named = [name for name in PATH.findall(TEXT) if name not in OF_OTHERS]
    assert len(named) > 10
    for name in named:
        file, _, test = name.partition("::")
        assert (ROOT / file).exists(), name
        assert not test or f"def {test}(" in (ROOT / file).read_text(), name
