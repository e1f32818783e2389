"""The containers that Modal starts together for one call: the first leads a Ray cluster and trains, the others join it.

Owns who of them does what, and the process of Ray on each (lib/verl/machine.py), from its start to its end. Must not
know jobs, run folders, or what is trained.

    python -c "from lib.gang import Gang; print(Gang(('10.0.0.1', '10.0.0.2'), rank=1, token='').head)"
"""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lib import WorkbenchError
from lib.log import name_secrets
from lib.program import POLL, NotUpError, Process, Program
from lib.verl.environment import import_path, interpreter
from lib.verl.machine import answers

logger = logging.getLogger(__name__)

PORT = 6379
"""Of Ray's head: its usual one."""

_DEADLINE = 300.0
"""Seconds until the head answers. The others wait for it for longer than that."""
_GRACE = 4.0
"""Seconds for Ray to end by itself: after a preemption there are 30 for all, and training gets the most of them."""
_TOKEN = "RAY_AUTH_TOKEN"


class GangError(WorkbenchError, RuntimeError):
    """The containers do not come to one cluster; the message says why."""


class Gang(NamedTuple):
    """The containers of one call, as one of them sees them."""

    addresses: tuple[str, ...]
    """IPv4, which is all that Ray takes, by rank."""
    rank: int
    """0 leads: its result is the call's."""
    token: str
    """What joins or asks the Ray cluster has to show it: without one Ray runs what anybody sends who can reach it."""

    @property
    def head(self) -> str:
        """HOST:PORT of the Ray cluster."""
        return f"{self.addresses[0]}:{PORT}"

    @property
    def environment(self) -> dict[str, str]:
        """What every process of the cluster, and what asks it, is started with."""
        return {"RAY_AUTH_MODE": "token", _TOKEN: self.token, "RAY_USAGE_STATS_ENABLED": "0"}


class Head:
    """The Ray cluster of a gang, on the machine that leads it."""

    def __init__(self, gang: Gang, process: Process) -> None:
        self.address, self._process = gang.head, process

    def check(self) -> None:
        """Raises GangError where it has ended by itself: what trains on it would wait for it for long."""
        if not self._process.is_alive():
            raise GangError(self._process.report(f"{self._process.ending()} while it was needed"))


def find_gang(machines: int, token: str) -> Gang | None:
    """The containers of the call that runs here; None where it is one. Raises GangError where they are not so many."""
    if machines == 1:
        return None
    import modal

    cluster = modal.Cluster.from_context()
    gang = Gang(tuple(cluster.container_ips(family="ipv4")), cluster.container_rank(), token)
    if len(gang.addresses) != machines:
        raise GangError(
            f"{machines} machines were asked for, and Modal gave {len(gang.addresses)} addresses: "
            f"{', '.join(gang.addresses) or 'none'}. Run the same command again"
        )
    return gang


@contextmanager
def lead(gang: Gang | None) -> Iterator[Head | None]:
    """A Ray cluster that the others can join, until the block ends, however it does; None without a gang.

    Raises GangError where it does not start.
    """
    if gang is None:
        yield None
        return
    process = _start("Ray's head", gang, "head", "--address", gang.addresses[0], "--port", str(PORT))
    try:
        _wait_for(process, gang)
        yield Head(gang, process)
    finally:
        process.close()


def join(gang: Gang) -> None:
    """Lend this machine to the cluster until its head is gone.

    Does not raise where that fails: what the leader says of the machine that is missing is the call's result, and an
    error of this one would end the call before.
    """
    process = _start("Ray", gang, "join", gang.head, "--address", gang.addresses[gang.rank])
    logger.warning("machine %d of %d: lent to the Ray cluster at %s", gang.rank + 1, len(gang.addresses), gang.head)
    try:
        while process.is_alive():
            time.sleep(POLL)
    finally:
        process.close()
    if process.failed():
        logger.error("machine %d: %s", gang.rank + 1, process.report(process.ending()))


def _start(name: str, gang: Gang, *arguments: str) -> Process:
    name_secrets([_TOKEN])
    program = Program(
        name=name,
        log=Path(tempfile.mkdtemp(prefix="workbench-ray-")) / "log.txt",
        environment=gang.environment | {"PYTHONPATH": import_path()},
        deadline=_DEADLINE,
        grace=_GRACE,
    )
    return Process(program, [interpreter(), "-m", "lib.verl.machine", *arguments], {})


def _wait_for(process: Process, gang: Gang) -> None:
    try:
        process.check_start()
        while not answers(gang.head):
            process.wait_on(f"an answer at {gang.head}")
            time.sleep(POLL)
            process.check_start()
    except NotUpError as error:
        raise GangError(process.report(str(error))) from None
