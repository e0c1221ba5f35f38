"""Hooks of the run module that come off again, and a world of one rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim import optimizer as torch_optimizer

from distnorm.integrations import job as job_module
from distnorm.layers import optimizer_hooks, untrained
from distnorm.layers.conversion import Conversion


@pytest.fixture
def clean_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is patched comes back; reports at exit are called by the tests."""
    for kind in (DistributedDataParallel, Optimizer, GradScaler, Conversion):
        monkeypatch.setattr(kind, "__init__", kind.__init__)
    for module in (torch, torch.serialization):
        monkeypatch.setattr(module, "save", module.save)
        monkeypatch.setattr(module, "load", module.load)
    monkeypatch.setattr(Conversion, "find_state", None)
    untrained._register_hook()  # These two register once per process. First done in here, they would be gone after.
    optimizer_hooks._register_hooks()
    hooks = torch_optimizer._global_optimizer_pre_hooks
    monkeypatch.setattr(torch_optimizer, "_global_optimizer_pre_hooks", type(hooks)(hooks))
    monkeypatch.setattr(job_module.atexit, "register", lambda _: None)
    monkeypatch.setattr("distnorm.integrations.wrapping.when_imported", lambda *_: None)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
