"""The score ledger: every verdict once, by content key, in one SQLite file.

Owns the file, its schema and its locking. Must not know tasks, trainers or judges.

    python -c "from lib.ledger import Ledger; print(Ledger('outputs/ace/ledger.sqlite').export('verdicts.csv'))"
"""

from __future__ import annotations

import atexit
import csv
import hashlib
import logging
import os
import shutil
import sqlite3
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lib import WorkbenchError, places

logger = logging.getLogger(__name__)

NAME = "ledger.sqlite"
"""The ledger's name in a run folder."""

APPLICATION_ID = 0x47525042  # "GRPB": tells our files from anybody else's SQLite
SCHEMA = 1
_PATIENCE = 30.0
"""Seconds to wait for other writers."""
_CACHE = 32 * 1024
"""KiB of a ledger that a process keeps in memory: with SQLite's own 2 MB every verdict is read from the file again."""
_MOST_KEYS = 500
"""Keys in one statement."""
_MOST_REMEMBERED = 20_000
"""Verdicts that a process keeps at hand: about 1 KB each."""
_PAGE = 1000
"""Rows that are read at a time."""


class LedgerError(WorkbenchError, RuntimeError):
    """The file is not a ledger, is damaged, or cannot be written; the message says what to do."""


class Verdict(NamedTuple):
    """What is known about one criterion of one answer."""

    verdict: Literal["pass", "fail", "unknown"]
    score: float | None
    """0 to 1, from 0.5 on it is a "pass"; a check has 1 or 0; None when unknown."""
    reasons: str = ""
    """The judge's words; of an unknown verdict: the cause."""
    usd: float | None = None
    """This criterion's share of what the calls cost; None = no price is known."""
    seconds: float = 0.0
    """Latency of the calls."""
    attempts: int = 0
    """HTTP requests made for it, retries included; 0 = decided without a call."""


class Entry(NamedTuple):
    """A verdict to keep, and what it is about. The texts are for those who read the ledger: the key alone decides."""

    key: str
    verdict: Verdict
    task: str
    row: str
    criterion: str
    judge: str
    prompt: str
    """Version of the judge's prompt."""
    answer: str
    """`hash_text` of the answer."""


_VALUES = Verdict._fields
_COLUMNS = ("key", *_VALUES, *Entry._fields[2:], "written")
_TABLE = """CREATE TABLE verdicts (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, verdict TEXT NOT NULL, score REAL,
    reasons TEXT NOT NULL, usd REAL, seconds REAL NOT NULL, attempts INTEGER NOT NULL,
    task TEXT NOT NULL, row TEXT NOT NULL, criterion TEXT NOT NULL, judge TEXT NOT NULL, prompt TEXT NOT NULL,
    answer TEXT NOT NULL, written REAL NOT NULL)"""
_GET = f"SELECT {', '.join(_VALUES)} FROM verdicts WHERE key = ?"
_GET_MANY = f"SELECT key, {', '.join(_VALUES)} FROM verdicts WHERE key IN"
_KEEP = f"""ON CONFLICT (key) DO UPDATE SET {", ".join(f"{name} = excluded.{name}" for name in _COLUMNS[1:])}
    WHERE verdicts.verdict = 'unknown' AND (excluded.verdict != 'unknown' OR excluded.written > verdicts.written)"""
_PUT = f"INSERT INTO verdicts ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))}) {_KEEP}"
_MERGE = f"""INSERT INTO verdicts ({", ".join(_COLUMNS)})
    SELECT {", ".join(_COLUMNS)} FROM theirs.verdicts WHERE true ORDER BY id {_KEEP}"""

_DAMAGED = "move it away, or restore a copy"
_REMEDIES = {
    "SQLITE_BUSY": f"another process has been writing to it for {_PATIENCE:.0f} s: run again when that one is done",
    "SQLITE_FULL": "the disk is full: free some space and run again; what it holds is not lost",
    "SQLITE_CANTOPEN": "name a file in a folder that is there and may be written",
    "SQLITE_READONLY": "name a file in a folder that may be written",
    "SQLITE_IOERR": "a ledger needs a local disk with space left; on a network drive SQLite cannot lock",
}
"""What to do, by how SQLite's name of the error begins; anything else means that the file is damaged."""


