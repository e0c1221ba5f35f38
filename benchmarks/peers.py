"""What others do, from its public description: the designs that the benchmarks compare with.

* ``GatherNorm``, the design of torch's SyncBatchNorm (torch/nn/modules/_functions.py): forward, an all_gather of mean,
  inverse standard deviation and count; backward, an all_reduce of two sums. Torch's own refuses CPU tensors.
* ``NaiveNorm``: the mean and the mean of squares by two differentiable all_reduces, equal batches assumed; autograd
  does the rest.

``GatherNorm`` computes on the kernels of distnorm, which is more than its description gives it: what the benchmark
shows then is the communication.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distnorm.kernels import cpu


class GatherNorm(nn.BatchNorm2d):
    """Batch norm over all ranks: one all_gather forward, one all_reduce backward."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``."""
        y: Tensor = _Gather.apply(input, self.weight, self.bias, self)
        return y


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, layer: nn.BatchNorm2d) -> Tensor:
        raw, _, memory = cpu.moments(x)
        count = x.numel() // x.shape[1]
        local_mean, square = (raw[:-1] / count).view(2, -1)
        local_var = torch.addcmul(square, local_mean, local_mean, value=-1).clamp_min_(0)
        told = torch.cat((local_mean, (local_var + layer.eps).rsqrt_(), local_mean.new_full((1,), count))).float()
        answers = told.new_empty(dist.get_world_size() * told.numel())
        dist.all_gather_single(answers, told)
        means, invstds, counts = answers.view(-1, told.numel()).split([x.shape[1], x.shape[1], 1], dim=1)
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        var = ((invstds.pow(-2) - layer.eps + means.square()) * counts).sum(0) / total - mean.square()
        assert layer.running_mean is not None and layer.running_var is not None and layer.momentum is not None
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(var * (total / (total - 1)), layer.momentum)
        invstd = (var + layer.eps).rsqrt()
        ctx.save_for_backward(x, weight, mean, invstd, total)
        return cpu.apply(x, mean, invstd * weight, bias, into=memory)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, invstd, total = ctx.saved_tensors
        sum_dy, sum_dy_centred = cpu.cosums(dy, x, mean).float()
        shared = torch.cat((sum_dy, sum_dy_centred))
        dist.all_reduce(shared)
        mean_dy, mean_dy_centred = (shared / total).view(2, -1)
        scale = invstd * weight
        slope = -scale * invstd.square() * mean_dy_centred
        dx = cpu.combine(dy, x, mean, scale, -scale * mean_dy, slope)
        return dx, sum_dy_centred * invstd, sum_dy, None


class _AllReduce(torch.autograd.Function):
    """A sum over ranks, and back the sum of its gradients."""

    @staticmethod
    def forward(ctx: Any, local: Tensor) -> Tensor:
        total = local.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone()
        dist.all_reduce(total)
        return total


class NaiveNorm(nn.BatchNorm2d):
    """Batch norm over all ranks: two differentiable all_reduces, so two forward and two backward."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``input``."""
        ranks = dist.get_world_size()
        mean = _AllReduce.apply(input.mean((0, 2, 3))) / ranks
        var = _AllReduce.apply(input.square().mean((0, 2, 3))) / ranks - mean.square()
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            total = input.numel() // input.shape[1] * ranks
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (total / (total - 1)), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return input * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def replace_norms(model: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """Give the batch norms of ``model`` the class ``kind``; ``nn.Identity`` takes them out."""
    for name, child in list(model.named_children()):
        if not isinstance(child, nn.BatchNorm2d):
            replace_norms(child, kind)
        elif kind is nn.Identity:
            setattr(model, name, nn.Identity())
        else:
            child.__class__ = kind
    return model
