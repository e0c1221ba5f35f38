"""Batch norms of other packages, known by name: what they convert to, and which are left as they are."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm import selection
from distnorm.layers.module import DistNorm, DistSyncBatchNorm
from tests import known_classes as known
from tests.support.threads import run_threads
from tests.training import batches, converted, same, train, worn

X = batches((6, 4, 3, 2))
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "SiLU": lambda: known.BatchNormAct2d(4),
    "ReLU": lambda: known.BatchNormAct2d(4, nn.ReLU),
    "Hardswish": lambda: known.BatchNormAct2d(4, nn.Hardswish),
    "derived": lambda: known.Derived(4),
    "split": lambda: known.SplitBatchNorm2d(4, splits=3),
    "mmcv": lambda: known.MMSyncBatchNorm(4),
    "apex": lambda: known.ApexSyncBatchNorm(4),
    "apex, ReLU": lambda: known.ApexSyncBatchNorm(4, fuse_relu=True),
    **{f"ABN, {name}": lambda name=name: known.ABN(4, name) for name in ("relu", "leaky_relu", "elu", "identity")},
}
EACH = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


@pytest.fixture(autouse=True)
def nothing_was_said() -> Iterator[None]:
    selection._named.clear()
    yield
    selection._named.clear()


@EACH
def test_it_trains_as_the_original(make: Callable[[], nn.Module]) -> None:
    stock = nn.Sequential(nn.Conv2d(4, 4, 1), worn(make()))
    mine = converted(stock)
    same(train(mine, X), train(stock, X))
    assert all(isinstance(each, DistNorm) for each in mine.modules() if isinstance(each, nn.BatchNorm2d))


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickles name the classes by the modules of their packages."""
    for kind in vars(known).values():
        if isinstance(kind, type) and kind.__module__ != known.__name__:
            parts = kind.__module__.split(".")
            for name in (".".join(parts[:length]) for length in range(1, len(parts) + 1)):
                if name not in sys.modules:
                    monkeypatch.setitem(sys.modules, name, ModuleType(name))
            monkeypatch.setattr(sys.modules[kind.__module__], kind.__qualname__, kind, raising=False)


