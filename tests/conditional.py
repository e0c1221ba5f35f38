"""Layers whose affine part is an input, transcribed from their equations: plain float64, no norm of torch's or ours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

EPS = 1e-5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one_hot_map(samples: int, channels: int, height: int, width: int) -> Tensor:
    ids = torch.randint(channels, (samples, height, width), generator=torch.Generator().manual_seed(1))
    return F.one_hot(ids, channels).movedim(-1, 1).double()


def standard(x: Tensor, dims: tuple[int, ...], eps: float = EPS) -> Tensor:
    centred = x - x.mean(dims, keepdim=True)
    return centred / (centred.square().mean(dims, keepdim=True) + eps).sqrt()


def per_instance(x: Tensor) -> Tensor:
    return standard(x, tuple(range(2, x.dim())))


def per_channel(x: Tensor) -> Tensor:
    return standard(x, (0, *range(2, x.dim())))


def by_class(normalized: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Sample by sample."""
    outputs = []
    for y, label in zip(normalized, labels, strict=True):
        share = label if labels.dim() == 2 else F.one_hot(label.long(), len(weight)).to(weight.dtype)
        scale = sum(part * row for part, row in zip(share, weight, strict=True))
        shift = sum(part * row for part, row in zip(share, bias, strict=True))
        outputs.append(torch.stack([a * each + b for a, each, b in zip(scale, y, shift, strict=True)]))
    return torch.stack(outputs)


def adain(x: Tensor, style: Tensor, alpha: float = 1.0) -> Tensor:
    spatial = tuple(range(2, style.dim()))
    mean = style.mean(spatial)
    std = ((style**2).mean(spatial) - mean**2 + EPS).sqrt()
    y = per_instance(x)
    t = y * std.view(*std.shape, *(1,) * (y.dim() - 2)) + mean.view(*std.shape, *(1,) * (y.dim() - 2))
    return alpha * t + (1 - alpha) * x


def conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Cross-correlation with zero padding that keeps the size, from shifted copies."""
    size = weight.shape[-1]
    height, width = x.shape[2:]
    padded = F.pad(x, [size // 2] * 4)
    total = bias.view(1, -1, 1, 1)
    for i in range(size):
        for j in range(size):
            part = padded[:, :, i : i + height, j : j + width]
            total = total + torch.einsum("oc,nchw->nohw", weight[:, :, i, j], part)
    return total


def nearest(map: Tensor, height: int, width: int) -> Tensor:
    rows = [i * map.shape[2] // height for i in range(height)]
    columns = [j * map.shape[3] // width for j in range(width)]
    return map[:, :, rows][:, :, :, columns]


def spade(normalized: Tensor, map: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """Of parameters by the names that the layer gives them."""

    def through(name: str, x: Tensor) -> Tensor:
        return conv(x, parameters[f"{name}.weight"], parameters[f"{name}.bias"])

    hidden = through("shared", nearest(map, *normalized.shape[2:])).clamp(min=0)
    return normalized * (1 + through("gamma", hidden)) + through("beta", hidden)
