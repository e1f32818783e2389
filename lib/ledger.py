"""The score ledger: every verdict once, by content key, in one SQLite file.

Owns the file, its schema and its locking. Must not know tasks or trainers.

    python -c "from lib.ledger import Ledger; print(Ledger('outputs/decisions/ledger.sqlite').get('some key'))"
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lib import WorkbenchError

APPLICATION_ID = 0x47525042  # "GRPB": tells our files from anybody else's SQLite
_TABLE = """CREATE TABLE IF NOT EXISTS verdicts
    (key TEXT PRIMARY KEY, verdict TEXT NOT NULL, record TEXT NOT NULL) WITHOUT ROWID"""


class LedgerError(WorkbenchError, RuntimeError):
    """The file is not a ledger, or is damaged."""


class Ledger:
    """Verdicts by key. Threads and processes may share the file: WAL, one connection per thread."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._local = threading.local()
        self._connection()

    def get(self, key: str) -> dict[str, Any] | None:
        """The record under a key, or None."""
        found = self._connection().execute("SELECT record FROM verdicts WHERE key = ?", (key,)).fetchone()
        return None if found is None else dict(json.loads(found[0]))

    def put(self, key: str, verdict: str, record: Mapping[str, Any]) -> None:
        """Keep a verdict (pass, fail or unknown) with its record. The first known one stays; unknown is replaced."""
        text = json.dumps({**record, "verdict": verdict}, allow_nan=False)
        self._connection().execute(
            "INSERT INTO verdicts VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE "
            "SET verdict = excluded.verdict, record = excluded.record WHERE verdicts.verdict = 'unknown'",
            (key, verdict, text),
        )

    def __len__(self) -> int:
        return int(self._connection().execute("SELECT count(*) FROM verdicts").fetchone()[0])

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = self._local.connection = self._open()
        return connection

    def _open(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(self.path, timeout=30, isolation_level=None)
            owner = connection.execute("PRAGMA application_id").fetchone()[0]
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
            if owner != APPLICATION_ID and (owner or tables):
                raise LedgerError(
                    f"{self.path} is an SQLite file of another program: give the ledger a path of its own"
                )
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(_TABLE)
        except sqlite3.DatabaseError as error:
            raise LedgerError(
                f"{self.path} cannot be read as a ledger ({error}): move it away, or restore a copy"
            ) from error
        return connection


def content_key(*parts: str) -> str:
    """One key from the parts that decide a verdict; their order and boundaries count."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
