"""The fake world: collectives of any size return, the store echoes, nothing is left behind."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from tests.support.fake import EchoStore, fake_world
from tests.support.threads import run_threads


def test_the_store_answers_for_the_other_ranks() -> None:
    store = EchoStore()
    wrapped = dist.PrefixStore("outer", dist.PrefixStore("inner", store))
    wrapped.set("distnorm/layout/0", "mine")
    wrapped.wait([f"distnorm/layout/{rank}" for rank in range(64)], timedelta(seconds=1))
    assert wrapped.check(["anything"])
    assert {wrapped.get(f"distnorm/layout/{rank}") for rank in range(64)} == {b"mine"}
    assert wrapped.multi_get(["distnorm/layout/9"]) == [b"mine"]
    assert [wrapped.add("counter", 1) for _ in range(3)] == [1, 2, 3]
    assert store.num_keys() == 2
    assert wrapped.delete_key("counter") and not wrapped.delete_key("counter")


@pytest.mark.parametrize("key", ["distnorm/other/3", "distnorm/layout/name"])
def test_a_key_nobody_wrote_is_an_error(key: str) -> None:
    store = EchoStore()
    store.set("distnorm/layout/0", "mine")
    with pytest.raises(KeyError, match="was never written"):
        store.get(key)


def test_another_rank_than_zero() -> None:
    with fake_world(8, rank=5) as store:
        store.set("distnorm/layout/5", "five")
        assert (dist.get_rank(), dist.get_world_size()) == (5, 8)
        assert store.get("distnorm/layout/0") == b"five"


def test_groups_and_collectives() -> None:
    with fake_world(64):
        default = dist.distributed_c10d._get_default_store()
        default.set("distnorm/layout/0", "mine")
        assert default.get("distnorm/layout/63") == b"mine"
        node = dist.new_group(range(8), use_local_synchronization=True)
        every = dist.new_group(range(64))
        assert (node.size(), every.size()) == (8, 64)
        value = torch.arange(64.0)
        for group in (node, every):
            dist.all_reduce(value, group=group)
            dist.all_reduce(value, group=group, async_op=True).wait()
            dist.all_to_all_single(torch.empty(64), value, group=group)
            dist.broadcast(value, 0, group=group)
            dist.barrier(group)
        assert value.tolist() == list(range(64))
    assert not dist.is_initialized()


def test_it_goes_together_with_threads() -> None:
    with fake_world(16):
        pass
    assert run_threads(2, lambda rank: dist.get_world_size()) == [2, 2]
    with fake_world(16):
        assert dist.get_world_size() == 16
