"""Every coding row is tried before it is used: rows in chunks, the reasons against some, and what is said about it all.

Owns the loop, the counts and the log lines. Must not know what makes a row unusable, nor sandboxes.

    python -c "from lib.tasks._coding_check import RowCheck; help(RowCheck)"
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from lib.data import ChosenRows
from lib.task import Row, TaskError

log = logging.getLogger(__name__)

CHUNK = 256  # rows checked together: an interrupt waits for them at most
NAMED = 3  # rows that are named for each reason to leave rows out
OFTEN = 15  # seconds between two lines on how far it is


class RowCheck:
    """Rows tried in the sandbox, a chunk at a time, and the reasons against those that are left out."""

    def __init__(self, unusable: Callable[[Row], Coroutine[Any, Any, str]], total: int) -> None:
        """unusable: why a row is no use, "" where it is; total: how many rows there are in all."""
        self._unusable, self._total = unusable, total
        self._reasons: Counter[str] = Counter()
        self._named: dict[str, list[str]] = {}
        self._kept = self._unproved = 0
        self._said = self._started = time.monotonic()

    def usable(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows that passed, read from `rows` again when they are asked for."""
        kept: list[int] = []
        # A kernel already runs a loop in this thread; and the caller's thread stays free to be interrupted.
        with ThreadPoolExecutor(1, thread_name_prefix="row-check") as thread:
            for first in range(0, len(rows), CHUNK):
                chunk = list(rows[first : first + CHUNK])
                reasons = thread.submit(asyncio.run, self._try(chunk)).result()
                for number, (row, reason) in enumerate(zip(chunk, reasons, strict=True), first):
                    if self._note(row, reason):
                        kept.append(number)
                self._progress()
        return ChosenRows(rows.__getitem__, kept)

    async def _try(self, rows: Sequence[Row]) -> list[str]:
        return await asyncio.gather(*map(self._unusable, rows))

    def _note(self, row: Row, reason: str) -> bool:
        if reason:
            self._reasons[reason] += 1
            self._named.setdefault(reason, []).append(str(row["id"]))
            del self._named[reason][NAMED:]
            return False
        self._kept += 1
        self._unproved += not row.get("gold")
        return True

    def _progress(self) -> None:
        if time.monotonic() > self._said + OFTEN:
            self._said = time.monotonic()
            log.info("%d of %d rows checked in the sandbox", self._kept + self._reasons.total(), self._total)

    def tell(self) -> None:
        """Log what was left out and why. Raises TaskError where nothing is left."""
        for reason, count in self._reasons.most_common():
            names = ", ".join(self._named[reason]) + (", …" if count > NAMED else "")
            log.warning("%d of %d rows left out: %s (%s)", count, self._total, reason, names)
        seconds = time.monotonic() - self._started
        log.info("%d of %d rows passed the check in the sandbox (%.1f s)", self._kept, self._total, seconds)
        if self._unproved:
            log.info("%d of them have no reference solution: only that a stub fails is known", self._unproved)
        if not self._kept:
            raise TaskError(
                f"no rows left: all {self._total} were left out, for the reasons above. "
                "A reference must earn 1 and a stub 0 in the sandbox: look at the tests, or raise task.sandbox.limits"
            )
