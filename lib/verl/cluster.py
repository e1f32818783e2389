"""Where verl runs: how many GPUs it counts on, whether its Ray answers, and what an earlier attempt left behind.

Owns the questions that are asked before anything is launched. Must not know verl, Ray or what is trained.

    python -c "from lib.verl.cluster import probe; probe('127.0.0.1:6379')"
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lib.config import Config
from lib.gpu import MOST, MOST_HOSTS, Gpu, parse_gpu
from lib.provenance import gpus
from lib.verl.errors import VerlError

TRACKER = "latest_checkpointed_iteration.txt"
"""verl's file that names the newest checkpoint; without it verl starts from the beginning and says nothing."""

PLATFORM = "VERL_PLATFORM"
"""Environment variable of verl: its device. `cpu`: a cluster whose GPUs are places for processes, for tests."""

_TRIES, _TIMEOUT, _PAUSE = 3, 3.0, 1.0
"""Of the probe: times, and seconds for each and between them."""

_HOW_TO_START = (
    "Start a cluster with verl's own Python: `ray start --head --port=6379` on its first machine, `ray start "
    "--address=HOST:6379` on every other one. Or leave verl.ray_address out: the run then has a Ray of its own"
)


class Cluster(NamedTuple):
    """What verl is told of its machines."""

    gpus: int
    """Of one node."""
    nodes: int = 1
    cpu: bool = False
    """There are no GPUs: processes on the processor stand in for them."""

    @property
    def size(self) -> int:
        """GPUs in all; verl runs one training process on each."""
        return self.gpus * self.nodes


def cluster_of(config: Config, seen: int | None = None) -> Cluster:
    """The machines that this config trains on, as seen from here. `seen`: GPUs of this machine; None = look.

    Raises VerlError where nobody says how many GPUs there are, or more are asked for than there are.
    """
    ours = config.verl
    if config.where == "modal":
        return of_the_container(config)
    seen = len(gpus()) if seen is None else seen
    if ours.ray_address:
        if not (ours.gpus or seen):
            raise VerlError(
                f"verl.gpus is not set, and none is here to count by: how many GPUs has one machine of the Ray cluster "
                f"at {ours.ray_address}? Set verl.gpus to that, verl.nodes to the number of its machines"
            )
        return Cluster(ours.gpus or seen, ours.nodes, cpu=os.environ.get(PLATFORM) == "cpu")
    if ours.nodes > 1:
        raise VerlError(
            f"verl.nodes {ours.nodes}: a Ray of the run's own is this one machine. Set verl.nodes to 1, or "
            f"verl.ray_address to a cluster's head. {_HOW_TO_START}"
        )
    if not seen and ours.gpus is None:
        raise VerlError(
            "how many GPUs? None is here, and verl.gpus is not set. Train where there are some, e.g. `modal run -m "
            "lib.modal_app::run --notebook 3_grpo_training --config ... --gpu H100:2`, or give the address of a Ray "
            "cluster (verl.ray_address) with verl.gpus; verl.gpus=1 alone trains on the processor: slow, for tests"
        )
    if seen and ours.gpus and ours.gpus > seen:
        raise VerlError(f"verl.gpus {ours.gpus}: {seen} are here. Set verl.gpus to at most {seen}, or leave it out")
    return Cluster(ours.gpus or seen, cpu=not seen)


def of_the_container(config: Config) -> Cluster:
    """The machines of a training that is sent to Modal, by `modal.gpu` and `verl.nodes`. Raises VerlError."""
    requests = [request for text in config.modal.gpus if (request := parse_gpu(text))]
    counts = sorted({request.number for request in requests})
    asked, wanted = " or ".join(config.modal.gpus), config.verl.gpus
    if config.verl.nodes > 1:
        _check_hosts(config, requests)
    if not counts and wanted:
        return Cluster(wanted, cpu=True)
    if not counts:
        raise VerlError("modal.gpu is none, and verl needs GPUs: set modal.gpu, e.g. to H100:2")
    if len(counts) > 1:
        raise VerlError(f"modal.gpu {asked}: verl trains on one number of GPUs, whatever they are called")
    if wanted and wanted != counts[0]:
        raise VerlError(f"verl.gpus {wanted}, and modal.gpu {asked} has {counts[0]}: leave verl.gpus out")
    return Cluster(counts[0], config.verl.nodes)


