"""The workers of this process: threads that own a sandbox each, and one queue for all of them.

Owns which worker takes which job, replacing broken workers, and one pool per (process, settings). Must not know what a
sandbox is made of.

    python -c "from lib.sandbox.pool import pool_of; help(pool_of)"
"""

from __future__ import annotations

import logging
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Protocol

from lib.sandbox.settings import Execution, ProgramRun, SandboxError, SandboxSettings
from lib.sandbox.worker import Job

logger = logging.getLogger(__name__)

Result = Execution | ProgramRun
Pending = tuple[Job, "Future[Result]"]


class AnyWorker(Protocol):
    """What a pool needs of a worker: bwrap's on this machine, or Modal's."""

    def run(self, job: Job) -> Result: ...

    def close(self) -> None: ...


class Pool:
    """`count` threads, started as they are needed. Each makes its own worker: the kernel ties processes to threads."""

    def __init__(self, make: Callable[[], AnyWorker], count: int) -> None:
        self._make, self._count = make, count
        self._waiting: OrderedDict[object, deque[Pending]] = OrderedDict()
        self._changed = threading.Condition()
        self._threads = self._idle = 0
        self._served: dict[int, object] = {}

    def submit(self, job: Job) -> Future[Result]:
        """Queue a job; callable from any thread. The future raises SandboxError where the sandbox broke twice."""
        future: Future[Result] = Future()
        with self._changed:
            self._waiting.setdefault(job.group, deque()).append((job, future))
            if self._idle < sum(len(jobs) for jobs in self._waiting.values()) and self._threads < self._count:
                number, self._threads = self._threads, self._threads + 1
                threading.Thread(target=self._serve, args=(number,), name=f"sandbox-{number}", daemon=True).start()
            self._changed.notify()
        return future

    def _serve(self, number: int) -> None:
        worker: AnyWorker | None = None
        while True:
            job, future = self._next(number)
            if not future.set_running_or_notify_cancel():
                continue
            try:
                worker, result = self._run(worker, job)
            except SandboxError as error:
                worker = None
                future.set_exception(error)
            except (
                BaseException
            ) as error:  # a bug of ours must reach the caller: a future that never ends would hang it
                worker = None
                future.set_exception(error)
            else:
                future.set_result(result)

    def _run(self, worker: AnyWorker | None, job: Job) -> tuple[AnyWorker, Result]:
        """Run the job; what breaks is replaced, and the job tried once more."""
        if worker is not None:
            try:
                return worker, worker.run(job)
            except SandboxError as error:
                logger.warning("a sandbox is replaced: %s", error)
                worker.close()
        worker = self._make()
        try:
            return worker, worker.run(job)
        except SandboxError:
            worker.close()
            raise

    def _next(self, number: int) -> Pending:
        """Another job with the tests that this worker served last, else the oldest that nobody is serving."""
        with self._changed:
            self._idle += 1
            while not self._waiting:
                self._changed.wait()
            self._idle -= 1
            group = self._choose(number)
            jobs = self._waiting[group]
            pending = jobs.popleft()
            if not jobs:
                del self._waiting[group]
            self._served[number] = group
            return pending

    def _choose(self, number: int) -> object:
        own = self._served.get(number)
        if own is not None and own in self._waiting:
            return own
        others = {group for other, group in self._served.items() if other != number}
        return next((group for group in self._waiting if group not in others), next(iter(self._waiting)))


_POOLS: dict[tuple[int, SandboxSettings], Pool] = {}
_LOCK = threading.Lock()


def pool_of(settings: SandboxSettings, make: Callable[[], AnyWorker]) -> Pool:
    """The one pool of this process for these settings; `make` is used by the first who asks."""
    with _LOCK:
        key = (os.getpid(), settings)  # a forked child has none of the threads
        if key not in _POOLS:
            _POOLS[key] = Pool(make, settings.workers or _cores())
        return _POOLS[key]


def _cores() -> int:
    return len(os.sched_getaffinity(0))
