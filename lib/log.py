"""Plain progress lines: to the terminal or the cell, and to the run's log.txt.

Owns the handlers and the scrubbing of secrets. Must not know what is logged.

    python -c "from lib.log import scrub; print(scrub('nothing secret here'))"
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

_SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|_PAT)(_ID|_\d+)?$", re.IGNORECASE)
_SHORTEST_SECRET = 8
"""Shorter values ("1", "none") would blank out ordinary text."""


def scrub(text: str) -> str:
    """The text with the value of every secret-looking environment variable replaced by its name."""
    secrets = {value: name for name, value in os.environ.items() if _SECRET_NAME.search(name)}
    for value in sorted(secrets, key=len, reverse=True):  # one secret may begin with another
        if len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, f"<{secrets[value]}>")
    return text


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
