"""The GPUs that a container can be asked for: their names, how many fit one machine, and how a request is written.

Owns Modal's GPU names (modal.com/docs/guide/gpu, read with client 1.6.4). Must not know prices or configs.

    python -c "from lib.gpu import parse_gpu; print(parse_gpu('A10G:2'))"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from lib import WorkbenchError

MOST = {
    "T4": 8,
    "L4": 8,
    "A10": 4,
    "L40S": 8,
    "A100": 8,
    "A100-40GB": 8,
    "A100-80GB": 8,
    "RTX-PRO-6000": 8,
    "H100": 8,
    "H200": 8,
    "B200": 8,
}
"""GPU name -> the most that one container can have. A100 means A100-40GB."""

RDMA = frozenset({"H100", "H200", "B200"})
"""Those whose hosts Modal can connect by RDMA, at 3,200 Gbps in place of 50
(modal.com/docs/guide/multi-node-clusters)."""

MOST_HOSTS = 32
"""The most that one cluster can have. Its containers take whole hosts: MOST of a GPU."""

NONE = "none"
"""A container without a GPU."""

_ALIASES = {"A10G": "A10"}


class GpuError(WorkbenchError, ValueError):
    """A GPU that cannot be asked for; the message lists those that can."""


class Gpu(NamedTuple):
    """A request: `str()` of it is what Modal takes."""

    name: str
    number: int = 1

    def __str__(self) -> str:
        return self.name if self.number == 1 else f"{self.name}:{self.number}"


def parse_gpu(text: str) -> Gpu | None:
    """A request like `H100` or `A100-80GB:4`; None for `none`. Raises GpuError."""
    if text == NONE:
        return None
    name, colon, count = text.partition(":")
    known = {known.upper(): known for known in (*MOST, *_ALIASES)}.get(name.upper())
    if known is None:
        allowed = f"{', '.join(MOST)} (A10G is A10)"
        raise GpuError(f"unknown GPU {name!r}. Allowed: {allowed}, each with `:n` for n of them, or `{NONE}`")
    known = _ALIASES.get(known, known)
    if colon and not (re.fullmatch(r"[1-9]\d*", count) and int(count) <= MOST[known]):
        raise GpuError(f"{text!r}: one container can have 1 to {MOST[known]} {known}: write {known}:n")
    return Gpu(known, int(count) if colon else 1)


def granted(requests: Sequence[str], machines: Sequence[str]) -> str | None:
    """Which of several requests a container got, by the names that nvidia-smi gives its GPUs; None where unclear.

    "NVIDIA A100-SXM4-80GB" is an A100-80GB, "NVIDIA L40S" no L4.
    """
    seen = [set(re.split(r"[^A-Z0-9]+", line.upper())) for line in machines]
    fitting = [request for request in requests if seen and _is_a(parse_gpu(request), seen[0])]
    exact = [request for request in fitting if (gpu := parse_gpu(request)) and gpu.number == len(seen)]
    return next(iter(exact or fitting), None)


def _is_a(gpu: Gpu | None, words: set[str]) -> bool:
    if gpu is None:
        return False
    if gpu.name.startswith("A100"):
        return "A100" in words and ("80GB" in words) == (gpu.name == "A100-80GB")
    aliases = [known for known, name in _ALIASES.items() if name == gpu.name]
    return any(set(name.split("-")) <= words for name in (gpu.name, *aliases))
