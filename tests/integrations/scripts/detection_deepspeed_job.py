"""Trains the detector under several stages of ZeRO, in one job: ``torchrun ... FOLDER RECIPE:STAGE ...``.

``skips:STAGE`` lets ranks leave the mask head out, whatever the stage.
"""

from __future__ import annotations

import sys
from typing import Any

import deepspeed
import deepspeed.ops
import detection_deepspeed
import torch
import torch.distributed as dist
from detection import Detector

import distnorm
import distnorm.integrations.deepspeed

OPTIONS: dict[str, dict[str, Any]] = {"sync_bn": {}, "mabn": {"window": 4, "warmup": 4}}
STEPS = {"sync_bn": 4, "mabn": 12}


def trained(recipe: str, stage: int) -> dict[str, Any]:
    torch.manual_seed(1)
    model = Detector()
    if recipe == "skips":
        engine = detection_deepspeed.start(model, stage, "sync_bn")
        model.may_skip = True
        detection_deepspeed.train(engine, 4)
        return {}
    engine = detection_deepspeed.start(model, stage, recipe, **OPTIONS[recipe])
    detection_deepspeed.train(engine, STEPS[recipe])
    with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
        state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    return {"state": state, "kept": distnorm.state_dict(model), "stage": engine.zero_optimization_stage()}


if __name__ == "__main__":
    folder, *cases = sys.argv[1:]
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else init_distributed compiles it, for 88 s
    deepspeed.init_distributed(dist_backend="gloo")
    distnorm.integrations.deepspeed.enable()
    found = {case: trained(case.split(":")[0], int(case.split(":")[1])) for case in cases}
    torch.save({"ranks": dist.get_world_size(), **found}, f"{folder}/rank{dist.get_rank()}.pt")
    detection_deepspeed.main(1, "lazy_bn")  # the example as it is; it ends the process group
