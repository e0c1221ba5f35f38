"""The detector of ``detection.py`` under DeepSpeed: several forwards of one head, sizes that differ, no proposals.

DS_ACCELERATOR=cpu torchrun --standalone --nproc_per_node 2 examples/detection_deepspeed.py [--stage 3] [--recipe mabn]

ZeRO 0 bears a parameter that one rank leaves out (the mask head, which has no norm); ZeRO 1, 2 and 3 do not.
"""

import argparse
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from detection import Detector, sample

import distnorm.integrations.deepspeed


def start(model: Detector, stage: int, recipe: str, **options: object) -> Any:
    """DeepSpeed's engine with ZeRO ``stage``; ``options`` are the recipe's."""
    model.may_skip = stage == 0
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "distnorm": {"recipe": recipe, "options": options},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return engine


def train(engine: Any, steps: int) -> float:
    """The last loss; the engine's step is a step of moving statistics."""
    for step in range(steps):
        image, proposals = sample(step, dist.get_rank())
        loss = engine(image.to(engine.device), proposals.to(engine.device))
        engine.backward(loss)
        engine.step()
    return float(loss.detach())


def main(stage: int, recipe: str) -> None:
    """Train and report."""
    # On a CPU alone: DeepSpeed 0.19 would compile its shared-memory collectives for more than a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    distnorm.integrations.deepspeed.enable()
    torch.manual_seed(0)
    loss = train(start(Detector(), stage, recipe), steps=12)
    print(f"rank {dist.get_rank()}: loss {loss:.4f}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, choices=range(4), default=0)
    parser.add_argument("--recipe", default="sync_bn")
    main(**vars(parser.parse_args()))