def _check_hosts(config: Config, requests: Sequence[Gpu]) -> None:
    """Raises VerlError where Modal has no cluster of such containers (modal.com/docs/guide/multi-node-clusters)."""
    nodes = f"verl.nodes {config.verl.nodes} on Modal"
    whole = "Modal makes clusters of containers that have all GPUs of their hosts"
    if config.verl.ray_address:
        raise VerlError(
            f"{nodes}, and verl.ray_address {config.verl.ray_address}: the containers make a Ray cluster of their own. "
            f"Leave verl.ray_address out, or train on that cluster, from one of its machines, with where: here"
        )
    if config.verl.nodes > MOST_HOSTS:
        raise VerlError(f"{nodes}: one cluster has at most {MOST_HOSTS} machines there. Set verl.nodes to that or less")
    if not requests:
        raise VerlError(
            f"{nodes}, and modal.gpu is none: {whole}, and none without a GPU. Set modal.gpu, e.g. to H100:8, or "
            f"verl.nodes to 1"
        )
    parts = [request for request in requests if request.number < MOST[request.name]]
    if parts:
        wholes = " or ".join(str(Gpu(part.name, MOST[part.name])) for part in parts)
        raise VerlError(
            f"{nodes}, and modal.gpu {' or '.join(map(str, parts))}: {whole}. Set modal.gpu to {wholes}, or verl.nodes "
            f"to 1: one container has up to {max(MOST[part.name] for part in parts)} of them"
        )


# Ray ------------------------------------------------------------------------------------------------------------------
def probe(address: str) -> str:
    """HOST:PORT of a Ray cluster that answers within seconds; `auto` = the one of this machine. Raises VerlError."""
    where = _this_machines() if address == "auto" else address
    host, _, port = where.rpartition(":")
    problem = ""
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE)
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_TIMEOUT):
                return where
        except (OSError, OverflowError) as error:
            problem = str(error)
    raise VerlError(
        f"no Ray cluster answers at {where} (verl.ray_address: {address}): tried {_TRIES} times to connect, {problem}. "
        f"{_HOW_TO_START}"
    )


def _this_machines() -> str:
    """What `ray start` wrote down here."""
    told = os.environ.get("RAY_ADDRESS", "")
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    note = folder / "ray" / "ray_current_cluster"
    if not told and note.is_file():
        told = note.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r".+:\d{1,5}", told) or "://" in told:
        found = f"RAY_ADDRESS is {told!r}" if told else f"RAY_ADDRESS is not set and there is no {note}"
        raise VerlError(f"verl.ray_address auto: no Ray cluster runs on this machine ({found}). {_HOW_TO_START}")
    return told


# checkpoints ----------------------------------------------------------------------------------------------------------
def check_checkpoints(folder: Path) -> int:
    """The step that verl will go on from; 0 where there is no checkpoint. Raises VerlError for a folder that it would
    not go on from, although there are checkpoints in it."""
    found = [re.fullmatch(r"global_step_(\d+)", path.name) for path in folder.glob("global_step_*")]
    steps = sorted(int(match[1]) for match in found if match)
    tracker = folder / TRACKER
    there = ", ".join(f"global_step_{step}" for step in steps) or "none"
    if not tracker.is_file():
        if not steps:
            return 0
        raise VerlError(
            f"{folder} has checkpoints ({there}) and no {TRACKER}: verl would start from the beginning without a word. "
            f"It is written once a checkpoint is whole: write the number of the newest whole one into it (echo -n "
            f"{steps[-1]} > {TRACKER}), or remove the folder to start anew"
        )
    text = tracker.read_text(encoding="utf-8").strip()
    if not text.isdigit() or int(text) not in steps:
        raise VerlError(
            f"{tracker} says {text!r}, and the checkpoints there are: {there}. verl would start from the beginning: "
            f"write the number of one of them into it, or remove the folder to start anew"
        )
    return int(text)
