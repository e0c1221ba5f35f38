"""The example that compares every method: it names all recipes, trains them on two ranks, and draws them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import compare_methods
import pytest
from digits_report import Run
from train_digits import STOCK, train_all

from distnorm import recipes
from tests.support.pool import Pool

SOME = ["iebn", "group_norm(weights='standardized')"]


def test_every_recipe_takes_part() -> None:
    contenders = [recipes.parse(each) for each in compare_methods.CONTENDERS if each != STOCK]
    named = {each.name.partition("(")[0] for each in contenders if each.name is not None}
    assert named == {each.name for each in recipes.available()}


def some(rank: int) -> list[Run]:
    return train_all(SOME, [0], 1, 20)


@pytest.mark.slow
def test_they_train_and_are_drawn(pool: Pool, tmp_path: Path) -> None:
    runs, _ = pool.run(2, some)
    assert [run.recipe for run in runs] == SOME
    assert [len(run.curve) for run in runs] == [1, 1]
    assert runs[0].collectives > 0 and runs[1].collectives == 0
    compare_methods.draw(runs, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
