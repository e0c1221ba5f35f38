"""A small model for whole training loops, alike on every rank, and its batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import distnorm
from distnorm import Recipe

Trace = list[dict[str, Tensor]]


def build(recipe: Recipe, *, layers: int = 2, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(layers)]
    model = nn.Sequential(*blocks).to(dtype)
    generator = torch.Generator().manual_seed(0)  # the global one is common to all threaded ranks
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.1)
    return distnorm.convert(model, recipe)


def batch(step: int, rank: int, *, size: int | None = None) -> Tensor:
    """Of a size that differs by step and rank, unless ``size`` is given."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    rows = 2 + (step + rank) % 3 if size is None else size
    return torch.randn(rows, 4, generator=generator, dtype=torch.float64) * (1 + step / 5) + rank / 2


def loss_of(y: Tensor) -> Tensor:
    return (y - torch.linspace(-1, 1, y.shape[1], dtype=y.dtype)).square().mean()


def train_step(model: nn.Module, x: Tensor, *, lr: float = 0.05) -> dict[str, Tensor]:
    """One step of plain gradient descent on this rank's own loss; all that can be seen of it."""
    x = x.clone().requires_grad_()
    y = model(x)
    model.zero_grad()
    loss_of(y).backward()
    assert x.grad is not None
    seen = {"y": y.detach(), "dx": x.grad}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            seen[f"d {name}"] = parameter.grad.clone()
    torch.optim.SGD(model.parameters(), lr).step()
    return seen | {name: buffer.clone() for name, buffer in model.named_buffers()}


def train(model: nn.Module, rank: int, steps: range) -> Trace:
    return [train_step(model, batch(step, rank)) for step in steps]


def same(given: object, expected: object) -> None:
    """Equal bit for bit."""
    torch.testing.assert_close(given, expected, rtol=0, atol=0)


def shared_state(model: nn.Module) -> list[dict[str, Any]]:
    """The policies' part of what is saved."""
    return [each["reducer"] for each in distnorm.state_dict(model)]
