"""Decision tables from an hourly CO2 series: a thermal store, four actions, exact Q-values.

Owns the simulator, its dynamic programming and the wording of its prompts. Must not know rewards, models or trainers.

    python -m lib.tasks._thermal_store --series ../shared/data/carbon/CISO_2022_hourly.csv --rows 5000 --out table.csv

The store holds 0-6 units of heat; a demand of 1-3 units an hour is met from it or by electricity. The policy reads 8
hours of CO2 as levels 1-9; Q-values are computed on exactly those levels, so the table is exact for what can be read.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lib.data import CsvTable, TableErrors, finite, write_csv
from lib.task import TaskError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

log = logging.getLogger(__name__)

HORIZON = 8  # hours stated in the prompt, the present one included
CAPACITY = 6  # units of heat
DEMANDS = (1, 2, 3)  # units of heat an hour, the same over the horizon
ACTIONS = ("idle", "charge", "charge hard", "discharge")
CHARGED = np.array([0, 1, 2, 0])  # heat put in, units; what does not fit is wasted
DRAWN = np.array([0.0, 1.0, 2 * 1.15, 0.0])  # electricity for it; hard charging needs 15 % more per unit
DISCHARGED = np.array([0, 0, 0, 2])  # heat taken out at most, units
STANDING_LOSS = 0.005  # of the stored heat, every hour, made up by electricity: the levels stay whole, the DP exact
SALVAGE = 0.9  # heat left at the end is worth this share of the window's mean level
STATES = (CAPACITY + 1) * len(DEMANDS)
MENU = "choose " + " ".join(f"[{number}] {name}" for number, name in enumerate(ACTIONS))


@dataclass(frozen=True)
class HourlySeries:
    """An hourly series on a whole grid: `values` in g/kWh, NaN where an hour is missing; `clock` = hour of the day."""

    name: str
    first: datetime
    values: Floats
    clock: Ints

    def gaps(self) -> list[tuple[int, int]]:
        """(first missing hour, number of missing hours) of every gap."""
        missing = np.concatenate(([False], np.isnan(self.values), [False]))
        edges = np.flatnonzero(missing[1:] != missing[:-1])
        return [(int(start), int(stop - start)) for start, stop in zip(edges[::2], edges[1::2], strict=True)]

    def window_starts(self) -> Ints:
        """First hours of the windows of HORIZON hours that touch no gap; says how many were left out."""
        possible = max(0, len(self.values) - HORIZON + 1)
        if possible == 0:
            raise TaskError(f"{self.name}: {len(self.values)} hours; a window needs {HORIZON}. Give a longer series.")
        present = np.concatenate(([0], np.cumsum(~np.isnan(self.values))))
        starts = np.flatnonzero(present[HORIZON:] - present[:-HORIZON] == HORIZON)
        gaps = self.gaps()
        if gaps:
            hours = sum(length for _, length in gaps)
            left_out = f"{possible - len(starts)} of {possible} windows left out"
            log.warning("%s: %d hours missing in %d gaps; %s", self.name, hours, len(gaps), left_out)
        if len(starts) == 0:
            raise TaskError(f"{self.name}: no {HORIZON} hours in a row without a gap. Give a file with fewer gaps.")
        return starts

    def levels(self) -> Ints:
        """CO2 levels 1-9: linear between the series' own 5 % and 95 % quantiles, clipped; 0 = missing."""
        low, high = (float(value) for value in np.nanquantile(self.values, (0.05, 0.95)))
        if not high > low:
            raise TaskError(f"{self.name}: the values do not vary (5 % to 95 %: {low} to {high}); nothing to decide.")
        scaled = np.rint(1 + 8 * (self.values - low) / (high - low))
        return np.where(np.isnan(scaled), 0, np.clip(scaled, 1, 9)).astype(np.int64)


def synthetic_series(hours: int, seed: int) -> HourlySeries:
    """A made-up grid: a solar dip, an evening ramp, weekends, seasons, and weather more restless than a real one's.

    The restlessness is on purpose: where every day looks alike, the hour alone tells what to do, and a policy need not
    read the levels.
    """
    rng = np.random.default_rng([seed, 2])
    time = np.arange(hours)
    day, clock = time // 24, time % 24
    days = int(day[-1]) + 1
    winter = np.cos(2 * np.pi * (day - 15) / 365)
    sun = np.clip(0.75 - 0.35 * winter + rng.normal(0, 0.35, days)[day], 0, 1.3)
    evening = rng.uniform(0.3, 1.5, days)[day] * _bell(clock - rng.normal(19.5, 2.0, days)[day], 2.5)
    morning = rng.uniform(0.0, 1.2, days)[day] * _bell(clock - rng.normal(7.0, 1.5, days)[day], 2.0)
    use = np.where(day % 7 >= 5, 0.6, 1.0) * (morning + evening)
    wind = _weather(rng, hours, scale=3.0)
    values = 290 + 25 * winter + 140 * use - 170 * sun * _bell(clock - 12.8, 3.2) + 65 * wind
    values += 40 * rng.normal(0, 1, hours)
    return HourlySeries(f"synthetic-{seed}", datetime(2024, 1, 1), np.maximum(values, 15.0), clock.astype(np.int64))


