"""Runs rows of the table, each as two forks of a process that has imported torch, and judges how the ranks ended.

``python -m tests.faults.runner`` reads rows from its input, a line of JSON each, and writes a line for each; `Runner`
is the other end. docs/decisions.md#the-fault-table-forks-its-ranks
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
import torch.distributed as dist

import distnorm
from distnorm.transport import shared_memory, sockets  # noqa: F401  # for the forks
from tests.faults import apart
from tests.faults.apart import RANKS, STRANGER, Host
from tests.faults.faults import BY_NAME, TRANSPORTS, Fault
from tests.faults.judge import Found, Judged, judge
from tests.faults.rank import Net, Rank, read

HANG_S = 45.0
"""How much longer than its timeout a job may take before it is ended."""
PR_SET_PDEATHSIG = 1
LINGER_S = 8.0
"""How long what a rank has started may live on, such as the child of a row."""


class Runner:
    """A process that runs rows, one after another."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.faults.runner"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        self._process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process when its row is done."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(120)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def run(self, fault: str, transport: str, recipe: str) -> Judged:
        """What came of one row."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([fault, transport, recipe]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the runner ended in row {fault}, {transport}, {recipe}")
        return Judged(**json.loads(line))


@dataclass
class _Jobs:
    """Rows, and what they can be compared with."""

    states: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="distnorm-faults-")))
    undisturbed: dict[tuple[str, str], Found] = field(default_factory=dict)

    def run(self, fault: Fault, transport: str, recipe: str) -> Judged:
        ends = fault.must(transport, recipe)[0]
        undisturbed = self.undisturbed_of(transport, recipe) if {"right", "right or error"} & set(ends) else None
        if fault.at == "loading":
            for each in ("sync_bn", "mabn", "lazy_bn"):
                self.undisturbed_of(TRANSPORTS[0], each)
        found = self.start(fault, transport, recipe)
        return judge(found, fault, transport, recipe, undisturbed)

    def undisturbed_of(self, transport: str, recipe: str) -> Found:
        key = transport, recipe
        if key not in self.undisturbed:
            self.undisturbed[key] = self.start(BY_NAME["nothing"], transport, recipe)
        return self.undisturbed[key]

    def start(self, fault: Fault, transport: str, recipe: str) -> Found:
        """Fork the ranks, and wait until all that belongs to them has ended."""
        folder = Path(tempfile.mkdtemp(prefix="distnorm-fault-"))
        helpers, hosts = [], [Host()] * RANKS
        if fault.apart:
            helpers.append(_fork(folder / "output-hosts", lambda: apart.keep(folder / "hosts")))
            hosts = apart.hosts_in(_wait_for(folder / "hosts", helpers[-1]))
        helpers.append(_fork(folder / "output-port", lambda: _serve(folder, hosts[0])))
        store = hosts[0].address, int(_wait_for(folder / "port", helpers[-1]))
        forks = [
            _fork(
                folder / f"output-{number}",
                Rank(number, fault, transport, recipe, folder, hosts[number], store, self.states).run,
            )
            for number in range(RANKS)
        ]
        if fault.do == "let_stranger_in":
            helpers.append(_fork(folder / "output-stranger", lambda: _call(hosts[STRANGER], forks)))
        codes = _await(forks, fault.timeout_s + HANG_S)
        left = _await_rest(forks)
        for pid in reversed(helpers):
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
        left += _await_rest(helpers)
        found = Found(
            codes=codes,
            logs=[read(folder, number) for number in range(2)],
            outputs=[(folder / f"output-{number}").read_text() for number in range(2)],
            left=[*left, *_memory_of(forks)],
            saved=_saved(folder),
            seen=_seen(folder),
        )
        if fault is BY_NAME["nothing"]:
            shutil.copytree(folder / "saved", self.states / recipe, dirs_exist_ok=True)
        shutil.rmtree(folder)
        return found


class _Fork(SystemExit):
    """Ends a fork as a script ends, with all that the interpreter does then."""


def _fork(output: Path, script: Any) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # no fork outlives the runner
    nothing = os.open(os.devnull, os.O_RDONLY)
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for descriptor, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(descriptor, target)
    try:
        script()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        raise _Fork(1) from None
    raise _Fork(0)


def _serve(folder: Path, host: Host) -> None:
    """The job's store, which launchers keep in a process of their own."""
    host.enter()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    (folder / "port.new").write_text(str(store.port))
    (folder / "port.new").rename(folder / "port")
    signal.pause()


def _call(host: Host, ranks: list[int]) -> None:
    """A stranger."""
    host.enter()
    apart.call_all(ranks)


def _wait_for(file: Path, writer: int) -> str:
    """What process ``writer`` says in ``file``."""
    while not file.exists():
        if os.waitpid(writer, os.WNOHANG)[0]:
            raise RuntimeError(f"{file.name}: {(file.parent / f'output-{file.name}').read_text()}")
        time.sleep(0.005)
    return file.read_text()


def _await(forks: list[int], seconds: float) -> list[int | None]:
    """Exit codes, minus the number of the signal that ended it; None for one that had to be ended."""
    codes: dict[int, int | None] = {}
    deadline = time.monotonic() + seconds
    while len(codes) < len(forks) and time.monotonic() < deadline:
        for pid in (each for each in forks if each not in codes):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for pid in (each for each in forks if each not in codes):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        codes[pid] = None
    return [codes[pid] for pid in forks]


def _await_rest(forks: list[int]) -> list[str]:
    """Processes in the ranks' sessions that do not end; they are ended."""
    deadline = time.monotonic() + LINGER_S
    while (left := _in_sessions(forks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return [f"process {pid}" for pid in left]


def _in_sessions(sessions: list[int]) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            pid, _, rest = stat.read_text().partition(" (")
            if int(rest.rpartition(") ")[2].split()[3]) in sessions:
                found.append(int(pid))
    return found


def _memory_of(forks: list[int]) -> list[str]:
    """Segments with a name of distnorm's or torch's, of these processes: other jobs run on this host."""
    names = [path.name for path in Path("/dev/shm").iterdir() if re.match("(distnorm|torch)[_-]", path.name)]
    return [f"/dev/shm/{name}" for name in names if any(str(pid) in re.split("[_-]", name) for pid in forks)]


def _saved(folder: Path) -> list[int | str]:
    """By rank, the step that its file holds, or why it cannot be read."""
    found: list[int | str] = []
    for file in sorted((folder / "saved").glob("*.pt")):
        try:
            found.append(torch.load(file, weights_only=True)["models"][0][0]["step"])
        except Exception as error:
            found.append(f"{file.name}: {error}")
    return found


def _seen(folder: Path) -> list[Any]:
    files = [folder / f"seen-{number}.pt" for number in range(2)]
    return [torch.load(file, weights_only=True) for file in files if file.exists()]


def _warm_up() -> None:
    """Import here, once, what ranks would: torch's optimizers import Dynamo, which takes seconds."""
    model = distnorm.convert(Net(), "sync_bn")
    distnorm.attach(model)
    torch.optim.SGD(model.parameters())
    assert "torch._dynamo" in sys.modules, "ranks would import it"
    gc.freeze()  # each fork would go through all that at its end
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"


def main() -> None:
    """Rows in, judgements out."""
    _warm_up()
    jobs = _Jobs()
    for line in sys.stdin:
        fault, transport, recipe = json.loads(line)
        judged = jobs.run(BY_NAME[fault], transport, recipe)
        print(json.dumps(asdict(judged)), flush=True)
    shutil.rmtree(jobs.states)


if __name__ == "__main__":
    main()
