"""A child process of the task `verifiers`: an interpreter with an environment in it, asked over JSON lines.

Owns which interpreter, what of our environment variables it sees, requests and replies, and how a child is lost. Must
not know what is asked, or what to do about a loss.

    python -c "from lib.tasks._verifiers_process import default_interpreter; print(default_interpreter())"
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, NamedTuple

from lib import PROJECT_ROOT, WorkbenchError

logger = logging.getLogger(__name__)

LEAVE = 10.0
"""Seconds that a child has to tear down."""
LONGEST = 256 * 2**20
"""Bytes of one reply; a longer one is no reply."""
SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
"""Environment variables whose names look like this are withheld from the environment, unless it is given them."""
_RUN = "import sys; sys.path[:] = [p for p in sys.path if p] + [{root!r}]; from {module} import main; main()"


class EnvironmentFailedError(WorkbenchError, RuntimeError):
    """The environment could not answer; the message says why."""


class ChildLostError(EnvironmentFailedError):
    """The child process died, stopped answering, or spoke no JSON."""


class Source(NamedTuple):
    """What decides which child serves a task: equal sources share one."""

    interpreter: str
    environment: str
    args: str = "{}"
    """JSON."""
    rows: int = 0
    keys: tuple[str, ...] = ()
    load_seconds: float = 900.0


class Child:
    """One process. Requests are written and replies read by threads of its own, so that no caller ever blocks."""

    def __init__(self, source: Source) -> None:
        self.lost: str | None = None
        self._pending: dict[int, Future[Any]] = {}
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._said: deque[str] = deque(maxlen=40)
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        code = _RUN.format(root=str(PROJECT_ROOT), module="lib.tasks._verifiers_child")
        try:
            self._process = subprocess.Popen(
                [source.interpreter, "-u", "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                cwd=PROJECT_ROOT,
                env=given_environment(os.environ, source.keys),
                start_new_session=True,  # Ctrl-C is for the workbench, which ends its children itself
            )
        except OSError as error:
            raise EnvironmentFailedError(f"task.python ({source.interpreter}) cannot be run: {error}") from None
        for work in (self._read, self._write, self._listen):
            threading.Thread(target=work, name=f"verifiers {work.__name__}", daemon=True).start()

    def ask(self, op: str, **fields: Any) -> tuple[int, Future[Any]]:
        """Send a request; (its number, its reply to come). The reply raises EnvironmentFailedError."""
        number, future = next(self._numbers), Future[Any]()
        with self._lock:
            if self.lost is not None:
                future.set_exception(ChildLostError(self.lost))
                return number, future
            self._pending[number] = future
        self._outbox.put(json.dumps({"id": number, "op": op, **fields}).encode() + b"\n")
        return number, future

    def cancel(self, number: int) -> None:
        """Nobody waits for this reply any more."""
        self._pending.pop(number, None)
        self._outbox.put(json.dumps({"id": 0, "op": "cancel", "of": number}).encode() + b"\n")

    def alive(self) -> Future[Any]:
        """Answered at once, unless the child's loop is blocked."""
        return self.ask("ping")[1]

    def give_up(self, why: str) -> None:
        """Kill it; whatever is in flight fails with the reason."""
        with self._lock:
            self.lost = self.lost or why + self._last_words()
            pending, self._pending = list(self._pending.values()), {}
        self._outbox.put(None)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for future in pending:
            if not future.done():
                future.set_exception(ChildLostError(self.lost))

    def close(self) -> None:
        """Let it tear down, then make sure."""
        self._outbox.put(None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVE)
        self.give_up("closed")

    def _last_words(self) -> str:
        told = " | ".join(line for line in self._said if line.strip())[-1500:]
        return f". Its last words: {told}" if told else ""

    def _write(self) -> None:
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError, ValueError):
            while (line := self._outbox.get()) is not None:
                self._process.stdin.write(line)
                self._process.stdin.flush()
            self._process.stdin.close()

    def _listen(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            text = line.decode(errors="replace").rstrip()[:500]
            self._said.append(text)
            logger.debug("verifiers: %s", text)

    def _read(self) -> None:
        assert self._process.stdout
        while line := self._process.stdout.readline(LONGEST):
            try:
                reply = json.loads(line)
                future = self._pending.pop(reply["id"], None)
                error = reply.get("error")
            except (ValueError, TypeError, KeyError, AttributeError):
                self.give_up(f"the child process of the environment spoke no JSON: {line[:200]!r}")
                return
            if future is None or future.done():
                continue
            if error is None:
                future.set_result(reply.get("ok"))
            else:
                future.set_exception(EnvironmentFailedError(error.get("text")))
        status = self._process.wait()
        time.sleep(0.1)  # its last words
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        self.give_up(f"the child process of the environment ended ({how})")


def given_environment(environment: Mapping[str, str], keys: tuple[str, ...]) -> dict[str, str]:
    """The variables that third-party code is given: all but those whose names look like secrets, and `keys`."""
    given = {name: value for name, value in environment.items() if name in keys or not SECRET.search(name)}
    return given | {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def default_interpreter() -> str:
    """This one where verifiers is installed in it, else that of build/verifiers. Raises EnvironmentFailedError."""
    import importlib.util
    import sys

    if importlib.util.find_spec("verifiers") is not None:
        return sys.executable
    made = PROJECT_ROOT / "build" / "verifiers" / "bin" / "python"
    if made.is_file():
        return str(made)
    place = Path("build") / "verifiers"
    raise EnvironmentFailedError(
        f"no interpreter with verifiers: it needs one of its own, because its pins clash with the workbench's. "
        f"`make verifiers` makes a small one in {place}; for environments of your own make a whole one and set "
        f"task.python to it:\n  python3 -m venv my-environments && my-environments/bin/pip install verifiers==0.1.14"
    )
