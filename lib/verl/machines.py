"""Files between the machines of a Ray cluster that share no disk: a model goes out, checkpoints come in and go out.

Owns which machines do not see the run folder, and the way of files to and from them, through Ray. It runs in verl's
environment, in the process that drives the training. Must not know what the files are.

    build/verl/bin/python -c "from lib.verl.machines import Machines; help(Machines)"
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lib.verl.errors import VerlError

_CHUNK = 64 * 2**20
"""Bytes that travel at a time."""
_AHEAD = 4
"""Chunks under way."""
_PATIENCE, _SAY = 300.0, 10.0
"""Seconds in which machines have to join, and between lines about it."""


class Part(NamedTuple):
    """A file of a folder."""

    name: str
    """Relative to the folder."""
    size: int


class Machines:
    """Those beside this one that verl trains on, where one of them does not see this one's run folder."""

    def __init__(self, folder: Path, resource: str) -> None:
        """`folder`: of the run, on this machine's disk; `resource`: Ray's name of what verl trains on."""
        here = ray.get_runtime_context().get_node_id()
        others = [
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] != here and node["Resources"].get(resource, 0)
        ]
        self.apart: tuple[str, ...] = ()
        """Ray's ids of the machines that files have to be brought to."""
        mark = hashlib.sha256(f"{os.getuid()} {folder.resolve()}".encode()).hexdigest()[:16]
        self.staging = Path(tempfile.gettempdir()) / f"workbench-verl-{mark}"
        """A folder on every machine's own disk: what travels lies there, at the same path on all of them."""
        self.staged = bool(_not_seeing(folder, others))
        """Whether files have to go by way of it."""
        if self.staged:
            _renew(str(self.staging))
            self.apart = _not_seeing(self.staging, others)  # two of them may be one machine
            ray.get([_on(node, _renew).remote(str(self.staging)) for node in self.apart])
            _say(f"{len(self.apart)} of {len(others)} other machines have disks of their own: files go through Ray")

    def send(self, source: Path, name: str) -> Path:
        """A folder of this machine to every other one, as `staging/name`; here a link stands for it. Raises VerlError
        where it does not arrive whole."""
        target = self.staging / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        target.symlink_to(source.resolve(), target_is_directory=True)
        _send(self.apart, source, target)
        return target

    def bring(self, name: str, target: Path) -> None:
        """The files of `staging/name` of all machines into one folder here, whole or not at all; no machine keeps
        them. Raises VerlError."""
        source, partial = self.staging / name, target.with_name(f".{target.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(source, partial)
        for node in self.apart:
            _bring(node, source, partial)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        self.clear(source)

    def clear(self, folder: Path) -> None:
        """Remove a folder of the staging on every machine."""
        ray.get([_on(node, _remove).remote(str(folder)) for node in self.apart])
        _remove(str(folder))


def wait_for(count: int, resource: str, each: int) -> None:
    """Until `count` machines with `each` of a resource have joined the cluster. Raises VerlError past the deadline."""
    deadline, said = time.monotonic() + _PATIENCE, 0.0
    while True:
        there = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get(resource, 0) >= each]
        if len(there) >= count:
            return
        if time.monotonic() > deadline:
            raise VerlError(
                f"verl.nodes is {count}, and {len(there)} machines with {each} GPUs were in the Ray cluster after "
                f"{_PATIENCE:g} s: join the others (`ray start --address=HOST:PORT`), or set verl.nodes or verl.gpus "
                f"to what there is"
            )
        if time.monotonic() - said > _SAY:
            said = time.monotonic()
            _say(f"waiting for machines: {len(there)} of {count} have joined")
        time.sleep(0.5)


def this_one_first() -> None:
    """Have verl place its single agent loop and reward worker on this machine: it deals them out over `ray.nodes()`,
    and they work in the run folder."""
    nodes, here = ray.nodes, ray.get_runtime_context().get_node_id()
    ray.nodes = lambda: sorted(nodes(), key=lambda node: node["NodeID"] != here)


