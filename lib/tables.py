"""Tables of records: CSV, JSON lines, JSON, parquet, read one record at a time; and all their problems at once.

Owns reading and writing of tables and the wording of their errors. Must not know what the records mean.

    python -c "from lib.tables import CsvTable; print(CsvTable('configs/examples/decisions.csv')[0])"
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, overload

from lib.task import TaskError

Record = dict[str, Any]

SHOWN = 20  # problems of a table written out; the rest is counted
csv.field_size_limit(sys.maxsize)  # the module's own limit of 128 KB a cell is shorter than some prompts


class RecordError(TaskError):
    """One record cannot be read. `column` may be empty."""

    def __init__(self, column: str, message: str) -> None:
        super().__init__(message)
        self.column = column


class Table(Sequence[Record]):
    """A sequence of records. `name` for messages, `path` of its file if it has one, `columns` of its first record."""

    name: str
    path: Path | None = None
    columns: tuple[str, ...]

    @property
    def stem(self) -> str:
        """The file's name without its ending."""
        return self.path.stem if self.path else self.name.replace("/", "-")

    def place(self, number: int) -> str:
        """Where record `number` (from 0) stands, as a person finds it: "line 7"."""
        return f"record {number + 1}"

    def read(self, number: int) -> Record:
        """One record; raises RecordError when it is broken."""
        raise NotImplementedError

    @overload
    def __getitem__(self, number: int) -> Record: ...
    @overload
    def __getitem__(self, number: slice) -> list[Record]: ...
    def __getitem__(self, number: int | slice) -> Record | list[Record]:
        if isinstance(number, slice):
            return [self[one] for one in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"{self.name} has {len(self)} records; number {number} was asked for")
        number %= len(self)
        try:
            return self.read(number)
        except RecordError as error:
            raise TaskError(_problem(self.name, self.place(number), error.column, str(error))) from None


class ListTable(Table):
    """Records that are already in memory, or in anything indexable."""

    def __init__(self, name: str, records: Sequence[Any], path: Path | None = None) -> None:
        self.name, self.path, self._records = name, path, records
        self.columns = tuple(records[0]) if len(records) and isinstance(records[0], dict) else ()

    def __len__(self) -> int:
        return len(self._records)

    def read(self, number: int) -> Record:
        return _object(self._records[number])


class FileTable(Table):
    """A text file indexed once: 12 bytes a record in memory; records are read from the file when asked for.

    Reads with pread, so that forked processes and threads may share it; a pickled copy opens the file itself.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.name = str(path)
        self._starts, self._lines = array("q"), array("I")
        self._file: int | None = None
        try:
            with self.path.open("rb") as file:
                self._end = self._index(_Lines(self.name, file))
        except OSError as error:
            raise TaskError(f"{self.name}: cannot be read ({error.strerror or error}). Check the path.") from None

    def _index(self, lines: _Lines) -> int:
        """Fill the offsets and line numbers of the records; return the size of the file."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._starts)

    def place(self, number: int) -> str:
        return f"line {self._lines[number]}"

    def text(self, number: int) -> str:
        """The record as it stands in the file."""
        start = self._starts[number]
        stop = self._starts[number + 1] if number + 1 < len(self._starts) else self._end
        data = os.pread(self._open(), stop - start, start)
        if len(data) != stop - start:
            raise TaskError(f"{self.name} became shorter while it was in use. Start again with the new file.")
        return data.decode("utf-8")

    def _open(self) -> int:
        if self._file is None:
            self._file = os.open(self.path or "", os.O_RDONLY)
        return self._file

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            os.close(self._open())


class _Lines(Iterator[str]):
    """The lines of a file as text, with the byte offset and the number of the next one."""

    def __init__(self, name: str, file: io.BufferedReader) -> None:
        self._name, self._file = name, file
        self.offset = 3 if file.peek(3)[:3] == b"\xef\xbb\xbf" else 0
        self.number = 1
        file.seek(self.offset)

    def __next__(self) -> str:
        data = next(self._file)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f"byte {self.offset + error.start} is {data[error.start]:#04x}"
            raise TaskError(
                f"{self._name}, line {self.number}: not UTF-8 ({where}). Convert it: iconv -f LATIN1 -t UTF-8, say."
            ) from None
        self.offset += len(data)
        self.number += 1
        return text


