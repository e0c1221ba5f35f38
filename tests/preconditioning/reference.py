"""An independent transcription of BNP: the preconditioner as a matrix, and a training loop of its own, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DAMPING, EPS, MOMENTUM, RATE = 0.03, 1e-3, 0.2, 0.05
OPTIONS = {"damping": DAMPING, "eps": EPS, "momentum": MOMENTUM}


def matrix(mean: Tensor, var: Tensor, places: int) -> Tensor:
    """P = U D for one output: a bias, then a weight for each channel of ``mean`` and each place in the kernel."""
    size = 1 + len(mean) * places
    U, D = torch.eye(size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
    for channel in range(len(mean)):
        for place in range(places):
            at = 1 + channel * places + place
            U[0, at] = -mean[channel]
            D[at, at] = 1 / var[channel].sqrt()
    return U @ D


def explicit(weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """P P^T g, output by output; ``var`` has its damping already."""
    out, per_group = weight.shape[:2]
    places = weight[0, 0].numel()
    new_weight, new_bias = torch.empty_like(weight), torch.empty_like(bias)
    for o in range(out):
        first = o // (out // groups) * per_group
        P = matrix(mean[first : first + per_group], var[first : first + per_group], places)
        g = torch.cat([bias[o].reshape(1), weight[o].reshape(-1)])
        new = P @ P.T @ g
        new_bias[o], new_weight[o] = new[0], new[1:].view_as(weight[o])
    return new_weight, new_bias


def damped(var: Tensor, damping: float = DAMPING, eps: float = EPS) -> Tensor:
    return var + damping * max(var.tolist()) + eps


def channels_last(x: Tensor, kernel_dims: int) -> Tensor:
    """[values, channels]"""
    return x.movedim(x.dim() - 1 - kernel_dims, -1).reshape(-1, x.shape[x.dim() - 1 - kernel_dims])


class Net(nn.Module):
    """A convolution with stride and padding, one with groups, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 6, 2, groups=2)
        self.head = nn.Linear(6, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = torch.tanh(self.second(x))
        return self.head(x.mean((2, 3)))


def batch(step: int, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = 2 * torch.randn(size, 3, 6, 6, generator=generator, dtype=torch.float64) + 1
    return x, torch.randn(size, 2, generator=generator, dtype=torch.float64)


def loss_of(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (net(x) - y).square().sum()


class Running:
    """Running statistics of one layer, from whole batches."""

    def __init__(self, channels: int) -> None:
        self.mean = torch.zeros(channels, dtype=torch.float64)
        self.var = torch.ones(channels, dtype=torch.float64)

    def see(self, rows: Tensor, momentum: float = MOMENTUM) -> None:
        self.mean = (1 - momentum) * self.mean + momentum * rows.mean(0)
        self.var = (1 - momentum) * self.var + momentum * rows.var(0, correction=0)


def train(steps: Sequence[int], size: int = 6) -> dict[str, Tensor]:
    """Plain SGD on the joined batch, with explicit matrices."""
    net = Net()
    running = {"first": Running(3), "second": Running(4), "head": Running(6)}
    for step in steps:
        x, y = batch(step, size)
        h1 = F.relu(F.conv2d(x, net.first.weight, net.first.bias, stride=2, padding=1))
        h2 = torch.tanh(F.conv2d(h1, net.second.weight, net.second.bias, groups=2)).mean((2, 3))
        out = F.linear(h2, net.head.weight, net.head.bias)
        loss = (out - y).square().sum() / size
        inputs = {"first": channels_last(x, 2), "second": channels_last(h1, 2), "head": h2}
        parameters = list(net.parameters())
        gradients = dict(
            zip((name for name, _ in net.named_parameters()), torch.autograd.grad(loss, parameters), strict=True)
        )
        with torch.no_grad():
            for name, rows in inputs.items():
                layer = net.get_submodule(name)
                running[name].see(rows.detach())
                weight, bias = explicit(
                    gradients[f"{name}.weight"],
                    gradients[f"{name}.bias"],
                    running[name].mean,
                    damped(running[name].var),
                    getattr(layer, "groups", 1),
                )
                scale = min(1.0, len(rows) / layer.weight[0].numel())
                layer.weight -= RATE * scale * weight
                layer.bias -= RATE * scale * bias
    return {name: each.detach().clone() for name, each in net.named_parameters()}
