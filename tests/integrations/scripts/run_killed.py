"""A plain training script of which rank 1 is killed in the middle of step 5, between its two norm layers."""

import json
import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


class Fate(nn.Module):
    forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += 1
        if self.forwards == 5 and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return x


signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it to the survivor, which shall speak for itself
dist.init_process_group("gloo", timeout=timedelta(hours=1))
(Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps({"processes": dist.get_world_size()}))
layers = nn.Linear(4, 6), nn.BatchNorm1d(6), Fate(), nn.Linear(6, 6), nn.BatchNorm1d(6)
model = DistributedDataParallel(nn.Sequential(*layers))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(50):
    model(torch.randn(4, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print("nobody was killed")
