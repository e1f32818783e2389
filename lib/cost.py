"""The bill of a run: the price file, the meter that writes down what was used, and the budget that ends it in time.

Owns configs/prices.yaml and the folder `cost/` of a run: one JSON file per attempt (a container, or a training process
on this machine), and `usage.jsonl` for services that are paid by use. Must not know who spends. The quote of a run that
has not begun is lib/quote.py's.

    python -c "from lib.cost import read_bill; print(read_bill('outputs/decisions').as_json())"
"""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import re
import tempfile
import time
from collections import defaultdict, deque
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from lib import PROJECT_ROOT, WorkbenchError
from lib.gpu import MOST, parse_gpu
from lib.task import describe_invalid, nearest

logger = logging.getLogger(__name__)

PRICES = PROJECT_ROOT / "configs" / "prices.yaml"
FOLDER = "cost"
USAGE = "usage.jsonl"

SERVICES = ("judge", "endpoint", "sandboxes")
"""What is paid by use, and not by the hour of an attempt."""
ROLES = ("cold start", "gpu", "cpu", "here", "idle", *SERVICES)
"""Every line that a bill or a quote can have, in the order in which they are shown."""

ATTEMPT = "WORKBENCH_ATTEMPT"
"""Environment variable of a process whose attempt is metered by another one: the attempt's name."""

BESIDE = "role-"
"""How attempts begin that are paid beside the one that they work for: the containers of a distributed training."""

RUNNING = 60.0
"""Seconds: an attempt that was seen this lately is taken to be running still."""

_REREAD = 1.0
"""Seconds before a budget looks again at what the other attempts and the services have cost."""
_RECENT = 20
"""Steps whose dearest stands for the next one."""
_CHECKPOINT = 0.5
"""The least, in steps, that is kept in reserve for checkpoints."""
_MILLION = 1_000_000
_ATTEMPT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")

Amount = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Second = Annotated[float, Field(allow_inf_nan=False)]


class CostError(WorkbenchError, ValueError):
    """A price, an attempt or a limit that cannot be used; the message says what to add or change, and where."""


# prices ---------------------------------------------------------------------------------------------------------------


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TokenPrice(_Frozen):
    """USD per million tokens."""

    input: Amount
    output: Amount


class Prices(_Frozen):
    """A price file: USD per hour, or per million tokens."""

    date: datetime.date
    source: str
    gpu: dict[str, Amount]
    """Per GPU-hour."""
    cpu: Amount
    """Per physical core-hour."""
    memory: Amount
    """Per GiB-hour."""
    sandbox_cpu: Amount
    sandbox_memory: Amount
    here: Amount
    """Per hour of the machine that the workbench itself runs on."""
    tokens: dict[str, TokenPrice]

    _file: str = PrivateAttr(default="the price file")

    @property
    def file(self) -> str:
        """The file that they came from, for messages."""
        return self._file

    @field_validator("gpu")
    @classmethod
    def _known_gpus(cls, gpu: dict[str, float]) -> dict[str, float]:
        for name in gpu:
            if name not in MOST:
                raise ValueError(f"unknown GPU {name!r}.{nearest(name, list(MOST))}")
        return gpu


