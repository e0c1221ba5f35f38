"""A script that starts its own ranks, and knows nothing of distnorm: ``children_spawned.py FOLDER WAY``."""

import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def train(rank: int, folder: str, port: int) -> None:
    method = "env://" if "TORCHELASTIC_RUN_ID" in os.environ else f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2)
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


def start(folder: str, way: str, port: int) -> None:
    mine = [sys.executable, __file__, folder, "rank"]
    if way == "programs":  # one by its path, one through a shell that looks for it
        ranks = [
            subprocess.Popen([*mine, "0", str(port)]),
            subprocess.Popen(f"python {shlex.join([*mine[1:], '1', str(port)])}", shell=True),
        ]
        assert [each.wait() for each in ranks] == [0, 0]
    elif way == "torchrun":
        assert os.system(f"torchrun --standalone --nproc_per_node 2 {shlex.join([*mine[1:], 'RANK', str(port)])}") == 0
    else:
        mp.start_processes(train, (folder, port), nprocs=2, start_method=way)


if __name__ == "__main__":
    folder, way, *place = sys.argv[1:]
    if way == "rank":
        train(int(os.environ.get(place[0], place[0])), folder, int(place[1]))
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start(folder, way, port)
