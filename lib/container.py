"""What runs inside a Modal container: a notebook through `python -m lib.run`, its results committed as they appear.

Owns the container's life: claim the run, run, commit, stop in time, go on after a preemption. Must not know what the
notebook does, nor how the app is defined (that is lib/modal_app.py, which is never imported in a container).

    modal run -m lib.modal_app::run --notebook 3_grpo_training --config configs/decisions.yaml
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from lib import PROJECT_ROOT, WorkbenchError, places, provenance
from lib.cost import ATTEMPT, CostError, Resources, beat, begin_attempt, load_prices, on_machines, read_bill
from lib.gang import Gang, GangError, Head, find_gang, join, lead
from lib.gpu import NONE, granted, parse_gpu
from lib.ledger import NAME as LEDGER
from lib.ledger import Ledger, LedgerError
from lib.log import ScrubbedStream, name_secrets, scrub
from lib.runfolder import LOCK, LOGS, atomic_file, hash_file, held_by, read_run, write_json

logger = logging.getLogger(__name__)

OUTPUTS, DATA, CACHE = Path("/outputs"), Path("/data"), Path("/cache")
MANIFEST = "manifest.json"
"""On the data volume: what was uploaded and verified, name -> bytes and sha256."""

CLAIMS = "writers"
"""Folder of a run: one file for each call that writes it, with the time when it was last seen."""

COMMIT_SECONDS = 10.0
STALE_SECONDS = 60.0
"""A writer that was not seen for so long is gone."""

GRACE = 22.0
"""Seconds to finish a step and save: Modal gives a preempted container 30 in all."""

_TEXT = (".txt", ".json", ".jsonl", ".csv", ".md", ".html", ".ipynb", ".yaml", ".log", ".env", ".py")
_LARGEST_TEXT = 4 * 2**20


class ContainerError(WorkbenchError, RuntimeError):
    """The container cannot do the job; the message says what to change."""


class AttemptTimeUp(WorkbenchError, RuntimeError):
    """The attempt stopped before Modal's timeout would have killed it. Raised, so that Modal starts the next one."""


class FileFact(BaseModel):
    """What a file on the data volume must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Self:
        return cls(bytes=path.stat().st_size, sha256=hash_file(path))


class Job(BaseModel):
    """One notebook to run in a container. Plain values only: it crosses to another machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    notebook: str
    config: str
    parameters: tuple[str, ...]
    """NAME=VALUE as on the command line."""
    run: str
    gpus: tuple[str, ...]
    """What was asked for, in order."""
    cpu: float
    memory: float
    seconds: float
    """What one attempt may take."""
    prices: str
    lock: str
    code: dict[str, str]
    """Commit and diff of the checkout that sent the job."""
    files: dict[str, FileFact]
    """Files on the data volume that the config names."""
    roles: str = ""
    """The app of the classes that a distributed training runs in; "" = none."""
    part: str = ""
    """What to check instead of running the notebook: `rollout`, `sync`, ..."""
    nodes: int = 1
    """Containers that are started together: the first runs the notebook on a Ray cluster of all."""
    token: str = ""
    """What lets a process into that cluster."""

    def command(self) -> list[str]:
        """What `python -m lib.run` is asked for; -p and its values follow."""
        return ["check", self.part, "--config", self.config] if self.part else [self.notebook, self.config]


def run_notebook(job: dict[str, Any]) -> dict[str, Any]:
    """Run a job to its end: {run, call, status (as `python -m lib.run`), usd, message}.

    May be started again on the same job (preempted, out of time, crashed): the run goes on from its last checkpoint.
    Raises AttemptTimeUp shortly before the attempt's timeout. On several machines this is the first one's work: the
    others lend it theirs, touch no run, and return {}, which Modal drops.
    """
    checked = Job.model_validate(job)
    gang = find_gang(checked.nodes, checked.token)
    return _lend(gang) if gang and gang.rank else _Attempt(checked, gang).run()


def _lend(gang: Gang) -> dict[str, Any]:
    name_secrets(foreign_variables())
    join(gang)
    return {}


def tick() -> dict[str, Any]:
    """One tick of a schedule: its job, in a run with the date in its name."""
    import modal

    entry = json.loads(os.environ["WORKBENCH_TICK"])
    gang = find_gang(entry["job"]["nodes"], entry["job"]["token"])
    if gang and gang.rank:
        return _lend(gang)
    # The same tick started again (preempted, say) goes on with the run that it began.
    note = OUTPUTS / ".ticks" / f"{modal.current_function_call_id()}.txt"
    if not note.is_file():
        note.parent.mkdir(exist_ok=True)
        with atomic_file(note) as file:
            file.write(f"{entry['name']}-{_now_in(entry['timezone'])}")
    name = note.read_text()
    job = entry["job"] | {"run": name, "parameters": [*entry["job"]["parameters"], f"run_name={name}"]}
    result = run_notebook(job)
    if result["status"]:
        raise ContainerError(f"the run {name} of this tick failed: {result['message']}")
    return result


