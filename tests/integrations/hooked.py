"""Models as a wrapper of the run module gets them, in one process."""

from __future__ import annotations

import torch
from torch import nn

from distnorm.attach import conversions_of
from distnorm.integrations.job import Job, WatchedSettings
from distnorm.integrations.wrapping import install
from distnorm.settings import Settings

MABN = Settings(recipe="mabn", options={"warmup": 2, "window": 3, "weights": "none"})


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def converted(settings: Settings = MABN) -> tuple[Job, nn.Sequential]:
    """A model as a wrapper would get it, in a process without a group."""
    job, model = install(settings), net()
    assert WatchedSettings.of_job(job, follow=True).convert(model)
    return job, model


def backward(model: nn.Module, times: int = 1, scale: float = 1.0) -> None:
    for _ in range(times):
        (scale * model(torch.randn(5, 3)).square().mean()).backward()


def steps_of(model: nn.Module) -> int:
    (conversion,) = conversions_of(model)
    return conversion.bound().step
