"""The run folder `outputs/<run>/`: all that the notebooks hand to each other.

Owns file names, atomic writes, the resolved config, stage records and resume. Must not know what the records mean.

    python -c "from lib.runfolder import read_run; print(read_run('outputs/decisions').stages())"
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from lib import PROJECT_ROOT, WorkbenchError, provenance
from lib.calls import sendable
from lib.config import HOW_ASKED, SCHEMA, Config, ConfigError, own_task, parse_config
from lib.cost import Bill, read_bill
from lib.log import scrub, start_logging
from lib.places import RUN, locate
from lib.tables import JsonlTable
from lib.task import Row, Split

logger = logging.getLogger(__name__)

LOGS = ("rollouts.jsonl", "metrics.jsonl")
"""Append-only files that a resumed training cuts back to its checkpoint."""

LOCK = "WORKBENCH_LOCK"
"""Environment variable of a container: the lock hash of the machine that started it."""

JUDGE_LIMITS = ("budget_usd", "concurrency", "timeout", "attempts", "key")
"""Keys of `task.judge` that say how a judge is reached and what it may cost: no verdict depends on them."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class RunError(WorkbenchError, RuntimeError):
    """The run folder cannot be used as asked; the message says what to do."""


class Run:
    """One run: a folder and its resolved config."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self.config = config

    @property
    def name(self) -> str:
        return self.folder.name

    def path(self, *parts: str) -> Path:
        """A path in the run folder; its parent exists afterwards."""
        path = self.folder.joinpath(*parts)
        with clear_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    # rows -----------------------------------------------------------------------------------------------------------
    def write_rows(self, split: Split, rows: Iterable[Row]) -> int:
        """Write a split's rows, one by one, whole or not at all; returns how many."""
        count = 0
        with atomic_file(self.path("rows", f"{split}.jsonl")) as file:
            for row in rows:
                file.write(to_line(row))
                count += 1
        return count

    def read_rows(self, split: Split) -> Sequence[Row]:
        """A split's rows, read lazily."""
        path = self.folder / "rows" / f"{split}.jsonl"
        if not path.is_file():
            raise RunError(f"{path} is missing: run notebook 1_data_prep with run_name={self.name!r} first")
        return JsonlTable(path)

    # logs -----------------------------------------------------------------------------------------------------------
    def append(self, log: str, records: Iterable[Mapping[str, Any]]) -> None:
        """Append records to one of LOGS, as whole lines; secrets that got into an answer or a note stay out of it."""
        lines = scrub("".join(to_line(record) for record in records))
        path = self.path(log)
        with clear_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(lines)

    def metrics(self) -> list[dict[str, Any]]:
        """What training logged so far, one record per step."""
        return list(read_lines(self.folder / "metrics.jsonl"))

    def last_logged(self) -> int:
        """The newest step that training logged; 0 where none is."""
        return max((int(record["step"]) for record in self.metrics()), default=0)

    def events(self) -> list[dict[str, Any]]:
        """What happened between the roles of a distributed training; [] where one process trains alone."""
        return list(read_lines(self.folder / "events.jsonl"))

    def rollouts(self, last: int = 0) -> list[dict[str, Any]]:
        """The logged completions; `last` > 0 keeps only the newest, read from the end of the file."""
        path = self.folder / "rollouts.jsonl"
        if not last or not path.is_file():
            return list(read_lines(path))
        return [json.loads(line) for line in _last_lines(path, last)]

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, step-N, in order of N."""
        found = (self.folder / "checkpoints").glob("step-*")
        return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))

    def log_sizes(self) -> dict[str, int]:
        """Bytes of each log now; a checkpoint keeps them so that a resume can cut back to it."""
        return {log: self._size(log) for log in LOGS}

    def cut_logs(self, sizes: Mapping[str, int]) -> None:
        """Cut the logs back to what they were at a checkpoint ({} = to nothing)."""
        for log in LOGS:
            path = self.folder / log
            if path.is_file():
                if path.stat().st_size < sizes.get(log, 0):
                    raise RunError(
                        f"{path} is shorter than its checkpoint says: it was changed by hand; start a new run"
                    )
                os.truncate(path, sizes.get(log, 0))

    def _size(self, log: str) -> int:
        path = self.folder / log
        return path.stat().st_size if path.is_file() else 0

    def bill(self) -> Bill:
        """What the run has cost so far."""
        return read_bill(self.folder)

    # stages ---------------------------------------------------------------------------------------------------------
    def begin(
        self,
        stage: str,
        sections: Sequence[str],
        inputs: Mapping[str, str],
        products: Sequence[str] = (),
        resumable: Sequence[str] = (),
    ) -> dict[str, Any] | None:
        """Start a stage, or return its outputs where it is already finished with the same key.

        `sections` are the config sections that the stage depends on, `inputs` names and hashes of what it reads. A
        stage that has something to lose under another key is refused: nothing finished is overwritten. Something to
        lose: it is finished, or one of the patterns `resumable` is there. Otherwise the stage starts anew, without
        the `products` (patterns too) of an attempt that failed, or that the user asked to forget.
        """
        key = {"config": self._sections(sections), "inputs": dict(inputs), "lock": lock_hash()}
        record = self._stage(stage)
        if record is not None and self._has_something_to_lose(record):
            differences = _differences(_with_new_defaults(record["key"], sections), key)
            if differences:
                raise RunError(self._refusal(stage, differences))
            if record["finished"]:
                logger.info("stage %s: already finished, skipped", stage)
                return dict(record["outputs"])
        else:
            self._forget(products)
        now = time.time()
        attempts = [*(record or {}).get("attempts", []), {"started": now, "machine": provenance.machine()}]
        self._write_stage(
            stage,
            {
                "key": key,
                "finished": False,
                "outputs": {},
                "resumable": list(resumable),
                "started": now,
                "attempts": attempts,
            },
        )
        return None

    def _has_something_to_lose(self, record: Mapping[str, Any]) -> bool:
        return record["finished"] or any(any(self.folder.glob(pattern)) for pattern in record["resumable"])

    def _forget(self, products: Sequence[str]) -> None:
        for path in [found for product in products for found in self.folder.glob(product)]:
            logger.info("removing %s of an earlier attempt", _shown(path))
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def end(self, stage: str, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Mark a stage finished, with what it produced."""
        record = self._stage(stage)
        assert record is not None, f"stage {stage} was not begun"
        seconds = round(time.time() - record["started"], 2)
        self._write_stage(stage, record | {"finished": True, "outputs": dict(outputs), "seconds": seconds})
        return dict(outputs)

    def stages(self) -> dict[str, dict[str, Any]]:
        """Every stage that was begun: finished or not, its key, its outputs."""
        return {path.stem: json.loads(path.read_text()) for path in sorted((self.folder / "stages").glob("*.json"))}

    def attempts(self, stage: str) -> list[dict[str, Any]]:
        """When and where each attempt of a stage began."""
        return list((self._stage(stage) or {}).get("attempts", []))

    def outputs(self, stage: str) -> dict[str, Any] | None:
        """What a finished stage produced; None where it is not finished."""
        record = self._stage(stage)
        return dict(record["outputs"]) if record and record["finished"] else None

    def finish(self, result: Mapping[str, Any]) -> None:
        """Add to result.json: the run's figures, for people and scripts."""
        path = self.path("result.json")
        known = json.loads(path.read_text()) if path.is_file() else {"schema": SCHEMA, "run": self.name}
        write_json(path, known | plain(result))
        logger.info("result: %s", _shown(path))

    def check_config(self) -> None:
        """Refuse a config that differs from the one that this run's stages were begun with."""
        for stage, record in self.stages().items():
            if not self._has_something_to_lose(record):
                continue
            known = record["key"]
            now = {"config": self._sections(list(known["config"])), "inputs": known["inputs"], "lock": known["lock"]}
            differences = _differences(_with_new_defaults(known), now)
            if differences:
                raise RunError(self._refusal(stage, differences))

    def _sections(self, sections: Sequence[str]) -> dict[str, Any]:
        config = self.config.as_json()
        return _deciding({section: config[section] for section in sections})

    def _stage(self, stage: str) -> dict[str, Any] | None:
        path = self.folder / "stages" / f"{stage}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def _write_stage(self, stage: str, record: Mapping[str, Any]) -> None:
        write_json(self.path("stages", f"{stage}.json"), record)

    def _refusal(self, stage: str, differences: Sequence[str]) -> str:
        record = self._stage(stage)
        state = "finished" if record and record["finished"] else "begun"
        return (
            f"run {self.name!r} has {state} its stage {stage!r} with other settings: {'; '.join(differences)}. "
            f"Choose another run_name, or delete {_shown(self.folder / 'stages' / f'{stage}.json')} to redo that stage "
            f"(or the whole folder to start over)."
        )


