"""Centralized weights: which layers, what stays, and one trajectory in two forms."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from torch import Tensor, nn

import distnorm
from distnorm import Recipe
from distnorm.layers import centralized as ours
from distnorm.layers.centralized import Centralized
from distnorm.layers.weights import centralized
from distnorm.methods import RMS
from distnorm.policies import Local

RECIPE = Recipe(method=RMS(), policy=Local(), weights="centralized")


class Block(nn.Module):
    """A residual block with a projection shortcut, registered in call order or convolutions first."""

    def __init__(self, convs_first: bool, inputs: int = 4, middle: int = 6, outputs: int = 8) -> None:
        super().__init__()
        pairs = {
            "1": (nn.Conv2d(inputs, middle, 1, bias=False), nn.BatchNorm2d(middle)),
            "2": (nn.Conv2d(middle, middle, 3, padding=1), nn.BatchNorm2d(middle)),
            "3": (nn.Conv2d(middle, outputs, 1, bias=False), nn.BatchNorm2d(outputs)),
        }
        order = [("conv", 0, n) for n in pairs] + [("bn", 1, n) for n in pairs]
        if not convs_first:
            order.sort(key=lambda each: (each[2], each[1]))
        for kind, index, number in order:
            self.add_module(kind + number, pairs[number][index])
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn2(self.conv2(y)).relu()
        return (self.bn3(self.conv3(y)) + self.shortcut(x)).relu()


class Net(nn.Module):
    def __init__(self, convs_first: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.block = Block(convs_first)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.norm(self.stem(x)).relu()).mean((2, 3)))


FEEDERS = {"stem", "block.conv1", "block.conv2", "block.conv3", "block.shortcut.0"}


def build(seed: int = 0, *, convs_first: bool = False) -> Net:
    generator = torch.Generator().manual_seed(seed)
    net = Net(convs_first).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return net


def names(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Centralized)}


def batch(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, 3, 6, 6, generator=generator, dtype=torch.float64) + 0.5


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    losses = []
    for at in range(steps):
        optimizer.zero_grad()
        loss = model(batch(at)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def centred(weight: Tensor) -> Tensor:
    return weight - weight.flatten(1).mean(1).view(-1, *[1] * (weight.dim() - 1))


def effective(model: nn.Module) -> dict[str, Tensor]:
    """Parameters as the model computes with them."""
    return {
        name: centred(value.detach()) if name.removesuffix(".weight") in FEEDERS else value.detach()
        for name, value in model.named_parameters()
    }


@pytest.mark.parametrize("convs_first", [False, True])
def test_feeders_of_a_residual_block(convs_first):
    assert names(distnorm.convert(build(convs_first=convs_first), RECIPE)) == FEEDERS


@pytest.mark.parametrize(
    ("feeder", "norm", "shape"),
    [
        (nn.Conv1d(3, 4, 2), nn.BatchNorm1d(4), (2, 3, 6)),
        (nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), (2, 3, 6, 6)),
        (nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4), (2, 3, 4, 4, 4)),
        (nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="reflect"), nn.BatchNorm2d(4), (2, 4, 5, 5)),
        (nn.Linear(3, 4), nn.BatchNorm1d(4), (5, 3)),
    ],
)
def test_forward_and_gradients_are_those_of_an_explicit_centred_weight(feeder, norm, shape):
    model = nn.Sequential(copy.deepcopy(feeder), norm).double()
    stock = copy.deepcopy(model[0])
    distnorm.convert(model, RECIPE)
    assert isinstance(model[0], Centralized) and isinstance(model[0], type(feeder))
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = model[0](x)
    expected = torch.func.functional_call(stock, {"weight": centred(stock.weight)}, x)
    torch.testing.assert_close(y, expected)
    (grad,) = torch.autograd.grad(y.pow(3).sum(), model[0].weight)
    (right,) = torch.autograd.grad(expected.pow(3).sum(), stock.weight)
    torch.testing.assert_close(grad, right)
    assert grad.flatten(1).sum(1).abs().max() < 1e-9 * grad.abs().max()


def test_only_layers_that_feed_converted_norms():
    model = distnorm.convert(build(), RECIPE, where=["block.bn*"])
    assert names(model) == {"block.conv1", "block.conv2", "block.conv3"}


def test_parameters_keys_and_optimizer_stay():
    model = build()
    before, keys = list(model.parameters()), list(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    distnorm.convert(model, RECIPE)
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(model.parameters(), before, strict=True))
    weight = model.stem.weight.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(model.stem.weight, weight)
    model.load_state_dict(build(3).state_dict(), strict=True)


def test_one_weight_per_filter_is_left_alone_with_one_warning():
    layers = [nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    layers += [nn.Conv2d(4, 4, 1, groups=4), nn.BatchNorm2d(4)]
    model = nn.Sequential(*layers)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        distnorm.convert(model, RECIPE)
    assert len(seen) == 1 and "'0', '4'" in str(seen[0].message) and "one weight per filter" in str(seen[0].message)
    assert seen[0].filename == __file__
    assert names(model) == {"2"}


def test_revert_bakes_the_weights_and_gives_classes_back():
    model = distnorm.convert(build(), RECIPE)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3)
    model.eval()
    expected, parameters = model(batch()), list(model.parameters())
    distnorm.revert(model)
    assert {type(each) for each in model.modules()} == {type(each) for each in build().modules()}
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(model(batch()), expected, rtol=1e-12, atol=1e-12)
    assert model.stem.weight.flatten(1).mean(1).abs().max() < 1e-12
    distnorm.convert(model, RECIPE)  # and once more
    assert names(model) == FEEDERS


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(way):
    model = distnorm.convert(build(), RECIPE)
    copied = way(model)
    assert names(copied) == FEEDERS
    losses = [train(each, torch.optim.SGD(each.parameters(), lr=0.1), 3) for each in (model, copied)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


SGD = [
    {"lr": 0.1},
    {"lr": 0.05, "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 1e-2},
    {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2},
]


@pytest.mark.parametrize("options", SGD, ids=str)
def test_sgd_takes_the_projected_form_on_the_same_trajectory(options):
    forward, projected = (distnorm.convert(build(), RECIPE) for _ in range(2))
    optimizers = [torch.optim.SGD(each.parameters(), **options) for each in (forward, projected)]
    distnorm.attach(projected, optimizer=optimizers[1])
    assert all(layer.projected for layer in centralized(projected))
    losses = [train(each, optimizer, 20) for each, optimizer in zip((forward, projected), optimizers, strict=True)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(effective(projected), effective(forward), rtol=1e-9, atol=1e-9)
    assert projected.stem.weight.flatten(1).mean(1).abs().max() < 1e-12


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_other_optimizers_keep_the_forward_form(kind):
    bare, attached = (distnorm.convert(build(), RECIPE) for _ in range(2))
    optimizers = [kind(each.parameters(), lr=0.01) for each in (bare, attached)]
    distnorm.attach(attached, optimizer=optimizers[1])
    assert not any(layer.projected for layer in centralized(attached))
    losses = [train(each, optimizer, 5) for each, optimizer in zip((bare, attached), optimizers, strict=True)]
    torch.testing.assert_close(*losses, rtol=0, atol=0)


def test_weights_that_the_optimizer_does_not_step_keep_the_forward_form():
    model = distnorm.convert(build(), RECIPE)
    stem = model.stem.weight.detach().clone()
    distnorm.attach(model, optimizer=torch.optim.SGD(model.block.parameters(), lr=0.1))
    assert {name for name, each in model.named_modules() if getattr(each, "projected", False)} == FEEDERS - {"stem"}
    torch.testing.assert_close(model.stem.weight.detach(), stem, rtol=0, atol=0)


def test_after_remove_the_trajectory_goes_on():
    """Without its hook the projected form would let weights wander off; the forward form takes over."""
    plain, model = (distnorm.convert(build(), RECIPE) for _ in range(2))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (plain, model)]
    attachment = distnorm.attach(model, optimizer=optimizers[1])
    for each, optimizer in zip((plain, model), optimizers, strict=True):
        train(each, optimizer, 3)
    attachment.remove()
    losses = [train(each, optimizer, 5) for each, optimizer in zip((plain, model), optimizers, strict=True)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_projected_form_trains_centred(way):
    """The hook stays with the optimizer, so the copy cannot rely on it."""
    model = distnorm.convert(build(), RECIPE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    distnorm.attach(model, optimizer=optimizer)
    train(model, optimizer, 2)
    copied = way(model)
    losses = [train(model, optimizer, 5), train(copied, torch.optim.SGD(copied.parameters(), lr=0.1), 5)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)


def test_loaded_weights_of_the_projected_form_are_projected():
    """A stock checkpoint that is loaded after ``attach`` computes with centred weights from the first forward on."""
    plain, model = (distnorm.convert(build(), RECIPE) for _ in range(2))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (plain, model)]
    distnorm.attach(model, optimizer=optimizers[1])
    for each in (plain, model):
        each.load_state_dict(build(5).state_dict())
    losses = [train(each, optimizer, 3) for each, optimizer in zip((plain, model), optimizers, strict=True)]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0, 1e4])
@pytest.mark.parametrize("count", [2, 9, 576])
def test_centring_again_changes_nothing(count, mean, dtype):
    """Also where the mean is so large that its rounding, left in the weight, is above what is ignored."""
    weight = torch.randn(256, count, generator=torch.Generator().manual_seed(0), dtype=dtype) + mean
    once = ours.centred(weight, [1])
    assert torch.equal(ours.centred(once, [1]), once)
    exact = weight.double() - weight.double().mean(1, keepdim=True)
    torch.testing.assert_close(once.double(), exact, rtol=0, atol=8 * torch.finfo(dtype).eps * max(mean, 1))
    assert once.double().mean(1).abs().max() < 4 * torch.finfo(dtype).eps


def test_revert_after_sgd_leaves_what_was_centred():
    """In a copy, which knows of no optimizer, weights far from 0 were centred once more, by their rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    with torch.no_grad():
        model[0].weight += 50
    distnorm.convert(model, "sync_bn", weights="centralized")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 3, 6, 6)
    for _ in range(2):
        model(x).square().sum().backward()
        optimizer.step()
    weight, y = model[0].weight.detach().clone(), model.eval()(x)
    for each in (distnorm.revert(copy.deepcopy(model)), distnorm.revert(model)):
        assert torch.equal(each[0].weight, weight) and torch.equal(each(x), y)
