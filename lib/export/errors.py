"""What can be wrong with an export. Must not know anything else.

python -c "from lib.export.errors import ExportError; print(ExportError.__doc__)"
"""

from __future__ import annotations

from lib import WorkbenchError


class ExportError(WorkbenchError, RuntimeError):
    """This cannot be exported, or not as asked; the message says what to do."""
