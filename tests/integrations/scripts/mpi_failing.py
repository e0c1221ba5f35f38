"""Started by mpirun: two ranks train over MPI until rank 1 fails in the way that is given."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distnorm
from distnorm.integrations import mpi


def fail(how: str) -> None:
    if how == "raises":
        raise ZeroDivisionError("rank 1 has had enough")
    if how == "exits":
        sys.exit(3)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # "absent"


def main(how: str) -> None:
    torch.set_num_threads(1)
    mpi.init_process_group(timeout=timedelta(seconds=2 if how == "absent" else 60))
    model = distnorm.convert(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)), "sync_bn", transport="mpi")
    for step in range(3):
        if step == 2 and dist.get_rank() == 1:
            fail(how)
        x_NC: Tensor = torch.randn(4, 3)
        model(x_NC).square().sum().backward()
    print("nobody failed")


if __name__ == "__main__":
    main(sys.argv[1])
