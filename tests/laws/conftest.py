"""The laws hold for distnorm's own kernels, at sizes for which layers that share nothing would use torch's."""

from __future__ import annotations

import pytest

from distnorm.kernels import stock


@pytest.fixture(autouse=True)
def _own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stock, "FEW_VALUES", 0)