def open_run(name: str, config: Config, default: str | Path = "") -> Run:
    """The run of this name ("" = named after `default`, the config's path), made or continued.

    Refuses another config than its stages were begun with, a newer schema, and an unwritable folder.
    """
    name = check_name(name or default_name(default, config.task.name))
    folder = locate(config.paths.outputs) / name
    with clear_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, config)
    existing = folder / "config.json"
    if existing.is_file():
        _check_schema(_read_json(existing), existing)
        run.check_config()
    write_json(existing, config.as_json())
    start_logging(folder / "log.txt")
    for note in config.notes:
        logger.info("config: %s", note)
    os.environ[RUN] = str(folder)
    _record_provenance(run)
    return run


def check_name(name: str) -> str:
    """A run's name as it was given; refused where it cannot be a folder's name."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise RunError(f"run_name {name!r} is not usable: letters, digits, '.', '_' and '-' only, at most 100, no '..'")
    return name


def default_name(config_path: str | Path, task: str = "") -> str:
    """A run's name from its config's path: configs/smoke/decisions.yaml -> smoke-decisions.

    Where another task than the file's own was put in its place, that task's name follows.
    """
    if not str(config_path):
        raise RunError("the run has no name: give run_name, or the config that it should be named after")
    path = Path(os.path.normpath(locate(config_path))).with_suffix("")
    configs = PROJECT_ROOT / "configs"
    name = "-".join(path.relative_to(configs).parts) if path.is_relative_to(configs) else path.name
    if task and locate(config_path).is_file() and task != own_task(config_path):
        name += f"-{Path(task).stem}"
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "run"


def read_run(folder: str | Path) -> Run:
    """An existing run, with the config that it was made with."""
    folder = locate(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise RunError(f"{folder} is not a run folder: it has no config.json")
    values = _read_json(path)
    _check_schema(values, path)
    return Run(folder, parse_config(values, where=str(path)))


def hash_file(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names."""
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def task_file_hash(config: Config) -> dict[str, str]:
    """A user's own task file and its hash, as an input of every stage that scores; {} for the shipped tasks."""
    name = config.task.name
    return {name: hash_file(locate(name))} if name.endswith(".py") else {}


