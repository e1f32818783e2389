"""Plain progress lines: to the terminal or the cell, and to the run's log.txt.

Owns the handlers and the scrubbing of secrets. Must not know what is logged.

    python -c "from lib.log import scrub; print(scrub('nothing secret here'))"
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO

_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|_PAT)(_ID|_\d+)?$", re.IGNORECASE)
_PASSWORD = re.compile(r"://[^/\s@]+@")
SECRETS = "WORKBENCH_SECRETS"
"""Environment variable: names of more variables that hold secrets, with commas between."""

_SHORTEST_SECRET = 8
"""Shorter values ("1", "none") would blank out ordinary text."""


def scrub(text: str) -> str:
    """The text with the value of every secret environment variable replaced by its name.

    Secret are the variables whose names look like it, and those that SECRETS names.
    """
    forms: dict[str, str] = {}
    for name, value in os.environ.items():
        if is_secret(name):
            forms |= dict.fromkeys(_forms(value), name)
    for form in sorted(forms, key=len, reverse=True):  # one secret may begin with another
        text = text.replace(form, f"<{forms[form]}>")
    return text


def is_secret(name: str) -> bool:
    """Whether an environment variable of this name holds a secret: it looks like it, or SECRETS names it."""
    return bool(_SECRET_NAME.search(name)) or name in os.environ.get(SECRETS, "").split(",")


def without_secrets() -> dict[str, str]:
    """This process's environment for a program that is not ours: without secrets, and without URLs with a password."""
    return {name: value for name, value in os.environ.items() if not is_secret(name) and not _PASSWORD.search(value)}


def name_secrets(names: Iterable[str]) -> None:
    """Have the values of more environment variables scrubbed, here and in child processes."""
    known = {name for name in os.environ.get(SECRETS, "").split(",") if name}
    os.environ[SECRETS] = ",".join(sorted(known.union(names)))


def _forms(value: str) -> set[str]:
    """How a secret can stand in a text: as it is, as a string of JSON, and each line of one that has several."""
    parts = {value, *value.splitlines()}
    written = {json.dumps(part, ensure_ascii=ascii)[1:-1] for part in parts for ascii in (True, False)}
    return {form for form in parts | written if len(form) >= _SHORTEST_SECRET}


class ScrubbedStream:
    """A text stream that passes on whole lines only, without secrets: one could stand across two writes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._rest = stream, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        self._stream.write("".join(scrub(line) + "\n" for line in lines))
        return len(text)

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """Pass on what is left after the last line end; the stream itself stays open."""
        if self._rest:
            self._stream.write(scrub(self._rest) + "\n")
            self._rest = ""
        self._stream.flush()


class _Scrubbed(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record))


class _Stdout(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to whatever sys.stdout is now: a notebook kernel replaces it after import."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> object:
        return sys.stdout


def start_logging(file: Path, terminal: bool = True) -> None:
    """Send the workbench's log lines to `file` and, where asked, to standard output; again = to another file."""
    root = logging.getLogger("lib")
    root.setLevel(logging.INFO)
    root.propagate = False
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    to_file = logging.FileHandler(file, encoding="utf-8")
    to_file.setFormatter(_Scrubbed("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(to_file)
    if terminal:
        to_terminal = _Stdout()
        to_terminal.setFormatter(_Scrubbed("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        root.addHandler(to_terminal)


def echo(line: str) -> None:
    """Show a line that a child process already logged, on standard output only."""
    sys.stdout.write(scrub(line) + "\n")
    sys.stdout.flush()
