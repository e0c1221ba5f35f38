"""Batch norms of other packages, restated: what they compute, under their qualified names.

The packages themselves cannot be installed with the tests: they need torchvision, a GPU or a compiler.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


def _is_known_as(name: str):
    def rename(cls: type) -> type:
        cls.__module__, cls.__qualname__ = name.rsplit(".", 1)
        return cls

    return rename


def _stock(layer: nn.Module, x: Tensor) -> Tensor:
    """Batch norm of what this rank has, with torch's functions, as these classes compute it."""
    track = layer.training and layer.track_running_stats
    if track:
        layer.num_batches_tracked.add_(1)
    uses = layer.training or layer.running_mean is None
    kept = (None, None) if layer.training and not track else (layer.running_mean, layer.running_var)
    return F.batch_norm(x, *kept, layer.weight, layer.bias, uses, layer.momentum, layer.eps)


def _state(layer: nn.Module, channels: int, eps: float = 1e-5) -> None:
    """Give a plain module what a batch norm has."""
    layer.num_features, layer.eps, layer.momentum = channels, eps, 0.1
    layer.affine = layer.track_running_stats = True
    layer.weight, layer.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
    layer.register_buffer("running_mean", torch.zeros(channels))
    layer.register_buffer("running_var", torch.ones(channels))
    layer.register_buffer("num_batches_tracked", torch.tensor(0))


@_is_known_as("timm.layers.norm_act.BatchNormAct2d")
class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, channels: int, act: type[nn.Module] = nn.SiLU, drop: type[nn.Module] = nn.Identity) -> None:
        super().__init__(channels)
        self.drop, self.act = drop(), act(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(_stock(self, x)))


@_is_known_as("timm.layers.norm_act.SyncBatchNormAct")
class SyncBatchNormAct(nn.SyncBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for name in ("drop", "act"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


@_is_known_as("timm.layers.norm_act.FrozenBatchNormAct2d")
class FrozenBatchNormAct2d(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias))


@_is_known_as("timm.layers.split_batchnorm.SplitBatchNorm2d")
class SplitBatchNorm2d(nn.BatchNorm2d):
    def __init__(self, channels: int, splits: int = 2) -> None:
        super().__init__(channels)
        self.splits = splits
        self.aux_bn = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(splits - 1))

    def forward(self, input: Tensor) -> Tensor:
        if self.training:
            parts = input.split(input.shape[0] // self.splits)
            done = [super().forward(parts[0])]
            for norm, part in zip(self.aux_bn, parts[1:], strict=True):
                done.append(norm(part))
            y = torch.cat(done)
        else:
            y = super().forward(input)
        return self.act(y) if hasattr(self, "act") else y


@_is_known_as("mmcv.ops.sync_bn.SyncBatchNorm")
class MMSyncBatchNorm(nn.Module):
    def __init__(self, channels: int, group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        _state(self, channels)
        self.group = group
        self.group_size = dist.get_world_size(group) if dist.is_initialized() else 1

    def forward(self, input: Tensor) -> Tensor:
        return _stock(self, input)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.num_features}, group_size={self.group_size})"


@_is_known_as("apex.parallel.optimized_sync_batchnorm.SyncBatchNorm")
class ApexSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    def __init__(self, channels: int, channel_last: bool = False, fuse_relu: bool = False) -> None:
        super().__init__(channels)
        self.process_group, self.channel_last, self.fuse_relu = None, channel_last, fuse_relu

    def forward(self, input: Tensor, z: Tensor | None = None) -> Tensor:
        last = self.channel_last and input.dim() > 2
        y = _stock(self, input.movedim(-1, 1) if last else input)
        y = y.movedim(1, -1) if last else y
        y = y if z is None else y + z
        return y.relu() if self.fuse_relu else y


@_is_known_as("detectron2.layers.batch_norm.NaiveSyncBatchNorm")
class NaiveSyncBatchNorm(nn.BatchNorm2d):
    def __init__(self, channels: int, *, stats_mode: str = "") -> None:
        super().__init__(channels)
        self._stats_mode = stats_mode

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        var, mean = torch.var_mean(input, (0, 2, 3), correction=0)
        with torch.no_grad():
            self.running_mean += self.momentum * (mean - self.running_mean)
            self.running_var += self.momentum * (var - self.running_var)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return input * scale[:, None, None] + (self.bias - mean * scale)[:, None, None]


@_is_known_as("inplace_abn.abn.ABN")
class ABN(nn.Module):
    def __init__(self, channels: int, activation: str = "leaky_relu", activation_param: float = 0.2) -> None:
        super().__init__()
        _state(self, channels)
        self.activation, self.activation_param = activation, activation_param

    def forward(self, x: Tensor) -> Tensor:
        y, a = _stock(self, x), self.activation_param
        functions = {"relu": F.relu, "leaky_relu": lambda y: F.leaky_relu(y, a), "elu": lambda y: F.elu(y, a)}
        return functions.get(self.activation, lambda y: y)(y)


@_is_known_as("inplace_abn.abn.InPlaceABNSync")
class InPlaceABNSync(ABN):
    pass


class Derived(BatchNormAct2d):
    """A user's class on top of timm's."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1
