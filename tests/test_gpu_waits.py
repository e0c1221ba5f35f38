"""A training step on a GPU never makes the host wait for it: shown without one, by tensors that have no values.

Tensors on torch's meta device refuse every question about their values, and take part in all else: convolutions,
autograd, the kernels' operators. Layers are made to treat them as they treat CUDA tensors.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="Triton is made for Linux only")

import distnorm
from distnorm import Recipe
from distnorm.attach import conversions_of
from distnorm.autograd import normalize
from distnorm.compat import dispatch_state
from distnorm.kernels import gpu, windows
from distnorm.methods import RMS, BatchNorm, Method
from distnorm.nn import SPADE, AdaIN, ConditionalBatchNorm, ConditionalInstanceNorm
from distnorm.policies import AllReduce, Moving, Policy, StaleMix, Warmup
from tests.support.gpu import gpu_pass
from tests.support.thinned import thinned

POLICIES = [AllReduce(), Moving(window=3), Moving(window=3, loss_reduction="sum"), StaleMix()]
POLICIES += [Warmup(then=Moving(window=3), steps=1)]
METHODS = [BatchNorm(), RMS(), RMS(clip=5.0, clip_after=2)]


class NoCopies(TorchDispatchMode):
    """Refuses what takes memory of the host's: copies of it wait, too, unless it is pinned."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [each for each in args if isinstance(each, Tensor)]
        assert all(each.is_meta for each in given), f"{func} takes a tensor of the host's"
        return func(*args, **kwargs or {})


@pytest.fixture(autouse=True, params=[True, False], ids=["kernels", "no kernels"])
def meta_for_cuda(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels for layers and windows, or the plain path for both."""
    monkeypatch.setattr(dispatch_state, "has_dispatch_mode", lambda: False)  # layers run as if nobody looked on
    monkeypatch.setattr(gpu, "takes", lambda x: request.param and x.is_meta)
    monkeypatch.setattr(normalize, "new_pass", gpu_pass)
    monkeypatch.setattr(windows, "in_triton", lambda values, outbox: request.param)


def network(times: int) -> nn.Module:
    """The last norm runs so many times."""
    with torch.device("meta"):
        last = nn.BatchNorm2d(3)
        first = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)
        return nn.Sequential(*first, *[last] * times)


@pytest.mark.parametrize("times", [pytest.param(1, marks=pytest.mark.slow), 2], ids=["", "twice"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("method", thinned(METHODS, every=2), ids=str)
def test_a_step_asks_for_no_value(method: Method, policy: Policy, recomputed: bool, times: int) -> None:
    model = distnorm.convert(network(times), Recipe(method=method, policy=policy), fuse=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    # Where a layer runs twice the host must know the scale, to tell whether the optimizer has skipped a step.
    scale = torch.empty((), device="meta") if times == 1 else 1024.0
    distnorm.attach(model, optimizer=optimizer, loss_scale=lambda: scale)
    for conversion in conversions_of(model):
        conversion.resume_pending = False  # what was loaded is looked at once, before the first step
    x, empty = torch.empty(2, 3, 5, 4, device="meta"), torch.empty(0, 3, 5, 4, device="meta")
    with NoCopies():
        for given in (x, x, empty, x):
            optimizer.zero_grad()
            y = checkpoint(model, given, use_reentrant=False) if recomputed else model(given)
            y.square().sum().backward()
            optimizer.step()


@pytest.mark.parametrize("recipe", ["sync_bn", "mabn"])
def test_labels_and_maps_are_not_looked_at(recipe: str) -> None:
    ids, map = torch.empty(4, dtype=torch.int64, device="meta"), torch.empty(4, 2, 3, 3, device="meta")
    with torch.device("meta"):
        layers = [ConditionalBatchNorm(3, 5, recipe), ConditionalInstanceNorm(3, 5), SPADE(3, 2, recipe), AdaIN()]
    for conversion in conversions_of(nn.ModuleList(layers)):
        conversion.bound()
        conversion.means_to_fold = False
    x = torch.empty(4, 3, 6, 6, device="meta")
    with NoCopies():
        for layer, other in zip(layers, (ids, ids, map, x), strict=True):
            layer(x.requires_grad_(), other).square().sum().backward()


def test_a_question_would_be_noticed() -> None:
    with pytest.raises(RuntimeError, match="meta"):
        float(torch.empty((), device="meta"))
    with NoCopies(), pytest.raises(AssertionError, match="the host's"):
        torch.ones(3).to("meta")
