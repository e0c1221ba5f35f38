"""Callbacks come with real imports, and with nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from distnorm.integrations.import_hook import when_imported


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    folder = tmp_path / "watched"
    folder.mkdir()
    (folder / "__init__.py").write_text("from watched.part import VALUE\nDONE = True\n")
    (folder / "part.py").write_text("VALUE = 3\n")
    (folder / "breaks.py").write_text("import os\nif 'LET_IT' not in os.environ: raise ValueError('broken')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    importlib.invalidate_caches()
    yield "watched"
    for name in [name for name in sys.modules if name.partition(".")[0] == "watched"]:
        del sys.modules[name]


def test_a_callback_gets_the_finished_module_once(package: str) -> None:
    seen: list[object] = []
    when_imported(package, lambda module: seen.append((module, module.DONE)))
    assert not seen
    module = importlib.import_module(package)
    importlib.import_module(package)
    assert seen == [(module, True)]


def test_the_importing_statement_sees_what_the_callback_did(package: str) -> None:
    when_imported("watched.part", lambda module: setattr(module, "VALUE", 4))
    assert importlib.import_module(package).VALUE == 4


def test_now_if_it_is_imported_already(package: str) -> None:
    module = importlib.import_module(package)
    seen: list[ModuleType] = []
    when_imported(package, seen.append)
    assert seen == [module]


def test_looking_for_a_module_is_no_import(package: str) -> None:
    seen: list[ModuleType] = []
    when_imported(package, seen.append)
    spec = importlib.util.find_spec(package)
    assert spec is not None and not seen and package not in sys.modules
    assert type(spec.loader).__name__ == "SourceFileLoader"
    assert seen == [importlib.import_module(package)]


def test_looking_for_a_module_that_is_missing_finds_none() -> None:
    when_imported("watched_nowhere", pytest.fail)
    assert importlib.util.find_spec("watched_nowhere") is None
    with pytest.raises(ModuleNotFoundError, match="watched_nowhere"):
        importlib.import_module("watched_nowhere")


def test_several_callbacks_run_in_order_and_submodules_apart(package: str) -> None:
    order: list[str] = []
    when_imported(package, lambda _: order.append("first"))
    when_imported(package, lambda _: order.append("second"))
    when_imported("watched.part", lambda _: order.append("part"))
    importlib.import_module("watched.part")
    assert order == ["part", "first", "second"]


def test_an_import_that_fails_does_not_count(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ModuleType] = []
    when_imported("watched.breaks", seen.append)
    with pytest.raises(ValueError, match="broken"):
        importlib.import_module("watched.breaks")
    assert not seen
    monkeypatch.setenv("LET_IT", "1")
    assert seen == [] and [importlib.import_module("watched.breaks")] == seen


def test_modules_keep_a_loader_that_reads_their_source(package: str) -> None:
    when_imported(package, lambda _: None)
    module = importlib.import_module(package)
    assert module.__loader__ is module.__spec__.loader
    assert "exec_module" not in vars(module.__loader__)
    assert importlib.reload(module) is module
