"""What ranks compare before they share: all that the first broadcast takes for granted, at a cost that scales."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import distnorm
from distnorm.policies.routes import joined
from distnorm.transport.rendezvous import all_gather_text
from tests.distributed.test_failures import expect_everywhere
from tests.support.fake import EchoStore, fake_world
from tests.support.threads import run_threads, run_threads_all


def norms(**options: Any) -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, **options))


def without(name: str) -> nn.Sequential:
    model = norms()
    setattr(model[1], name, None)
    return model


def halfway() -> nn.Sequential:
    model = norms()
    model[1].running_var = model[1].running_var.to(torch.bfloat16)
    return model


ODD: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "float64": (lambda: norms().double(), "running_mean float32", "running_mean float64"),
    "one buffer": (halfway, "running_var float32", "running_var bfloat16"),
    "nothing tracked": (lambda: norms(track_running_stats=False), "running_mean float32", "no running statistics"),
    "no counter": (lambda: without("num_batches_tracked"), "num_batches_tracked int64", "running_var float32"),
    "no mean": (lambda: without("running_mean"), "running_mean float32", "running_var float32"),
    "another device": (lambda: norms().to("meta"), "on cpu", "on meta"),
}


@pytest.mark.parametrize(("build", "usual", "odd"), ODD.values(), ids=ODD)
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("recipe", ["sync_bn", "lazy_bn"])
def test_running_statistics_that_no_broadcast_could_unite(build, usual, odd, at, recipe):
    def run(rank: int) -> None:
        distnorm.attach(distnorm.convert(build() if rank == at else norms(), recipe))

    outcomes = run_threads_all(3, run, timeout=30.0)
    first, other = ("0", "1") if at == 0 else ("0", str(at))
    expect_everywhere(outcomes, RuntimeError, f"rank {other} converted another", f"than rank {first}", usual, odd)


def test_several_kinds_of_difference_name_the_first():
    def run(rank: int) -> None:
        model = [norms(), norms(), norms(eps=1.0), norms(momentum=0.5)][rank]
        distnorm.attach(distnorm.convert(model, "sync_bn"))

    expect_everywhere(run_threads_all(4, run, timeout=30.0), RuntimeError, "rank 2 converted another", "eps=1.0")


def test_equal_models_are_told_as_digests():
    """However many layers there are."""
    sizes = {}
    for layers in (1, 300):
        with fake_world(8) as store:
            distnorm.attach(distnorm.convert(nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(layers)]), "sync_bn"))
            sizes[layers] = max(map(len, store.values.values()))
    assert sizes[1] == sizes[300] < 1500


class Counting(EchoStore):
    """Counts what is read."""

    reads = 0

    def get(self, key: str) -> bytes:
        self.reads += 1
        return super().get(key)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_reads_for_all(rank, monkeypatch):
    """The others read one text each."""
    store = Counting(rank)
    monkeypatch.setattr("distnorm.transport.rendezvous._store", lambda: store)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    if rank == 1:
        monkeypatch.setattr(store, "get", lambda key: b'[["a", "b"], [0, 1, 0]]' if key.endswith("/all") else None)
        assert all_gather_text((0, 1, 2), "b", torch.distributed.default_pg_timeout) == ["a", "b", "a"]
        assert store.reads == 0
    else:
        assert all_gather_text((0, 1, 2), "a", torch.distributed.default_pg_timeout) == ["a"] * 3
        assert store.reads == 3


def test_texts_come_back_in_order():
    def run(rank: int) -> list[str]:
        return all_gather_text((0, 1, 2, 3), "é\n" * (rank % 2) + str(rank // 2), torch.distributed.default_pg_timeout)

    assert run_threads(4, run) == [["0", "é\n0", "1", "é\n1"]] * 4


@pytest.mark.parametrize("recipe", ["sync_bn", "mabn", "lazy_bn", "periodic_bn"])
def test_1024_ranks_bind_in_seconds(recipe):
    with fake_world(1024):
        model = distnorm.convert(nn.Sequential(*[nn.BatchNorm1d(3) for _ in range(50)]), recipe)
        start = time.process_time()
        distnorm.attach(model)
        assert time.process_time() - start < 15  # the compiler of kernels' imports included; 0.1 to 0.6 s without


def test_who_is_joined_among_many_ranks():
    """Blocks of 8, then those of equal place in them: everybody once."""
    ranks = range(256)
    routes = {
        rank: (tuple(range(rank - rank % 8, rank - rank % 8 + 8)), tuple(range(rank % 8, 256, 8))) for rank in ranks
    }
    for sums in joined(routes).values():
        assert sums == Counter(ranks)
