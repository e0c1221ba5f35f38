"""The pool of gloo processes and the profile of the property tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.support.pool import Pool

settings.register_profile("distnorm", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("distnorm")


@pytest.fixture(scope="session")
def pool(pytestconfig: pytest.Config) -> Iterator[Pool]:
    """Gloo processes that live as long as the session and turn warnings into errors as this process does."""
    with Pool(warning_filters=pytestconfig.getini("filterwarnings")) as started:
        yield started
