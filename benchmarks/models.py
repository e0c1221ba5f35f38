"""The models of the benchmarks: ResNets for 32x32 images (He et al. 2016, without the initial pooling)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

IMAGE = 32
CLASSES = 10


class Residual(nn.Module):
    """A branch and a shortcut, which is None where x itself will do; both end in a norm.

    ``last`` names the branch's, ``shortcut[1]`` is the other.
    """

    last: str
    shortcut: nn.Module | None

    def branch(self, x: Tensor) -> Tensor:
        """The branch up to its last norm."""
        raise NotImplementedError


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module | None:
    """A convolution and a norm, where sizes change."""
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class Block(Residual):
    """ResNet's basic block."""

    last = "norm2"

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def branch(self, x: Tensor) -> Tensor:
        """Two convolutions."""
        return self.conv2(functional.relu(self.norm1(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        """The branch beside the shortcut."""
        identity = x
        y = self.norm2(self.branch(x))
        if self.shortcut is not None:
            identity = self.shortcut(x)
        y += identity
        return functional.relu(y)


class Bottleneck(Residual):
    """ResNet's bottleneck: a 3x3 convolution between two of 1x1, within a quarter of the channels."""

    last = "norm3"

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        inner = outputs // 4
        self.conv1 = nn.Conv2d(inputs, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outputs, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outputs)
        self.shortcut = _shortcut(inputs, outputs, stride)

    def branch(self, x: Tensor) -> Tensor:
        """Three convolutions."""
        y = functional.relu(self.norm1(self.conv1(x)))
        return self.conv3(functional.relu(self.norm2(self.conv2(y))))

    def forward(self, x: Tensor) -> Tensor:
        """The branch beside the shortcut."""
        identity = x
        y = self.norm3(self.branch(x))
        if self.shortcut is not None:
            identity = self.shortcut(x)
        y += identity
        return functional.relu(y)


Maker = Callable[[int, int, int], Residual]


def _resnet(width: int, block: Maker, expansion: int, depths: tuple[int, ...]) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage, depth in enumerate(depths):
        for number in range(depth):
            outputs = expansion * width << stage
            layers.append(block(inputs, outputs, 2 if stage and not number else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, CLASSES))


def resnet18(width: int) -> nn.Sequential:
    """ResNet-18 with ``width`` channels in its first stage; equal weights at every call."""
    return _resnet(width, Block, 1, (2, 2, 2, 2))


def resnet50(width: int) -> nn.Sequential:
    """ResNet-50, whose first stage has ``width`` channels within its bottlenecks; equal weights at every call."""
    return _resnet(width, Bottleneck, 4, (3, 4, 6, 3))


MODELS: dict[str, Callable[[int], nn.Sequential]] = {"resnet18": resnet18, "resnet50": resnet50}


def norm_shapes(width: int) -> list[tuple[int, int]]:
    """Channels and image side of every norm layer of ``resnet18(width)``."""
    return [(width << stage, IMAGE >> stage) for stage in range(4) for _ in range(5)]
