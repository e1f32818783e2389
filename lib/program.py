"""A program that is started as a process of this machine: how long it is waited for, and what is said where it fails.

Owns progress lines, the deadline, which failures are tried again, and the report. lib/keeper.py stands between the
program and this process: whatever ends this process ends the program's whole tree. Must not know how a program says
that it is ready: lib/hosts.py asks servers, lib/rpc listens to children.

    python -c "from lib.program import explain; print(explain(['ValueError: too small'], []))"
"""

from __future__ import annotations

import logging
import re
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from lib import WorkbenchError
from lib.keeper import KILL_NOW, POLL, end, family, last_lines, launch, wait
from lib.log import scrub

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 10.0
SHOWN_LINES = 50
FIRST_WAIT = 1.0
"""Seconds before the second attempt, doubled for each one more."""

PORT_LOST = "address already in use"
TRANSIENT = re.compile(
    rf"{PORT_LOST}|EADDRINUSE|connection (reset|aborted)|remote end closed|read timed out|too many requests|"
    r"temporary failure in name resolution|\b50[234] (server error|bad gateway|service|gateway)",
    re.IGNORECASE,
)
"""What may be gone at the next attempt: a port that another process took first, a download that was cut off."""

_ERROR = re.compile(r"^[^'\"`]{0,120}?\b((?:\w*(?:Error|Exception): |Value error, )(?!.*root cause).+)")
_LOOKED_AT = 2_000
"""Lines from the end of a log in which the cause of a failure is looked for."""

Advice = Sequence[tuple[str, str]]
"""(pattern, what to change), the most telling first; \\1 in the text is the pattern's first group."""


class ProgramError(WorkbenchError, RuntimeError):
    """A program did not start, or has ended; the message says why and what to change, and shows its last lines."""


class NotUpError(Exception):
    """One attempt failed; the message goes on after the program's name."""

    def __init__(self, what: str, said: str = "", hung: bool = False) -> None:
        """`said`: an error that the program told otherwise than by its log."""
        super().__init__(what)
        self.said, self.hung = said, hung


@dataclass(frozen=True, kw_only=True)
class Program:
    """What is started, but for its command line."""

    name: str
    """How messages begin: `vLLM`, `worker-0`."""
    log: Path
    """What it says goes here, without secrets; what was said at the start before is beside it, as `.before`."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """On top of this process's own."""
    deadline: float = 600.0
    """Seconds until it has to be ready."""
    deadline_setting: str = "deadline"
    """Where that is set, for messages."""
    grace: float = 10.0
    """Seconds that it gets to end by itself after SIGTERM."""
    attempts: int = 3
    advice: Advice = ()
    log_bytes: int = 8 * 2**20


class Process:
    """One attempt: a process tree in the project's root. It ends with this process, whatever ends that."""

    def __init__(self, program: Program, command: Sequence[str], more: Mapping[str, str], *descriptors: int) -> None:
        """`more`: of the environment; `descriptors`: that it inherits."""
        self.program, self.began = program, time.monotonic()
        self._told = self.began
        environment = {**program.environment, **more}
        self._keeper = launch(command, environment, program.log, program.log_bytes, program.grace, descriptors)

    def is_alive(self) -> bool:
        return self._keeper.poll() is None

    def failed(self) -> bool:
        """Whether it has ended otherwise than with status 0."""
        return self._keeper.poll() not in (None, 0)

    def pids(self) -> set[int]:
        """Its processes (Linux; elsewhere empty)."""
        return family(self._keeper.pid) - {self._keeper.pid}

    def tail(self, lines: int = SHOWN_LINES) -> list[str]:
        """The last lines that it said."""
        return last_lines(self.program.log, lines)

    # the wait until it is ready ---------------------------------------------------------------------------------------
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.began

    def check_start(self) -> None:
        """Raises NotUpError where it has ended before it was ready."""
        if not self.is_alive():
            raise NotUpError(f"did not start: it {self.ending()} after {self.seconds():.0f} s")

    def wait_on(self, what: str) -> None:
        """To be called again and again while it is not ready: says now and then what is waited for.

        Raises NotUpError at the deadline.
        """
        program, waited = self.program, self.seconds()
        if waited > program.deadline:
            raise NotUpError(
                f"is not ready after {waited:.0f} s: still waiting for {what}. It hangs, or needs longer (for a first "
                f"download, say): look at its last lines, or raise {program.deadline_setting}",
                hung=True,
            )
        if time.monotonic() - self._told >= PROGRESS_SECONDS:
            self._told += PROGRESS_SECONDS
            said = (self.tail(1) or ["nothing yet"])[0][:200]
            progress = f"{waited:.0f} of {program.deadline:g} s"
            logger.info("%s: waiting for %s, %s; it said last: %s", program.name, what, progress, said)

    def retry(self, error: NotUpError, attempt: int) -> float:
        """Seconds until attempt + 1, once this one is ended. Raises ProgramError where another one makes no sense."""
        program = self.program
        transient = None if error.hung else TRANSIENT.search("\n".join([str(error), error.said, *self.tail()]))
        if not transient or attempt >= program.attempts:
            raise ProgramError(self.report(str(error), error.said)) from None
        again = f"attempt {attempt + 1} of {program.attempts}"
        logger.warning("%s %s (%s): %s follows", program.name, error, transient[0], again)
        return float(FIRST_WAIT * 2 ** (attempt - 1))

    # what is said of it -----------------------------------------------------------------------------------------------
    def ending(self) -> str:
        """How it ended, once it has: `exited with status 1`."""
        status = self._keeper.returncode
        number = -status if status < 0 else status - 128
        if number not in set(signal.Signals):
            return f"exited with status {status}"
        why = " (by hand, or by the kernel because memory ran out: see `dmesg`)" if number == signal.SIGKILL else ""
        return f"was ended by {signal.Signals(number).name}{why}"

    def report(self, what: str, said: str = "") -> str:
        """Its name and `what`, the line that says why, what to change, and its last lines."""
        lines = self.tail(_LOOKED_AT)
        shown = "\n".join(f"  {line}" for line in lines[-SHOWN_LINES:]) or "  (nothing)"
        cause = explain([*lines, *said.splitlines()], self.program.advice, what)
        return scrub(f"{self.program.name} {what}.{cause}\nThe last lines of {self.program.log}:\n{shown}")

    # the end ----------------------------------------------------------------------------------------------------------
    def kill(self) -> None:
        """End it and all that it started at once, without waiting for it."""
        with suppress(ProcessLookupError):
            self._keeper.send_signal(KILL_NOW)

    def close(self) -> None:
        """End it and all that it started; returns when they are gone. Again = nothing."""
        end(self._keeper, self.program.grace)

    def wait(self) -> None:
        """Wait until all of it is gone."""
        wait(self._keeper)


def explain(lines: Sequence[str], advice: Advice, what: str = "") -> str:
    """The line that says why and what to change: what a program says last is often only what followed from it.

    `what` happened may call for advice as well, where nothing was said that does.
    """
    for pattern, change in advice:
        for line in [*lines, what]:
            if match := re.search(pattern, line, re.IGNORECASE):
                said = "" if line is what else f" It said: {line.strip()[:500]}"
                return f"{said}\nWhat to change: {match.expand(change)}"
    errors = [match[1] for line in lines if (match := _ERROR.search(line))]
    return f" It said: {errors[-1][:500]}" if errors else ""


__all__ = ["POLL", "PORT_LOST", "Advice", "NotUpError", "Process", "Program", "ProgramError", "explain"]
