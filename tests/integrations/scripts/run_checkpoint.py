"""A plain training script with a checkpoint that rank 0 writes: ``run_checkpoint.py FOLDER MODE...``.

Modes: ``straight`` trains all steps and saves in the middle, ``resumed`` continues from there, ``first`` lets only
rank 0 load. Each writes what every rank has seen in the second half.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

STEPS, HALF = 12, 7
folder = Path(sys.argv[1])


class Net(nn.Module):
    """The first layer feeds a norm and something else."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.second, self.norm2 = nn.Linear(6, 6), nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.head(self.norm2(self.second(self.norm1(y).relu())) + y)


def train(mode: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model, batches = Net(), torch.randn(STEPS, 2, 5, 4)
    saved = None
    if mode == "resumed" or (mode == "first" and dist.get_rank() == 0):
        saved = torch.load(folder / "last.pth")
        model.load_state_dict(saved["model"])
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    if mode == "resumed" and saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
    losses = []
    for step in range(0 if mode == "straight" else HALF, STEPS):
        loss = wrapped(batches[step, dist.get_rank()]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if mode == "straight" and step + 1 == HALF and dist.get_rank() == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "last.pth")
    values = {name: each.tolist() for name, each in model.state_dict().items()}
    return {"losses": losses[-(STEPS - HALF) :], "values": values}


dist.init_process_group("gloo")
for mode in sys.argv[2:]:
    (folder / f"{mode}{dist.get_rank()}.json").write_text(json.dumps(train(mode)))
dist.barrier()
dist.destroy_process_group()
