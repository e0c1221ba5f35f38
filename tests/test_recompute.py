"""Which first forward a recomputation repeats."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from distnorm.autograd.recompute import Record, Records


def several(*, in_graph: bool, device: str = "cpu") -> tuple[Records, list[Record]]:
    """Three forwards of two values; that with squares 10 (k + 1) was given 100 + k."""
    known = [
        Record(sums(10.0 * (k + 1), device), torch.full((3,), 100.0 + k, device=device), 4, in_graph=in_graph)
        for k in range(3)
    ]
    records = Records()
    for each in known:
        records.note(each)
    return records, known


def sums(square: float, device: str = "cpu") -> Tensor:
    return torch.tensor([1.0, square, 2.0], device=device)


def test_nothing_to_recall() -> None:
    assert Records().recall(sums(1.0), 2) is None


def test_the_only_one() -> None:
    records, record = Records(), Record(sums(50.0), sums(2.0), 0, in_graph=True)
    records.note(record)
    assert records.recall(sums(50.1), 2) is record


@pytest.mark.parametrize(
    "other",
    [[1.0, 51.0, 2.0], [1.2, 50.0, 2.0], [1.0, 50.0, 3.0], [float("nan"), 50.0, 2.0], [1.0, float("inf"), 2.0]],
    ids=["squares", "sums", "count", "nan", "inf"],
)
def test_other_values_are_a_new_forward(other: list[float]) -> None:
    records, record = Records(), Record(sums(50.0), sums(2.0), 0, in_graph=True)
    records.note(record)
    assert records.recall(torch.tensor(other), 2) is None


def test_scales_do_not_matter() -> None:
    """Sums of tiny values about 0 differ by rounding from one run to the next."""
    records, record = Records(), Record(torch.tensor([1e-12, 1e-10, 8.0]), sums(2.0), 0, in_graph=True)
    records.note(record)
    assert records.recall(torch.tensor([-1e-12, 1e-10, 8.0]), 2) is record


def test_values_that_are_not_finite_repeat_too() -> None:
    records, _ = several(in_graph=True)
    broken = Record(torch.tensor([float("nan"), float("inf"), 2.0]), torch.full((3,), 7.0), 4, in_graph=True)
    records.note(broken)
    assert records.recall(broken.local.clone(), 2) is broken
    torch.testing.assert_close(records.recall(sums(20.0), 2).shared, torch.full((3,), 101.0), rtol=0, atol=0)


def test_nothing_repeats_nothing() -> None:
    records, record = Records(), Record(torch.zeros(3), torch.zeros(3), 0, in_graph=True)
    records.note(record)
    assert records.recall(torch.zeros(3), 2) is record


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("k", range(3))
def test_the_nearest_of_several(in_graph: bool, k: int) -> None:
    records, _ = several(in_graph=in_graph)
    found = records.recall(sums(10.0 * (k + 1) + 0.05), 2)
    assert found.in_graph is in_graph and found.step == 4
    torch.testing.assert_close(found.shared, torch.full((3,), 100.0 + k), rtol=0, atol=0)


@pytest.mark.parametrize("k", range(4))
def test_records_in_a_graph_among_others(k: int) -> None:
    """The caller is told which kind it is."""
    records, _ = several(in_graph=True)
    records.note(Record(sums(40.0), torch.full((3,), 103.0), 4, in_graph=False))
    found = records.recall(sums(10.0 * (k + 1)), 2)
    assert found.in_graph is (k < 3)
    torch.testing.assert_close(found.shared, torch.full((3,), 100.0 + k), rtol=0, atol=0)


def test_what_was_recalled_keeps_its_origin() -> None:
    """A graph that was recomputed may be recomputed again, though the first one is gone."""
    records, known = several(in_graph=True)
    found = records.recall(sums(20.0), 2)
    del known
    gc.collect()
    torch.testing.assert_close(records.recall(sums(20.0), 2).shared, torch.full((3,), 101.0), rtol=0, atol=0)
    del found
    gc.collect()
    assert records.recall(sums(20.0), 2) is None


@pytest.fixture
def fake() -> Iterator[None]:
    with FakeTensorMode():
        yield


@pytest.mark.parametrize("in_graph", [False, True])
def test_a_gpu_is_not_waited_for(fake: None, in_graph: bool) -> None:
    """Fake tensors have no values to wait for."""
    records, _ = several(in_graph=in_graph, device="cuda")
    local = torch.zeros(3, device="cuda")
    found = records.recall(local, 2)
    assert found.shared.is_cuda and found.shared.shape == (3,)
    with pytest.raises(DataDependentOutputException):
        local.argmin().item()
