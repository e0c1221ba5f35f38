"""What becomes of a layer's own process group in copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import distnorm
from tests.distributed.test_layer_groups import PAIRS, batch, layer, own, stock
from tests.moving.models import same
from tests.support.threads import run_threads


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [lambda model: pickle.loads(pickle.dumps(model)), saved], ids=["pickle", "torch.save"])
def test_a_pickled_copy_leaves_its_group_behind(way: Callable[[nn.Module], nn.Module]) -> None:
    def run(rank: int) -> None:
        model = distnorm.convert(nn.Sequential(layer(own(rank, PAIRS))), "sync_bn")
        model(batch(rank))
        other = way(way(model))
        same(other.eval()(batch(0)), model.eval()(batch(0)))
        with pytest.raises(RuntimeError, match=r"its process group over ranks \[\d, \d\] cannot be pickled"):
            other.train()(batch(rank))
        distnorm.revert(other)
        with pytest.raises(ValueError, match=r"0: SyncBatchNorm: its process group over ranks .* cannot be pickled"):
            distnorm.convert(other, "sync_bn")
        other[0].process_group = None
        distnorm.attach(distnorm.convert(other, "sync_bn"))

    run_threads(4, run)


def test_a_deepcopy_keeps_its_group() -> None:
    def run(rank: int) -> Tensor:
        model = distnorm.convert(nn.Sequential(layer(own(rank, PAIRS))), "sync_bn")
        other = copy.deepcopy(model)
        assert other[0].process_group is model[0].process_group
        assert other[0]._site.conversion is not model[0]._site.conversion
        distnorm.revert(copy.deepcopy(other))
        return other(batch(rank).requires_grad_()).detach()

    found = run_threads(4, run)
    torch.testing.assert_close(found[2:], stock(PAIRS[1]))
