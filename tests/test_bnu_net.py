"""The segmentation example: its images, its scores, and all of its contenders on two ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from examples import bnu_net
from examples.bnu_net import PLAIN, QUICK, Run, UNet, boundary_distance, dice, generate
from tests.support.pool import Pool


def square(top: int, left: int, side: int) -> torch.Tensor:
    mask = torch.zeros(1, 1, 12, 12)
    mask[..., top : top + side, left : left + side] = 1
    return mask


EMPTY = torch.zeros(1, 1, 12, 12)


@pytest.mark.parametrize(
    ("found", "mask", "overlap", "distance"),
    [
        (square(2, 2, 5), square(2, 2, 5), 1.0, 0.0),
        (square(2, 2, 1), square(2, 5, 1), 0.0, 3.0),
        (square(2, 2, 4), square(2, 4, 4), 0.5, None),
        (square(2, 2, 1), square(5, 6, 1), 0.0, 5.0),
        (EMPTY, square(2, 2, 5), 0.0, 12 * math.sqrt(2)),
        (EMPTY, EMPTY, 1.0, 0.0),
    ],
    ids=["the same", "one pixel aside", "half", "diagonally", "nothing found", "nothing there"],
)
def test_scores(found: torch.Tensor, mask: torch.Tensor, overlap: float, distance: float | None) -> None:
    assert dice(found, mask).tolist() == pytest.approx([overlap])
    if distance is None:  # from each of 12 boundary pixels: two columns of the square are not on the other's boundary
        columns = {each: [(r, c) for r in range(4) for c in range(4) if r in (0, 3) or c in (0, 3)] for each in (0, 2)}
        first, second = ([(r, c + shift) for r, c in columns[shift]] for shift in (0, 2))
        nearest = [min(math.dist(a, b) for b in second) for a in first]
        distance = sum(nearest) / len(nearest)  # the same the other way round
    assert boundary_distance(found, mask).tolist() == pytest.approx([distance])


def test_images_are_what_they_are_said_to_be() -> None:
    images, masks = generate(50, 24, torch.Generator().manual_seed(0))
    again, _ = generate(50, 24, torch.Generator().manual_seed(0))
    assert images.shape == masks.shape == (50, 1, 24, 24) and images.equal(again)
    area = masks.mean((1, 2, 3))
    assert 0 < area.min() and area.max() < 0.5
    spread = images.std((1, 2, 3))
    assert spread.max() > 2 * spread.min()


def test_networks_differ_by_norm_and_activation_only() -> None:
    plain, normed = UNet(False), UNet(True)
    convs = [[m.weight.shape for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (plain, normed)]
    assert convs[0] == convs[1]
    count = {kind: [sum(isinstance(m, kind) for m in net.modules()) for net in (plain, normed)]
             for kind in (nn.BatchNorm2d, nn.ELU, nn.ReLU)}  # fmt: skip
    assert count == {nn.BatchNorm2d: [0, 10], nn.ELU: [0, 10], nn.ReLU: [10, 0]}


def train(rank: int) -> list[Run]:
    torch.set_num_threads(1)
    return bnu_net.train_all(replace(QUICK, steps=12))


def test_every_contender_trains_on_two_ranks(pool: Pool) -> None:
    runs, _ = pool.run(2, train)
    assert [run.contender for run in runs] == [PLAIN, *QUICK.recipes]
    assert all(0 <= run.dice <= 1 and 0 <= run.distance < 24 * 1.4143 for run in runs)
    assert [run.collectives for run in runs[:3]] == [0, 0, 12 * 20]
    assert 0 < runs[3].collectives < 12 * 20
    lines = bnu_net.table(runs).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert lines[3].split()[:2] == ["BNU-Net,", "sync_bn"]
