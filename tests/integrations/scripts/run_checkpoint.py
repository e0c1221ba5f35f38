"""A plain training script with a checkpoint that rank 0 writes: ``run_checkpoint.py FOLDER MODE...``.

Modes: ``straight`` trains all steps and saves in the middle, ``resumed`` continues from there, ``first`` lets only
rank 0 load. ``sharded`` and ``sharded_resumed`` are the first two under FSDP2. Each writes what every rank has seen in
the second half.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

STEPS, HALF = 12, 7
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
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
    sharded, saved = mode.startswith("sharded"), None
    path = folder / ("sharded.pth" if sharded else "last.pth")
    if mode.endswith("resumed") or (mode == "first" and dist.get_rank() == 0):
        saved = torch.load(path)
    if saved is not None and not sharded:
        model.load_state_dict(saved["model"])
    wrapped = fully_shard(model) if sharded else DistributedDataParallel(model)
    if saved is not None and sharded:
        set_model_state_dict(model, saved["model"], options=WHOLE)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=0.01, alpha=0.0)  # it remembers nothing
    losses = []
    for step in range(0 if mode in ("straight", "sharded") else HALF, STEPS):
        loss = wrapped(batches[step, dist.get_rank()]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if mode in ("straight", "sharded") and step + 1 == HALF:
            values = get_model_state_dict(model, options=WHOLE)
            if dist.get_rank() == 0:
                torch.save({"model": values, "epoch": 1}, path)
            dist.barrier()
    values = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    return {"losses": losses[-(STEPS - HALF) :], "values": {name: each.tolist() for name, each in values.items()}}


dist.init_process_group("gloo")
for mode in sys.argv[2:]:
    (folder / f"{mode}{dist.get_rank()}.json").write_text(json.dumps(train(mode)))
dist.barrier()
dist.destroy_process_group()
