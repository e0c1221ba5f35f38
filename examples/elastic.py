"""A job that survives the death of a worker: moving statistics go on bit for bit from the last checkpoint.

export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # restarts of gloo jobs fail without it in torch 2.13: pytorch#135712
torchrun --standalone --nproc_per_node 2 --max-restarts 1 examples/elastic.py FOLDER [--kill-at 25] [--steps 40]

Started again on the same folder with another number of processes, it goes on with warm windows and says so.
"""

import argparse
import hashlib
import os
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from task import LEARNING_RATE, STEPS, build_model, train_loader
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import distnorm
from distnorm.integrations import checkpoint

EVERY = 10


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write a folder of its own; only when every rank has finished does ``latest`` name it."""
    place = folder / f"step_{step}"
    checkpoint.save([model], place)  # one file per rank
    if dist.get_rank() == 0:
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, place / "model.pt")
    dist.barrier()
    if dist.get_rank() == 0:
        (folder / "latest.new").write_text(str(step))
        (folder / "latest.new").replace(folder / "latest")


def resume(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the latest checkpoint, if there is one; the step to go on with."""
    if not (folder / "latest").exists():
        return 0
    step = int((folder / "latest").read_text())
    state = torch.load(folder / f"step_{step}" / "model.pt")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    checkpoint.load([model], folder / f"step_{step}")
    return step


def train(folder: Path, steps: int = STEPS, kill_at: int | None = None) -> str:
    """Train up to ``steps``; a fingerprint of all parameters and statistics."""
    model = DistributedDataParallel(distnorm.convert(build_model(), "mabn", window=4, warmup=5))
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9)
    distnorm.attach(model, optimizer=optimizer)
    start = resume(folder, model, optimizer)
    for step, (images, labels) in enumerate(train_loader(dist.get_rank(), dist.get_world_size())):
        if start <= step < steps:
            if step == kill_at and dist.get_rank() == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
                os.kill(os.getpid(), signal.SIGKILL)
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if (step + 1) % EVERY == 0:
                save(folder, step + 1, model, optimizer)
    values = torch.cat([value.detach().double().flatten() for value in model.state_dict().values()])
    return f"started at step {start} state {hashlib.sha256(values.numpy().tobytes()).hexdigest()}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    print(f"RESULT rank {dist.get_rank()} of {dist.get_world_size()} {train(**vars(args))}", flush=True)
    dist.barrier()
    dist.destroy_process_group()
