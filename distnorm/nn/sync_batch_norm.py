"""SyncBatchNorm: a drop-in replacement for torch.nn.SyncBatchNorm that also runs on the CPU."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from distnorm.convert import apply_to
from distnorm.layers.agreement import narrower
from distnorm.layers.conversion import Conversion
from distnorm.layers.module import DistNorm, DistSyncBatchNorm
from distnorm.layers.site import Site
from distnorm.methods import BatchNorm
from distnorm.policies import AllReduce
from distnorm.recipe import Recipe
from distnorm.selection import select

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class SyncBatchNorm(DistSyncBatchNorm):
    """Batch norm over the joined batch of a process group, with torch.nn.SyncBatchNorm's constructor, on any device.

    Input and output are ``[N, C, ...]``. Issues one collective per direction in training, none in evaluation. Raises
    what ``DistNorm`` raises.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
    ) -> None:
        """Take the arguments of torch.nn.SyncBatchNorm; a ``process_group`` of None means all ranks."""
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if not bias:  # torch 2.11 has no such option
            self.register_parameter("bias", None)
        name = f"SyncBatchNorm({num_features})"
        conversion = _conversion(process_group)
        self._site = Site(conversion, 0, name, nn.SyncBatchNorm, momentum, process_group)
        conversion.add(0, name, self)

    @classmethod
    def convert_sync_batchnorm(cls, module: ModuleT, process_group: dist.ProcessGroup | None = None) -> ModuleT:
        """Convert the batch norm layers of ``module``, stock ones to this class: as torch's, but in place.

        As in torch, all of them use the ``process_group`` given here, whatever group a SyncBatchNorm had before.
        Subclasses of batch norm convert as in ``distnorm.convert``. Issues no collective.

        Raises:
            ValueError: as ``distnorm.convert``.

        Warns:
            UserWarning: as ``distnorm.convert``.
        """
        conversion = _conversion(process_group)
        stock = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        layers, targets = select(module, conversion.recipe, None, dict.fromkeys(stock, cls))
        apply_to(module, {conversion: [each for each in layers if not isinstance(each[1], DistNorm)]}, targets)
        return module


def _conversion(process_group: dist.ProcessGroup | None) -> Conversion:
    recipe = Recipe(method=BatchNorm(), policy=AllReduce(), name="sync_bn")
    return Conversion(recipe, mesh=None, process_group=narrower(process_group, "SyncBatchNorm"))
