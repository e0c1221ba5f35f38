"""The pool of gloo processes and the profile of the property tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support.pool import Pool

settings.register_profile("distnorm", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("distnorm")


def pytest_configure(config: pytest.Config) -> None:
    """Without ``-m gpu``, kernels for GPUs run in Triton's interpreter: a choice made before Triton is imported."""
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def pool(pytestconfig: pytest.Config) -> Iterator[Pool]:
    """Gloo processes that live as long as the session and turn warnings into errors as this process does."""
    with Pool(warning_filters=pytestconfig.getini("filterwarnings")) as started:
        yield started
