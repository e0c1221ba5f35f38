"""Trees of functions: the definition that was compiled, in any number of threads."""

from __future__ import annotations

import ast
import functools
import gc
import inspect
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType
from typing import Any

import pytest
from torch import nn

from distnorm.compat.source_code import parse, source_of


def kept(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


class One:
    def method(self) -> int:
        return 1


class Two:
    @kept
    @functools.cache  # noqa: B019
    def cached(self) -> int:
        return 3

    @kept
    def method(self) -> int:
        return 2


@pytest.mark.parametrize(("cls", "value"), [(One, 1), (Two, 2)])
def test_the_definition_is_the_one_that_was_compiled(cls: type, value: int) -> None:
    source = source_of(vars(cls)["method"])
    assert source is not None and ast.unparse(source.definition.body[-1]) == f"return {value}"


def test_what_was_made_at_run_time_has_none() -> None:
    names: dict[str, Any] = {}
    exec("def made(x): return x", names)
    assert isinstance(names["made"], FunctionType) and source_of(names["made"]) is None


@pytest.fixture
def collecting() -> Iterator[None]:
    """Garbage collection, which may come while a tree is made, gives way to other threads, as finalizers may."""

    def give_way(*_: object) -> None:
        time.sleep(0)

    gc.callbacks.append(give_way)
    yield
    gc.callbacks.remove(give_way)


@pytest.mark.usefixtures("collecting")
def test_threads_parse_at_the_same_time() -> None:
    text = inspect.getsource(inspect.getmodule(nn.Module))  # type: ignore[arg-type]
    with ThreadPoolExecutor(4) as pool:
        trees = list(pool.map(parse, [text] * 12))
    assert {type(each) for each in trees} == {ast.Module}
