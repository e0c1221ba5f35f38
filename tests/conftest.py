"""The pool of gloo processes, the profile of the property tests, and what to do where a package is missing.

Tests marked gpu need torch, Triton and pytest, nothing else.
docs/decisions.md#test-files-run-whole-in-two-processes
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from importlib.util import find_spec

import pytest

from tests.support.pool import Pool

NOT_EVERYWHERE = (
    *("PIL", "accelerate", "deepspeed", "hypothesis", "lightning", "matplotlib", "mpi4py", "scipy", "sklearn", "tqdm"),
    *("transformers", "triton", "yaml"),
)
"""Modules of tests that import one of these are skipped where it is missing."""

if find_spec("hypothesis") is not None:
    from hypothesis import settings

    for profile, max_examples in (("quick", 8), ("thorough", 25)):
        settings.register_profile(profile, deadline=None, max_examples=max_examples, derandomize=True)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """pyproject.toml sets what pytest-timeout reads."""
    if not pluginmanager.hasplugin("timeout"):
        parser.addini("timeout", "seconds per test, which nothing enforces without pytest-timeout")


def pytest_configure(config: pytest.Config) -> None:
    """Without ``-m gpu``, kernels for GPUs run in Triton's interpreter: a choice made before Triton is imported."""
    if find_spec("hypothesis") is not None:
        settings.load_profile("quick" if "not slow" in config.option.markexpr else "thorough")
    if config.option.markexpr != "gpu":
        os.environ["TRITON_INTERPRET"] = "1"
    if not config.pluginmanager.hasplugin("timeout"):
        config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Skip a module of tests that imports what is not everywhere, or a helper that does."""
    report = yield
    missing = re.search(r"^E +ModuleNotFoundError: No module named '(\w+)", report.longreprtext, re.MULTILINE)
    if report.failed and missing is not None and missing[1] in NOT_EVERYWHERE:
        report.outcome = "skipped"
        report.longrepr = (str(collector.path), 0, f"Skipped: needs {missing[1]}, which is not installed")
    return report


@pytest.fixture(scope="session")
def pool(pytestconfig: pytest.Config) -> Iterator[Pool]:
    """Gloo processes that live as long as the session and turn warnings into errors as this process does."""
    with Pool(warning_filters=pytestconfig.getini("filterwarnings")) as started:
        yield started
