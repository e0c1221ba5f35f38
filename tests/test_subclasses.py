"""Subclasses of batch norm: which convert, what stays their own, and what is said of the others."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import distnorm
from distnorm import selection
from distnorm.layers.module import DistBatchNorm1d, DistNorm
from tests.subclass_models import (
    CONVERTED,
    LEFT,
    AnyLayout,
    Functional,
    Ghost,
    Grandchild,
    NodeNorm,
    Scaled,
    Skips,
    SparseNorm,
    Split,
)  # fmt: skip
from tests.support.threads import run_threads
from tests.training import batches, converted, same, train, worn

X = batches((6, 4, 3, 2))
EACH = pytest.mark.parametrize("kind", CONVERTED, ids=lambda kind: kind.__name__)


@pytest.fixture(autouse=True)
def nothing_was_said() -> Iterator[None]:
    """Warnings come once per job."""
    selection._named.clear()
    yield
    selection._named.clear()


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def net(kind: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 4, 1), worn(kind(4)), nn.ReLU())


# --- those that go through super().forward -------------------------------------------------------


@EACH
@pytest.mark.parametrize("recipe", ["sync_bn", "local_bn"])
def test_it_trains_as_stock(kind: type[nn.Module], recipe: str) -> None:
    stock = net(kind).train()
    mine = converted(stock, recipe)
    assert (
        isinstance(mine[1], DistNorm) and isinstance(mine[1], kind) and type(mine[1]).__name__ == f"Dist{kind.__name__}"
    )
    same(train(mine.train(), X), train(stock, X))


@EACH
@pytest.mark.parametrize("way", [copy.deepcopy, saved, lambda model: pickle.loads(pickle.dumps(model, 2))])
def test_copies_are_alike_and_revert(kind: type[nn.Module], way: Callable[[nn.Module], nn.Module]) -> None:
    mine = converted(net(kind))
    train(mine, X)
    other = way(mine)
    assert type(other[1]) is type(mine[1]) and other[1]._site is not mine[1]._site
    same(train(other, X), train(mine, X), exactly=True)
    for each in (mine, other):
        distnorm.revert(each)
        assert type(each[1]) is kind and sorted(vars(each[1])) == sorted(vars(kind(4)))
    assert [type(each) for each in mine.modules()] == [type(each) for each in net(kind).modules()]


@EACH
def test_the_state_dict_goes_both_ways(kind: type[nn.Module]) -> None:
    stock = net(kind)
    mine = converted(stock)
    train(mine, X)
    stock.load_state_dict(mine.state_dict(), strict=True)
    torch.testing.assert_close(stock.eval()(X[0]), mine.eval()(X[0]))
    other = converted(net(kind))
    other.load_state_dict(stock.state_dict(), strict=True)
    torch.testing.assert_close(other.eval()(X[0]), mine.eval()(X[0]))


@pytest.mark.parametrize("kind", [Ghost, Grandchild, Scaled])
def test_ranks_share(kind: type[nn.Module]) -> None:
    """Two ranks whose parts of the batch interleave as the parts of a ghost norm do."""
    torch.manual_seed(0)
    stock = worn(kind(4)).double()
    whole = batches((8, 4, 3, 2), steps=1, dtype=torch.float64)[0]
    parts = [torch.cat([half.chunk(2)[rank] for half in whole.chunk(2)]) for rank in range(2)]

    def rank(number: int) -> tuple[Tensor, Tensor]:
        mine = converted(stock)
        x = parts[number].clone().requires_grad_()
        y = mine(x)
        y.square().sum().backward()
        return y.detach(), x.grad

    x = whole.clone().requires_grad_()
    y = stock(x)
    y.square().sum().backward()
    for number, (mine, dx) in enumerate(run_threads(2, rank)):
        for given, expected in ((mine, y), (dx, x.grad)):
            wanted = torch.cat([half.chunk(2)[number] for half in expected.chunk(2)])
            torch.testing.assert_close(given, wanted)


def test_arguments_are_passed_on() -> None:
    stock = worn(Grandchild(4))
    mine = converted(stock)
    torch.testing.assert_close(mine(X[0], shift=2.0), stock(X[0], shift=2.0))
    torch.testing.assert_close(mine(X[0], 3.0), stock(X[0], 3.0))
    with pytest.raises(TypeError, match="unexpected keyword argument 'relu'"):
        mine(X[0], relu=True)


def test_layers_of_one_class_share_one() -> None:
    mine = [converted(nn.Sequential(Scaled(4), Scaled(5))) for _ in range(2)]
    assert len({type(layer) for model in mine for layer in model}) == 1


def test_averages_follow() -> None:
    mine = converted(net(Scaled))
    average = AveragedModel(mine, use_buffers=True)
    train(mine, X)
    average.update_parameters(mine)
    assert type(average.module[1]) is type(mine[1])
    torch.testing.assert_close(average.eval()(X[0]), mine.eval()(X[0]))


def test_a_compiled_one_trains_as_stock() -> None:
    stock = net(Scaled)
    mine = converted(stock, "local_bn")
    compiled = torch.compile(mine, backend="aot_eager", fullgraph=True)
    same(train(mine, X), train(stock, X))
    torch.testing.assert_close(compiled.train()(X[0]), mine(X[0]))


def test_a_forward_that_is_patched_later_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    mine, stock = converted(net(Scaled)), net(Scaled)
    monkeypatch.setattr(Scaled, "forward", lambda self, x: super(Scaled, self).forward(x) - 1)
    same(train(mine, X), train(stock, X))


def test_torch_scripts_the_reverted_one() -> None:
    class Counted(nn.BatchNorm2d):
        calls = 0

    mine = converted(worn(Counted(4))).eval()
    with pytest.raises(RuntimeError, match=r"cannot compile a converted Counted. Script a reverted copy"):
        torch.jit.script(mine)
    scripted = torch.jit.script(distnorm.revert(mine))
    assert torch.equal(scripted(X[0]), mine(X[0]))


def test_a_tracer_is_told_what_it_needs() -> None:
    """The layer's node would be followed by its own code once more."""
    with pytest.raises(TypeError, match="Scaled does more than normalize, so name it a leaf"):
        torch.fx.symbolic_trace(converted(net(Scaled)))

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module: nn.Module, name: str) -> bool:
            return isinstance(module, Scaled) or super().is_leaf_module(module, name)

    mine = converted(net(Scaled))
    traced = torch.fx.GraphModule(mine, Tracer().trace(mine))
    torch.testing.assert_close(traced.eval()(X[0]), mine.eval()(X[0]))