@EACH
@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("way", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"])
def test_copies_revert_to_the_very_class(make: Callable[[], nn.Module], way: Callable[[nn.Module], nn.Module]) -> None:
    stock = worn(make())
    before = {name: sorted(vars(each)) for name, each in stock.named_modules()}
    mine = converted(stock)
    train(mine, X)
    other = way(mine)
    assert type(other) is type(mine)
    same(train(other, X), train(mine, X), exactly=True)
    for each in (mine, other):
        distnorm.revert(each)
        assert type(each) is type(stock) and {n: sorted(vars(e)) for n, e in each.named_modules()} == before
        assert repr(each) == repr(stock)
    stock.load_state_dict(mine.state_dict(), strict=True)
    assert torch.equal(stock.eval()(X[0]), mine.eval()(X[0]))


def test_tools_that_ask_for_the_class_find_it() -> None:
    """timm's own functions look for BatchNormAct2d, to keep what it adds."""
    mine = converted(known.BatchNormAct2d(4, nn.ReLU))
    assert isinstance(mine, known.BatchNormAct2d) and isinstance(mine, nn.BatchNorm2d)
    assert type(mine).__name__ == "DistBatchNormAct2d" and "(act): ReLU" in repr(mine) and "sync_bn" in repr(mine)


def test_the_drop_is_applied_before_the_activation() -> None:
    mine, stock = (known.BatchNormAct2d(4, nn.ReLU, nn.Dropout) for _ in range(2))
    distnorm.convert(mine, "local_bn")
    seen = []
    for each in (mine, stock):
        torch.manual_seed(0)
        seen.append(each(X[0]))
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize("make", [LAYERS["SiLU"], LAYERS["derived"], LAYERS["apex"]], ids=["timm", "derived", "apex"])
def test_a_forward_that_is_patched_later_is_heeded(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, stock = converted(make()), make()
    monkeypatch.setattr(
        type(stock), "forward", lambda self, x, *_: F.batch_norm(x, None, None, self.weight, None, True)
    )
    same(train(mine, X), train(stock, X))


def test_frozen_ones_stay_without_a_word() -> None:
    model = nn.Sequential(known.FrozenBatchNormAct2d(4), nn.BatchNorm2d(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distnorm.convert(model, "sync_bn")
    assert type(model[0]) is known.FrozenBatchNormAct2d and isinstance(model[1], DistNorm)


def test_what_scales_otherwise_is_left_and_said() -> None:
    model = nn.Sequential(known.InPlaceABNSync(4), nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match=r"1 inplace_abn.abn.InPlaceABNSync \(it scales by \|weight\| \+ eps"):
        distnorm.convert(model, "sync_bn")
    assert type(model[0]) is known.InPlaceABNSync


@pytest.mark.parametrize("fuse_relu", [True, False])
def test_apex_with_channels_last_and_a_summand(fuse_relu: bool) -> None:
    stock = worn(known.ApexSyncBatchNorm(4, channel_last=True, fuse_relu=fuse_relu))
    mine = converted(stock)
    x, z = (each.movedim(1, -1) for each in X[:2])
    torch.testing.assert_close(mine(x, z), stock(x, z))
    torch.testing.assert_close(mine.eval()(x), stock.eval()(x))
    torch.testing.assert_close(mine(batches((5, 4))[0]), stock(batches((5, 4))[0]))


class Sum(nn.Module):
    """A block that gives apex's layer its summand."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = worn(known.ApexSyncBatchNorm(4, fuse_relu=True))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.bn(x, z=z)


def test_a_graph_keeps_the_summand() -> None:
    model = distnorm.convert(Sum(), "sync_bn").eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(*X[:2]), model(*X[:2]))


def test_detectron2s_becomes_exact() -> None:
    """Its running variance is the biased one, and it weighs ranks alike; outputs of equal batches are the same."""
    stock = worn(known.NaiveSyncBatchNorm(4))
    mine, reference = converted(stock), worn(nn.BatchNorm2d(4))
    reference.load_state_dict(stock.state_dict())
    torch.testing.assert_close(mine(X[0]), stock(X[0]))
    reference(X[0])
    same(train(mine, X), train(reference, X))
    assert type(distnorm.revert(mine)) is known.NaiveSyncBatchNorm


# --- ranks ---------------------------------------------------------------------------------------


def test_synchronized_ones_share_within_their_group() -> None:
    """A class that is no batch norm of torch's, with a group attribute of another name."""

    def rank(number: int) -> tuple[Tensor, object]:
        pairs = [dist.new_group(each) for each in ([0, 1], [2, 3])]
        torch.manual_seed(0)
        layer = worn(known.MMSyncBatchNorm(4, pairs[number // 2])).double()
        distnorm.convert(layer, "sync_bn")
        assert isinstance(layer, DistSyncBatchNorm) and layer.process_group is pairs[number // 2]
        y = layer(whole[number])
        copied = copy.deepcopy(layer)
        assert distnorm.revert(copied).group is pairs[number // 2]
        return y.detach(), distnorm.revert(layer).group

    whole = batches((3, 4, 3, 2), steps=4, dtype=torch.float64)
    found = run_threads(4, rank)
    torch.manual_seed(0)
    stock = worn(known.MMSyncBatchNorm(4)).double()
    for first in (0, 2):
        expected = copy.deepcopy(stock)(torch.cat(whole[first : first + 2]))
        torch.testing.assert_close(torch.cat([y for y, _ in found[first : first + 2]]), expected)


def test_timms_synchronized_one_trains_under_ddp_on_the_cpu() -> None:
    """So its class does not derive from SyncBatchNorm, which DDP refuses there."""

    def rank(number: int) -> Tensor:
        layer = worn(known.SyncBatchNormAct(4)).double()
        layer.drop, layer.act = nn.Identity(), nn.SiLU()
        model = nn.Sequential(layer)
        distnorm.convert(model, "sync_bn")
        assert type(layer).__name__ == "DistSyncBatchNormAct"
        wrapped = DistributedDataParallel(model)
        y = wrapped(whole[number])
        assert distnorm.revert(model)[0].__class__ is known.SyncBatchNormAct and layer.process_group is None
        return y.detach()

    whole = batches((3, 4, 3, 2), steps=2, dtype=torch.float64)
    stock = worn(known.BatchNormAct2d(4)).double()
    torch.testing.assert_close(torch.cat(run_threads(2, rank)), stock(torch.cat(whole)))


def test_folding_keeps_what_the_class_adds() -> None:
    mine = converted(nn.Sequential(nn.Conv2d(4, 4, 1), worn(known.BatchNormAct2d(4)), nn.Conv2d(4, 4, 1))).eval()
    folded = distnorm.fold(mine)
    assert type(folded[1]) is known.BatchNormAct2d
    torch.testing.assert_close(folded(X[0]), mine(X[0]))


@EACH
def test_what_has_wrapped_a_forward_calls_the_original_after_revert(make: Callable[[], nn.Module]) -> None:
    mine = converted(nn.Sequential(nn.Conv2d(4, 4, 1), worn(make())), "mabn")
    for each in mine.modules():
        each.forward = functools.partial(each.forward)  # type: ignore[method-assign]
    train(mine, X)
    y = mine.eval()(X[0])
    torch.testing.assert_close(distnorm.revert(mine)(X[0]), y)
