"""The error of the way to verl."""

from __future__ import annotations

from lib import WorkbenchError


class VerlError(WorkbenchError, ValueError):
    """verl cannot train this config here; the message says what to change."""