def _bell(distance: npt.NDArray[np.floating[Any]], width: float) -> Floats:
    """A bump of height 1 around 0, on a clock of 24 hours."""
    around = (distance + 12) % 24 - 12
    return np.asarray(np.exp(-0.5 * (around / width) ** 2))


def _weather(rng: np.random.Generator, hours: int, scale: float) -> Floats:
    """Smooth noise of unit variance that forgets over `scale` hours."""
    kernel = np.exp(-np.arange(5 * int(scale)) / scale)
    kernel /= np.sqrt((kernel**2).sum())
    return np.asarray(np.convolve(rng.normal(0, 1, hours + len(kernel) - 1), kernel, mode="valid"))


def q_values(levels: Ints, storage: Ints, demand: Ints) -> Floats:
    """Q = -cost of each action in the first hour, acting optimally after it: exact backward dynamic programming.

    Shapes: levels (n, hours), storage (n,), demand (n,) -> (n, 4). Cost in units of electricity x level. Every cost is
    a multiple of 1/10,000, so rounding removes float noise only, and equally good actions have equal Q.
    """
    n, hours = levels.shape
    stored = np.arange(CAPACITY + 1)
    put_in = np.minimum(CHARGED[:, None], CAPACITY - stored[None])  # (4, states)
    left_over = -SALVAGE * levels.mean(axis=1)[:, None] * stored[None]  # (n, states)
    q = np.empty((n, len(ACTIONS), len(stored)))
    for hour in reversed(range(hours)):
        for action in range(len(ACTIONS)):
            taken = np.minimum(np.minimum(DISCHARGED[action], stored)[None], demand[:, None])  # (n, states)
            electricity = demand[:, None] + DRAWN[action] - taken + STANDING_LOSS * stored[None]
            after = stored[None] + put_in[action][None] - taken
            q[:, action] = levels[:, hour, None] * electricity + np.take_along_axis(left_over, after, axis=1)
        left_over = q.min(axis=1)
    first: Floats = q[np.arange(n), :, storage]
    return np.round(-first, 4) + 0.0


def rule_of_thumb(storage: Ints) -> Ints:
    """What a plant run by its store alone would do, blind to CO2: fill when low, use when full."""
    return np.select([storage >= 4, storage <= 1, storage == 2], [3, 2, 1], default=0).astype(np.int64)


def reason(levels: Sequence[int], storage: int) -> str:
    """The words before the action: how the present level ranks in the window, and where the next one goes."""
    now, rest = levels[0], levels[1:]
    rank = sum((now > other) + 0.5 * (now == other) for other in rest) / len(rest)
    height = "low" if rank < 0.34 else "high" if rank > 0.67 else "mid"
    trend = "up" if rest[0] > now else "down" if rest[0] < now else "flat"
    return f"now {height} then {trend} storage {storage} so"


def decision_table(series: HourlySeries, rows: int, seed: int) -> list[dict[str, Any]]:
    """`rows` decisions in the input format of the task `decisions`; no two share a prompt.

    Every window is used once before any is used again. `logged_action` is a well-formed but mediocre historical log:
    35 % random, 30 % best, 35 % rule of thumb.
    """
    rng = np.random.default_rng([seed, 1])
    start, storage, demand = _draw(series, rows, rng)
    levels = series.levels()[start[:, None] + np.arange(HORIZON)[None]]
    q = q_values(levels, storage, demand)
    lot = rng.random(rows)
    guess = rng.integers(0, len(ACTIONS), rows)
    logged = np.select([lot < 0.35, lot < 0.65], [guess, q.argmax(axis=1)], default=rule_of_thumb(storage))
    clock = series.clock[start]
    parts = (start, clock, storage, demand, levels, q, logged)
    return [_record(series, *values) for values in zip(*(part.tolist() for part in parts), strict=True)]


def _draw(series: HourlySeries, rows: int, rng: np.random.Generator) -> tuple[Ints, Ints, Ints]:
    """Window starts, storage and demand of `rows` decisions with different prompts, in a random order."""
    starts = rng.permutation(series.window_starts())
    levels = series.levels()
    text = series.clock[starts]
    for hour in range(HORIZON):
        text = text * 10 + levels[starts + hour]
    # 8 and STATES have no common factor: pass after pass, a window meets each of its states once.
    first = rng.integers(0, STATES, len(starts))
    state = ((first[None] + 8 * np.arange(STATES)[:, None]) % STATES).ravel()
    _, chosen = np.unique(np.tile(text, STATES) * STATES + state, return_index=True)
    if len(chosen) < rows:
        raise TaskError(
            f"{series.name} gives {len(chosen)} different prompts, {rows} rows are asked for: lower generate_rows."
        )
    chosen = np.sort(chosen)[:rows]
    storage, demand = np.divmod(state[chosen], len(DEMANDS))
    return starts[chosen % len(starts)], storage, demand + DEMANDS[0]