def weights_hash(path: str) -> str:
    """What tells one set of weights from another: the hash of a folder's weights and configs, or the Hub id."""
    files = sorted(f for pattern in ("*.safetensors", "*.bin", "*config.json") for f in Path(path).glob(pattern))
    return hashlib.sha256("".join(hash_file(file) for file in files).encode()).hexdigest() if files else path


def base_hash(config: Config) -> dict[str, str]:
    """The base policy as an input: the weights of a local folder, or the seed that the starter is made from."""
    if config.model.name == "starter":
        return {"starter seed": str(config.training.seed)} if config.starter.seed is None else {}
    folder = locate(config.model.name)
    return {config.model.name: weights_hash(str(folder))} if folder.is_dir() else {}


def recorded_base_hash(inside: Path, base: str) -> str:
    """The hash of the local base of this name that the run of this folder was trained on; "" where no run says one.

    `inside`: a folder of the run's, at most three levels deep: its adapter, a checkpoint, an export.
    """
    for folder in inside.absolute().parents[:3]:
        record = folder / "stages" / "training.json"
        if record.is_file():
            key = json.loads(record.read_text())["key"]
            name = str(key["config"].get("model", {}).get("name", ""))
            return str(key["inputs"].get(name, "")) if Path(name).name == Path(base).name else ""
    return ""


def lock_hash() -> str:
    """Which package versions a result was made with: a hash of the committed locks."""
    if LOCK in os.environ:  # a container has the packages of the locks, not the files
        return os.environ[LOCK]
    digest = hashlib.sha256()
    for lock in sorted((PROJECT_ROOT / "requirements").glob("*.lock")):
        digest.update(lock.read_bytes())
    return digest.hexdigest()[:16]