class Ledger:
    """Verdicts by key. Threads and processes may share the file (WAL); a fork may happen at any time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] | None = None
        self._memory: dict[str, Verdict] = {}
        with _registry:
            _alive.add(self)
        len(self)  # refuses at once what is no ledger

    def get(self, key: str) -> Verdict | None:
        """The verdict under a key, or None."""
        if remembered := self._memory.get(key):
            return remembered
        try:
            with self._lock:
                row = (self._connection or self._connect()).execute(_GET, (key,)).fetchone()
        except sqlite3.DatabaseError as error:
            raise self._explained(error) from error
        found = None if row is None else Verdict._make(row)
        if found:
            self._remember({key: found})
        return found

    def get_many(self, keys: Iterable[str]) -> dict[str, Verdict]:
        """What there is under these keys; about twice as quick a key as one by one."""
        keys = list(keys)
        found = {key: verdict for key in keys if (verdict := self._memory.get(key))}
        rest = [key for key in keys if key not in found]
        for some in (rest[start : start + _MOST_KEYS] for start in range(0, len(rest), _MOST_KEYS)):
            rows = self._all(f"{_GET_MANY} ({','.join('?' * len(some))})", some)
            new = {key: Verdict._make(values) for key, *values in rows}
            self._remember(new)
            found |= new
        return found

    def put(self, entries: Iterable[Entry]) -> None:
        """Keep verdicts, all or none. The first known one under a key stays; an unknown one is replaced.

        Raises ValueError for a verdict that cannot be, before anything is kept.
        """
        now = time.time()
        rows = [_as_row(entry, now) for entry in entries]
        if not rows:
            return
        with self._using(write=True) as connection, _transaction(connection):
            connection.executemany(_PUT, rows)

    def __len__(self) -> int:
        return int(self._all("SELECT count(*) FROM verdicts")[0][0])

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every verdict with what it is about, by column, in the order first written; `written` = seconds since 1970.

        `pandas.DataFrame(ledger.rows())` is a run's ledger as a table.
        """
        page: list[Any] = [(0,)]
        statement = f"SELECT id, {', '.join(_COLUMNS)} FROM verdicts WHERE id > ? ORDER BY id LIMIT {_PAGE}"
        while page := self._all(statement, page[-1][:1]):
            for _, *values in page:
                yield dict(zip(_COLUMNS, values, strict=True))

    def merge(self, other: str | Path) -> int:
        """Take over what another ledger knows and this one does not; how many verdicts that were."""
        other = Path(other)
        if not other.is_file():
            raise LedgerError(f"{other}: there is no such ledger to merge into {self.path}")
        if self.path.exists() and other.samefile(self.path):
            return 0
        Ledger(other).close()  # is it one?
        with self._using(f"{self.path} or {other}", write=True) as connection:
            connection.execute("ATTACH ? AS theirs", (str(other),))
            try:
                with _transaction(connection):
                    return connection.execute(_MERGE).rowcount
            finally:
                connection.execute("DETACH theirs")

    def backup(self, target: str | Path) -> None:
        """Write a whole copy that needs no other file beside it; `target` changes at once or not at all.

        The target may lie where SQLite cannot work (a volume): it is only copied there.
        """
        with tempfile.TemporaryDirectory(dir=self.path.parent, prefix=f".{self.path.name}.") as folder:
            copy = Path(folder) / NAME
            with self._using() as connection, closing(sqlite3.connect(copy)) as fresh:
                connection.backup(fresh)
                fresh.execute("PRAGMA journal_mode = DELETE")
            with _whole(Path(target)) as partial:
                shutil.copyfile(copy, partial)

    def export(self, path: str | Path) -> Path:
        """Write all rows as a table: .parquet or .csv, by the name's ending. Returns the path."""
        path = Path(path)
        writers = {".parquet": _write_parquet, ".csv": _write_csv}
        if path.suffix not in writers:
            raise ValueError(f"export to {path}: the name must end in {' or '.join(writers)}")
        with _whole(path) as partial:
            writers[path.suffix](partial, self.rows())
        return path

    def close(self) -> None:
        """Let go of the file; the next call opens it again."""
        with self._lock:
            self._close()

    # the connection: one, under a lock, closed before a fork. SQLite forbids to carry one across, and a child that
    # opens its own beside it would take its parent's locks for its own. Threads would take turns in any case.
    @contextmanager
    def _using(self, what: str = "", write: bool = False) -> Iterator[sqlite3.Connection]:
        try:
            with self._lock:
                if write:
                    self._notice_removal()
                yield self._connection or self._connect()
        except sqlite3.DatabaseError as error:
            raise self._explained(error, what) from error

    def _notice_removal(self) -> None:
        """Begin anew where somebody removed or replaced the file: what goes into the old one would be lost."""
        if self._connection and self._file != _identity(self.path):
            self._close()
            self._memory.clear()

    def _remember(self, found: Mapping[str, Verdict]) -> None:
        """Keep known verdicts at hand: they never change."""
        if len(self._memory) > _MOST_REMEMBERED:
            self._memory.clear()
        self._memory.update({key: verdict for key, verdict in found.items() if verdict.score is not None})

    def _all(self, statement: str, values: Sequence[object] = ()) -> list[Any]:
        with self._using() as connection:
            return connection.execute(statement, values).fetchall()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
        try:
            self._settle(connection)
            _switch_to_wal(connection)
            connection.execute("PRAGMA synchronous = NORMAL")  # a kill loses nothing; a power cut the last seconds
            connection.execute(f"PRAGMA cache_size = -{_CACHE}")
        except BaseException:
            connection.close()
            raise
        self._connection, self._file = connection, _identity(self.path)
        return connection

    def _settle(self, connection: sqlite3.Connection) -> None:
        """Whose file it is; a new one is made ours. Each look is one transaction: another may be making it now."""
        with _transaction(connection, "DEFERRED"):
            if self._is_ours(connection):
                return
        with _transaction(connection):
            if not self._is_ours(connection):
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {SCHEMA}")
                connection.execute(_TABLE)

    def _is_ours(self, connection: sqlite3.Connection) -> bool:
        """True for a ledger, False for an empty file. Raises LedgerError for anything else."""
        owner, version, tables = (
            int(connection.execute(question).fetchone()[0])
            for question in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
        )
        if owner != APPLICATION_ID and (owner or tables):
            raise LedgerError(f"{self.path} is an SQLite file of another program: give the ledger a path of its own")
        if tables and version < SCHEMA:
            raise LedgerError(f"{self.path} is a ledger of an older workbench (format {version}): move it away")
        if version > SCHEMA:
            raise LedgerError(
                f"{self.path} was written by a newer workbench (format {version}, this one knows {SCHEMA}): "
                f"update this checkout, or move the ledger away"
            )
        return bool(tables)

    def _close(self) -> None:
        if self._connection:
            self._connection.close()
        self._connection = self._file = None

    def _explained(self, error: sqlite3.DatabaseError, what: str = "") -> Exception:
        if isinstance(error, sqlite3.ProgrammingError):
            return error  # a bug, not the file
        name = error.sqlite_errorname
        remedy = next((text for start, text in _REMEDIES.items() if name.startswith(start)), "")
        verb = "used" if remedy else "read"
        return LedgerError(f"{what or self.path} cannot be {verb} as a ledger ({error}): {remedy or _DAMAGED}")


