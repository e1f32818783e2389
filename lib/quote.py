"""What a run will cost, before it begins: from what an earlier run, or a probe of a few steps, measured.

Owns the estimate and its interval. Must not know configs or backends: of a run folder it reads how long things took.

The method. A run's seconds = cold start + start-up (what the first steps take longer) + steps + checkpoints + the tail.
Neighbouring steps are alike and all of them drift (answers grow or shrink): mean ± se / sqrt(n) is too sure of itself.
Their level comes from a circular block bootstrap (Politis and Romano 1992), widened for few steps as Student's t is;
their drift from a Bayesian regression of log seconds on the step number, whose prior says how much runs drift (DRIFT).
Two runs of one config differ (BETWEEN_RUNS). benchmarks/quote.py measures error and coverage on replayed traces.

    python -c "from lib.quote import read_trace; print(read_trace('outputs/decisions').steps[:5])"
"""

from __future__ import annotations

import datetime
import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median, median_low
from typing import Any, NamedTuple, TypeGuard

from pydantic import BaseModel, ConfigDict

from lib.cost import BESIDE, ROLES, SERVICES, CostError, Prices, Resources, Usage, rates, read_attempts

DRIFT = 0.3
"""Standard deviation of the log of (seconds of the last step / of the first), before anything is measured."""
BETWEEN_RUNS = 0.05
"""Relative standard deviation between runs of one config."""
UNSEEN = 0.18
"""The same for what one step cannot have shown; it falls with the root of their number."""
COLD_START = (90.0, 0.7)
"""Seconds, and the standard deviation of their log: assumed for a container where none was metered."""
STALE = 180
"""Days after which a quote says that its prices are old."""

_TIMED = ("gpu", "cpu", "here")
"""Roles that are paid by the hour of useful work."""
_DRAWS = 600
_LOW, _HIGH = 0.05, 0.95


class Trace(BaseModel):
    """What a run measured, in seconds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    steps: tuple[float, ...]
    """Wall to wall, in order, without start-up and checkpoints."""
    startup: tuple[float, ...] = ()
    """What the first steps of each process took longer than the others."""
    checkpoints: tuple[float, ...] = ()
    """What each checkpoint seen took."""
    save_steps: int | None = None
    cold: tuple[float, ...] = ()
    """Of each attempt that became ready."""
    tail: float | None = None
    """From the last step to the end of its attempt; None where it was not metered."""
    usage: Mapping[str, float] = {}
    """USD per step of services, by role."""
    answers: tuple[float, int] | None = None
    """Tokens of the mean answer at the end, and the most that an answer may have."""
    gpu: str | None = None
    where: str | None = None
    """None where nothing was metered."""


class QuoteLine(BaseModel):
    """`low` and `high` are USD: nine in ten runs should fall between them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hours: float
    usd: float
    low: float
    high: float


class Quote(BaseModel):
    """What a run will probably cost. Intervals are of 90 %; `hours` ends with the work, before the idle time."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int
    lines: dict[str, QuoteLine]
    usd: float
    usd_low: float
    usd_high: float
    hours: float
    hours_low: float
    hours_high: float
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """For a file or a table."""
        return self.model_dump(mode="json")


# reading --------------------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    number: int
    wall: float
    """Seconds since the step before, or since training began."""
    own: float | None
    """Seconds that the step itself says it took."""


def read_trace(folder: str | Path) -> Trace:
    """What a run folder measured; an empty trace where there are no steps. Damaged lines and files are passed over."""
    folder = Path(folder)
    attempts, _ = read_attempts(folder)
    attempts = [attempt for attempt in attempts if not attempt.attempt.startswith(BESIDE)]
    records = _read_records(folder / "metrics.jsonl")
    config = None
    with suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_bytes())
    save_steps = _setting(config, "training", "save_steps")
    steps: list[float] = []
    startup: list[float] = []
    checkpoints: list[float] = []
    for process in _processes(records):
        _split(process, save_steps, steps, startup, checkpoints)
    usage = Usage(folder)
    usage.read()
    last = attempts[-1] if attempts else None
    tail = None
    if last is not None and last.ready is not None and records:
        tail = max(0.0, last.seen - last.ready - records[-1]["time"])
    return Trace(
        source=folder.name,
        steps=tuple(steps),
        startup=tuple(startup),
        checkpoints=tuple(checkpoints),
        save_steps=save_steps,
        cold=tuple(attempt.cold_seconds() for attempt in attempts if attempt.ready is not None),
        tail=tail,
        usage={role: usd / len(records) for role, usd in usage.usd.items()} if records else {},
        answers=_answers(records, _setting(config, "sampling", "completion_limit")),
        gpu=last.gpu if last else None,
        where=last.where if last else None,
    )


def _read_records(path: Path) -> list[dict[str, Any]]:
    """The records that have a step and a time; others cannot be placed."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int) and _is_number(record.get("time")):
            records.append(record)
    return records


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _setting(config: Any, section: str, name: str) -> int | None:
    """A positive whole number of a run's config.json; None where there is none."""
    try:
        found = config[section][name]
    except (KeyError, TypeError):
        return None
    return found if isinstance(found, int) and found > 0 else None


