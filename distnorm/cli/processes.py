"""How many processes ``accelerate launch`` makes of its arguments and config, before it starts any.

On CPU it starts one process, whatever num_processes says, unless mpirun is configured (accelerate 1.15,
https://github.com/huggingface/accelerate/issues/2741). torchrun with ACCELERATE_USE_CPU=true starts them all.
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
    """What is asked for, and what comes of it.

    Args:
        kind: accelerate's name of the launch, a value of ``distributed_type``.
        cpu: whether CPU is asked for.
        asked: how many processes are asked for; None where accelerate itself complains that nobody says.
        machines: on how many machines.
        world: ranks that see each other.
        alone: whether processes start but each believes to be the only one.
    """

    kind: str
    cpu: bool
    asked: int | None
    machines: int
    world: int | None
    alone: bool

    @property
    def are_dropped(self) -> bool:
        """Whether several CPU processes are asked for, and accelerate would let one train, or each alone."""
        plain = self.kind == "NO" or self.kind.startswith("MULTI_")
        return self.cpu and plain and (self.asked or 0) > 1 and self.world == 1


def foresee(
    arguments: argparse.Namespace, config: Mapping[str, Any] | None, environment: Mapping[str, str]
) -> Processes:
    """Foresee what accelerate does.

    Args:
        arguments: as accelerate's parser returns them.
        config: the config file that it reads; None if it reads none.
        environment: variables that the launcher sees.
    """
    values = config or {}
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    asked = _asked(arguments, config, devices)
    cpu = bool(arguments.cpu or values.get("use_cpu"))
    kind = _kind(arguments, config, several_devices=devices > 1 and (asked or 0) > 1)
    simple = arguments.cpu or kind in ("NO", "MULTI_CPU")
    hostfile = arguments.mpirun_hostfile or nested(values, "mpirun_config", "mpirun_hostfile")
    mpi_size = max(_number(environment.get(name)) for name in _MPI_SIZES)
    # DeepSpeed sets up ranks by itself. Megatron, like the rest, needs a device, or word that it is to do without.
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
    """A value in a section of the config; None if there is none."""
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