def test_any_layout_and_another_metaclass() -> None:
    class Registry(type):
        seen: list[str] = []  # noqa: RUF012

        def __init__(cls, name: str, *args: object) -> None:
            super().__init__(name, *args)
            cls.seen.append(name)

    class Registered(nn.BatchNorm1d, metaclass=Registry):
        pass

    for stock, x in ((worn(AnyLayout(4)), torch.randn(5, 4, 2, 2, 2)), (worn(Registered(4)), torch.randn(5, 4))):
        mine = converted(stock)
        torch.testing.assert_close(mine(x), stock(x))
        assert type(distnorm.revert(mine)) is type(stock)


# --- whole or not at all -------------------------------------------------------------------------


class HalfKnown(Split):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.others = nn.ModuleList([Functional(channels)])


def test_a_norm_inside_of_a_norm_follows_it() -> None:
    model = nn.Sequential(Split(4), nn.BatchNorm2d(4))
    assert [type(each).__name__ for each in distnorm.convert(model, "sync_bn", where="0").modules()] == [
        "Sequential", "DistSplit", "ModuleList", "DistBatchNorm2d", "BatchNorm2d",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"selects none of \['0', '1'\]"):
        distnorm.convert(nn.Sequential(Split(4), nn.BatchNorm2d(4)), "sync_bn", where="0.others.0")