def _answers(records: Sequence[Mapping[str, Any]], limit: int | None) -> tuple[float, int] | None:
    lengths = [record.get("completions/mean_length") for record in records[-5:]]
    known = [length for length in lengths if _is_number(length)]
    return (fmean(known), limit) if known and limit else None


def _processes(records: Sequence[Mapping[str, Any]]) -> list[list[_Step]]:
    """Steps by the process that made them: `time` starts again after a resume."""
    processes: list[list[_Step]] = []
    before = 0.0
    for record in records:
        time = float(record["time"])
        own = float(record["step_time"]) if _is_number(record.get("step_time")) else None
        if not processes or time < before or (own is not None and time - before < 0.9 * own - 0.01):
            processes.append([])
            before = 0.0
        processes[-1].append(_Step(record["step"], time - before, own))
        before = time
    return processes


def _split(
    process: Sequence[_Step], save_steps: int | None, steps: list[float], startup: list[float], checkpoints: list[float]
) -> None:
    """Add one process's seconds to what they were: steps, start-up, checkpoints."""
    seconds = [step.wall for step in process]
    overheads = [step.wall - step.own for step in process[1:] if step.own is not None]
    usual = median(overheads) if overheads else 0.0
    for i, step in enumerate(process[1:], 1):
        if save_steps is not None and (step.number - 1) % save_steps == 0:  # a checkpoint was made just before
            around = [*seconds[max(1, i - 2) : i], *seconds[i + 1 : i + 3]] or [step.wall]
            regular = step.own + usual if step.own is not None else median(around)
            checkpoints.append(max(0.0, step.wall - regular))
            seconds[i] = min(step.wall, regular)
    if len(process) == 1:
        first = process[0]
        own = first.own or first.wall
        startup.append(max(0.0, first.wall - own))
        steps.append(own)
        return
    warm = 1
    while warm <= len(seconds) / 3 and len(seconds) - warm > 3 and seconds[warm] > 2 * median(seconds[warm + 1 :]):
        warm += 1
    base = median(seconds[warm : warm + 5])
    startup.append(max(0.0, sum(seconds[:warm]) - warm * base))
    steps.extend(seconds[warm:])


# estimating -----------------------------------------------------------------------------------------------------------


class _Draws(NamedTuple):
    """Seconds of one run: the first of each is the estimate, the others are draws of what may happen."""

    work: list[float]
    cold: list[float]
    services: list[float]
    """How much of the measured USD per step, all steps together."""


def make_quote(
    trace: Trace,
    steps: int,
    resources: Sequence[Resources],
    prices: Prices,
    interruptions_per_day: float = 0.0,
    idle_seconds: float = 0.0,
) -> Quote:
    """What `steps` steps like those of the trace will cost on `resources` (the first is preferred, all may be got).

    `idle_seconds` are billed once, after the work. Raises CostError where nothing was measured or no price is known.
    """
    _check(trace, steps, resources, interruptions_per_day, idle_seconds)
    draws = _draw(trace, steps, _cold(trace, resources), interruptions_per_day)
    columns: dict[str, list[list[float]]] = {role: [] for role in ROLES}
    for each in resources:
        for role, column in _price(trace, draws, rates(each, prices), idle_seconds).items():
            columns[role].append(column)
    totals = [[sum(values) for values in zip(*choice, strict=True)] for choice in zip(*columns.values(), strict=True)]
    low, high = _interval(totals)
    whole = [a + b for a, b in zip(draws.work, draws.cold, strict=True)]
    hours_low, hours_high = _interval([whole])
    return Quote(
        steps=steps,
        lines=_lines(columns, draws, idle_seconds),
        usd=totals[0][0],
        usd_low=low,
        usd_high=high,
        hours=whole[0] / 3600,
        hours_low=hours_low / 3600,
        hours_high=hours_high / 3600,
        notes=tuple(_notes(trace, steps, resources, prices, interruptions_per_day)),
    )


