"""The fault table, row by row; the quick rows where `make test` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from tests.faults import table
from tests.faults.faults import FAULTS, RECIPES, TRANSPORTS
from tests.faults.runner import Runner


def rows() -> list[Any]:
    return [
        pytest.param(
            *(fault.name, *key),
            marks=[] if key == fault.quick else pytest.mark.slow,
            id="-".join((fault.name, *key)),
        )
        for fault in FAULTS
        for key in product(TRANSPORTS, RECIPES)
    ]


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with Runner() as started:
        yield started


@pytest.mark.parametrize(("fault", "transport", "recipe"), rows())
def test_row(runner: Runner, fault: str, transport: str, recipe: str) -> None:
    assert runner.run(fault, transport, recipe).wrong == []


def test_the_page_has_every_row_and_none_that_is_wrong() -> None:
    page = table.PAGE.read_text()
    assert page.count("| shm |") == page.count("| sockets |") == page.count("| gloo |") == len(FAULTS)
    for fault in FAULTS:
        assert f"| {fault.name} | {table.demand(fault)} | shm |" in page
    assert "**wrong**" not in page