class Here:
    """An actor class whose actors live on the machine of the process that makes them, in the manner of `ray.remote`."""

    def __init__(self, plain: type) -> None:
        self._plain = plain

    def remote(self, *arguments: Any) -> Any:
        place = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
        return ray.remote(num_cpus=1, scheduling_strategy=place)(self._plain).remote(*arguments)


def _say(text: str) -> None:
    """For verl's log, which the run keeps: Ray brings there what an actor prints, whatever verl makes of loggers."""
    print(text, flush=True)


# on the other machine -------------------------------------------------------------------------------------------------
def listing(folder: str) -> list[Part]:
    """The files of a folder, links followed."""
    root, found = Path(folder), []
    for parent, _, files in os.walk(root, followlinks=True):
        paths = [Path(parent) / name for name in files]
        found += [Part(path.relative_to(root).as_posix(), path.stat().st_size) for path in paths]
    return sorted(found)


def _sees(path: str) -> bool:
    return Path(path).is_file()


def _read(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(offset)
        return file.read(size)


def _write(path: str, offset: int, data: bytes) -> int:
    """The file's size afterwards."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "r+b" if offset else "wb") as file:
        file.seek(offset)
        file.write(data)
        return file.tell()


def _remove(path: str) -> None:
    if Path(path).is_symlink():
        Path(path).unlink()
    shutil.rmtree(path, ignore_errors=True)


def _renew(folder: str) -> None:
    """An empty folder that nobody else reads: its name can be guessed."""
    _remove(folder)
    Path(folder).mkdir(mode=0o700, parents=True)


def _not_seeing(folder: Path, nodes: Sequence[str]) -> tuple[str, ...]:
    """The machines that do not see what this one puts into a folder."""
    token = folder / f".seen-{uuid4().hex}"
    token.touch()
    try:
        seen = ray.get([_on(node, _sees).remote(str(token)) for node in nodes])
    finally:
        token.unlink()
    return tuple(node for node, sees in zip(nodes, seen, strict=True) if not sees)


# the way --------------------------------------------------------------------------------------------------------------
def _on(node: str, function: Callable[..., Any]) -> Any:
    """A function that runs on a machine."""
    place = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(function).options(scheduling_strategy=place)


def _pieces(parts: Iterable[Part]) -> Iterator[tuple[Part, int]]:
    """Every file in chunks, each with its offset; an empty file is one chunk."""
    for part in parts:
        for offset in range(0, max(1, part.size), _CHUNK):
            yield part, offset


def _send(nodes: Sequence[str], source: Path, target: Path) -> None:
    writes = [_on(node, _write) for node in nodes]
    for part, offset in _pieces(listing(str(source))):  # in order: a file is written from its beginning
        data = ray.put(_read(str(source / part.name), offset, _CHUNK))  # read once, for all of them
        sizes = ray.get([write.remote(str(target / part.name), offset, data) for write in writes])
        if set(sizes) - {min(part.size, offset + _CHUNK)}:
            raise VerlError(f"{source / part.name} did not reach another machine whole: it changed on its way")


def _bring(node: str, source: Path, target: Path) -> None:
    parts = ray.get(_on(node, listing).remote(str(source)))
    read, waiting = _on(node, _read), deque[tuple[Part, int, Any]]()

    def arrive() -> None:
        part, offset, reference = waiting.popleft()
        size = _write(str(target / part.name), offset, ray.get(reference))
        if size != min(part.size, offset + _CHUNK):
            raise VerlError(f"{source / part.name} of another machine did not arrive whole: it changed on its way")

    for part, offset in _pieces(parts):
        waiting.append((part, offset, read.remote(str(source / part.name), offset, _CHUNK)))
        if len(waiting) >= _AHEAD:
            arrive()
    while waiting:
        arrive()
