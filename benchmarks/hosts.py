"""Several hosts on one machine, with a network between them that delivers after a fixed delay.

Run ``python benchmarks/hosts.py HOSTS DELAY_MS COMMAND...``: one rank per host, with the environment that torchrun
would set. ``benchmarks/netlab/delayswitch.c`` is the network. Needs Linux, root, iproute2, util-linux and a C compiler.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).parent / "netlab" / "delayswitch.c"
NEEDED = {"cc": "a C compiler", "ip": "iproute2", "nsenter": "util-linux"}


class Unavailable(RuntimeError):  # noqa: N818 - a state of the machine, not a mistake of the caller
    """This machine cannot make such a network; the message says why."""


@contextmanager
def network(hosts: int, delay_ms: float) -> Iterator[list[str]]:
    """Bring up ``hosts`` hosts; yields the path of each one's network namespace. Root only.

    Raises:
        Unavailable: not root, a program is missing, or the kernel refuses namespaces or devices.
    """
    if os.geteuid() != 0:
        raise Unavailable("a network between hosts needs root")
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(_compiled(Path(folder))), str(delay_ms * 1e3), str(hosts)]
        errors = Path(folder) / "errors"
        with (
            errors.open("w") as sink,
            subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=sink, text=True) as switch,
        ):
            try:
                assert switch.stdout is not None
                ready, *descriptors = switch.stdout.readline().split() or [""]
                if ready != "ready":
                    raise Unavailable(f"no network between hosts: {errors.read_text().strip()}")
                yield [f"/proc/{switch.pid}/fd/{each}" for each in descriptors]
            finally:
                switch.kill()


def _compiled(folder: Path) -> Path:
    for program, package in NEEDED.items():
        if not any(os.access(Path(each) / program, os.X_OK) for each in os.get_exec_path()):
            raise Unavailable(f"a network between hosts needs {package} ({program})")
    target = folder / "delayswitch"
    ran = subprocess.run(["cc", "-O2", "-Wall", "-o", target, SOURCE], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise Unavailable(f"{SOURCE.name} does not compile: {ran.stderr.strip()}")
    return target


def why_not() -> str | None:
    """Why this machine has no network between hosts; None where it has one."""
    try:
        with network(1, 0):
            return None
    except Unavailable as reason:
        return str(reason)


def run(hosts: int, delay_ms: float, command: Sequence[str]) -> int:
    """Run ``command`` as one rank per host; its exit status. A rank that fails ends the others.

    Raises:
        Unavailable: as ``network``.
    """
    with network(hosts, delay_ms) as namespaces:
        ranks = [
            subprocess.Popen(["nsenter", f"--net={namespace}", *command], env=os.environ | environment(rank, hosts))
            for rank, namespace in enumerate(namespaces)
        ]
        try:
            while None in (states := [each.poll() for each in ranks]) and not any(states):
                time.sleep(0.2)
        finally:
            for each in ranks:
                each.terminate()
                each.wait()
    return next((state for state in states if state), 0)


def environment(rank: int, hosts: int) -> dict[str, str]:
    """What torchrun tells a rank. The port is free: nothing else runs on these hosts."""
    numbers = {"RANK": rank, "WORLD_SIZE": hosts, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "MASTER_PORT": 29500}
    threads = os.environ.get("OMP_NUM_THREADS", "1")
    network = {"MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": threads}
    return {name: str(value) for name, value in numbers.items()} | network


def main() -> int:
    """Run a command on hosts."""
    parser = argparse.ArgumentParser(description="Run a command as one rank per host.")
    parser.add_argument("hosts", type=int)
    parser.add_argument("delay", type=float, help="milliseconds, one way")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    try:
        return run(options.hosts, options.delay, options.command)
    except Unavailable as reason:
        print(reason, file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
