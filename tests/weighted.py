"""What the tests of standardized and normalized weights share: formulas per filter, and a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from distnorm.layers.reweighted import Reweighted
from tests.training import worn

KINDS = ("standardized", "normalized")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def numbers(*shape: int, seed: int = 0, mean: float = 0.3) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean


def places(layer: nn.Module) -> list[Any]:
    """An index per output channel, of the weights that make it."""
    if not isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return [(channel,) for channel in range(layer.weight.shape[0])]
    inputs, outputs = layer.weight.shape[0] // layer.groups, layer.weight.shape[1]
    return [
        (slice(group * inputs, (group + 1) * inputs), channel)
        for group in range(layer.groups)
        for channel in range(outputs)
    ]


def formula(kind: str, layer: nn.Module, gain: Tensor | None) -> Tensor:
    found = torch.empty_like(layer.weight.detach())
    for channel, place in enumerate(places(layer)):
        part = layer.weight.detach()[place]
        if kind == "standardized":
            variance = sum((value - part.mean()) ** 2 for value in part.flatten()) / part.numel()
            found[place] = (part - part.mean()) / (variance + 1e-5) ** 0.5
        else:
            found[place] = gain[channel] * part / sum(value**2 for value in part.flatten()) ** 0.5
    return found


class Net(nn.Module):
    """Layers that feed norms, of three kinds, and a head that feeds none."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 6, 3, bias=False), worn(nn.BatchNorm2d(6))
        self.up, self.norm2 = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2), worn(nn.BatchNorm2d(4))
        self.line, self.norm3 = nn.Linear(4, 5), worn(nn.BatchNorm1d(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.up(self.norm1(self.stem(x)).relu())).relu()
        return self.head(self.norm3(self.line(y.mean((2, 3)))).relu())


FEEDERS = ["stem", "up", "line"]


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def batch(step: int = 0) -> Tensor:
    return numbers(5, 3, 6, 6, seed=step)


def train(model: nn.Module, steps: int = 3, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    model.train()
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), 0.02)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model(batch(step)) - 1).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def evaluated(model: nn.Module) -> Tensor:
    return model.eval()(batch(99)).detach()


def names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, Reweighted)]


def layers(model: nn.Module) -> list[tuple[str, Any]]:
    return [(name, model.get_submodule(name)) for name in FEEDERS]
