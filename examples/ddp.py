"""DistributedDataParallel with synchronized statistics.

torchrun --standalone --nproc_per_node 2 examples/ddp.py sync_bn
"""

import sys

import torch
import torch.distributed as dist
from task import LEARNING_RATE, build_model, report, train_loader
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import distnorm  # distnorm


def main(recipe: str = "sync_bn") -> None:
    """Train with ``recipe``, evaluate, report."""
    dist.init_process_group("gloo")
    model = DistributedDataParallel(distnorm.convert(build_model(), recipe))  # distnorm
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    distnorm.attach(model, optimizer=optimizer)  # distnorm: moving statistics count its steps
    losses = []
    for images, labels in train_loader(dist.get_rank(), dist.get_world_size()):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    report(model.module, losses)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