class CsvTable(FileTable):
    """A comma-separated file with a header; quoted cells may hold commas and line breaks. Cells are strings."""

    def _index(self, lines: _Lines) -> int:
        self.columns = ()
        reader = csv.reader(lines, strict=True)
        while True:
            start, line = lines.offset, lines.number
            try:
                cells = next(reader, None)
            except csv.Error as error:
                remedy = "Put the cell in quotes and double the quotes in it."
                raise TaskError(f"{self.name}, line {line}: not CSV ({error}). {remedy}") from None
            if cells is None:
                return self._whole(lines.offset)
            if not cells:
                continue
            if self.columns:
                self._starts.append(start)
                self._lines.append(line)
            else:
                self.columns = self._header(cells)

    def _whole(self, size: int) -> int:
        if not self.columns:
            raise TaskError(f"{self.name}: an empty file ({size} bytes). The first line must name the columns.")
        return size

    def _header(self, cells: list[str]) -> tuple[str, ...]:
        names = [cell.strip() for cell in cells]
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice:
            raise TaskError(f"{self.name}, line 1: the column {twice[0]!r} is there twice. Rename one of them.")
        return tuple(names)

    def read(self, number: int) -> Record:
        cells = next(csv.reader(io.StringIO(self.text(number), newline="")))
        if len(cells) != len(self.columns):
            remedy = "Put cells that hold commas in quotes."
            raise RecordError("", f"{len(cells)} cells; the header has {len(self.columns)}. {remedy}")
        return dict(zip(self.columns, cells, strict=True))


class JsonlTable(FileTable):
    """One JSON object a line; blank lines are skipped."""

    def _index(self, lines: _Lines) -> int:
        start, line = lines.offset, lines.number
        for text in lines:
            if text.strip():
                self._starts.append(start)
                self._lines.append(line)
            start, line = lines.offset, lines.number
        return start

    @property
    def columns(self) -> tuple[str, ...]:  # type: ignore[override]
        """The keys of the first record that can be read."""
        for number in range(min(len(self), SHOWN)):
            try:
                return tuple(self.read(number))
            except RecordError:
                continue
        return ()

    def read(self, number: int) -> Record:
        try:
            return _object(_DECODER.decode(self.text(number)))
        except json.JSONDecodeError as error:
            raise RecordError("", f"not JSON ({error.msg} at column {error.colno})") from None
        except RecursionError:
            raise RecordError("", "brackets within brackets, more than can be read") from None


def _no_constant(name: str) -> NoReturn:
    raise RecordError("", f"{name} is not JSON; write null, or leave the key out")


