"""One rank of a small job to which something is done: it binds, goes on from a checkpoint, trains, saves.

It runs in a process of its own, and tells what it sees by lines of its log: see ``note``. What it raises ends it, as it
would end a script.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.integrations import checkpoint
from distnorm.transport import rendezvous
from tests.faults import actions, kernels
from tests.faults.apart import Host
from tests.faults.faults import RECIPES, TRANSPORTS, Fault, Point

C, N = 6, 4
STEPS = 8
AT = 4
"""The step in which it is done, when moving recipes are past their warm-up."""
SAVES = (1, 5)


class Net(nn.Module):
    """Norms of equal width; the first one sees data as it is, so that plain batch norm of the joined batch tells it."""

    def __init__(self, width: int = C) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.BatchNorm1d(C, affine=False)
        self.linear = nn.Linear(C, width)
        self.left, self.right = nn.BatchNorm1d(width), nn.BatchNorm1d(width)
        self.spare = nn.BatchNorm1d(width, affine=False)  # not always run: DDP would miss its gradients

    def forward(self, x: Tensor, order: tuple[str, ...] = ("left", "right")) -> Tensor:
        x = self.linear(self.first(x))
        for name in order:
            x = getattr(self, name)(x).tanh()
        return x


def batch(number: int, step: int) -> Tensor:
    """What rank ``number`` trains on."""
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(N, C, generator=generator, dtype=torch.float64) * (1 + number) + step


@dataclass
class Rank:
    """Rank ``number`` of the job whose files are in ``folder``."""

    number: int
    fault: Fault
    transport: str
    recipe: str
    folder: Path
    host: Host
    store: tuple[str, int]
    """Where the job's store is: address and port."""
    states: Path
    """Where folders of checkpoints are, by recipe."""

    def note(self, event: str, **what: Any) -> None:
        """Add a line to this rank's log."""
        with log_of(self.folder, self.number).open("a") as log:
            log.write(json.dumps({"event": event, "at": time.monotonic(), **what}) + "\n")

    @property
    def pids(self) -> list[int]:
        """Of all ranks, once all have started."""
        return [next(told["pid"] for told in read(self.folder, each) if "pid" in told) for each in range(2)]

    def differs(self, how: str) -> bool:
        """Whether this rank is the one that is built, or behaves, like ``how``."""
        return self.number == 1 and self.fault.do == how

    def run(self) -> None:
        """From the first line of the script to the last."""
        self.host.enter()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        logging.basicConfig(level=logging.INFO)
        self.note("started", pid=os.getpid())
        try:
            store = dist.TCPStore(*self.store, is_master=False)
            timeout = timedelta(seconds=self.fault.timeout_s)
            dist.init_process_group("gloo", store=store, rank=self.number, world_size=2, timeout=timeout)
            dist.barrier()
            self._script()
        except actions.OutOfData:
            return
        except BaseException as error:
            self.note("raised", kind=type(error).__name__, text=str(error))
            raise

    def _script(self) -> None:
        if self.fault.do in (*kernels.OF_FILES, *kernels.OF_RANKS):
            kernels.prepare(self.fault.do, self.folder / "cache", self.number)
            dist.barrier()
            kernels.use(self.fault.do, self.folder / "cache")
        model = self._model()
        if self.fault.at == "loading":
            self._load(model)
        dist.barrier()
        self._reach("binding")
        if self.fault.at == "building":
            self.note("fault")
        distnorm.attach(model)
        self._train(model)
        dist.barrier()
        dist.destroy_process_group()

    def _model(self) -> nn.Module:
        model = Net(C + self.differs("another_width")).double()
        if self.differs("another_dtype"):
            model.float()
        if self.differs("one_layer_more"):
            model.more = nn.BatchNorm1d(C)
        recipe = other(list(RECIPES), self.recipe) if self.differs("another_recipe") else self.recipe
        transport = other(list(TRANSPORTS), self.transport) if self.differs("another_transport") else self.transport
        return distnorm.convert(model, RECIPES[recipe], transport=transport)

    def _train(self, model: nn.Module) -> None:
        wrapped = DistributedDataParallel(model) if self.fault.ddp else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        seen = []
        handle = model.first.register_forward_hook(lambda layer, args, y: seen.append(y.detach()))
        y = torch.zeros(())
        model.linear.register_forward_hook(self._between)
        for self.step in range(STEPS):
            y = self._step(wrapped, optimizer)
            if self.step in SAVES:
                if self.step == SAVES[-1]:
                    self._reach("saving")
                checkpoint.save([model], self.folder / "saved")
        handle.remove()
        running = [buffer for name, buffer in model.named_buffers() if "spare" not in name]
        torch.save({"y": seen, "mean": model.first.running_mean}, self.folder / f"seen-{self.number}.pt")
        finite = bool(y.isfinite().all())
        self.note("ended", state=digest([*running, *model.parameters()]), running=digest(running), finite=finite)

    def _step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        x, order = batch(self.number, self.step), ("left", "right")
        if self.step >= AT:
            if self.differs("another_order"):
                order = ("right", "left")
            if self.differs("another_branch"):
                order = ("left", "spare")
            if self.fault.do in ("another_order", "another_branch", "poison") and self.step == AT:
                self.note("fault")
            if self.differs("poison") and self.step == AT:
                x[0] = torch.nan
        optimizer.zero_grad()
        y = model(x, order)
        y.square().sum().backward()
        self._reach("end of a step")
        if all(each.grad is None or each.grad.isfinite().all() for each in model.parameters()):  # as a GradScaler
            optimizer.step()
        return y.detach()

    def _between(self, layer: nn.Module, args: Any, h: Tensor) -> None:
        self._reach("forward")
        h.register_hook(lambda grad: self._reach("backward"))

    def _reach(self, point: Point) -> None:
        """Do what is to be done at ``point``, if it is to be done now."""
        action = actions.ACTIONS.get(self.fault.do)
        if action is None or point != self.fault.at or not (self.number == 1 or action in actions.OF_BOTH):
            return
        if point == "binding" and action is actions.kill:
            rendezvous._Room.leave = lambda room: actions.kill(self)  # when ranks have met once, and will again
        elif point in ("binding", "saving") or self.step == AT:
            action(self)

    def _load(self, model: nn.Module) -> None:
        another = self.fault.do == "state_of_another_recipe"
        mine = shutil.copytree(
            self.states / (other(list(RECIPES), self.recipe) if another else self.recipe),
            self.folder / f"given-{self.number}",
        )
        file = checkpoint.file_of(mine, self.number)
        if self.differs("truncated_file"):
            os.truncate(file, file.stat().st_size // 2)
        if self.differs("empty_file"):
            os.truncate(file, 0)
        if self.differs("garbage_file"):
            file.write_bytes(os.urandom(5000))
        dist.barrier()
        self.note("fault")
        checkpoint.load([model], mine)


def other(names: list[str], name: str) -> str:
    """The one behind ``name``."""
    return names[(names.index(name) + 1) % len(names)]


def digest(tensors: list[Tensor]) -> str:
    """Of their bits."""
    return hashlib.sha256(b"".join(each.detach().contiguous().numpy().tobytes() for each in tensors)).hexdigest()


def log_of(folder: Path, number: int) -> Path:
    return folder / f"log-{number}.jsonl"


def read(folder: Path, number: int) -> list[dict[str, Any]]:
    """What rank ``number`` has told so far."""
    path = log_of(folder, number)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