def verify_upload(facts: dict[str, Any], gone: list[str]) -> list[str]:
    """What is wrong with files on the data volume, by size and hash; what is right goes into the volume's manifest.

    Files that are `gone` from a folder at home are removed here too: a task reads whole folders.
    """
    known = read_manifest(DATA)
    for name in gone:
        known.pop(name, None)
        (DATA / name).unlink(missing_ok=True)
    problems = []
    for name, values in facts.items():
        fact = FileFact.model_validate(values)
        problem = _problem(DATA / name, fact, check_hash=True)
        if problem:
            problems.append(f"{name}: {problem}")
            known.pop(name, None)
        else:
            known[name] = fact
    write_json(DATA / MANIFEST, {name: fact.model_dump() for name, fact in sorted(known.items())})
    commit("/data")
    return problems


def read_manifest(folder: Path) -> dict[str, FileFact]:
    path = folder / MANIFEST
    return parse_manifest(path.read_bytes()) if path.is_file() else {}


def parse_manifest(content: bytes) -> dict[str, FileFact]:
    return {name: FileFact.model_validate(fact) for name, fact in json.loads(content).items()}


def commit(mount: str = "/outputs") -> None:
    """Publish what this container wrote to a volume."""
    import modal

    volume = modal.Volume.from_name(os.environ[f"WORKBENCH_VOLUME_{mount.strip('/').upper()}"])
    try:
        volume.commit()
    except RuntimeError as error:
        # The commit is done by then: what failed is the reload that follows it, and logs are open while a run writes.
        if "open files" not in str(error):
            raise


