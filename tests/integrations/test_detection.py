"""Detectors: a head that runs several times per step, image sizes that differ, a rank without proposals.

The reference runs the same model in one process on all ranks' inputs, with stock batch norm on what all of them
together give one call of a layer.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import distnorm
from examples.detection import Detector, sample, wrap
from tests.support.pool import Pool

RANKS = 2
STEPS = 4


def detector() -> Detector:
    torch.manual_seed(1)
    return Detector().double()


def train(rank: int, engine: str, recipe: str, steps: int) -> tuple[dict[str, Tensor], list[dict[str, object]]]:
    """The trained state, and the state of what is kept over steps."""
    options = {"window": 4, "warmup": 4} if recipe == "mabn" else {}
    model = distnorm.convert(detector(), recipe, **options)
    wrapped = wrap(model, engine)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    distnorm.attach(model, optimizer=optimizer)
    for step in range(steps):
        image, proposals = sample(step, rank)
        wrapped(image.double(), proposals).backward()
        optimizer.step()
        optimizer.zero_grad()
    state = {
        name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in model.state_dict().items()
    }
    return state, distnorm.state_dict(model)


def through(layers: nn.Sequential, inputs: list[Tensor]) -> list[Tensor]:
    """``layers`` on the inputs of all ranks; a norm sees them as one batch, whatever their shapes."""
    for layer in layers:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            rows = [each.movedim(1, -1).flatten(0, -2) for each in inputs]
            y = F.batch_norm(
                torch.cat(rows), layer.running_mean, layer.running_var, layer.weight, layer.bias, True, 0.1, layer.eps
            )
            layer.num_batches_tracked += 1
            parts = y.split([len(each) for each in rows])
            inputs = [
                part.view(each.movedim(1, -1).shape).movedim(-1, 1) for part, each in zip(parts, inputs, strict=True)
            ]
        else:
            inputs = [layer(each) for each in inputs]
    return inputs


def joined_loss(model: Detector, samples: list[tuple[Tensor, Tensor]]) -> Tensor:
    features = through(model.stem, [image.double() for image, _ in samples])
    scores = []
    for level in range(3):
        scores += through(model.dense, [F.avg_pool2d(each, 2**level) for each in features])
    rows = [
        each.movedim(1, -1).flatten(0, 2)[proposals] for each, (_, proposals) in zip(features, samples, strict=True)
    ]
    scores += through(model.box, rows)
    scores += [model.mask(each) for each, (image, _) in zip(rows, samples, strict=True) if image.shape[-1] > 16]
    return sum(each.square().sum() for each in scores) / 1000 / RANKS  # gradients are averaged over ranks


def train_joined() -> dict[str, Tensor]:
    model = detector()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        joined_loss(model, [sample(step, rank) for rank in range(RANKS)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def test_the_samples_are_what_they_should_be() -> None:
    sizes = [[sample(step, rank)[0].shape[-1] for rank in range(RANKS)] for step in range(STEPS)]
    assert all(first != second for first, second in sizes)
    assert [len(sample(step, 1)[1]) for step in range(STEPS)] == [0, 6, 0, 6]
    assert any(size <= 16 for pair in sizes for size in pair) and any(size > 16 for pair in sizes for size in pair)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_sync_bn_equals_stock_on_the_joined_batch(pool: Pool, engine: str) -> None:
    expected = train_joined()
    for state, _ in pool.run(RANKS, train, engine, "sync_bn", STEPS):
        torch.testing.assert_close(state, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_mabn_shares_one_window_among_calls(pool: Pool, engine: str) -> None:
    """It runs, and ranks agree on what completed, though one of them had nothing to say about boxes."""
    (state, kept), (other, other_kept) = pool.run(RANKS, train, engine, "mabn", 12)
    torch.testing.assert_close(other, state, rtol=0, atol=0)
    assert all(value.isfinite().all() for value in state.values())
    assert kept[0]["step"] == other_kept[0]["step"] == 12
    windows = [[value for name, value in leaves(each) if "window" in name] for each in (kept, other_kept)]
    assert len(windows[0]) == 3 and any(value.any() for value in windows[0])
    torch.testing.assert_close(windows[1], windows[0], rtol=0, atol=0)


def leaves(tree: object, name: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(tree, Tensor):
        return [(name, tree)]
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else ()
    return [leaf for key, each in items for leaf in leaves(each, f"{name}/{key}")]
