"""What happened in a run and who was busy: events.jsonl, spans and idle shares of every role.

Owns the lines of events.jsonl and the clock that all of it is measured with. Must not know what the roles do.

    python -c "from lib.orchestrator.events import Busy; b = Busy(); b.begin(1.0); b.end(3.0); print(b.until(4.0))"
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lib.runfolder import Run, read_lines

LOG = "events.jsonl"
"""Never cut: a resumed run goes on at its end, so what came before a kill stays to be seen."""

_GAP = 0.05
"""Seconds of idleness that no chart could show: spans closer than this are one."""

_WAIT = 0.1
"""Seconds that an event may wait for others to be written with."""

Span = tuple[float, float]


class Busy:
    """When one role had something to do; several things at a time count once."""

    def __init__(self) -> None:
        self._doing = 0
        self._since = 0.0
        self._spans: list[Span] = []
        self._seconds = 0.0

    def begin(self, now: float) -> None:
        if not self._doing:
            self._since = now
        self._doing += 1

    def end(self, now: float) -> None:
        self._doing -= 1
        if not self._doing:
            self._note(self._since, now)

    def until(self, now: float) -> tuple[list[Span], float]:
        """The spans since the last call, and the seconds in them; what is going on is cut in two here."""
        if self._doing:
            self._note(self._since, now)
            self._since = now
        taken = self._spans, self._seconds
        self._spans, self._seconds = [], 0.0
        return taken

    def _note(self, start: float, end: float) -> None:
        self._seconds += end - start
        if self._spans and start - self._spans[-1][1] < _GAP:
            start = self._spans.pop()[0]
        if end > start:
            self._spans.append((start, end))


class Events:
    """Writes events.jsonl: one line each, with `time` (seconds since 1970), `role` and `kind`."""

    def __init__(self, run: Run) -> None:
        self._run = run
        _cut_half_line(run)
        self._offset = time.time() - self.now()
        self._busy: dict[str, Busy] = {}
        self._taken_at = self.now()
        self._waiting: list[dict[str, Any]] = []

    @staticmethod
    def now() -> float:
        """Seconds on the event loop's clock."""
        return asyncio.get_running_loop().time()

    def add(self, role: str, kind: str, **facts: Any) -> None:
        """`facts`: plain JSON values. What happens at nearly the same time is written at once."""
        when = round(self.now() + self._offset, 3)
        if not self._waiting:
            asyncio.get_running_loop().call_later(_WAIT, self.flush)
        self._waiting.append({"time": when, "role": role, "kind": kind, **facts})

    def flush(self) -> None:
        """Write what is still waiting: before what must not be forgotten, and in the end."""
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._run.append(LOG, waiting)

    # who is busy ------------------------------------------------------------------------------------------------------
    def busy(self, role: str) -> Busy:
        """The role's record of being busy; made when it is first asked for."""
        return self._busy.setdefault(role, Busy())

    @contextmanager
    def at_work(self, role: str) -> Iterator[None]:
        """The role is busy inside."""
        record = self.busy(role)
        record.begin(self.now())
        try:
            yield
        finally:
            record.end(self.now())

    def idle_shares(self) -> dict[str, float]:
        """By role, the share of the time since the last call in which it had nothing to do; the spans become events."""
        start, end = self._taken_at, self.now()
        self._taken_at = end
        shares = {}
        for role, record in self._busy.items():
            spans, seconds = record.until(end)
            shares[role] = max(0.0, 1 - seconds / (end - start)) if end > start else 0.0
            shown = [[round(at + self._offset, 3) for at in span] for span in spans]
            self.add(role, "busy", spans=shown, idle=round(shares[role], 4))
        return shares


def _cut_half_line(run: Run) -> None:
    """A kill may leave half a line, and the next one must not be joined to it."""
    path = run.folder / LOG
    if path.is_file():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def last_version(run: Run) -> int:
    """The newest weight version that any process of this run has begun to publish; 0 before the first."""
    return max((event.get("version", 0) for event in read_lines(run.folder / LOG)), default=0)