class _Attempt:
    """One container's work on a job."""

    def __init__(self, job: Job, gang: Gang | None) -> None:
        import modal

        self.job, self.gang = job, gang
        self.head: Head | None = None
        self.call = str(modal.current_function_call_id())
        self.name = os.environ["MODAL_TASK_ID"]
        self.folder = OUTPUTS / job.run
        self.claim = self.folder / CLAIMS / f"{self.call}.json"
        self.started = time.time()
        self.tail: list[str] = []
        self.done = threading.Event()
        self.ready = False
        self.scrubbed: dict[Path, int] = {}
        self.ledger = Path(tempfile.mkdtemp(prefix="workbench-ledger-")) / LEDGER
        """On this container's own disk: SQLite can neither lock nor keep its write-ahead log on a volume."""
        self.kept: list[tuple[int, int]] = []
        """What the ledger's files were like when they were last copied."""

    def run(self) -> dict[str, Any]:
        name_secrets(foreign_variables())
        os.environ.update(self._environment())
        problems = [
            f"{name}: {problem}" for name, fact in self.job.files.items() if (problem := _problem(DATA / name, fact))
        ]
        if problems:
            return self._result(2, "data on the volume is not what the config means:\n" + "\n".join(problems))
        other = self._claim()
        if other:
            return self._result(2, other)
        try:
            self._begin()
            self._restore_ledger()
            with lead(self.gang) as self.head:
                status = self._work()
        except (GangError, LedgerError) as error:
            return self._result(1 if isinstance(error, GangError) else 2, str(error))
        finally:
            self._leave()
        return self._result(status, "" if status == 0 else "\n".join(self.tail[-8:]))

    def _begin(self) -> None:
        one = Resources(gpu=self._gpu(), cpu=self.job.cpu, memory_gb=self.job.memory, where="modal")
        prices = load_prices(places.locate(self.job.prices))
        begin_attempt(self.folder, self.name, on_machines(one, self.job.nodes), prices)

    def _work(self) -> int:
        following = threading.Thread(target=self._follow, daemon=True)
        process = self._start()
        following.start()
        try:
            return self._wait(process)
        except BaseException:  # a preemption, a cancelled call: Modal gives it half a minute, then it kills
            self._stop(process, GRACE)
            raise
        finally:
            self.done.set()
            following.join()

    def _wait(self, process: subprocess.Popen[str]) -> int:
        margin = max(5.0, min(120.0, 0.1 * self.job.seconds))
        deadline = self.started + self.job.seconds - margin
        while process.poll() is None:
            if time.time() > deadline:
                self._stop(process, margin)
                raise AttemptTimeUp(
                    f"this attempt used its {self.job.seconds / 3600:.3g} hours (modal.timeout); the next one goes on "
                    f"from the last checkpoint, as often as modal.retries says"
                )
            if self.head:
                self.head.check()
            time.sleep(0.2)
        return process.returncode

    # the process ------------------------------------------------------------------------------------------------------
    def _start(self) -> subprocess.Popen[str]:
        where = [f"paths.outputs={OUTPUTS}", f"paths.cache={CACHE}", "where=here"]
        command = [sys.executable, "-m", "lib.run", *self.job.command()]
        for parameter in (*self.job.parameters, *where, *self._cluster()):
            command += ["-p", parameter]
        process = subprocess.Popen(
            command,
            cwd=PROJECT_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # a signal to this container is for us to pass on, in order
        )
        threading.Thread(target=self._show, args=(process,), daemon=True).start()
        return process

    def _cluster(self) -> list[str]:
        gpu = parse_gpu(self._gpu() or NONE)
        return [f"verl.ray_address={self.head.address}", f"verl.gpus={gpu.number}"] if self.head and gpu else []

    def _environment(self) -> dict[str, str]:
        code = Path("/tmp/workbench-code.json")
        code.write_text(json.dumps(self.job.code), encoding="utf-8")
        return {
            places.DATA: str(DATA),
            places.OUTPUTS: str(OUTPUTS),
            LOCK: self.job.lock,
            provenance.CODE: str(code),
            places.LEDGER: str(self.ledger),
            ATTEMPT: self.name,
            places.ROLES: self.job.roles,
            "PYTHONUNBUFFERED": "1",
            **(self.gang.environment if self.gang else {}),
        }

    def _show(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        out = ScrubbedStream(sys.stdout)
        for line in process.stdout:
            out.write(line)
            out.flush()
            self.tail.append(scrub(line.rstrip("\n")))
            del self.tail[:-50]
        out.close()

    def _stop(self, process: subprocess.Popen[str], grace: float) -> None:
        """Let training finish its step and write a checkpoint; end it where it takes too long."""
        training = held_by(self.folder / "stages" / "training.lock")
        with suppress(ProcessLookupError):
            os.kill(training or process.pid, signal.SIGTERM if training else signal.SIGINT)
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if training:
                with suppress(ProcessLookupError):
                    os.killpg(training, signal.SIGKILL)

    # the volume -------------------------------------------------------------------------------------------------------
    def _follow(self) -> None:
        """Commit every few seconds and as soon as there is a new checkpoint; keep claim and bill up to date."""
        metrics = _size(self.folder / "metrics.jsonl")
        checkpoints, last = self._checkpoints(), time.monotonic()
        while not self.done.wait(1.0):
            begins = not self.ready and _size(self.folder / "metrics.jsonl") > metrics
            if not begins and self._checkpoints() == checkpoints and time.monotonic() - last < COMMIT_SECONDS:
                continue
            checkpoints, last = self._checkpoints(), time.monotonic()
            self.ready = self.ready or begins
            self._publish()

    def _publish(self) -> None:
        beat(self.folder, self.name, ready=self.ready)
        write_json(self.claim, self._claim_record())
        scrub_files(self.folder, self.scrubbed)
        self._keep_ledger()
        try:
            commit()
        except Exception as error:  # the next one may get through; the container's end commits in any case
            logger.warning("commit failed, will be tried again: %s", scrub(str(error)))

    def _checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").glob("step-*"))

    def _claim(self) -> str:
        """Take the run for this call; why not, where another call writes it."""
        import modal

        volume = modal.Volume.from_name(os.environ["WORKBENCH_VOLUME_OUTPUTS"])
        volume.reload()  # nothing is open yet
        self.claim.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.claim, self._claim_record())
        commit()
        volume.reload()
        claims = {path.stem: json.loads(path.read_text()) for path in self.claim.parent.glob("*.json")}
        other = live_writer({call: claim for call, claim in claims.items() if call != self.call})
        if other:
            self.claim.unlink()
            commit()
            return busy(self.job.run, other)
        return ""

    def _claim_record(self) -> dict[str, Any]:
        return {"call": self.call, "container": self.name, "notebook": self.job.notebook, "seen": time.time()}

    def _leave(self) -> None:
        with suppress(CostError):  # the attempt was never begun
            beat(self.folder, self.name, ready=self.ready)
        if (self.folder / "config.json").is_file():
            run = read_run(self.folder)
            run.finish({"cost": run.bill().as_json()})
        scrub_files(self.folder, self.scrubbed)
        self.kept = []
        self._keep_ledger()
        self.claim.unlink(missing_ok=True)
        with suppress(Exception):  # the container's end commits in any case; what ended the attempt must be told
            commit()

    def _restore_ledger(self) -> None:
        """Bring the run's ledger here; raises LedgerError where it is damaged."""
        if (self.folder / LEDGER).is_file():
            shutil.copyfile(self.folder / LEDGER, self.ledger)
            try:
                Ledger(self.ledger).close()
            except LedgerError:
                self.ledger.unlink()  # it must not become the run's again
                raise

    def _keep_ledger(self) -> None:
        """Put a whole copy of the ledger, where it changed, into the run's folder."""
        files = (self.ledger, self.ledger.with_name(f"{LEDGER}-wal"))
        now = [(path.stat().st_size, path.stat().st_mtime_ns) for path in files if path.is_file()]
        if not self.ledger.is_file() or now == self.kept:
            return
        try:
            ledger = Ledger(self.ledger)
            ledger.backup(self.folder / LEDGER)
            ledger.close()
            self.kept = now
        except (LedgerError, OSError) as error:  # the run goes on; the next copy may get through
            logger.warning("the ledger was not copied to the volume, will be tried again: %s", error)

    def _gpu(self) -> str | None:
        """The GPU that this container got of those asked for; prices and quotes are by its name."""
        if len(self.job.gpus) < 2:
            return self.job.gpus[0] if self.job.gpus else None
        return granted(self.job.gpus, provenance.gpus()) or self.job.gpus[0]

    def _result(self, status: int, message: str) -> dict[str, Any]:
        usd = read_bill(self.folder).usd if (self.folder / "cost").is_dir() else 0.0
        return {"run": self.job.run, "call": self.call, "status": status, "usd": usd, "message": scrub(message)}


