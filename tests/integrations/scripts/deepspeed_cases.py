"""Runs DeepSpeed engines on real ranks and saves what each rank saw: one job for many tests.

Under torchrun: ``deepspeed_cases.py FOLDER CASE ...``.
"""

from __future__ import annotations

import inspect
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.integrations.deepspeed import enable
from tests.integrations.scripts.deepspeed_models import (
    STEPS,
    configuration,
    loss_of,
    model,
    piece,
    statistics,
)

LEARNING_RATE = 0.1
SLOWLY = 1e-4  # a skipped step then hardly matters for the next one's statistics
MABN = {"recipe": "mabn", "options": {"window": 4, "warmup": 3}}


def engine_of(stage: int, recipe: dict[str, Any] | None, lr: float = LEARNING_RATE, **extra: Any) -> Any:
    net = model()
    config = configuration(stage, recipe, **extra)
    return deepspeed.initialize(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=lr), config=config)[0]


def weights(engine: Any) -> list[torch.Tensor]:
    parameters = list(engine.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=engine.zero_optimization_stage() == 3):
        return [each.detach().float().clone() for each in parameters]


def train(engine: Any, steps: range, accumulation: int = 1, dtype: torch.dtype = torch.float32) -> list[float]:
    losses = []
    for micro in range(steps.start * accumulation, steps.stop * accumulation):
        images, labels = piece(micro, dist.get_rank(), dist.get_world_size())
        loss = loss_of(engine(images.to(dtype)), labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def seen(engine: Any, losses: list[float]) -> dict[str, Any]:
    return {"losses": losses, "statistics": statistics(engine.module), "weights": weights(engine)}


def exact(stage: int) -> dict[str, Any]:
    engine = engine_of(stage, {"recipe": "sync_bn"})
    return seen(engine, train(engine, range(STEPS)))


def bf16(stage: int) -> dict[str, Any]:
    engine = engine_of(stage, {"recipe": "sync_bn"}, bf16={"enabled": True}, data_types={"buffer_dtype": "bf16"})
    return seen(engine, train(engine, range(STEPS), dtype=torch.bfloat16))


def moving(stage: int) -> dict[str, Any]:
    engine = engine_of(stage, MABN, gradient_accumulation_steps=2)
    with distnorm.Ledger(engine.module) as ledger:
        found = seen(engine, train(engine, range(STEPS), accumulation=2))
    return {
        **found,
        "collectives": {step: tally.collectives for step, tally in ledger.steps.items()},
        "step": distnorm.state_dict(engine.module)[0]["step"],
    }


def stock(stage: int) -> dict[str, Any]:
    """What the model's own file holds, after steps of an optimizer whose steps are not linear, and an evaluation."""
    net = model()
    config = configuration(stage, MABN, bf16={"enabled": True}) if stage else configuration(stage, MABN)
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config)[0]
    dtype = torch.bfloat16 if stage else torch.float32
    train(engine, range(6), dtype=dtype)
    engine.save_16bit_model(FOLDER, f"stock-{stage}.pt")
    dist.barrier()
    engine.eval()
    return {"y": engine(piece(0, 0, 1)[0].to(dtype)).detach(), "file": f"{FOLDER}/stock-{stage}.pt"}


def state_of(module: nn.Module) -> dict[str, Any]:
    """How many steps ended, and what is in the windows of mabn: an entry per layer and direction, newest not last."""
    (state,) = distnorm.state_dict(module)
    ring = state["reducer"]["then"]["window"]["ring"]
    return {"step": state["step"], "ring": ring.split([8, 8, 6, 6], dim=1)}


