"""The choice of the transport, by code or environment, and the check that the ranks of a job can use it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import cast, get_args

import torch.distributed as dist

from distnorm.transport.group import backend_for
from distnorm.types import Transport

VARIABLE = "DISTNORM_TRANSPORT"

OF_OUR_OWN = ("shm", "sockets")


def chosen(given: Transport | None) -> Transport:
    """Return ``given``, else the setting in the environment, else ``"torch"``.

    Raises:
        ValueError: there is no such transport; the message says where it was set, and what is allowed.
    """
    choice = os.environ.get(VARIABLE, "torch") if given is None else given
    if choice not in get_args(Transport):
        source = f"environment {VARIABLE}={choice!r}" if given is None else f"convert(transport={choice!r})"
        raise ValueError(f"{source}: allowed are {', '.join(get_args(Transport))}.")
    return cast(Transport, choice)


def check(transport: Transport, ranks: Sequence[int], devices: Sequence[str], world: dist.ProcessGroup) -> None:
    """Check that ``transport`` can send what layers on ``devices``, by rank, share. No collective.

    Raises:
        RuntimeError: it cannot; on all ranks.
    """
    if transport in ("torch", "mpi"):
        return
    for rank, device in zip(ranks, devices, strict=True):
        if transport in OF_OUR_OWN and device not in ("cpu", "meta"):
            raise RuntimeError(
                f"distnorm: transport={transport!r} supports layers on the CPU only; those of rank {rank} are "
                f"on {device}. Use transport='torch' ({VARIABLE}=torch), which uses the job's backend there."
            )
    # Large vectors, and asynchronous ones, use the job's own backend.
    served = {"cpu", *devices} - {"meta"} if transport in OF_OUR_OWN else set(devices) - {"meta"}
    others = {device: backend_for(world, device) for device in sorted(served) if backend_for(world, device) != "gloo"}
    if others or (transport in OF_OUR_OWN and sys.platform != "linux"):
        raise RuntimeError(
            f"distnorm: transport={transport!r} needs gloo as the job's backend"
            f"{', on Linux' if transport in OF_OUR_OWN else ''}; this job has {dist.get_backend_config(world)!r} on "
            f"{sys.platform}. Use transport='torch' ({VARIABLE}=torch), which uses what is available."
        )
