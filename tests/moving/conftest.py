"""All ways into a window: in C, in torch, and in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from threading import Lock

import pytest

from distnorm.kernels import windows
from tests.support.interpreter import INTERPRETED

# The interpreter takes its time; tests/moving/test_entries_gpu.py always runs.
MISSING = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is made for Linux only")
TRITON = MISSING, pytest.mark.slow, *INTERPRETED


@pytest.fixture(scope="module", params=["compiled", "torch", pytest.param("triton", marks=TRITON)])
def entries(request: pytest.FixtureRequest) -> Iterator[None]:
    """Policies that remember steps do their arithmetic in C, in torch or in Triton."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(windows, "library", lambda: None)
        if request.param == "triton":
            interpret(patch)
        yield


def interpret(patch: pytest.MonkeyPatch) -> None:
    """CPU tensors enter windows by Triton's interpreter, which is one for all threads."""
    from distnorm.kernels.gpu import entries as operators

    real, alone = operators.launch, Lock()

    def launch(*arguments: object) -> None:
        with alone:
            real(*arguments)

    patch.setattr(operators, "launch", launch)
    patch.setattr(windows, "in_triton", lambda values, outbox: True)
