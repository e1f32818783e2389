"""What can be wrong with published weights. Must not know anything else.

python -c "from lib.sync.errors import SyncError; print(SyncError.__doc__)"
"""

from __future__ import annotations

from lib import WorkbenchError


class SyncError(WorkbenchError, RuntimeError):
    """These weights cannot be published, or must not be taken; the message says why."""
