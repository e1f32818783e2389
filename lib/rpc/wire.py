"""What both ends of the wire know. Owns names and limits. Must not know which end it is on.

python -c "from lib.rpc.wire import BEAT_SECONDS; print(BEAT_SECONDS)"
"""

from __future__ import annotations

WIRE = "WORKBENCH_WIRE"
"""Environment variable of a child: the number of its end of the wire."""

BEAT_SECONDS = 1.0
"""How often a child says that it is there."""

LONGEST_LINE = 2**31
"""Bytes of one message."""
