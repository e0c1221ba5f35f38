"""The model of the benchmarks: a ResNet-18 for 32x32 images (He et al. 2016, without the initial pooling)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE = 32
CLASSES = 10


class Block(nn.Module):
    """ResNet's basic block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        shortcut = [nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)]
        self.shortcut = nn.Sequential(*shortcut) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions beside the shortcut."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def resnet18(width: int) -> nn.Sequential:
    """ResNet-18 with ``width`` channels in its first stage; equal weights at every call."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(4):
        for block in range(2):
            layers.append(Block(inputs, width << stage, 2 if stage and not block else 1))
            inputs = width << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def norm_shapes(width: int) -> list[tuple[int, int]]:
    """Channels and image side of every norm layer of ``resnet18(width)``."""
    return [(width << stage, IMAGE >> stage) for stage in range(4) for _ in range(5)]
