"""One process of the pool, seen from the parent: start it, look at its stacks, end it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from tests.support.worker import serve

START_S = 120.0  # starting a process and importing torch


class WorkerProcess:
    """A process and the connection to it."""

    def __init__(self, port: int, warning_filters: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory(prefix="pool-")
        self.stacks = Path(self.folder.name) / "stacks"
        self.connection: Connection
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=serve, args=(theirs, port, warning_filters, str(self.stacks)), daemon=True
        )
        self.process.start()
        theirs.close()

    def await_ready(self) -> None:
        if not self.connection.poll(START_S):
            raise TimeoutError(f"a process of the pool did not start within {START_S} s")
        self.connection.recv_bytes()

    def dump(self) -> str:
        """The stacks of the process as they are now."""
        if self.process.pid is None or not self.process.is_alive():
            return "(the process has ended)"
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.2)
        return self.stacks.read_text()

    def hang_up(self) -> None:
        self.connection.close()
        self.process.join(5)
        self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.process.close()
        self.connection.close()
        self.folder.cleanup()
