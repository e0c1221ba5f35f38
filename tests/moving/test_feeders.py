"""Which layers feed norms: guessed when converting, seen in the first training forward, and alike on all ranks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import distnorm
from distnorm import Recipe
from distnorm.layers.centralized import Centralized
from distnorm.methods import RMS
from distnorm.policies import AllReduce, Local
from tests.support.threads import run_threads

ALONE = Recipe(method=RMS(), policy=Local(), weights="centralized")
SHARED = Recipe(method=RMS(), policy=AllReduce(), weights="centralized")
Forward = Callable[["Net", Tensor], Any]


class Net(nn.Module):
    """Two convolutions and two norms of equal size, joined as ``how`` says."""

    def __init__(self, how: Forward) -> None:
        super().__init__()
        self.how = how
        self.one, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.two, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Any:
        return self.how(self, x)


def plain(net: Net, x: Tensor) -> Tensor:
    return net.norm2(net.two(net.norm1(net.one(x)).relu()))


def concatenation(net: Net, x: Tensor) -> Tensor:
    y = net.one(x)
    return torch.cat([net.norm2(net.two(net.norm1(y))), y], 1)


def addition(net: Net, x: Tensor) -> Tensor:
    y = net.one(x)
    return net.norm2(net.two(net.norm1(y))) + y


def second_branch(net: Net, x: Tensor) -> Tensor:
    y = net.one(x)
    return net.norm2(net.two(net.norm1(y))) * y.mean((2, 3), keepdim=True).sigmoid()


def output(net: Net, x: Tensor) -> dict[str, Any]:
    y = net.one(x)
    return {"out": net.norm2(net.two(net.norm1(y))), "features": [y.flatten(2)]}


def activation_first(net: Net, x: Tensor) -> Tensor:
    return net.norm2(net.two(net.norm1(F.relu(net.one(x)))))


def in_place_first(net: Net, x: Tensor) -> Tensor:
    return net.norm2(net.two(net.norm1(net.one(x).relu_())))


def augmented(net: Net, x: Tensor) -> Tensor:
    y = net.one(x)
    y += 1
    return net.norm2(net.two(net.norm1(y)))


def assignment(net: Net, x: Tensor) -> Tensor:
    y = net.one(x)
    kept = torch.zeros_like(y)
    kept[:, :2] = y[:, :2]
    return net.norm2(net.two(net.norm1(y))) + kept


def layouts(net: Net, x: Tensor) -> Tensor:
    y = net.one(x).contiguous(memory_format=torch.channels_last)
    return net.norm2(net.two(net.norm1(y.reshape(y.shape))))


def twice(net: Net, x: Tensor) -> Tensor:
    return net.norm2(net.two(net.norm1(net.one(x)))) + net.norm2(net.two(net.norm1(net.one(x + 1))))


def recomputed(net: Net, x: Tensor) -> Tensor:
    h = checkpoint(lambda each: net.norm1(net.one(each)), x, use_reentrant=False)
    return checkpoint(lambda each: net.norm2(net.two(each)), h, use_reentrant=True)


BOTH, SECOND = {"one", "two"}, {"two"}
CASES: list[tuple[Forward, set[str]]] = [
    (plain, BOTH), (layouts, BOTH), (twice, BOTH), (recomputed, BOTH), (concatenation, SECOND), (addition, SECOND),
    (second_branch, SECOND), (output, SECOND), (activation_first, SECOND), (in_place_first, SECOND),
    (assignment, SECOND), (augmented, SECOND),
]  # fmt: skip


def batch(seed: int = 0, size: int = 4) -> Tensor:
    return torch.randn(size, 3, 5, 5, generator=torch.Generator().manual_seed(seed)).double() + 1


def made(how: Forward) -> Net:
    model = Net(how).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.2, 0.3, generator=generator)
    return model


def loss_of(y: Any) -> Tensor:
    if isinstance(y, dict):
        return loss_of(y["out"]) + loss_of(y["features"][0])
    return (y - 1).pow(3).mean()


def train(model: nn.Module, steps: int = 4) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(model(batch(step))).backward()
        optimizer.step()


def centred(model: nn.Module) -> set[str]:
    """By what their weights are after training: whatever their class."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            dims = (0, 2, 3) if isinstance(module, nn.ConvTranspose2d) else tuple(range(1, module.weight.dim()))
            found[name] = module.weight.mean(dims).abs().max() < 1e-9
    return {name for name, yes in found.items() if yes}


@pytest.mark.parametrize(("how", "expected"), CASES, ids=lambda each: getattr(each, "__name__", ""))
def test_only_what_goes_to_a_norm_and_nowhere_else(how: Forward, expected: set[str], caplog: Any) -> None:
    model = distnorm.convert(made(how), ALONE)
    train(model)
    assert centred(model) == expected
    notes = [record.getMessage() for record in caplog.records if "not centred" in record.getMessage()]
    assert [("of one are" in note, "two" in note) for note in notes] == ([] if expected == BOTH else [(True, False)])
    stock = made(how)
    stock.load_state_dict(model.state_dict())
    ours, theirs = model.eval()(batch(9)), stock.eval()(batch(9))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    torch.testing.assert_close(distnorm.revert(model)(batch(9)), ours, rtol=0, atol=1e-9)
    assert {name: type(each) for name, each in model.named_modules()} == {
        name: type(each) for name, each in stock.named_modules()
    }
    assert not model._forward_hooks and not model._forward_pre_hooks and not model.one._forward_hooks


def test_a_left_layer_keeps_its_weight_through_saves_and_copies() -> None:
    """Also those that come before the first forward."""
    model = distnorm.convert(made(addition), ALONE)
    before = model.one.weight.detach().clone()
    model.state_dict(), copy.deepcopy(model)
    model(batch()).sum().backward()
    torch.testing.assert_close(model.state_dict()["one.weight"], before, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model).one.weight, model.one.weight)


