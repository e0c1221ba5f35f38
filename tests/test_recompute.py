"""Which first forward a recomputation repeats."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from distnorm.recompute import Record, Records


def several(*, held: bool, device: str = "cpu") -> tuple[Records, list[Record]]:
    """Three forwards; that with sums 10 k was given 100 + k."""
    known = [
        Record(torch.full((3,), 10.0 * k, device=device), torch.full((3,), 100.0 + k, device=device), 4, held=held)
        for k in range(3)
    ]
    records = Records()
    for each in known:
        records.note(each)
    return records, known


def sums(value: float) -> Tensor:
    return torch.full((3,), value)


def test_nothing_to_recall() -> None:
    assert Records().recall(sums(0.0)) is None


def test_the_only_one() -> None:
    records, record = Records(), Record(sums(1.0), sums(2.0), 0, held=True)
    records.note(record)
    assert records.recall(sums(50.0)) is record


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("k", range(3))
def test_the_nearest_of_several(held: bool, k: int) -> None:
    records, _ = several(held=held)
    found = records.recall(sums(10.0 * k + 3))
    assert found.held is held and found.step == 4
    torch.testing.assert_close(found.shared, sums(100.0 + k), rtol=0, atol=0)


@pytest.mark.parametrize("k", range(4))
def test_held_ones_among_others(k: int) -> None:
    """The caller is told which kind it is."""
    records, _ = several(held=True)
    records.note(Record(sums(30.0), sums(103.0), 4, held=False))
    found = records.recall(sums(10.0 * k))
    assert found.held is (k < 3)
    torch.testing.assert_close(found.shared, sums(100.0 + k), rtol=0, atol=0)


def test_what_was_recalled_keeps_its_origin() -> None:
    """A graph that was recomputed may be recomputed again, though the first one is gone."""
    records, known = several(held=True)
    found = records.recall(sums(10.0))
    del known
    gc.collect()
    torch.testing.assert_close(records.recall(sums(10.0)).shared, sums(101.0), rtol=0, atol=0)
    del found
    gc.collect()
    assert records.recall(sums(10.0)) is None


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("held", [False, True])
def test_a_gpu_is_not_waited_for(fake: None, held: bool) -> None:
    """Fake tensors have no values to wait for."""
    records, _ = several(held=held, device="cuda")
    local = torch.zeros(3, device="cuda")
    found = records.recall(local)
    assert found.shared.is_cuda and found.shared.shape == (3,)
    with pytest.raises(DataDependentOutputException):
        local.argmin().item()