def plain(value: Any) -> Any:
    """A value as JSON takes it: NaN and infinities become None, wherever they are."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_line(record: Mapping[str, Any]) -> str:
    """One JSON line; NaN and infinities are refused (they are not JSON).

    Half a surrogate pair, which any policy can spell out in an argument, becomes U+FFFD: no file takes it.
    """
    return sendable(json.dumps(record, ensure_ascii=False, allow_nan=False)) + "\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole records of an append-only file; a last line cut off by a kill is left out."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _last_lines(path: Path, count: int) -> list[bytes]:
    """The last whole lines of a file, from ever larger windows at its end."""
    window = count * 2048
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        while True:
            file.seek(max(0, size - window))
            lines = file.read(size).split(b"\n")[:-1]  # what follows the last line end is still being written
            if window >= size:
                return lines[-count:]
            if len(lines) > count:  # the first one may be cut off
                return lines[-count:]
            window *= 4


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    with atomic_file(path) as file:
        json.dump(value, file, indent=1, ensure_ascii=False, allow_nan=False)


@contextmanager
def atomic_file(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A text file that appears under its name only once it is complete and on disk."""
    with clear_errors(path):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline=newline) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_UMASK)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Turn the file system's refusals into a sentence with a remedy."""
    try:
        yield
    except OSError as error:
        named = None if error.filename is None else Path(os.fsdecode(error.filename))
        if named and not (named.is_relative_to(path.parent) or path.is_relative_to(named)):
            raise  # it is about another file: of whoever feeds this one
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            hint = "the disk is full: free some space and run the same command again, it goes on from here"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            hint = "no permission to write there: set paths.outputs to a folder that you may write"
        elif isinstance(error, (FileExistsError, NotADirectoryError, IsADirectoryError)):
            hint = "a file is in the way: move it, or set paths.outputs to another folder"
        else:
            raise
        raise RunError(f"cannot write {path}: {hint}") from error


@contextmanager
def exclusive(path: Path, wait: float = 20.0, doing: str = "is training this run") -> Iterator[None]:
    """Hold a lock file while writing a run; waits a little for a writer that is finishing its step.

    `doing`: what its holder does, for the message.
    """
    with path.open("a+") as file:
        deadline = time.monotonic() + wait
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip()
                if time.monotonic() > deadline:
                    raise RunError(
                        f"process {owner} {doing}: wait for it, stop it, or choose another run_name"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL):
                    raise
                logger.warning("%s: this file system has no locks: see that only one process writes the run", path)
                break
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def held_by(path: Path) -> int | None:
    """The process that holds a lock file; None where nobody does."""
    if not path.is_file():
        return None
    with path.open("r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(file.read().strip() or 0) or None
        except OSError:  # a file system without locks
            return None
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}): restore it, or choose another run_name") from None


def _check_schema(values: Mapping[str, Any], path: Path) -> None:
    version = values.get("schema", 0)
    if version > SCHEMA:
        raise RunError(f"{path} has schema {version}, this workbench reads {SCHEMA}: update the workbench")
    if version < SCHEMA:
        raise RunError(f"{path} has schema {version}, this workbench reads {SCHEMA}: start a new run from its config")


def _record_provenance(run: Run) -> None:
    path = run.path("provenance.json")
    now = provenance.collect(lock=lock_hash(), seed=run.config.training.seed)
    if not path.is_file():
        write_json(path, now)
        return
    known = json.loads(path.read_text())
    if known["code"].get("commit") != now["code"]["commit"] or known["code"].get("diff") != now["code"]["diff"]:
        then, here = known["code"].get("commit"), now["code"]["commit"]
        what = f"{then} then, {here} now" if then != here else f"{here} both times, with other changes on top"
        logger.warning("the code changed since this run was made (%s)", what)


def _with_new_defaults(key: Mapping[str, Any], sections: Sequence[str] = ()) -> dict[str, Any]:
    """A stage's key as it would be today: config keys, and `sections`, that came later have their defaults."""
    try:
        today = parse_config(key["config"]).as_json()
    except ConfigError:
        return dict(key)
    return {**key, "config": _deciding({section: today[section] for section in {*key["config"], *sections}})}


def _deciding(config: dict[str, Any]) -> dict[str, Any]:
    """The config without what decides nothing that a stage produces: a raised budget must not make it another run."""
    task = config.get("task")
    judge = task.get("judge") if isinstance(task, dict) else None
    if not isinstance(task, dict) or not isinstance(judge, dict):
        return config
    kept = {name: value for name, value in judge.items() if name not in JUDGE_LIMITS}
    rest = {name: value for name, value in task.items() if name != "judge"}
    return {**config, "task": {**rest, **({"judge": kept} if kept else {})}}


def _differences(known: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(known, dict) and isinstance(now, dict):
        keys = sorted(known.keys() | now.keys())
        return [
            d for key in keys for d in _differences(known.get(key), now.get(key), f"{where}.{key}" if where else key)
        ]
    where = where.removeprefix("config.")
    return [] if known == now or where in HOW_ASKED else [f"{where} was {known!r}, now {now!r}"]


def _shown(path: Path) -> str:
    with suppress(ValueError):
        return str(path.relative_to(PROJECT_ROOT))
    return str(path)


_UMASK = os.umask(0)
os.umask(_UMASK)
