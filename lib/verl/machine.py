"""One machine of a Ray cluster, from its start to its end: the head, or one that joins it and leaves with it.

Owns how Ray is started where a cluster is made for one training (lib/gang.py), as `ray start` does by hand. It runs in
verl's environment. Must not know verl, or what is trained.

    build/verl/bin/python -m lib.verl.machine head --address 10.0.0.1 --port 6379
    build/verl/bin/python -m lib.verl.machine join 10.0.0.1:6379 --address 10.0.0.2
"""

from __future__ import annotations

import argparse
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from lib import keeper
from lib.verl import local_ray

_PATIENCE = 600.0
"""Seconds in which a head has to be there."""
_POLL, _TIMEOUT = 1.0, 3.0
_LOST = 3
"""Times in a row that a head does not answer before it is gone."""
_GRACE = 5.0
"""Seconds for Ray to end by itself: it drains for up to 30, and there is nothing left to drain."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    head = verbs.add_parser("head", help="start a cluster, until SIGTERM")
    head.add_argument("--port", type=int, default=6379)
    join = verbs.add_parser("join", help="join a cluster, until its head is gone")
    join.add_argument("head", help="HOST:PORT of the cluster's head")
    join.add_argument("--patience", type=float, default=_PATIENCE, help="seconds in which the head has to be there")
    for verb in (head, join):
        verb.add_argument("--address", required=True, help="this machine's address, as the others reach it")
        verb.add_argument("--gpus", type=int, help="what Ray counts on, where it cannot see them")
    given = parser.parse_args(arguments)
    places = [] if given.gpus is None else [f"--num-gpus={given.gpus}", f"--num-cpus={8 * given.gpus}"]
    own = [f"--node-ip-address={given.address}", *places]
    if given.verb == "head":
        return _until_asked([f"--port={given.port}", "--head", "--include-dashboard=false", *own])
    return _until_gone(given.head, given.patience, [f"--address={given.head}", *own])


def _until_asked(options: Sequence[str]) -> int:
    process, asked = _begin(options), _note_signals()
    while process.poll() is None and not asked:
        time.sleep(_POLL / 4)
    status = _end(process)
    return 0 if asked else status


def _until_gone(head: str, patience: float, options: Sequence[str]) -> int:
    deadline = time.monotonic() + patience
    while not answers(head):
        if time.monotonic() > deadline:
            print(f"no Ray head answered at {head} within {patience:g} s", file=sys.stderr)
            return 1
        time.sleep(_POLL)
    process, asked, missed = _begin(options), _note_signals(), 0
    while process.poll() is None and missed < _LOST and not asked:
        time.sleep(_POLL)
        missed = 0 if answers(head) else missed + 1
    gone = missed > 0 or not answers(head)
    status = _end(process)
    return 0 if gone or asked else status or 1


def _begin(options: Sequence[str]) -> subprocess.Popen[bytes]:
    """Ray, in a process of its own: it ends that one as it likes."""
    code = "import sys; from lib.verl.machine import start; start(sys.argv[1:])"
    return subprocess.Popen([sys.executable, "-c", code, *options, "--block"])


def _end(process: subprocess.Popen[bytes]) -> int:
    """Its exit status. Ray leaves helpers behind whose raylet is gone: nothing of it stays."""
    below = keeper.family(process.pid)
    if process.poll() is None:
        process.terminate()
    try:
        return process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
    finally:
        keeper.kill(below)


def _note_signals() -> list[int]:
    """What grows by every SIGTERM and SIGINT from now on."""
    asked: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked.append(number))
    return asked


def answers(head: str) -> bool:
    """Whether somebody listens at HOST:PORT."""
    host, _, port = head.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT):
            return True
    except OSError:
        return False


def start(options: Sequence[str]) -> None:
    """`ray start` in this process; on loopback where that is its address."""
    from ray.scripts import scripts

    if any(option == f"--node-ip-address={local_ray.LOOPBACK}" for option in options):
        local_ray.fix_ports()
        local_ray.stay_here()
    scripts.start.main(args=list(options), standalone_mode=False)


if __name__ == "__main__":
    sys.exit(main())
