"""What tests/distributed/test_checkpoint_files.py looks at: processes that end by SIGKILL while they save.

``killed_saves.py FOLDER``: prints, as JSON, what each of them left behind, and what a reader saw meanwhile.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import distnorm
from distnorm.integrations import checkpoint

WRITE = torch.save


def model_of(step: int) -> nn.Module:
    """Whose state has ``step`` in every value."""
    model = distnorm.convert(nn.Sequential(nn.BatchNorm1d(2000)), "mabn", warmup=0)
    state = distnorm.state_dict(model)
    state[0]["step"] = step
    state[0]["reducer"]["then"]["window"]["ring"].fill_(step)
    distnorm.load_state_dict(model, state)
    return model


def read(folder: Path) -> int:
    """The step of a file, all of whose values say it."""
    (state,) = torch.load(checkpoint.file_of(folder, 0), weights_only=True)["models"][0]
    assert bool((state["reducer"]["then"]["window"]["ring"] == state["step"]).all())
    return int(state["step"])


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half(state: object, file: Any) -> None:
    """A write that a signal ends."""
    WRITE({"world_size": 1, "models": []}, file)
    file.flush()
    die()


def before(place: object, name: str) -> Callable[[], None]:
    return lambda: setattr(place, name, die)


STAGES = {
    "writing": lambda: setattr(torch, "save", half),
    "written": before(os, "fsync"),
    "renaming": before(Path, "replace"),
    "renamed": before(os, "close"),
}


def child(act: Callable[[], None]) -> int:
    """The exit status of a process that acts."""
    process = os.fork()
    if process == 0:
        act()
        os._exit(0)
    return os.waitpid(process, 0)[1]


def killed(folder: Path, stage: str) -> dict[str, Any]:
    checkpoint.save([model_of(3)], folder)

    def act() -> None:
        model = model_of(4)
        STAGES[stage]()
        checkpoint.save([model], folder)

    status = child(act)
    seen = read(folder)
    resumed = model_of(0)
    checkpoint.load([resumed], folder)
    step = distnorm.state_dict(resumed)[0]["step"]
    checkpoint.save([model_of(5)], folder)
    files = sorted(path.name for path in folder.iterdir())
    return {"signal": os.WTERMSIG(status), "seen": seen, "step": step, "then": read(folder), "files": files}


def watched(folder: Path) -> list[int]:
    """Steps that a reader sees, while another process saves over and over."""
    checkpoint.save([model_of(1)], folder)
    process = os.fork()
    if process == 0:
        for step in range(2, 12):
            checkpoint.save([model_of(step)], folder)
        os._exit(0)
    seen = []
    while os.waitpid(process, os.WNOHANG) == (0, 0):
        seen.append(read(folder))
    return [*seen, read(folder)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found = {stage: killed(folder / stage, stage) for stage in STAGES}
    print("RESULT", json.dumps({**found, "watched": watched(folder / "watched")}))
