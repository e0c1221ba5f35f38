"""Both ways into a window: in C, and in torch, which GPUs take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distnorm.policies import moving, stale_mix


@pytest.fixture(scope="module", params=["compiled", "torch"])
def entries(request: pytest.FixtureRequest) -> Iterator[None]:
    """Policies that remember steps do their arithmetic in C, or in torch."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            for module in (moving, stale_mix):
                patch.setattr(module, "library", lambda: None)
        yield