def _record(
    series: HourlySeries,
    start: int,
    clock: int,
    storage: int,
    demand: int,
    levels: list[int],
    q: list[float],
    logged: int,
) -> dict[str, Any]:
    hour = series.first + timedelta(hours=start)
    return {
        "id": f"{series.name}-{hour:%Y-%m-%dT%H}-s{storage}-d{demand}",
        "prompt": f"hour {clock:02d} storage {storage} demand {demand} co2 {' '.join(map(str, levels))} {MENU}",
        "phase": ("night", "morning", "afternoon", "evening")[clock // 6],
        **{f"q_action_{action}": value for action, value in enumerate(q)},
        "reason": reason(levels, storage),
        "logged_action": logged,
    }


def read_series(path: Path) -> HourlySeries:
    """A CSV with a time column (ISO 8601) and a value column under any names: the first of each.

    An empty cell (or nan, NA) is a missing hour, like an absent line. Raises TaskError with every bad cell.
    """
    table = CsvTable(path)
    time_name, value_name = _series_columns(table)
    errors = TableErrors()
    found: dict[int, tuple[datetime, float]] = {}
    for number, record in enumerate(table):
        where = errors.at(table.name, table.place(number))
        moment, value = _moment(record[time_name]), _value(record[value_name])
        if moment is None:
            where.report(time_name, f"{record[time_name]!r} is not an ISO 8601 time (2022-01-31 13:00)")
        elif value is None:
            where.report(
                value_name, f"{record[value_name]!r} is not a finite number; leave the cell empty where it is missing"
            )
        elif moment.minute or moment.second or moment.microsecond:
            where.report(time_name, f"{record[time_name]!r} is not a whole hour: an hourly series is needed")
        elif _hour_number(moment) in found:
            where.report(time_name, f"the hour {record[time_name]!r} is there twice (summer time ends? add the zone)")
        else:
            found[_hour_number(moment)] = (moment, value)
    errors.raise_if_any()
    return _on_grid(path.stem, found)


def _on_grid(name: str, found: dict[int, tuple[datetime, float]]) -> HourlySeries:
    first = min(found)
    length = max(found) - first + 1
    if length > 20 * len(found) + 24:
        raise TaskError(f"{name}: {len(found)} values spread over {length} hours: not an hourly series.")
    values, clock = np.full(length, np.nan), np.full(length, -1, dtype=np.int64)
    for number, (moment, value) in found.items():
        values[number - first], clock[number - first] = value, moment.hour
    return HourlySeries(name, found[first][0].replace(tzinfo=None), values, clock)


def _series_columns(table: CsvTable) -> tuple[str, str]:
    """The first column whose first filled cell is a time, and the first other one where it is a number."""
    first_filled: dict[str, str] = {}
    for record in table:
        filled = {name: cell for name, cell in record.items() if not math.isnan(_value(cell) or 0)}
        first_filled = {**filled, **first_filled}
        if len(first_filled) == len(table.columns):
            break
    times = [name for name, cell in first_filled.items() if _moment(cell) is not None]
    numbers = [name for name, cell in first_filled.items() if finite(cell) is not None and name not in times[:1]]
    times.sort(key=table.columns.index)
    numbers.sort(key=table.columns.index)
    if not times or not numbers:
        lacking = "time column (ISO 8601)" if not times else "numeric column"
        raise TaskError(f"{table.name}: no {lacking} among {', '.join(table.columns)}.")
    return times[0], numbers[0]


def _moment(cell: str) -> datetime | None:
    try:
        return datetime.fromisoformat(cell.strip()) if not cell.strip().isdigit() else None
    except ValueError:
        return None


def _hour_number(moment: datetime) -> int:
    """Hours since 0001-01-01, UTC where the time has a zone: neighbours differ by one, daylight saving or not."""
    offset = moment.utcoffset() or timedelta()
    return int((moment.replace(tzinfo=None) - offset - datetime(1, 1, 1)) // timedelta(hours=1))


def _value(cell: str) -> float | None:
    """A number, NaN for a missing one, None for anything else."""
    if cell.strip().lower() in ("", "nan", "na", "null"):
        return math.nan
    return finite(cell)


def generate(series: str, rows: int, seed: int) -> list[dict[str, Any]]:
    """The decision table of a series file (absolute path), or of a synthetic series when `series` is empty."""
    found = read_series(Path(series)) if series else synthetic_series(max(8760, 2 * rows), seed)
    return decision_table(found, rows, seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a decision table as CSV, in the input format of the task `decisions`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--series", default="", help="CSV of time and CO2 intensity; default: a synthetic series")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    records = generate(options.series, options.rows, options.seed)
    write_csv(options.out, list(records[0]), _cells(records))
    log.info("%s: %d rows", options.out, len(records))


def _cells(records: Sequence[dict[str, Any]]) -> Iterator[list[Any]]:
    return (list(record.values()) for record in records)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        main()
    except TaskError as problem:
        sys.exit(f"error: {problem}")