def load_prices(path: str | Path = PRICES) -> Prices:
    """Read a price file. Raises CostError for a missing file or key, an unknown key, and a bad number."""
    import yaml

    path = Path(path)
    shown = str(path.relative_to(PROJECT_ROOT)) if path.is_relative_to(PROJECT_ROOT) else str(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        prices = Prices.model_validate(values)
    except FileNotFoundError:
        raise CostError(f"the price file {shown} is missing: restore it with `git checkout {shown}`") from None
    except ValidationError as error:
        raise CostError(f"{shown} cannot be used:\n{describe_invalid(error, Prices)}") from None
    except (ValueError, yaml.YAMLError) as error:  # not text, or not YAML
        raise CostError(f"{shown} cannot be read: {error}") from None
    prices._file = shown
    return prices


class Resources(_Frozen):
    """What one attempt runs on."""

    gpu: str | None = None
    """As lib.gpu writes it: `H100:2`."""
    cpu: Amount = 0.0
    """Physical cores."""
    memory_gb: Amount = 0.0
    """GiB."""
    where: Literal["here", "modal"]
    beside: tuple[Resources, ...] = ()
    """Others that run as long: the roles of a distributed training, the other machines of a cluster."""


def on_machines(one: Resources, count: int) -> Resources:
    """What `count` machines of the same kind come to, the first of which keeps the meter."""
    return one.model_copy(update={"beside": (one,) * (count - 1)})


def rates(resources: Resources, prices: Prices) -> dict[str, float]:
    """USD per hour by role: `gpu` and `cpu` (with memory), or `here`. Raises CostError, GpuError."""
    if resources.beside:
        alone = [resources.model_copy(update={"beside": ()}), *resources.beside]
        summed: dict[str, float] = defaultdict(float)
        for one in alone:
            for role, rate in rates(one, prices).items():
                summed[role] += rate
        return dict(summed)
    if resources.where == "here":
        return {"here": prices.here}
    cpu = {"cpu": resources.cpu * prices.cpu + resources.memory_gb * prices.memory}
    gpu = parse_gpu(resources.gpu) if resources.gpu else None
    if gpu is None:
        return cpu
    if gpu.name not in prices.gpu:
        raise CostError(f"no price for the GPU {gpu.name}: add `{gpu.name}: USD per hour` under `gpu` in {prices.file}")
    return {"gpu": gpu.number * prices.gpu[gpu.name], **cpu}


def priced_as(prices: Prices, model: str) -> str | None:
    """The id under which the price file knows a model: its own, or the one that it is a dated snapshot of."""
    name = model.removeprefix("models/")
    return next((known for known in (name, undated(name)) if known in prices.tokens), None)


def undated(model: str) -> str:
    """gpt-5-mini-2026-08-07 -> gpt-5-mini."""
    return re.sub(r"-\d{4}-\d{2}-\d{2}$", "", model)


def token_price(prices: Prices, model: str, input_tokens: int, output_tokens: int) -> float:
    """USD for the tokens of one call, or of many. Raises CostError for a model without a price."""
    price = prices.tokens.get(model)
    if price is None:
        raise CostError(
            f"no token price for {model!r}: add `{model}: {{input: USD, output: USD}}` (per million tokens) under "
            f"`tokens` in {prices.file}.{nearest(model, list(prices.tokens))}"
        )
    return (input_tokens * price.input + output_tokens * price.output) / _MILLION


# the meter ------------------------------------------------------------------------------------------------------------


class Attempt(BaseModel):
    """One container, or one training process here. Times are epoch seconds of the machine that it runs on."""

    model_config = ConfigDict(frozen=True)  # unknown keys are passed over: a newer file's money counts all the same

    attempt: str
    where: Literal["here", "modal"]
    gpu: str | None
    cpu: Amount
    memory_gb: Amount
    rates: dict[str, Amount]
    """USD per hour by role, as they were when it began: a later edit of the price file does not change a bill."""
    started: Second
    seen: Second
    """The last sign of life. Up to here it is billed."""
    ready: Second | None = None
    """When useful work began; what comes before is its cold start."""

    def seconds(self, until: float | None = None) -> float:
        """Its length so far, never negative: clocks of containers may differ, and be set back."""
        return max(0.0, self.seen - self.started, (until or self.seen) - self.started)

    def cold_seconds(self, until: float | None = None) -> float:
        """Seconds before useful work began."""
        whole = self.seconds(until)
        return whole if self.ready is None else min(max(0.0, self.ready - self.started), whole)

    def usd(self, until: float | None = None) -> float:
        return sum(self.rates.values()) * self.seconds(until) / 3600


def begin_attempt(folder: str | Path, attempt: str, resources: Resources, prices: Prices) -> Attempt:
    """Start the meter of a new attempt. Raises CostError where the name is taken or unusable, and OSError."""
    path = _attempt_path(folder, attempt)
    if path.exists():
        raise CostError(f"attempt {attempt!r} has begun before: {path} is there; give every attempt a name of its own")
    now = time.time()
    fields = resources.model_dump() | {"rates": rates(resources, prices), "started": now, "seen": now}
    begun = Attempt(attempt=attempt, **fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, begun)
    return begun


def beat(folder: str | Path, attempt: str, ready: bool = False, now: float | None = None) -> Attempt:
    """Say that an attempt is alive, and with `ready` that useful work has begun (the first time counts).

    One process at a time beats for an attempt. Raises CostError where it was not begun, and OSError.
    """
    path = _attempt_path(folder, attempt)
    known = _read_attempt(path)
    now = time.time() if now is None else now
    now = max(now, known.started)
    began = known.ready if known.ready is not None or not ready else now
    later = known.model_copy(update={"seen": max(now, known.seen), "ready": began})
    _write(path, later)
    return later


def record_usage(folder: str | Path, role: str, usd: float, **what: Any) -> None:
    """Add what a service cost to `cost/usage.jsonl`, with what it was for. Raises CostError, OSError."""
    if role not in SERVICES:
        raise CostError(f"role {role!r} is not paid by use.{nearest(role, SERVICES)}")
    if not (math.isfinite(usd) and usd >= 0):
        raise CostError(f"{role}: usd must be a number of at least 0 (given: {usd!r})")
    line = json.dumps({**what, "time": round(time.time(), 3), "role": role, "usd": usd}, allow_nan=False) + "\n"
    path = Path(folder) / FOLDER / USAGE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":  # a kill cut the last line off: leave it to itself
                line = "\n" + line
        file.write(line.encode())


class Line(_Frozen):
    """`hours` are those of attempts, whatever the number of GPUs; 0 for what is paid by use."""

    hours: float
    usd: float


class Bill(_Frozen):
    """What a run has cost. The lines add up to `usd`; `hours` counts attempts that overlapped each for itself."""

    lines: dict[str, Line]
    usd: float
    hours: float
    attempts: int
    damaged: tuple[str, ...] = ()
    """Files and lines that could not be read: what they held is not in the bill."""

    def as_json(self) -> dict[str, Any]:
        """For result.json."""
        return self.model_dump(mode="json")


def read_bill(folder: str | Path, now: float | None = None) -> Bill:
    """The bill of a run folder; an empty one where nothing was metered.

    With `now` (epoch seconds) an attempt that was seen in the last minute counts up to it; without, every attempt
    counts up to its last sign of life. Damaged files and lines are left out, and named.
    """
    attempts, damaged = read_attempts(folder)
    hours: dict[str, float] = defaultdict(float)
    usd: dict[str, float] = defaultdict(float)
    total = 0.0
    for attempt in attempts:
        until = now if now is not None and now - attempt.seen < RUNNING else None
        cold, whole = attempt.cold_seconds(until) / 3600, attempt.seconds(until) / 3600
        total += whole
        hours["cold start"] += cold
        usd["cold start"] += cold * sum(attempt.rates.values())
        for role, rate in attempt.rates.items():
            hours[role] += whole - cold
            usd[role] += (whole - cold) * rate
    usage = Usage(folder)
    usage.read()
    for role, spent in usage.usd.items():
        hours[role] += 0.0
        usd[role] += spent
    order = [*(role for role in ROLES if role in usd), *sorted(usd.keys() - set(ROLES))]
    lines = {role: Line(hours=hours[role], usd=usd[role]) for role in order if hours[role] or usd[role]}
    if usage.damaged:
        damaged.append(f"{USAGE}: {usage.damaged} line(s)")
    return Bill(lines=lines, usd=sum(usd.values()), hours=total, attempts=len(attempts), damaged=tuple(damaged))


def read_attempts(folder: str | Path) -> tuple[list[Attempt], list[str]]:
    """The attempts of a run, in the order in which they began, and the files that could not be read."""
    attempts, damaged = [], []
    for path in sorted((Path(folder) / FOLDER).glob("[!.]*.json")):
        try:
            attempts.append(_read_attempt(path))
        except CostError as error:
            logger.warning("%s", error)
            damaged.append(path.name)
    return sorted(attempts, key=lambda attempt: attempt.started), damaged


class Usage:
    """The sums of `usage.jsonl`; reads on from where it was, since the file grows by a line for every judge call."""

    def __init__(self, folder: str | Path) -> None:
        self._path = Path(folder) / FOLDER / USAGE
        self._forget()

    def _forget(self) -> None:
        self.usd: dict[str, float] = defaultdict(float)
        """By role."""
        self.damaged = 0
        """Whole lines that could not be read."""
        self._offset = 0

    def read(self) -> None:
        """Add the lines written since. A last line without its end is left for the next time."""
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            if file.seek(0, os.SEEK_END) < self._offset:  # it was replaced by a shorter one
                self._forget()
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._add(line)

    def _add(self, line: bytes) -> None:
        with suppress(ValueError, KeyError, TypeError):
            record = json.loads(line)
            role, usd = str(record["role"]), float(record["usd"])
            if math.isfinite(usd) and usd >= 0:
                self.usd[role] += usd
                return
        self.damaged += 1


def _attempt_path(folder: str | Path, attempt: str) -> Path:
    if not _ATTEMPT.fullmatch(attempt):
        raise CostError(f"attempt {attempt!r} is not usable as a file name: letters, digits, '.', '_' and '-' only")
    return Path(folder) / FOLDER / f"{attempt}.json"


def _read_attempt(path: Path) -> Attempt:
    try:
        return Attempt.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise CostError(f"attempt {path.stem!r} was not begun: call begin_attempt first ({path} is missing)") from None
    except ValidationError as error:
        problem = error.errors()[0]
        raise CostError(f"{path} is damaged ({problem['msg']}): its cost is not in the bill") from None


def _write(path: Path, attempt: Attempt) -> None:
    """Under its name only once it is whole. No fsync: it is called often, and a lost beat costs only that beat."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(attempt.model_dump_json(indent=1))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


# the budget -----------------------------------------------------------------------------------------------------------


class Budget:
    """A limit in USD for a whole run, seen from the attempt that trains. Cheap enough to ask after every step."""

    def __init__(self, folder: str | Path, attempt: str, limit_usd: float) -> None:
        if not limit_usd >= 0:
            raise CostError(f"a budget must be a number of USD of at least 0 (given: {limit_usd!r})")
        self.limit_usd = limit_usd
        self._folder = folder
        self._own = _read_attempt(_attempt_path(folder, attempt))
        self._others = 0.0
        self._usage = Usage(folder)
        self._read_at = -math.inf
        self._recent: deque[float] = deque(maxlen=_RECENT)
        """USD of each of the latest steps."""
        self._pause = 0.0
        """The most USD that went between two steps: to a checkpoint, as a rule."""
        self._last: tuple[float, float] | None = None

    def spent(self, now: float | None = None) -> float:
        """USD of the whole run, with this attempt up to now and the others up to their last sign of life."""
        now = time.time() if now is None else now
        if not 0 <= now - self._read_at < _REREAD:
            attempts, _ = read_attempts(self._folder)
            self._others = sum(attempt.usd() for attempt in attempts if attempt.attempt != self._own.attempt)
            self._usage.read()
            self._read_at = now
        return self._others + sum(self._usage.usd.values()) + self._own.usd(now)

    def exhausted(self, step_seconds: float, now: float | None = None) -> bool:
        """Whether the money left does not pay one more step and the last checkpoint; to be asked after every step.

        A step is taken to cost what the dearest of the last 20 did, services included; a checkpoint, the most that
        ever went by between two steps. Two are kept in reserve, for one may be due before the step, and at least half
        a step while none was seen. What costs nothing is never refused.
        """
        now = time.time() if now is None else now
        spent, rate = self.spent(now), sum(self._own.rates.values()) / 3600
        step = rate * max(0.0, step_seconds)
        if self._last is not None:
            pause = rate * max(0.0, now - self._last[0] - step_seconds)
            step = max(step, spent - self._last[1] - pause)
            self._pause = max(self._pause, pause)
        self._last = now, spent
        self._recent.append(step)
        dearest = max(self._recent)
        needed = dearest + max(2 * self._pause, dearest * _CHECKPOINT)
        return needed > 0 and self.limit_usd - spent < needed
