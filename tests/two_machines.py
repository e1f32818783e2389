"""A Ray cluster of two machines that share no disk, for tests of verl: the second one's folders are its own.

Both are on this machine; the second one's are put over the first one's by bubblewrap, as in a container on Modal.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import NamedTuple

from lib import PROJECT_ROOT
from lib.hosts import free_port


class Pair(NamedTuple):
    address: str
    """HOST:PORT of the head."""
    environment: Mapping[str, str]
    """Of whoever joins them as a driver."""
    folder: Path
    """On the first one's disk."""
    disk: Path
    """What the second one has in its place."""
    head: subprocess.Popen[bytes]
    member: subprocess.Popen[bytes]


@contextmanager
def two_machines(python: str, above: Path) -> Iterator[Pair]:
    """`python`: of verl's environment."""
    folder, disk = above / "first", above / "second"
    for one in (folder, disk):
        (one / "tmp").mkdir(parents=True)
    given = {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    places = tempfile.mkdtemp(prefix="ray-")  # a socket has 107 letters for its path
    given["RAY_TMPDIR"] = places
    given |= {"PYTHONPATH": str(PROJECT_ROOT), "TMPDIR": str(folder / "tmp")}
    given |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token_hex(32)}
    address = f"127.0.0.1:{free_port()}"
    module, own = [python, "-m", "lib.verl.machine"], ["--address", "127.0.0.1", "--gpus", "1"]
    apart = ["bwrap", "--dev-bind", "/", "/", "--bind", str(disk), str(folder), "--tmpfs", "/dev/shm"]
    head = started([*module, "head", "--port", address.rpartition(":")[2], *own], given, above / "head.txt")
    until = time.monotonic() + 200
    while "Ray runtime started" not in (above / "head.txt").read_text():  # a driver would take the other for its own
        assert head.poll() is None and time.monotonic() < until, (above / "head.txt").read_text()
        time.sleep(0.2)
    member = started([*apart, *module, "join", address, *own], given, above / "member.txt")
    try:
        yield Pair(address, given, folder, disk, head, member)
    finally:
        for process in (member, head):
            if process.poll() is None:
                process.terminate()
                process.wait(60)
        shutil.rmtree(places, ignore_errors=True)


def started(command: list[str], given: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            command, env=os.environ | given, cwd=PROJECT_ROOT, stdout=file, stderr=subprocess.STDOUT
        )
