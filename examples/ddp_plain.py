"""DistributedDataParallel and stock batch norm: a script that knows nothing of this package.

torchrun --standalone --nproc_per_node 2 examples/ddp_plain.py
"""

import torch
import torch.distributed as dist
from task import LEARNING_RATE, build_model, report, train_loader
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    """Train, evaluate, report."""
    dist.init_process_group("gloo")
    model = DistributedDataParallel(build_model())
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
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
    main()
