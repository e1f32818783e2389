"""The simulator behind generated decision tables: exactness, wording, gaps."""

from __future__ import annotations

import csv
import itertools
import logging
import re
from pathlib import Path

import numpy as np
import pytest

from lib.task import TaskError
from lib.tasks import _thermal_store as store


def plain_cost(levels: list[int], storage: int, demand: int, actions: tuple[int, ...]) -> float:
    """The rules of the store once more, one hour after the other, without numpy."""
    total = 0.0
    for level, action in zip(levels, actions, strict=True):
        charged, drawn = {0: (0, 0.0), 1: (1, 1.0), 2: (2, 2.3), 3: (0, 0.0)}[action]
        taken = min(2, storage, demand) if action == 3 else 0
        total += level * (demand + drawn - taken + store.STANDING_LOSS * storage)
        storage = min(storage + charged, 6) - taken
    return total - 0.9 * sum(levels) / len(levels) * storage


@pytest.mark.parametrize("seed", range(4))
def test_dynamic_programming_agrees_with_all_action_sequences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    hours = 5
    levels = rng.integers(1, 10, (6, hours))
    storage, demand = rng.integers(0, 7, 6), rng.integers(1, 4, 6)
    q = store.q_values(levels, storage, demand)
    for row in range(6):
        for first in range(4):
            costs = [
                plain_cost(levels[row].tolist(), int(storage[row]), int(demand[row]), (first, *later))
                for later in itertools.product(range(4), repeat=hours - 1)
            ]
            assert q[row, first] == pytest.approx(-min(costs), abs=1e-4)


def test_q_values_are_those_of_the_levels_in_the_prompt() -> None:
    for record in store.generate("", 50, 3):
        numbers = [
            int(number) for number in re.findall(r"\d+", record["prompt"].split(" choose ")[0].replace("co2", ""))
        ]
        _, storage, demand, *levels = numbers
        assert len(levels) == 8
        q = store.q_values(np.array([levels]), np.array([storage]), np.array([demand]))[0]
        assert [record[f"q_action_{action}"] for action in range(4)] == q.tolist()


def test_prompts_read_as_agreed_and_none_comes_twice() -> None:
    records = store.generate("", 8192, 0)
    shape = re.compile(
        r"hour [0-2]\d storage [0-6] demand [1-3] co2( [1-9]){8} "
        r"choose \[0\] idle \[1\] charge \[2\] charge hard \[3\] discharge"
    )
    assert all(shape.fullmatch(record["prompt"]) for record in records)
    assert len({record["prompt"] for record in records}) == len({record["id"] for record in records}) == 8192


def test_every_action_is_best_somewhere_and_the_best_policy_must_read_the_levels() -> None:
    records = store.generate("", 4000, 0)
    q = np.array([[record[f"q_action_{action}"] for action in range(4)] for record in records])
    assert np.bincount(q.argmax(axis=1), minlength=4).min() > 400
    storage = np.array([int(record["prompt"].split()[3]) for record in records])
    rewards = np.exp(q - q.max(axis=1, keepdims=True))
    rewards /= rewards.sum(axis=1, keepdims=True)
    blind = max(rewards[storage == level].mean(axis=0).max() for level in range(7))
    rule = rewards[np.arange(len(q)), store.rule_of_thumb(storage)].mean()
    assert rule < 0.45 < rewards.max(axis=1).mean() - 0.15
    assert blind < rewards.max(axis=1).mean()


def test_the_log_is_mediocre_on_purpose() -> None:
    records = store.generate("", 8000, 0)
    q = np.array([[record[f"q_action_{action}"] for action in range(4)] for record in records])
    logged = np.array([record["logged_action"] for record in records])
    share = (q[np.arange(len(q)), logged] == q.max(axis=1)).mean()
    assert 0.4 < share < 0.65  # 30 % best, and what chance and the rule hit
    assert np.bincount(logged, minlength=4).min() > 1000


def test_the_reason_names_rank_trend_and_store() -> None:
    assert store.reason([7, 5, 3, 2, 4, 6, 6, 6], 4) == "now high then down storage 4 so"
    assert store.reason([1, 1, 3, 2, 4, 6, 6, 6], 0) == "now low then flat storage 0 so"
    assert store.reason([4, 5, 3, 2, 4, 6, 6, 1], 2) == "now mid then up storage 2 so"


def test_the_same_seed_gives_the_same_table_and_another_seed_another() -> None:
    assert store.generate("", 100, 5) == store.generate("", 100, 5)
    assert store.generate("", 100, 5) != store.generate("", 100, 6)