def test_a_resumed_run_knows_from_the_start() -> None:
    straight = distnorm.convert(made(addition), ALONE)
    train(straight, 2)
    resumed = distnorm.convert(made(addition), ALONE)
    resumed.load_state_dict(straight.state_dict())
    distnorm.load_state_dict(resumed, distnorm.state_dict(straight))
    torch.testing.assert_close(resumed(batch(7)), straight(batch(7)), rtol=0, atol=0)


class Rows(nn.Module):
    """A layer that returns rows, and a norm over channels, with ``[N, L, C]`` to ``[N, C, L]`` in between."""

    def __init__(self) -> None:
        super().__init__()
        self.line, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.line(x.flatten(2).transpose(1, 2)).transpose(1, 2))


def test_transposed_rows() -> None:
    model = distnorm.convert(Rows().double(), ALONE)
    train(model)
    assert centred(model) == {"line"}


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)], {"1"}),
        ([nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)], set()),
        ([nn.Conv2d(3, 4, 3), nn.Dropout(0.3), nn.BatchNorm2d(4)], set()),
        ([nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4)], {"0"}),
        ([nn.Conv2d(3, 8, 3), nn.PixelShuffle(2), nn.BatchNorm2d(2)], set()),
        ([nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)], {"0"}),
    ],
    ids=str,
)
def test_sequences(parts: list[nn.Module], expected: set[str]) -> None:
    model = distnorm.convert(nn.Sequential(*copy.deepcopy(parts)).double(), ALONE)
    assert not isinstance(model[0], Centralized) or "0" in expected or isinstance(model[1], nn.Dropout)
    train(model)
    assert centred(model) == expected


def test_registered_in_another_order_than_called() -> None:
    """The guess is wrong in both ways, and is put right."""

    class Crossed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.feeds, self.free, self.norm = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.feeds(x)) + self.free(x).square()

    model = distnorm.convert(Crossed().double(), ALONE)
    train(model)
    assert centred(model) == {"feeds"}


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_are_centred_per_output_filter(groups: int) -> None:
    stock = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=groups, output_padding=1).double()
    model = distnorm.convert(nn.Sequential(copy.deepcopy(stock), nn.BatchNorm2d(6)).double(), ALONE)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    weight = stock.weight.detach().clone().requires_grad_()
    parts = [each - each.mean((0, 2, 3), keepdim=True) for each in weight.chunk(groups)]
    expected = F.conv_transpose2d(x, torch.cat(parts), stock.bias, 2, output_padding=1, groups=groups)
    y = model[0](x)
    torch.testing.assert_close(y, expected)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), model[0].weight)
    (right,) = torch.autograd.grad(expected.pow(3).sum(), weight)
    torch.testing.assert_close(grad, right)
    for size in ([11, 11], [12, 11], [2, 6, 12, 12]):
        with torch.no_grad():
            stock.weight.copy_(torch.cat(parts))
        torch.testing.assert_close(model[0](x, output_size=size), stock(x, output_size=size))


def test_ranks_decide_alike() -> None:
    """One of them takes the addition, which the others do not see, and one has nothing to do."""

    def sometimes(net: Net, x: Tensor) -> Tensor:
        y = net.one(x)
        out = net.norm2(net.two(net.norm1(y)))
        return out + y if len(x) == 3 else out

    def run(rank: int) -> set[str]:
        model = distnorm.convert(made(sometimes), SHARED)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model(batch(step, (3, 4, 0)[rank]))).nan_to_num().backward()
            optimizer.step()
        return centred(model)

    assert run_threads(3, run) == [{"two"}] * 3


@pytest.mark.parametrize("sizes", [(3, 0), (0, 0)], ids=str)
def test_outputs_without_values_tell_nothing(sizes: tuple[int, int]) -> None:
    """Where an engine hands on other tensors than layers return, empty ones have nothing to be known by."""

    class Through(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.detach()  # as DeepSpeed's ZeRO 3 does (0.19.8)

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy

    def run(rank: int) -> set[str]:
        model = distnorm.convert(made(plain), SHARED)
        for norm in (model.norm1, model.norm2):
            norm.register_forward_pre_hook(lambda module, args: (Through.apply(*args),))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for step in range(2):
            optimizer.zero_grad()
            loss_of(model(batch(step, sizes[rank]))).nan_to_num().backward()
            optimizer.step()
        return centred(model)

    assert run_threads(2, run) == [BOTH] * 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("way", ["parts", "compiled", "compiled part"])
def test_models_that_cannot_be_watched_keep_the_guess(way: str) -> None:
    model = distnorm.convert(made(plain), ALONE)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    run: Callable[[Tensor], Tensor] = lambda x: model.norm2(model.two(model.norm1(model.one(x)).relu()))  # noqa: E731
    if way == "compiled":
        run = torch.compile(model, backend="eager", fullgraph=True)
    if way == "compiled part":
        model.two.compile(backend="eager", fullgraph=True)
        run = model
    for step in range(3):
        optimizer.zero_grad()
        loss_of(run(batch(step))).backward()
        optimizer.step()
    assert centred(model) == BOTH


def test_a_forward_that_fails_is_not_the_last_word(caplog: pytest.LogCaptureFixture) -> None:
    model = distnorm.convert(made(addition), ALONE)
    with pytest.raises(RuntimeError):
        model(batch()[:, :2])
    assert not model.one._forward_hooks
    train(model)
    assert centred(model) == {"two"}
    assert len([each for each in caplog.records if each.levelno == logging.WARNING]) == 1
