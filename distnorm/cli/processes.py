"""Predict how many processes ``accelerate launch`` starts for given arguments and config.

On the CPU it starts one process, for any num_processes, unless mpirun is configured (accelerate 1.15,
https://github.com/huggingface/accelerate/issues/2741). torchrun with ACCELERATE_USE_CPU=true starts all of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_FLAGS = {
    "multi_gpu": "MULTI_GPU",
    "tpu": "XLA",
    "use_deepspeed": "DEEPSPEED",
    "use_fsdp": "FSDP",
    "use_megatron_lm": "MEGATRON_LM",
}
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "WORLD_SIZE")  # as accelerate reads them


@dataclass(frozen=True)
class Processes:
    """The requested processes, and those that accelerate starts.

    Args:
        kind: accelerate's name of the launch, a value of ``distributed_type``.
        cpu: whether the CPU is requested.
        asked: the requested number of processes; None if it is not given, which accelerate reports itself.
        machines: the number of machines.
        world: the world size that each process sees.
        alone: whether several processes start, each with a world size of 1.
    """

    kind: str
    cpu: bool
    asked: int | None
    machines: int
    world: int | None
    alone: bool

    @property
    def are_dropped(self) -> bool:
        """Whether several CPU processes are requested, and accelerate would give each a world size of 1."""
        plain = self.kind == "NO" or self.kind.startswith("MULTI_")
        return self.cpu and plain and (self.asked or 0) > 1 and self.world == 1


def foresee(
    arguments: argparse.Namespace, config: Mapping[str, Any] | None, environment: Mapping[str, str]
) -> Processes:
    """Predict the processes that accelerate starts.

    Args:
        arguments: as accelerate's parser returns them.
        config: the values of the config file that accelerate reads; None if it reads none.
        environment: environment variables of the launcher.
    """
    values = config or {}
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    asked = _asked(arguments, config, devices)
    cpu = bool(arguments.cpu or values.get("use_cpu"))
    kind = _kind(arguments, config, several_devices=devices > 1 and (asked or 0) > 1)
    simple = arguments.cpu or kind in ("NO", "MULTI_CPU")
    hostfile = arguments.mpirun_hostfile or nested(values, "mpirun_config", "mpirun_hostfile")
    mpi_size = max(_number(environment.get(name)) for name in _MPI_SIZES)
    # DeepSpeed initializes ranks itself. All others, with Megatron, need a device or ACCELERATE_USE_CPU.
    alone = not simple and kind != "DEEPSPEED" and not devices and not _is_true(environment.get("ACCELERATE_USE_CPU"))
    world = 1 if alone else asked
    if simple and not hostfile:
        world = mpi_size
    return Processes(
        kind=kind,
        cpu=cpu,
        asked=asked,
        machines=arguments.num_machines or values.get("num_machines") or 1,
        world=world,
        alone=alone and (asked or 0) > 1,
    )


def nested(values: Mapping[str, Any], section: str, key: str) -> Any:
    """Return a value in a section of the config; None if there is none."""
    inner = values.get(section)
    return inner.get(key) if isinstance(inner, Mapping) else None


def _asked(arguments: argparse.Namespace, config: Mapping[str, Any] | None, devices: int) -> int | None:
    if arguments.num_processes is not None:
        return int(arguments.num_processes)
    if config is None:
        return devices
    number = config.get("num_processes", 1 if config.get("distributed_type") == "NO" else None)
    return number if isinstance(number, int) else None


def _kind(arguments: argparse.Namespace, config: Mapping[str, Any] | None, several_devices: bool) -> str:
    for flag, kind in _FLAGS.items():
        if getattr(arguments, flag):
            return kind
    if config is None:
        return "MULTI_GPU" if several_devices and not arguments.cpu else "NO"
    return str(config.get("distributed_type", "NO"))


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 1


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("1", "true", "yes", "y", "t", "on")
