"""Who carries statistics, as ``DISTNORM_TRANSPORT`` or the code says; and what cannot be had."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distnorm
from distnorm.attach import conversions_of
from distnorm.nn import SyncBatchNorm
from distnorm.transport import choice, shared_memory, sockets
from tests.support.fake import fake_world
from tests.support.pool import Pool

NAMES = {"torch": "SharedMemory", "shm": "SharedMemory", "sockets": "Sockets", "gloo": "NoneType"}


def batch(rank: int) -> Tensor:
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def carrier_of(model: nn.Module) -> str:
    (conversion,) = conversions_of(model)
    return type(conversion.bound().topology.everyone().direct).__name__


def train(rank: int, given: str | None, recipe: str = "sync_bn") -> tuple[str, Tensor]:
    model = distnorm.convert(nn.Sequential(nn.BatchNorm1d(3).double()), recipe, transport=given)
    y = model(batch(rank))
    y.square().sum().backward()
    return carrier_of(model), y.detach()


@pytest.mark.parametrize("name", NAMES)
def test_the_environment_chooses(pool: Pool, name: str) -> None:
    expected = nn.BatchNorm1d(3).double()(torch.cat((batch(0), batch(1)))).chunk(2)
    for rank, (carrier, y) in enumerate(pool.run(2, train, None, env=lambda rank: {"DISTNORM_TRANSPORT": name})):
        assert carrier == NAMES[name]
        torch.testing.assert_close(y, expected[rank])


def test_code_comes_before_the_environment(pool: Pool) -> None:
    found = pool.run(2, train, "gloo", env=lambda rank: {"DISTNORM_TRANSPORT": "sockets"})
    assert [carrier for carrier, _ in found] == ["NoneType"] * 2


def test_moving_recipes_train_over_all(pool: Pool) -> None:
    for name in ("shm", "sockets", "gloo"):
        found = pool.run(2, train, None, "mabn", env=lambda rank, name=name: {"DISTNORM_TRANSPORT": name})
        assert [carrier for carrier, _ in found] == [NAMES[name]] * 2


def train_twice(rank: int) -> list[str]:
    return [train(rank, name)[0] for name in ("shm", "sockets", "gloo", "torch")]


def test_models_of_one_job_may_differ(pool: Pool) -> None:
    assert pool.run(2, train_twice) == [["SharedMemory", "Sockets", "NoneType", "SharedMemory"]] * 2


@pytest.mark.parametrize("name", ["smoke", "", "SHM"])
def test_a_name_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    with pytest.raises(ValueError, match=rf"convert\(transport='{name}'\): need .*\"shm\" or \"sockets\" or \"gloo\""):
        distnorm.convert(nn.BatchNorm1d(3), "sync_bn", transport=name)  # type: ignore[arg-type]
    monkeypatch.setenv("DISTNORM_TRANSPORT", name)
    for make in (lambda: distnorm.convert(nn.BatchNorm1d(3), "sync_bn"), lambda: SyncBatchNorm(3)):
        with pytest.raises(ValueError, match=f"environment DISTNORM_TRANSPORT='{name}': allowed are torch, mpi, shm"):
            make()


def train_apart(rank: int, how: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        if how == "host" and rank == 1:
            patch.setattr(shared_memory, "host_id", lambda: "another")
        if how == "compiler" and rank == 1:
            patch.setattr(shared_memory, "library", lambda: None)
        if how == "deaf" and rank == 1:
            patch.setattr(sockets.socket, "create_server", refuse)
        if how == "many":
            patch.setattr(sockets, "MOST_RANKS", 1)
        return train(rank, None)


def refuse(*args: object, **options: object) -> None:
    raise OSError("not here")


@pytest.mark.parametrize(
    ("name", "how", "words"),
    [
        ("shm", "host", r"\[0\] and \[1\] are on different hosts"),
        ("shm", "compiler", r"ranks \[1\] have no compiled kernels"),
        ("sockets", "deaf", "rank 1: cannot listen on 127.0.0.1: not here"),
        ("sockets", "many", "they are 2, more than 1"),
    ],
)
def test_what_cannot_be_had_is_an_error_on_every_rank(pool: Pool, name: str, how: str, words: str) -> None:
    outcomes = pool.run_all(2, train_apart, how, env=lambda rank: {"DISTNORM_TRANSPORT": name}, timeout=60.0)
    for outcome in outcomes:
        assert isinstance(outcome, RuntimeError)
        with pytest.raises(RuntimeError, match=rf"transport='{name}' is not available among ranks \[0, 1\]: .*{words}"):
            raise outcome


def test_ranks_that_choose_differently(pool: Pool) -> None:
    outcomes = pool.run_all(2, train, None, env=[{"DISTNORM_TRANSPORT": name} for name in ("shm", "gloo")])
    for outcome in outcomes:
        assert isinstance(outcome, RuntimeError)
        assert "transport='shm'" in str(outcome) and "transport='gloo'" in str(outcome)


def check_on_gloo(rank: int) -> None:
    world = dist.group.WORLD
    assert world is not None
    for name in ("shm", "sockets", "gloo", "torch"):
        choice.check(name, (0, 1), ["cpu", "meta"], world)
    choice.check("gloo", (0, 1), ["cuda", "cuda"], world)
    for name in ("shm", "sockets"):
        with pytest.raises(RuntimeError, match=f"transport='{name}' supports layers on the CPU only; .* rank 5"):
            choice.check(name, (3, 5), ["cpu", "cuda"], world)


def test_layers_on_a_gpu(pool: Pool) -> None:
    pool.run(1, check_on_gloo)


@pytest.mark.parametrize("name", ["shm", "sockets", "gloo"])
def test_a_job_without_gloo(name: Any) -> None:
    with fake_world(2):
        world = dist.group.WORLD
        assert world is not None
        with pytest.raises(RuntimeError, match=f"transport='{name}' needs gloo as the job's backend"):
            choice.check(name, (0, 1), ["cpu", "cpu"], world)