# keys -----------------------------------------------------------------------------------------------------------------
def verdict_key(task: str, criterion: str, judge: str, prompt: str, answer: str, *more: str) -> str:
    """The key of all that decides a verdict: the task's version, the criterion's text, the judge, the version of its
    prompt, the answer's hash, and what else does (the question's hash, the number of a re-ask). Borders count."""
    parts = (task, criterion, judge, prompt, answer, *more)
    text = f"{[*map(len, parts)]}{''.join(parts)}"
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def hash_text(text: str) -> str:
    """sha256 of a text, as hex; any text, lone surrogates too."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# one ledger for each file ---------------------------------------------------------------------------------------------
_registry = threading.RLock()
_opened: dict[Path, Ledger] = {}
_alive: weakref.WeakSet[Ledger] = weakref.WeakSet()
_held: list[Ledger] = []
_told: set[str] = set()


def open_ledger(path: str = "") -> Ledger:
    """The ledger of this process for a path; without one, the run's.

    $WORKBENCH_LEDGER (in a container) wins over any path. Where there is neither path nor run ($WORKBENCH_RUN), the
    ledger is a temporary file of this process.
    """
    with _registry:
        file = _choose(path)
        known = _opened.get(file)
        if known is None:  # and not `if not known`: an empty ledger has the length 0
            if not file.parent.is_dir():
                raise LedgerError(f"ledger {file}: there is no folder {file.parent}: make it, or correct the path")
            known = _opened[file] = Ledger(file)
        with known._lock:
            known._notice_removal()
        return known


def _choose(path: str) -> Path:
    fixed, run = os.environ.get(places.LEDGER), os.environ.get(places.RUN)
    if fixed:
        if path and path not in _told:
            _told.add(path)
            logger.info("ledger: %s is not used: a container keeps its run's own, %s in the run folder", path, NAME)
        return Path(fixed).resolve()
    if path:
        return places.locate(path).resolve()
    return (Path(run) / NAME if run else _temporary(os.getpid())).resolve()


@cache
def _temporary(process: int) -> Path:
    folder = tempfile.mkdtemp(prefix="workbench-ledger-")

    def remove() -> None:
        if os.getpid() == process:  # and not a fork of it, that inherited this
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return Path(folder) / NAME


def _before_fork() -> None:
    _registry.acquire()
    _held.extend(_alive)
    for ledger in _held:
        ledger._lock.acquire()
        ledger._close()


def _after_fork() -> None:
    for ledger in _held:
        ledger._lock.release()
    _held.clear()
    _registry.release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)


# SQLite and files -----------------------------------------------------------------------------------------------------
def _as_row(entry: Entry, now: float) -> tuple[object, ...]:
    verdict = entry.verdict
    score = verdict.score
    if score is not None and not 0 <= score <= 1:  # NaN too
        raise ValueError(f"score {score!r}: a number from 0 to 1, or None when unknown")
    expected = "unknown" if score is None else "pass" if score >= 0.5 else "fail"
    if verdict.verdict != expected:
        raise ValueError(f"verdict {verdict.verdict!r} with score {score!r}: this score means {expected!r}")
    costs = (verdict.usd or 0.0, verdict.seconds, verdict.attempts)
    if not all(0 <= cost < float("inf") for cost in costs):
        raise ValueError(f"usd, seconds, attempts = {costs}: finite, and not below 0")
    values = (entry.key, *verdict, *entry[2:])
    return (*(_storable(value) if isinstance(value, str) else value for value in values), now)


def _storable(text: str) -> str:
    """The text without lone surrogates, which no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()
    return text


@contextmanager
def _transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """All of what is inside, or nothing; no other writer comes between. DEFERRED: to read only."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        connection.rollback()
        raise


def _switch_to_wal(connection: sqlite3.Connection) -> None:
    """SQLite does not wait for others when it changes the journal: wait here."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not error.sqlite_errorname.startswith("SQLITE_BUSY") or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file that is, whatever its name; None where there is none."""
    with suppress(OSError):
        stat = os.stat(path)
        return stat.st_dev, stat.st_ino
    return None


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A file to write that comes under its own name only once it is complete and on disk."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_csv(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    kinds = {"attempts": pyarrow.int64()} | dict.fromkeys(("score", "usd", "seconds", "written"), pyarrow.float64())
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in _COLUMNS])
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while page := list(islice(rows, _PAGE)):
            writer.write_table(pyarrow.Table.from_pylist(page, schema))
