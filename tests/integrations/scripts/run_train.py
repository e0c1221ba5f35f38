"""A plain training script: it knows nothing of distnorm. It writes what each process ended with into a folder."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

report = Path(sys.argv[-2])
with_accelerate = sys.argv[-1] == "accelerate"

torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
images, classes = torch.randn(20, 8, 3, 8, 8), torch.randint(4, (20, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
if with_accelerate:
    from accelerate import Accelerator

    accelerator = Accelerator()
    wrapped, optimizer = accelerator.prepare(model, optimizer)
else:
    rank = int(os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0")))
    size = int(os.environ.get("WORLD_SIZE", os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    wrapped = DistributedDataParallel(model)

rank, size = dist.get_rank(), dist.get_world_size()
losses = []
for step in range(20):
    mine = slice(rank * 8 // size, (rank + 1) * 8 // size)
    loss = nn.functional.cross_entropy(wrapped(images[step, mine]), classes[step, mine])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    total = loss.detach() / size
    dist.all_reduce(total)
    losses.append(total.item())
if with_accelerate:
    accelerator.save_state(report / "state")
found = {
    "arguments": sys.argv[1:-2],
    "processes": size,
    "layer": type(model[1]).__name__,
    "losses": losses,
    "running_mean": model[1].running_mean.tolist(),
    "running_var": model[1].running_var.tolist(),
    "weight": model[4].weight.flatten().tolist(),
}
(report / f"{rank}.json").write_text(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
