"""Small environments for the task `verifiers`, enough for the shipped example and the tests: `make verifiers`.

Owns the pins and where they go. What verifiers shares with the workbench is taken from the workbench's own packages,
and only what is missing is installed: some 50 MB in seconds, where `pip install verifiers` brings 700 MB. For
environments of your own make a whole one: docs/verifiers.md. Must not know rows or rewards.

    python -m lib.tasks._verifiers_make classic v1
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from lib import PROJECT_ROOT
from lib.layered import make_environment

PINS = {
    "classic": (
        "verifiers==0.1.14",
        "aiofiles==25.1.0",
        "aiolimiter==1.3.0",
        "antlr4-python3-runtime==4.13.2",
        "connectrpc==0.11.1",
        "griffelib==2.4.1",
        "latex2sympy2_extended==1.11.0",
        "math-verify==0.9.0",
        "msgpack==1.2.4",
        "openai-agents==0.24.0",
        "prime-sandboxes==0.5.1",
        "protobuf-py==0.1.1",
        "pyqwest==0.12.0",
    ),
    "v1": (
        "verifiers==0.4.0",
        "aiofiles==25.1.0",
        "antlr4-python3-runtime==4.13.2",
        "connectrpc==0.11.1",
        "latex2sympy2_extended==1.11.0",
        "math-verify==0.9.0",
        "prime-pydantic-config==0.4.3",
        "prime-sandboxes==0.5.1",
        "protobuf-py==0.1.1",
        "pyqwest==0.12.0",
        "renderers==0.1.12",
        "tomli_w==1.2.0",
    ),
}
"""Packages that the workbench does not have, resolved by pip on 21 November 2026; the others are the lock's."""

PLACES = {"classic": PROJECT_ROOT / "build" / "verifiers", "v1": PROJECT_ROOT / "build" / "verifiers-v1"}
"""Where they go; the first is what the task looks for by itself."""


def make(kind: str) -> Path:
    """The interpreter of an environment; makes it where it is not there as pinned. Raises WorkbenchError."""
    return make_environment(PLACES[kind], PINS[kind])


def main() -> None:
    """Make those named on the command line; without names the classic one."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for kind in sys.argv[1:] or ["classic"]:
        make(kind)


if __name__ == "__main__":
    main()