def test_more_rows_than_windows_reuse_windows_in_other_states() -> None:
    series = store.synthetic_series(100, 0)
    assert len({record["prompt"] for record in store.decision_table(series, 1000, 0)}) == 1000
    with pytest.raises(TaskError, match=r"gives \d+ different prompts, 5000 rows are asked for"):
        store.decision_table(series, 5000, 0)


# -- series from files ------------------------------------------------------------------------------------------------


def write_series(path: Path, lines: list[str], header: str = "when,region,gCO2") -> Path:
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def hourly(hours: range, value: str = "") -> list[str]:
    return [f"2022-01-{1 + h // 24:02d} {h % 24:02d}:00,X,{value or 100 + 7 * (h % 24)}" for h in hours]


def test_a_series_is_read_by_its_first_time_and_first_numeric_column(tmp_path: Path) -> None:
    series = store.read_series(write_series(tmp_path / "s.csv", hourly(range(48))))
    assert len(series.values) == 48 and series.values[1] == 107 and series.clock[25] == 1
    assert series.gaps() == [] and len(series.window_starts()) == 41


def test_absent_lines_and_empty_cells_are_gaps_whose_windows_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [*hourly(range(20)), *hourly(range(22, 40)), *hourly(range(40, 41), "nan"), *hourly(range(41, 72))]
    series = store.read_series(write_series(tmp_path / "s.csv", lines[::-1]))
    assert series.gaps() == [(20, 2), (40, 1)]
    with caplog.at_level(logging.WARNING):
        starts = series.window_starts()
    assert all(not np.isnan(series.values[start : start + 8]).any() for start in starts)
    assert len(starts) == 65 - (7 + 2) - (7 + 1)
    assert "3 hours missing in 2 gaps; 17 of 65 windows left out" in caplog.text


def test_a_change_to_summer_time_is_no_gap(tmp_path: Path) -> None:
    lines = [f"2022-03-27T0{h}:00+0{1 if h < 2 else 2}:00,{100 + h}" for h in (0, 1, 3, 4, 5, 6, 7, 8, 9)]
    series = store.read_series(write_series(tmp_path / "s.csv", lines, "time,value"))
    assert series.gaps() == [] and series.clock.tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([*hourly(range(20)), "2022-01-02 00:00,X,many"], r"line 22, gCO2: 'many' is not a finite number"),
        ([*hourly(range(20)), "2022-01-02 00:30,X,5"], r"line 22, when: .* is not a whole hour"),
        ([*hourly(range(20)), *hourly(range(19, 20))], r"line 22, when: .* is there twice"),
        ([*hourly(range(20)), "soon,X,5"], r"line 22, when: 'soon' is not an ISO 8601 time"),
        ([*hourly(range(5))], r"5 hours; a window needs 8"),
        (hourly(range(48), "7"), r"do not vary"),
        ([f"2022-01-01 {h:02d}:00,X," for h in range(9)], r"no numeric column among when, region, gCO2"),
        (["a,b,3"], r"no time column \(ISO 8601\)"),
        ([], r"no time column"),
        (["2022-01-01 00:00,X,1", "2032-01-01 00:00,X,2"], r"not an hourly series"),
        ([line for h in range(0, 48, 2) for line in hourly(range(h, h + 1))], r"no 8 hours in a row without a gap"),
    ],
)
def test_a_bad_series_gets_one_clear_error(tmp_path: Path, lines: list[str], message: str) -> None:
    path = write_series(tmp_path / "s.csv", lines)
    with pytest.raises(TaskError, match=message):
        store.generate(str(path), 4, 0)


@pytest.mark.parametrize(("name", "missing"), [("CISO", 3), ("NYIS", 0)])
def test_the_real_series_are_read_and_their_gaps_found(shared: Path, name: str, missing: int) -> None:
    path = shared / "data" / "carbon" / f"{name}_2022_hourly.csv"
    series = store.read_series(path)
    assert len(series.values) == 8760
    assert [length for _, length in series.gaps()] == [1] * missing
    assert len(series.window_starts()) == 8753 - 8 * missing
    records = store.decision_table(series, 8192, 0)
    assert len({record["prompt"] for record in records}) == 8192


def test_the_command_writes_a_table_in_the_tasks_input_format(tmp_path: Path) -> None:
    series = write_series(tmp_path / "s.csv", hourly(range(240)))
    out = tmp_path / "new" / "table.csv"
    store.main(["--series", str(series), "--rows", "30", "--seed", "1", "--out", str(out)])
    with out.open(newline="") as file:
        records = list(csv.DictReader(file))
    assert len(records) == 30
    assert {"id", "prompt", "phase", "q_action_0", "q_action_3"} <= set(records[0])
    assert [path.name for path in out.parent.iterdir()] == ["table.csv"]