def moving_ddp(_: int) -> dict[str, Any]:
    """The same training with torch's own data parallelism, steps ended by hand."""
    net = distnorm.convert(model(), "mabn", window=4, warmup=3)
    wrapped = DistributedDataParallel(net)
    distnorm.attach(wrapped, manual=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    losses = []
    for micro in range(2 * STEPS):
        images, labels = piece(micro, dist.get_rank(), dist.get_world_size())
        loss = loss_of(wrapped(images), labels)
        (loss / 2).backward()
        losses.append(loss.item())
        if micro % 2:
            optimizer.step()
            optimizer.zero_grad()
            distnorm.end_step(net)
    return {"losses": losses, "statistics": statistics(net), "weights": [p.detach() for p in net.parameters()]}


def methods(stage: int) -> dict[str, Any]:
    """Losses of methods with parameters, state and computed weights of their own, here and in torch's parallelism."""
    found = {}
    weights = ("sync_bn(weights='standardized')", "sync_bn(weights='normalized')")
    for recipe in ("iebn", "mixture_norm", "gbn(deviation='mad')", "gbn(deviation='range')", *weights):
        engine = engine_of(stage, {"recipe": recipe})
        net = distnorm.convert(model(), recipe)
        wrapped, optimizer = DistributedDataParallel(net), torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
        expected = []
        for step in range(4):
            images, labels = piece(step, dist.get_rank(), dist.get_world_size())
            loss = loss_of(wrapped(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            expected.append(loss.item())
        found[recipe] = train(engine, range(4)), expected
    return found


def fp32(stage: int) -> dict[str, Any]:
    """What ``fp16`` is compared with."""
    engine = engine_of(stage, MABN, lr=SLOWLY)
    train(engine, range(STEPS))
    return state_of(engine.module)


def fp16(stage: int) -> dict[str, Any]:
    """A loss scale that overflows at first, and then settles."""
    scaled = {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 1000, "hysteresis": 1}
    engine = engine_of(stage, MABN, lr=SLOWLY, fp16=scaled)
    train(engine, range(STEPS), dtype=torch.float16)
    return {**state_of(engine.module), "skipped": engine.skipped_steps, "log": list(LOG)}


def resumed(stage: int) -> dict[str, Any]:
    folder = f"{FOLDER}/checkpoint-{stage}"
    engine = engine_of(stage, MABN)
    train(engine, range(6))
    engine.save_checkpoint(folder)
    straight = seen(engine, train(engine, range(6, 12)))
    again = engine_of(stage, MABN)
    again.load_checkpoint(folder)
    loaded = seen(again, train(again, range(6, 12)))
    cold = engine_of(stage, MABN)
    for file in Path(folder).glob(f"global_step6/distnorm_state_{dist.get_rank()}.pt"):
        file.unlink()
    dist.barrier()
    cold.load_checkpoint(folder)
    again_cold = seen(cold, train(cold, range(6, 12)))
    return {"straight": straight, "resumed": loaded, "cold": again_cold, "log": list(LOG)}


def partitioned(stage: int) -> dict[str, Any]:
    """Parameters that are partitioned as they are made, so that conversion sees none of them whole."""
    config = configuration(stage, MABN, bf16={"enabled": True})
    with deepspeed.zero.Init(config_dict_or_path=config):
        net = model()
    engine = deepspeed.initialize(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), config=config)[0]
    centralized = [type(each).__name__ for each in net if isinstance(each, nn.Conv2d)]
    found = {**seen(engine, train(engine, range(8), dtype=torch.bfloat16)), "centralized": centralized}
    images = piece(0, 0, 1)[0].to(torch.bfloat16)
    engine.eval()
    converted = engine(images).detach()
    with deepspeed.zero.GatheredParameters(list(net.parameters()), modifier_rank=0):
        distnorm.revert(net)
    kinds = [type(each).__name__ for each in net]
    return {**found, "kinds": kinds, "converted": converted, "reverted": engine(images).detach()}


class ModelParallel:
    """What Megatron hands to DeepSpeed: two model-parallel ranks, the others in data parallel."""

    def __init__(self) -> None:
        rank, world = dist.get_rank(), dist.get_world_size()
        self.members = list(range(rank % 2, world, 2))
        self.data, _ = dist.new_subgroups_by_enumeration([list(range(first, world, 2)) for first in (0, 1)])
        self.model, _ = dist.new_subgroups_by_enumeration([[first, first + 1] for first in range(0, world, 2)])

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data)

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.model

    def get_model_parallel_world_size(self) -> int:
        return 2

    def get_model_parallel_rank(self) -> int:
        return dist.get_rank(self.model)


def groups(stage: int) -> dict[str, Any]:
    """Data parallelism over every other rank. DeepSpeed keeps the unit for all later engines: run it last."""
    unit = ModelParallel()
    net = model()
    config = configuration(stage, {"recipe": "sync_bn"})
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE)
    engine = deepspeed.initialize(model=net, optimizer=optimizer, config=config, mpu=unit)[0]
    return {**seen(engine, train(engine, range(STEPS))), "members": unit.members}


def misspelt(_: int) -> dict[str, Any]:
    path = Path(FOLDER) / f"misspelt-{dist.get_rank()}.json"
    path.write_text(json.dumps(configuration(0, {"recipes": "sync_bn"})))
    net = model()
    try:
        deepspeed.initialize(model=net, optimizer=torch.optim.SGD(net.parameters(), lr=0.1), config=str(path))
    except ValueError as error:
        return {"error": str(error), "path": str(path)}
    return {"error": None}


def named(_: int) -> dict[str, Any]:
    """What of DeepSpeed the integration uses by name."""
    engine = engine_of(1, {"recipe": "sync_bn", "ledger": True})
    plain = type(engine)
    counted = [engine.global_steps]
    images, labels = piece(0, dist.get_rank(), dist.get_world_size())
    engine.backward(loss_of(engine(images), labels))
    counted.append(engine.global_steps)
    engine.step()
    counted.append(engine.global_steps)
    taking = ("scale", "save_checkpoint", "load_checkpoint")
    parameters = {name: list(inspect.signature(getattr(plain, name)).parameters)[1:] for name in taking}
    return {
        "initialize": str(inspect.signature(deepspeed.initialize)),
        "original": str(inspect.signature(ORIGINAL)),
        "data_parallel_ranks": dist.get_process_group_ranks(engine.data_parallel_group),
        "global_steps": counted,
        "arguments": {name: each[0] for name, each in parameters.items()},
        "save": set(parameters["save_checkpoint"]),
        "load": set(parameters["load_checkpoint"]),
    }


class Lines(logging.Handler):
    """Keeps what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        LOG.append(record.getMessage())


LOG: list[str] = []
ORIGINAL = deepspeed.initialize
CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    each.__name__: each
    for each in (exact, bf16, moving, moving_ddp, stock, methods, fp32, fp16, resumed, partitioned, groups, misspelt)
} | {"named": named}

if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else init_distributed compiles it, for 88 s
    FOLDER = sys.argv[1]
    deepspeed.init_distributed(dist_backend="gloo")
    logging.getLogger("distnorm").addHandler(Lines())
    enable()
    found = {}
    for case in sys.argv[2:]:
        name, _, stage = case.partition(":")
        found[case] = CASES[name](int(stage or 0))
    torch.save({"ranks": dist.get_world_size(), **found}, f"{FOLDER}/rank{dist.get_rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()