@pytest.mark.parametrize("kind", [HalfKnown, type("OutsideLeft", (Functional,), {})])
def test_no_part_is_converted_alone(kind: type[nn.Module]) -> None:
    layer = kind(4)
    layer.inner = nn.BatchNorm2d(4)
    model = nn.Sequential(layer, nn.BatchNorm2d(4))
    with pytest.warns(UserWarning, match=f"1 {kind.__module__}.{kind.__name__} .*calls F.batch_norm itself"):
        distnorm.convert(model, "sync_bn")
    assert [type(each).__name__ for each in model.modules() if isinstance(each, DistNorm)] == ["DistBatchNorm2d"]
    assert type(model[1]).__name__ == "DistBatchNorm2d"


# --- those that are left alone -------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "reason"), LEFT.items(), ids=lambda each: getattr(each, "__name__", ""))
def test_it_is_left_alone_and_the_reason_is_said(kind: type[nn.Module], reason: str) -> None:
    model = nn.Sequential(*(kind(3) for _ in range(40)))
    with pytest.warns(UserWarning, match=rf"40 {kind.__module__}.{kind.__name__} \(.*{reason}") as caught:
        distnorm.convert(model, "sync_bn")
    (warning,) = caught
    assert warning.filename == __file__ and len(str(warning.message)) < 400
    assert {type(each) for each in model} == {kind}


def test_one_warning_counts_all_and_comes_once() -> None:
    model = nn.Sequential(Functional(3), nn.BatchNorm2d(3), Skips(3), nn.Sequential(Functional(3)))
    with pytest.warns(UserWarning) as caught:
        distnorm.convert(model, "sync_bn")
        distnorm.convert(nn.Sequential(Functional(3)), "sync_bn")
        distnorm.nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(Skips(3)))
    (warning,) = caught
    assert ".Functional (" in str(warning.message) and "2 tests" in str(warning.message)
    assert "1 tests" in str(warning.message) and "register_converter" in str(warning.message)
    assert isinstance(model[1], DistNorm)


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_only_the_first_rank_warns(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distnorm.convert(nn.Sequential(Functional(3)), "sync_bn")


def test_as_in_torchs_own_converter() -> None:
    """The method that stands for torch's converts subclasses too, and says what it leaves."""
    model = nn.Sequential(nn.BatchNorm2d(4), Scaled(4), Functional(4))
    with pytest.warns(UserWarning, match="Functional") as caught:
        assert distnorm.nn.SyncBatchNorm.convert_sync_batchnorm(model) is model
    assert [type(each).__name__ for each in model] == ["SyncBatchNorm", "DistScaled", "Functional"]
    assert (len(caught), caught[0].filename) == (1, __file__)


def test_a_forward_on_the_object_is_not_passed_over() -> None:
    """It would go on to run what it was bound to."""
    model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    model[0].forward = model[0].forward
    with pytest.warns(UserWarning, match="its forward has been replaced on the object"):
        distnorm.convert(model, "sync_bn")
    assert type(model[0]) is nn.BatchNorm2d and isinstance(model[1], DistNorm)


# --- wrappers ------------------------------------------------------------------------------------


def test_wrappers_need_nothing() -> None:
    torch.manual_seed(0)
    stock = nn.Sequential(NodeNorm(4), nn.Linear(4, 4), NodeNorm(4))
    mine = converted(stock)
    assert [type(each.module) for each in (mine[0], mine[2])] == [DistBatchNorm1d] * 2
    same(train(mine, batches((7, 4))), train(stock, batches((7, 4))))
    sparse, (features,) = SparseNorm(4), batches((7, 4), steps=1)
    coordinates = torch.arange(7)
    given, expected = (each((coordinates, features)) for each in (converted(sparse), sparse))
    assert given[0] is coordinates
    torch.testing.assert_close(given[1], expected[1])


def test_attributes_of_the_class_stay_with_the_authors() -> None:
    class Counted(nn.BatchNorm2d):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x)

    mine = converted(Counted(4))
    mine(X[0])
    distnorm.revert(mine)(X[0])
    assert Counted.calls == 2