def _check(
    trace: Trace, steps: int, resources: Sequence[Resources], interruptions_per_day: float, idle_seconds: float
) -> None:
    if not trace.steps:
        raise CostError(
            f"{trace.source} has measured no step, so there is nothing to quote from: "
            "make a short probe with `--probe`, or name an earlier run that trained"
        )
    if steps < 1:
        raise CostError(f"a quote needs at least 1 step (given: {steps})")
    if not resources:
        raise CostError("a quote needs at least one choice of resources")
    for name, value in (("interruptions_per_day", interruptions_per_day), ("idle_seconds", idle_seconds)):
        if not (math.isfinite(value) and value >= 0):
            raise CostError(f"{name} must be a number of at least 0 (given: {value!r})")


def _price(trace: Trace, draws: _Draws, rate: Mapping[str, float], idle_seconds: float) -> dict[str, list[float]]:
    """USD of every role, for every draw, at these rates per hour."""
    whole = sum(rate.values()) / 3600
    columns = {role: [rate.get(role, 0.0) / 3600 * seconds for seconds in draws.work] for role in _TIMED}
    columns |= {role: [trace.usage.get(role, 0.0) * steps for steps in draws.services] for role in SERVICES}
    columns["cold start"] = [whole * seconds for seconds in draws.cold]
    columns["idle"] = [whole * idle_seconds] * len(draws.work)
    return columns


def _lines(columns: Mapping[str, list[list[float]]], draws: _Draws, idle_seconds: float) -> dict[str, QuoteLine]:
    """The roles that cost something; `here` is shown for its hours."""
    seconds = dict.fromkeys(_TIMED, draws.work[0]) | {"cold start": draws.cold[0], "idle": idle_seconds}
    lines = {}
    for role, choices in columns.items():
        low, high = _interval(choices)
        lines[role] = QuoteLine(hours=seconds.get(role, 0.0) / 3600, usd=choices[0][0], low=low, high=high)
    paid = any(lines[role].high for role in ("gpu", "cpu"))
    return {role: line for role, line in lines.items() if line.high or (role == "here" and not paid)}


def _cold(trace: Trace, resources: Sequence[Resources]) -> tuple[float, float]:
    """Seconds of a cold start and the standard deviation of their log."""
    if trace.cold:
        return fmean(trace.cold), 0.4 / math.sqrt(len(trace.cold))
    return COLD_START if any(each.where == "modal" for each in resources) else (0.0, 0.0)


def _draw(trace: Trace, n: int, cold: tuple[float, float], interruptions_per_day: float) -> _Draws:
    chance = random.Random(0)
    k, middle = len(trace.steps), median(trace.steps)
    ceiling = median_low(trace.steps) * (1 + (k + 1) / 4)  # one slow step of three says little about the next hundred
    level = fmean(min(step, ceiling) for step in trace.steps)
    shift, shift_sd = _drift(trace.steps, n)
    start = fmean(trace.startup) if trace.startup else 0.0
    saves = (n - 1) // trace.save_steps if trace.save_steps else 0
    save = fmean(trace.checkpoints) if trace.checkpoints else middle / 3
    redone = (trace.save_steps or n) / 2
    unsure = math.hypot(BETWEEN_RUNS, UNSEEN / math.sqrt(k))

    def run(step: float, save: float, start: float, cold: float, breaks: float, lost: float) -> tuple[float, float]:
        work = n * step + saves * save + start + (trace.tail or 0.0) + breaks * (start + lost * step)
        return work, cold * (1 + breaks)

    def breaks(step: float) -> float:
        return interruptions_per_day * (n * step + saves * save + start + cold[0]) / 86400

    step = level * math.exp(shift)
    rows = [run(step, save, start, cold[0], breaks(step), redone)]
    services = [float(n)]
    for mean in _bootstrap(trace.steps, n, _DRAWS, chance):
        drift = math.exp(chance.gauss(shift, shift_sd))
        step = level * max(0.2, 1 + mean) * drift * math.exp(chance.gauss(0, unsure))
        each = chance.choice(trace.checkpoints) if trace.checkpoints else middle * chance.random() ** 2
        slow = math.exp(chance.gauss(0, 0.4))
        chill = cold[0] * math.exp(chance.gauss(0, cold[1]))
        lost = chance.uniform(0, 2 * redone)
        rows.append(run(step, each, start * slow, chill, _poisson(breaks(step), chance), lost))
        services.append(n * drift * math.exp(chance.gauss(0, math.hypot(0.1, 0.3 / math.sqrt(k)))))
    return _Draws([work for work, _ in rows], [cold for _, cold in rows], services)


