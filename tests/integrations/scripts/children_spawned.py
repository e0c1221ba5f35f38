"""A script that starts its own ranks, and knows nothing of distnorm: ``children_spawned.py FOLDER spawn|fork``."""

import json
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def train(rank: int, folder: str, port: int) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in torch.randn(5, 8, 4):
        model(batch[rank * 4 : rank * 4 + 4]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    norm = model.module[1]
    found = {"processes": dist.get_world_size(), "layer": type(norm).__name__, "running": norm.running_var.tolist()}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if sys.argv[2] == "spawn":
        mp.spawn(train, (sys.argv[1], port), nprocs=2)
    else:
        mp.start_processes(train, (sys.argv[1], port), nprocs=2, start_method=sys.argv[2])
