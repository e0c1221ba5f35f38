"""How many Python functions a layer calls in a step beyond those of stock: exact bounds, so that none creeps in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import tiny

from distnorm.policies import Facts

# Another torch calls other functions of its own.
pytestmark = pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="counted with torch 2.13")


@pytest.mark.parametrize(("recipe", "forward", "backward"), [("local_bn", 38, 22), ("sync_bn", 38, 22)])
def test_a_layer_that_shares_nothing(recipe: str, forward: int, backward: int) -> None:
    found = tiny.beyond_stock(recipe)
    assert found[0] <= forward and found[1] <= backward


def test_from_a_layer_to_its_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """As among several ranks, without the functions of a transport."""
    along = Facts.along
    monkeypatch.setattr(Facts, "along", lambda facts, routes, alone: along(facts, routes))
    forward, backward = tiny.beyond_stock("sync_bn")
    assert forward <= 50 and backward <= 53, (forward, backward)
