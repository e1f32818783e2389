"""Running untrusted Python: tests against a solution, or a program on its standard input.

Owns the choice of a backend and its self-test. The boundary is bubblewrap (or a Modal Sandbox); a solution never sees a
test, and what judges it never runs model code. Must not know what passing means: rewards are the task's.

    python -c "import asyncio; from lib.sandbox import run_tests
    print(asyncio.run(run_tests('def f(x): return 2 * x', ['assert f(2) == 4'], ['f'])))"
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from lib.sandbox import bubblewrap, checks
from lib.sandbox.pool import AnyWorker, pool_of
from lib.sandbox.settings import (
    LONGEST_SOURCE,
    Check,
    Execution,
    Kind,
    Limits,
    ProgramRun,
    SandboxError,
    SandboxSettings,
    SelfTest,
)
from lib.sandbox.worker import Job, Worker

__all__ = [
    "Execution",
    "Limits",
    "ProgramRun",
    "SandboxError",
    "SandboxSettings",
    "SelfTest",
    "run_program",
    "run_tests",
]

logger = logging.getLogger(__name__)

DEFAULT = SandboxSettings()


async def run_tests(
    source: str,
    tests: Sequence[str],
    entry_points: Sequence[str],
    *,
    setup: str = "",
    settings: SandboxSettings = DEFAULT,
    stop_at_first_failure: bool = False,
) -> Execution:
    """Run tests (statements, usually asserts) against a solution's source; verdicts in the order of the tests.

    entry_points: the names that the tests take from the solution; all other names are the judge's own. setup: code that
    runs before the tests, on the judge's side. Callable from any thread and any event loop.
    Raises SandboxError where the sandbox broke, or there is none: that is no verdict on the solution.
    """
    if not tests or not entry_points:
        what = "tests" if not tests else "entry points"
        raise ValueError(f"no {what} given: a solution without {what} cannot be judged. Drop the row.")
    if len(source) > LONGEST_SOURCE:
        return Execution(("error:SourceTooLong",) * len(tests), 0.0, 0.0, None, "", 0, "none")
    job = Job(source, (tuple(tests), tuple(entry_points), setup, stop_at_first_failure))
    done = await _submit(job, settings)
    assert isinstance(done, Execution)
    return done


async def run_program(source: str, stdin: str = "", *, settings: SandboxSettings = DEFAULT) -> ProgramRun:
    """Run a script on its standard input. The output is to be compared by the caller: nothing expected enters it.

    Raises SandboxError where the sandbox broke, or there is none.
    """
    if len(source) > LONGEST_SOURCE:
        return ProgramRun("", "error", 0.0, 0.0, None, f"longer than {LONGEST_SOURCE} characters", "none")
    done = await _submit(Job(source, stdin=stdin), settings)
    assert isinstance(done, ProgramRun)
    return done


def self_test(settings: SandboxSettings = DEFAULT) -> SelfTest:
    """Choose the backend and try it with real attacks; about a second, once per process and settings.

    Raises SandboxError with the reason and the remedy where no backend passes.
    """
    with _LOCK:
        key = (os.getpid(), settings)
        if key not in _CHOSEN:
            try:
                _CHOSEN[key] = _choose(settings)
            except SandboxError as error:
                _CHOSEN[key] = str(error)
        chosen = _CHOSEN[key]
    if isinstance(chosen, str):
        raise SandboxError(chosen)
    return chosen.test


class _Chosen(NamedTuple):
    test: SelfTest
    make: Callable[[], AnyWorker]


_CHOSEN: dict[tuple[int, SandboxSettings], _Chosen | str] = {}
"""A refusal is kept as well: a step asks thousands of times."""
_LOCK = threading.Lock()


async def _submit(job: Job, settings: SandboxSettings) -> Execution | ProgramRun:
    key = (os.getpid(), settings)
    if not isinstance(_CHOSEN.get(key), _Chosen):
        await asyncio.to_thread(self_test, settings)
    chosen = _CHOSEN[key]
    assert isinstance(chosen, _Chosen)
    return await asyncio.wrap_future(pool_of(settings, chosen.make).submit(job))


def _choose(settings: SandboxSettings) -> _Chosen:
    """The first backend that passes its self-test."""
    if settings.backend in ("auto", "warm", "cold"):
        bubblewrap.require()
    reasons: list[str] = []
    for kind, user in _candidates(settings):
        try:
            found = _tested(kind, user, settings)
        except SandboxError as error:
            reasons.append(f"{_shown(kind, user)}: {error}")
            continue
        reason = "; ".join(reasons) or "the first choice"
        logger.info("sandbox: %s, self-test passed in %.1f s (%s)", _shown(kind, user), found[1], reason)
        test = SelfTest(kind, tuple(found[0]), found[1], reason)
        return _Chosen(test, partial(_worker, kind, user, settings))
    raise SandboxError("no sandbox passed its self-test. " + " | ".join(reasons))


def _candidates(settings: SandboxSettings) -> list[tuple[Kind, int | None]]:
    kinds: list[Kind] = ["warm", "cold"] if settings.backend == "auto" else [settings.backend]
    users = [None] if settings.backend == "modal" else list(dict.fromkeys([bubblewrap.user(), None]))
    return [(kind, user) for kind in kinds for user in users]


def _worker(kind: Kind, user: int | None, settings: SandboxSettings) -> AnyWorker:
    if kind != "modal":
        return Worker(kind, settings.limits, user)
    from lib.sandbox.modal_host import ModalWorker

    return ModalWorker(settings)


def _shown(kind: Kind, user: int | None) -> str:
    return kind if user is None else f"{kind} as user {user}"


def _tested(kind: Kind, user: int | None, settings: SandboxSettings) -> tuple[list[Check], float]:
    """All checks on one worker, in this thread. Raises SandboxError where it does not start, or one fails."""
    started = time.monotonic()
    limits = checks.LIMITS.model_copy(update={"memory_mb": settings.limits.memory_mb})
    worker = _worker(kind, user, settings.model_copy(update={"limits": limits}))
    try:
        found = checks.check(worker.run, kind)
    finally:
        worker.close()
    failed = [f"{check.name} ({check.found})" for check in found if not check.passed]
    if failed:
        raise SandboxError(f"the self-test failed: {'; '.join(failed)}")
    return found, time.monotonic() - started
