"""What the machine did while a benchmark ran: the CPU share of processes that are not ours.

from machine import Others
"""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

NOISY = 0.3
"""Cores that other processes may use on average before a measurement counts as noisy (PERF.md section 5)."""


class Others:
    """Cores used by foreign processes since this was made. Ours: this process, and its children once they ended."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float:
        """Average number of cores; nan where the system has no /proc/stat (macOS)."""
        wall, busy, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, (busy - own) / wall) if wall else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        stat = Path("/proc/stat")
        busy = float("nan")
        if stat.is_file():
            user, nice, system, _idle, _wait, irq, softirq = map(int, stat.read_text().split(maxsplit=8)[1:8])
            busy = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return time.monotonic(), busy, sum(usage.ru_utime + usage.ru_stime for usage in used)


def shown(cores: float) -> str:
    """Cores with a mark where they make a measurement doubtful."""
    return f"{cores:.2f}{' noisy' if cores > NOISY else ''}"