def _drift(steps: Sequence[float], n: int) -> tuple[float, float]:
    """By how much the log of the mean of n steps differs from that of those measured, and its standard deviation.

    The regression's slope is drawn towards 0 as far as DRIFT is to be believed more than the steps seen.
    """
    k = len(steps)
    prior = (DRIFT / max(n, k)) ** 2
    reach = (n - k) / 2
    if k < 4:
        return 0.0, math.sqrt(prior) * abs(reach)
    logs = [math.log(max(step, 1e-9)) for step in steps]
    mean, centre = fmean(logs), (k - 1) / 2
    spread = sum((i - centre) ** 2 for i in range(k))
    slope = sum((i - centre) * (value - mean) for i, value in enumerate(logs)) / spread
    rest = [value - mean - slope * (i - centre) for i, value in enumerate(logs)]
    noise = (sum(r * r for r in rest) + 2 * 0.1**2) / k
    lag = sum(a * b for a, b in itertools.pairwise(rest)) / (sum(r * r for r in rest) or 1.0)
    lag = min(0.8, max(0.2, lag + 2 / k))  # k residuals show less of it than there is
    error = noise / spread * (1 + lag) / (1 - lag)
    trust = prior / (prior + error)
    wander = math.sqrt(sum(r * r for r in rest) / k) * abs(n - k) / max(n, k)
    return slope * trust * reach, math.hypot(math.sqrt(prior * (1 - trust)) * abs(reach), wander)


def _bootstrap(steps: Sequence[float], n: int, draws: int, chance: random.Random) -> list[float]:
    """Relative deviations of the mean of n future steps from the mean of those measured."""
    k = len(steps)
    if k == 1:
        return [chance.gauss(0, 0.35) for _ in range(draws)]
    length = max(1, round(math.sqrt(k)))
    blocks = math.ceil(k / length)
    around = [*steps, *steps[:length]]
    sums = [sum(around[i : i + length]) / length for i in range(k)]
    mean = fmean(steps)
    wide = (1 + 1.6 / (k - 1) ** 1.2) * math.sqrt(k / (k - 1))  # about t's 95 % point over the normal's

    def deviation() -> float:
        return float((fmean(sums[chance.randrange(k)] for _ in range(blocks)) / mean - 1) * wide)

    return [deviation() + deviation() * math.sqrt(k / n) for _ in range(draws)]


def _poisson(mean: float, chance: random.Random) -> int:
    """Knuth's; a normal where the mean is large."""
    if mean > 50:
        return max(0, round(chance.gauss(mean, math.sqrt(mean))))
    limit, product, count = math.exp(-mean), chance.random(), 0
    while product > limit:
        product *= chance.random()
        count += 1
    return count


def _interval(options: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The 90 % interval of what each option gives, from the lowest to the highest; it holds the estimates."""
    lows, highs = [], []
    for values in options:
        ordered = sorted(values[1:])
        lows.append(min(values[0], ordered[int(_LOW * len(ordered))]))
        highs.append(max(values[0], ordered[int(_HIGH * len(ordered))]))
    return min(lows), max(highs)


def _notes(
    trace: Trace, steps: int, resources: Sequence[Resources], prices: Prices, interruptions_per_day: float
) -> list[str]:
    k = len(trace.steps)
    notes = [f"measured from {trace.source}: {k} step(s) after start-up, {median(trace.steps):.3g} s each (median)"]
    if k < 10:
        notes.append("few steps were measured: a longer probe, or an earlier run, narrows the interval")
    if steps > 10 * k:
        notes.append(f"{steps} steps are quoted from {k}: how they drift later on is assumed, not measured")
    if trace.answers and trace.answers[1] > 2 * trace.answers[0]:
        mean, limit = trace.answers
        notes.append(
            f"answers had {mean:.0f} of the {limit} tokens allowed: should they grow, steps take longer than that"
        )
    asked = list(dict.fromkeys(each.gpu or f"no GPU ({each.where})" for each in resources))
    measured = trace.gpu or f"no GPU ({trace.where or 'not metered'})"
    if asked != [measured]:
        notes.append(f"measured on {measured}, quoted for {' or '.join(asked)}: the seconds are not scaled")
    if not trace.cold and any(each.where == "modal" for each in resources):
        notes.append(f"no cold start was metered: {COLD_START[0]:.0f} s are assumed, a large model takes longer")
    if trace.save_steps and steps > trace.save_steps and not trace.checkpoints:
        notes.append("no checkpoint was seen: each is taken to last up to one step")
    if interruptions_per_day:
        notes.append(f"{interruptions_per_day:g} interruption(s) a day are assumed")
    notes.append(f"prices of {prices.date} from {prices.file}")
    age = (datetime.date.today() - prices.date).days
    if age > STALE:
        notes.append(f"the prices are {age} days old: check them and edit {prices.file}")
    return notes
