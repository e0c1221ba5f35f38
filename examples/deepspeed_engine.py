"""DeepSpeed's engine: one line, and the section "distnorm" of its JSON says the rest.

DS_ACCELERATOR=cpu torchrun --standalone --nproc_per_node 2 examples/deepspeed_engine.py launch/deepspeed/zero2.json
"""

import sys

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from task import LEARNING_RATE, build_model, report, train_loader
from torch.nn import functional

import distnorm.integrations.deepspeed


def main(config: str) -> None:
    """Train, evaluate, report."""
    # On a CPU alone: DeepSpeed 0.19 would compile its shared-memory collectives for more than a minute.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo")
    distnorm.integrations.deepspeed.enable()
    model = build_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for images, labels in train_loader(dist.get_rank(), dist.get_world_size()):
        loss = functional.cross_entropy(engine(images.to(engine.device)), labels.to(engine.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    report(engine.module, losses)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