def foreign_variables() -> set[str]:
    """The environment variables that neither the image, nor Modal, nor the system brought: what secrets set."""
    ours = re.compile(
        r"(MODAL|WORKBENCH|PYTHON|NVIDIA|NV|NCCL|CUDA|LD|LC|UV|PIP|HF|VLLM|TORCH|TORCHINDUCTOR|TRITON|FLASHINFER|SSL)_\w+"
        r"|NV\w+|PATH|HOME|LANG|PWD|OLDPWD|SHLVL|TERM|HOSTNAME|USER|TZ|TMPDIR|LIBRARY_PATH|DEBIAN_FRONTEND|_"
        r"|EXPERIMENTER|EXPERIMENT_NAME|PYTHON\w+|GOMP_\w+|TRL_\w+|TOKENIZERS_\w+|DO_NOT_TRACK|LOCAL_KERNELS"
    )
    return {name for name in os.environ if not ours.fullmatch(name)}


def scrub_files(folder: Path, known: dict[Path, int]) -> None:
    """Take secrets out of the small text files that a run or a user's code wrote, before they are published.

    `known` holds the files that were looked at, with their times. Logs are scrubbed as they are written.
    """
    for path in folder.rglob("*"):
        if path.suffix not in _TEXT or path.name in LOGS or not path.is_file():
            continue
        stat = path.stat()
        if known.get(path) == stat.st_mtime_ns or stat.st_size > _LARGEST_TEXT:
            continue
        text = path.read_text(encoding="utf-8", errors="surrogateescape")
        if scrub(text) != text:
            logger.warning("%s held the value of a secret: taken out", path.name)
            path.write_text(scrub(text), encoding="utf-8", errors="surrogateescape")
        known[path] = path.stat().st_mtime_ns


def live_writer(claims: Mapping[str, Mapping[str, Any]], now: float | None = None) -> str | None:
    """The call that writes a run now, of its claims by call."""
    now = time.time() if now is None else now
    return next((call for call, claim in sorted(claims.items()) if abs(now - claim["seen"]) < STALE_SECONDS), None)


def busy(run: str, call: str) -> str:
    """What to say where another call writes a run."""
    return (
        f"run {run!r} is being written by the call {call}: wait for it, stop it with `modal container stop`, or choose "
        f"another run_name. (If it was killed: it counts as gone after {STALE_SECONDS:.0f} s.)"
    )


def _problem(path: Path, fact: FileFact, check_hash: bool = False) -> str:
    if not path.is_file():
        return "missing: modal run -m lib.modal_app::upload --config CONFIG"
    if path.stat().st_size != fact.bytes:
        return f"{path.stat().st_size} bytes there, {fact.bytes} here: upload it again"
    if check_hash and hash_file(path) != fact.sha256:
        return "its content differs from the file here: upload it again"
    return ""


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _now_in(timezone: str) -> str:
    import datetime
    import zoneinfo

    return datetime.datetime.now(zoneinfo.ZoneInfo(timezone)).strftime("%Y-%m-%d-%H%M")
