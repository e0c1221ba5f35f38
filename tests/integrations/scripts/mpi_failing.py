"""Started by mpirun: two ranks train over MPI until rank 1 fails in the way that is given."""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distnorm
from distnorm.attach import conversions_of
from distnorm.integrations import mpi


def fail(how: str) -> None:
    if how == "raises":
        raise ZeroDivisionError("rank 1 has had enough")
    if how == "exits":
        sys.exit(3)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()  # "absent", until somebody ends it


def main(how: str) -> None:
    torch.set_num_threads(1)
    mpi.init_process_group(timeout=timedelta(hours=1))
    model = distnorm.convert(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3)), "sync_bn", transport="mpi")
    for step in range(3):
        if step == 2 and dist.get_rank() == 1:
            fail(how)
        if step == 2 and how == "absent":
            (conversion,) = conversions_of(model)
            conversion.bound().topology.everyone()._timeout_s = 2.0  # until here, a busy machine may take its time
        x_NC: Tensor = torch.randn(4, 3)
        model(x_NC).square().sum().backward()
    print("nobody failed")


if __name__ == "__main__":
    main(sys.argv[1])
