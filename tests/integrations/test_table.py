"""docs/integrations.md says what jobs of 2 processes say: all rows with 'make test-all', three of them always.

The other rows' launchers and frameworks have fast tests of their own, with the same reference.
"""

from __future__ import annotations

import pytest

from tests.integrations import table
from tests.integrations.table import BF16, RECIPES, ROWS, Measured, Row

NUMBERS = ("final_loss", "running_mean", "running_var")


@pytest.fixture(scope="module")
def reference() -> Measured:
    return table.one_process()


def assert_as_committed(cells: list[str], found: Measured) -> None:
    """But for the last digits, which other machines round differently."""
    for text, name in zip(cells, NUMBERS, strict=False):
        assert float(text) == pytest.approx(getattr(found, name), abs=2e-3)
    assert cells[4] == ("" if found.collectives is None else f"{found.collectives:g}")


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_sync_bn_trains_as_one_process_on_the_joined_batch(row: Row, reference: Measured) -> None:
    found = table.measure(row, "sync_bn")
    assert found.processes == 2
    assert len(found.losses) == 20
    assert table.difference(found, reference) <= 1e-5
    for name in NUMBERS:
        assert getattr(found, name) == pytest.approx(getattr(reference, name), abs=1e-3)
    assert_as_committed(table.read("float32")[row.name, "sync_bn"], found)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_moving_statistics_train_alike_everywhere(row: Row) -> None:
    """All rows of the committed table have the same figures, so this compares with one another, too."""
    (recipe,) = RECIPES[1:]
    found = table.measure(row, recipe)
    assert found.processes == 2
    assert_as_committed(table.read("float32")[row.name, recipe], found)


@pytest.mark.slow
@pytest.mark.parametrize("row", BF16, ids=lambda row: row.name)
def test_bfloat16(row: Row, reference: Measured) -> None:
    found = table.measure(row, "sync_bn")
    assert found.processes == 2
    assert table.difference(found, reference) <= 0.1
    committed = table.read("bfloat16")[row.name, "sync_bn"]
    assert float(committed[0]) == pytest.approx(found.final_loss, abs=0.05)


def test_the_committed_tables_are_whole() -> None:
    committed = table.read("float32")
    assert list(committed) == [(row.name, recipe) for recipe in RECIPES for row in ROWS]
    assert list(table.read("bfloat16")) == [(row.name, "sync_bn") for row in BF16]
    for (name, recipe), cells in committed.items():
        first = committed[ROWS[0].name, recipe]
        for one, other in zip(cells[:3], first[:3], strict=True):
            assert float(one) == pytest.approx(float(other), abs=1e-3), name
        if recipe == "sync_bn":
            assert float(cells[3]) <= 1e-5
