"""How many Python functions a layer calls in a step beyond those of stock: exact bounds, so that none creeps in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import tiny

from distnorm.kernels import stock
from distnorm.policies import Facts

# Another torch calls other functions of its own.
pytestmark = pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="counted with torch 2.13")


@pytest.mark.parametrize("recipe", ["local_bn", "sync_bn"])
@pytest.mark.parametrize(("few", "forward", "backward"), [(stock.FEW_VALUES, 8, 0), (0, 34, 18)])
def test_a_layer_that_shares_nothing(
    recipe: str, few: int, forward: int, backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By torch's batch norm, as layers of few values have, and by the C kernels."""
    monkeypatch.setattr(stock, "FEW_VALUES", few)
    found = tiny.beyond_stock(recipe)
    assert found[0] <= forward and found[1] <= backward, found


def test_from_a_layer_to_its_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As among several ranks, without the functions of a transport."""
    along = Facts.along
    monkeypatch.setattr(Facts, "along", lambda facts, routes, alone: along(facts, routes))
    forward, backward = tiny.beyond_stock("sync_bn")
    assert forward <= 44 and backward <= 46, (forward, backward)
