"""What a future promises, whoever carries the sum: one outcome, and waits that go on where they were cut short."""

from __future__ import annotations

import gc
from weakref import ref

import pytest
import torch

from distnorm.types import Future

SUM = torch.ones(3)


def test_a_sum_is_waited_for_once() -> None:
    waits = iter([SUM])
    future = Future(lambda: next(waits))
    assert not future.done()
    assert future.wait() is future.wait() is SUM
    assert future.done()


def test_an_error_that_ends_the_sum_is_that_of_every_wait() -> None:
    error = RuntimeError("ranks share different layers")
    outcomes = iter([error])
    future = Future(lambda: next(outcomes))
    for _ in range(2):
        with pytest.raises(RuntimeError) as raised:
            future.wait()
        assert raised.value is error and future.done()


@pytest.mark.parametrize("cut", [RuntimeError("did not take part within 1 s"), KeyboardInterrupt()], ids=repr)
def test_a_wait_that_was_cut_short_goes_on(cut: BaseException) -> None:
    left: list[BaseException] = [cut, cut]

    def finish() -> torch.Tensor:
        if left:
            raise left.pop()
        return SUM

    future = Future(finish)
    for _ in range(2):
        with pytest.raises(type(cut)):
            future.wait()
        assert not future.done()
    assert future.wait() is SUM


def test_done_asks_and_does_not_wait() -> None:
    told = iter([False, True])
    future = Future(lambda: pytest.fail("it waited"), lambda: next(told))
    assert [future.done(), future.done()] == [False, True]
    assert Future.completed(SUM).done() and Future.completed(SUM).wait() is SUM


def test_memory_that_only_the_wait_needs_is_freed_after_it() -> None:
    buffer = torch.ones(3)
    alive = ref(buffer)
    future = Future(lambda kept=buffer: kept + 1)  # type: ignore[misc]
    del buffer
    assert alive() is not None
    assert future.wait().tolist() == [2.0] * 3
    gc.collect()
    assert alive() is None
