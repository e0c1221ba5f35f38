"""Plain training loops that an optimizer's steps divide otherwise than backward passes do."""

import json
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def accumulate(steps: int) -> DistributedDataParallel:
    model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        for last in (False, False, True):
            with nullcontext() if last else model.no_sync():
                model(torch.randn(4, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def adversaries(steps: int) -> tuple[DistributedDataParallel, DistributedDataParallel]:
    generator = DistributedDataParallel(nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)))
    critic = DistributedDataParallel(nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 1)))
    of_critic = torch.optim.Adam(critic.parameters(), lr=0.01)
    of_generator = torch.optim.Adam(generator.parameters(), lr=0.01)

    def fake() -> Tensor:
        return generator(torch.randn(4, 2))

    for step in range(steps):
        of_critic.zero_grad()
        # One forward for both halves: a wrapped model's buffers must not change between forward and backward.
        score = critic(torch.cat((torch.randn(4, 4), fake().detach())))
        (score[4:].mean() - score[:4].mean()).backward()
        of_critic.step()
        if step % 2:
            of_generator.zero_grad()
            (-critic(fake()).mean()).backward()
            of_generator.step()
    return generator, critic


dist.init_process_group("gloo")
torch.manual_seed(dist.get_rank())
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    DistributedDataParallel(nn.Linear(2, 2))
accumulated = accumulate(6)
generator, critic = adversaries(4)

from distnorm.attach import conversions_of  # noqa: E402  # the loops above know nothing of it

found = {
    "processes": dist.get_world_size(),
    "warnings": [str(each.message) for each in caught],
    "steps": {
        name: [conversion.bound().step for conversion in conversions_of(model)]
        for name, model in {"accumulated": accumulated, "generator": generator, "critic": critic}.items()
    },
    "running_var": [model.module[1].running_var.tolist() for model in (accumulated, generator, critic)],
}
(Path(sys.argv[1]) / f"{dist.get_rank()}.json").write_text(json.dumps(found))
dist.barrier()
dist.destroy_process_group()
