"""The score ledger: every verdict once, by content key, in one SQLite file.

Owns the file, its schema and its locking. Must not know tasks or trainers.

    python -c "from lib.ledger import Ledger; print(Ledger('outputs/decisions/ledger.sqlite').get('some key'))"
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from lib import WorkbenchError

Verdict = Literal["pass", "fail", "unknown"]

APPLICATION_ID = 0x47525042  # "GRPB": tells our files from anybody else's SQLite
_PATIENCE = 30.0
"""Seconds to wait for other writers."""

_TABLE = """CREATE TABLE IF NOT EXISTS verdicts
    (key TEXT PRIMARY KEY, verdict TEXT NOT NULL, record TEXT NOT NULL) WITHOUT ROWID"""


class LedgerError(WorkbenchError, RuntimeError):
    """The file is not a ledger, or is damaged."""


class Ledger:
    """Verdicts by key. Threads and processes may share the file: WAL, one connection per thread."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._local = threading.local()
        self._execute("SELECT 1")

    def get(self, key: str) -> dict[str, Any] | None:
        """The record under a key, or None."""
        found = self._execute("SELECT record FROM verdicts WHERE key = ?", key).fetchone()
        return None if found is None else dict(json.loads(found[0]))

    def put(self, key: str, verdict: Verdict, record: Mapping[str, Any]) -> None:
        """Keep a verdict with its record. The first known one stays; an unknown one is replaced."""
        if verdict not in get_args(Verdict):
            raise ValueError(f"verdict {verdict!r}: one of {', '.join(get_args(Verdict))}")
        text = json.dumps({**record, "verdict": verdict}, allow_nan=False)
        self._execute(
            "INSERT INTO verdicts VALUES (?, ?, ?) ON CONFLICT (key) DO UPDATE "
            "SET verdict = excluded.verdict, record = excluded.record WHERE verdicts.verdict = 'unknown'",
            key,
            verdict,
            text,
        )

    def __len__(self) -> int:
        return int(self._execute("SELECT count(*) FROM verdicts").fetchone()[0])

    def _execute(self, statement: str, *values: str) -> sqlite3.Cursor:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        try:
            if connection is None:
                connection = self._local.connection = self._open()
            return connection.execute(statement, values)
        except sqlite3.DatabaseError as error:
            raise LedgerError(
                f"{self.path} cannot be read as a ledger ({error}): move it away, or restore a copy"
            ) from error

    def _open(self) -> sqlite3.Connection:
        """A connection of this thread. Whose file it is, is looked at and settled in one transaction."""
        connection = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None)
        connection.execute("BEGIN IMMEDIATE")
        owner = connection.execute("PRAGMA application_id").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if owner != APPLICATION_ID and (owner or tables):
            connection.close()
            raise LedgerError(f"{self.path} is an SQLite file of another program: give the ledger a path of its own")
        if not tables:
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(_TABLE)
        connection.execute("COMMIT")
        _switch_to_wal(connection)
        connection.execute("PRAGMA synchronous = NORMAL")
        return connection


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """SQLite does not wait for others when it changes the journal: wait here."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def content_key(*parts: str) -> str:
    """One key from the parts that decide a verdict; their order and boundaries count."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
