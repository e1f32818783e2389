"""The actor's process: serve the trainer of a run to the parent.

Owns where its log lines go. Must not know anything else.

    python -m lib.actor outputs/decisions
"""

from __future__ import annotations

import logging
import sys

from lib.actor.service import Actor
from lib.rpc import progress, serve


class _ToParent(logging.Handler):
    """The workbench's own lines are lines of progress in the parent's log."""

    def emit(self, record: logging.LogRecord) -> None:
        progress(record.getMessage())


def main(folder: str) -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(name)s: %(message)s")
    logging.getLogger("lib").addHandler(_ToParent())
    serve(lambda: Actor(folder))


if __name__ == "__main__":
    main(sys.argv[1])
