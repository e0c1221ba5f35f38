"""Trains the detector under Lightning's ddp, in float64 and one job: ``torchrun ... FOLDER``."""

from __future__ import annotations

import sys
from typing import Any

import detection_lightning
import torch
import torch.distributed as dist
from detection import Detector
from lightning.pytorch import Callback, LightningModule, Trainer

import distnorm
from distnorm.integrations.lightning import DistNormSync


class Keep(Callback):
    """What the layers hold at the end of training; ``fit`` reverts them."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.state = {name: value.clone() for name, value in pl_module.detector.state_dict().items()}
        self.kept = distnorm.state_dict(pl_module)


def trained(steps: int, recipe: str, **options: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    module, keep = detection_lightning.Detection(Detector(), steps), Keep()
    detection_lightning.fit(module, DistNormSync(recipe, **options), precision="64-true", callbacks=[keep])
    return {"state": keep.state, "kept": keep.kept}


if __name__ == "__main__":
    found = {"sync_bn": trained(4, "sync_bn"), "mabn": trained(12, "mabn", window=4, warmup=4)}
    torch.save({"ranks": dist.get_world_size(), **found}, f"{sys.argv[1]}/rank{dist.get_rank()}.pt")
    detection_lightning.main("lazy_bn")  # the example as it is
    dist.barrier()
    dist.destroy_process_group()