def no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON (`object_pairs_hook`). Raises RecordError for a name that is there twice: which one counts?"""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise RecordError("", f"{twice!r} is there twice in one object: keep one of them")
    return found


_DECODER = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=no_key_twice)


def _object(value: Any) -> Record:
    if not isinstance(value, dict):
        raise RecordError("", f"a {type(value).__name__}, not a JSON object")
    return value


def _json_table(path: Path, name: str) -> Table:
    try:
        records = _DECODER.decode(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecordError) as error:
        raise TaskError(f"{name}: not JSON in UTF-8 ({error}).") from None
    if not isinstance(records, list):
        raise TaskError(
            f"{name}: holds a {type(records).__name__}; a list of objects is needed, or one a line in .jsonl."
        )
    return ListTable(name, records, path)


class ParquetTable(Table):
    """A parquet file, held in memory as Arrow columns and turned into a dict one record at a time."""

    def __init__(self, path: Path, name: str) -> None:
        import pyarrow  # type: ignore[import-untyped]
        import pyarrow.parquet  # type: ignore[import-untyped]

        self.path, self.name = path, name
        try:
            self._arrow = pyarrow.parquet.read_table(path)
        except (OSError, pyarrow.ArrowException) as error:
            raise TaskError(f"{name}: not a parquet file ({error}).") from None
        self.columns = tuple(self._arrow.column_names)

    def __len__(self) -> int:
        return int(self._arrow.num_rows)

    def read(self, number: int) -> Record:
        record: Record = self._arrow.slice(number, 1).to_pylist()[0]
        return record


READERS: dict[str, Callable[[Path, str], Table]] = {
    ".csv": lambda path, name: CsvTable(path),
    ".jsonl": lambda path, name: JsonlTable(path),
    ".json": _json_table,
    ".parquet": ParquetTable,
}


def table_files(path: Path) -> list[Path]:
    """A file, or the readable files of a folder, by name; hidden ones and those with other endings are left out."""
    known = ", ".join(READERS)
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(file for file in path.glob("[!.]*") if file.suffix.lower() in READERS)
    else:
        raise TaskError(f"{path} does not exist. Give a file ({known}) or a folder, relative to the project root.")
    if not files:
        raise TaskError(f"{path} holds no table ({known}).")
    if files[0].suffix.lower() not in READERS:
        raise TaskError(f"{path}: the ending {path.suffix!r} is not known. Known: {known}.")
    return files


def open_tables(files: Sequence[Path]) -> list[Table]:
    """The tables in the files. Raises TaskError, with the problems of all files at once."""
    tables, problems = [], []
    for file in files:
        try:
            tables.append(READERS[file.suffix.lower()](file, str(file)))
        except TaskError as error:
            problems.append(str(error))
        else:
            if not len(tables[-1]):
                problems.append(f"{file}: an empty file: no records. Give a table with at least one, or remove it.")
    if problems:
        raise TaskError("\n".join(problems))
    return tables


class TableErrors:
    """Collects every problem of the tables read together, so that a person mends them in one go."""

    def __init__(self) -> None:
        self.total = 0
        self.dropped: Counter[str] = Counter()
        self._lines: list[str] = []
        self._agreed: dict[Hashable, dict[Hashable, str]] = {}

    def at(self, file: str, row: str) -> Where:
        """The place to report from."""
        return Where(file, row, self)

    def add(self, file: str, row: str, column: str, message: str) -> None:
        """Count a problem; the first ones are kept in words."""
        self.total += 1
        if len(self._lines) < SHOWN:
            self._lines.append(_problem(file, row, column, message))

    def raise_if_any(self) -> None:
        """Raise one TaskError with the first problems and how many there are."""
        if self.total:
            more = f"\n… and {self.total - SHOWN} more" if self.total > SHOWN else ""
            head = f"{self.total} problem{'s' if self.total > 1 else ''} in the data:\n"
            raise TaskError(head + "\n".join(self._lines) + more)

    def agree(self, key: Hashable, value: Hashable, place: str) -> str | None:
        """The first place with another value for the key, told once for each value; None where all agree."""
        known = self._agreed.setdefault(key, {})
        if value in known:
            return None
        known[value] = place
        return next(iter(known.values())) if len(known) > 1 else None


@dataclass(frozen=True, slots=True)
class Where:
    """One record's place; without `errors`, a report raises at once."""

    file: str
    row: str
    errors: TableErrors | None = None

    def __str__(self) -> str:
        return f"{self.file}, {self.row}" if self.row else self.file

    def report(self, column: str, message: str) -> None:
        """A problem that a person must mend."""
        if self.errors is None:
            raise TaskError(_problem(self.file, self.row, column, message))
        self.errors.add(self.file, self.row, column, message)

    def drop(self, why: str) -> None:
        """A record that is left out on purpose: counted and logged, not an error."""
        if self.errors is not None:
            self.errors.dropped[why] += 1

    def agree(self, key: Hashable, value: Hashable) -> str | None:
        """The first place that gave this key another value; told once for each value, None otherwise."""
        return None if self.errors is None else self.errors.agree(key, value, str(self))


def _problem(file: str, row: str, column: str, message: str) -> str:
    return ", ".join(part for part in (file, row, column) if part) + f": {message}"


def finite(value: Any) -> float | None:
    """A cell or a JSON number as a finite float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    if isinstance(value, str) and (
        "_" in value or not value.isascii()
    ):  # float() takes 1_000 and other scripts' digits
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table whole or not at all, streaming. Raises TaskError when the disk refuses."""
    handle, temporary = -1, ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(handle, "w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise TaskError(f"{path} could not be written ({error.strerror or error}); nothing was left behind.") from None
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
