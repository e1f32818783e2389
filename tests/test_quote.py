"""The quote: what it says of runs that are over, how sure it is of itself, and what it makes of damaged traces."""

from __future__ import annotations

import importlib.util
import json
import statistics
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lib import PROJECT_ROOT
from lib.cost import CostError, Prices, Resources, load_prices
from lib.quote import COLD_START, Trace, make_quote, read_trace

HERE = Resources(where="here")
H100 = Resources(gpu="H100", cpu=4, memory_gb=16, where="modal")
H200 = Resources(gpu="H200", cpu=4, memory_gb=16, where="modal")
STEADY = tuple(20 + (i * 7 % 5 - 2) * 0.2 for i in range(40))


@pytest.fixture(scope="module")
def prices() -> Prices:
    return load_prices()


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    """benchmarks/quote.py, whose replays the bounds below are held on."""
    spec = importlib.util.spec_from_file_location("bench_quote", PROJECT_ROOT / "benchmarks" / "quote.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def trace(steps: tuple[float, ...] = STEADY, **changes: Any) -> Trace:
    return Trace(source="r", steps=steps, **{"cold": (60.0,), "gpu": "H100", "where": "modal", **changes})


def write_run(
    folder: Path, records: list[dict[str, Any]], attempt: dict[str, Any] | None = None, save_steps: int = 0
) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.json").write_text(json.dumps({"training": {"save_steps": save_steps or None}}))
    if attempt is not None:
        (folder / "cost").mkdir()
        values = {"attempt": "a", "where": "modal", "gpu": "H100", "cpu": 4, "memory_gb": 16, "rates": {}, **attempt}
        (folder / "cost" / "a.json").write_text(json.dumps(values))
    return folder


def records(walls: list[float], first: int = 1) -> list[dict[str, Any]]:
    return [{"step": first + i, "time": sum(walls[: i + 1]), "step_time": wall - 0.1} for i, wall in enumerate(walls)]


# -- how good it is ---------------------------------------------------------------------------------------------------


def test_quotes_of_synthetic_runs_are_near_and_their_intervals_hold(bench: ModuleType) -> None:
    for k, limit in ((5, 0.15), (20, 0.12)):
        results = [
            bench.compare(bench.synthetic_replay(kind, 80, seed), k) for kind in bench.KINDS for seed in range(8)
        ]
        assert statistics.median(error for error, _, _ in results) <= limit
        assert statistics.fmean(held for _, held, _ in results) >= 0.85


@pytest.mark.parametrize("k", [5, 10, 20])
def test_quotes_of_steady_runs_are_within_a_fifth(bench: ModuleType, k: int) -> None:
    results = [bench.compare(bench.synthetic_replay("steady", 80, seed), k) for seed in range(10)]
    assert max(error for error, _, _ in results) <= 0.20 and all(held for _, held, _ in results)


def test_quotes_of_real_runs_are_within_a_fifth(bench: ModuleType) -> None:
    sudden = {trace["name"]: trace["sudden"] for trace in json.loads(bench.REAL.read_text())["traces"]}
    replays = [replay for replay in bench.real_replays() if not sudden[replay.name]]
    for replay in replays:
        error, held, _ = bench.compare(replay, 20)
        assert error <= 0.20 and held, replay.name
    assert len(replays) >= 3 and statistics.fmean(bench.compare(replay, 5)[0] for replay in replays) <= 0.30


def test_a_probe_gives_a_wider_interval_than_a_long_run(prices: Prices) -> None:
    widths = []
    for k in (1, 2, 4, 10, 40):
        quote = make_quote(trace(STEADY[:k]), 80, [H100], prices)
        widths.append(quote.usd_high - quote.usd_low)
        assert quote.usd_low < quote.usd < quote.usd_high
    assert widths == sorted(widths, reverse=True) and widths[0] > 3 * widths[-1]


def test_a_trend_is_carried_on_in_part(prices: Prices) -> None:
    growing = tuple(20 * 1.01**i for i in range(40))
    flat = make_quote(trace(), 80, [H100], prices)
    grown = make_quote(trace(growing), 80, [H100], prices)
    carried_on = sum(20 * 1.01**i for i in range(80)) / 3600
    assert sum(growing) / 40 * 80 / 3600 < grown.hours < carried_on * 1.05
    assert flat.hours == pytest.approx((80 * 20 + 60) / 3600, rel=0.02)
    falling = make_quote(trace(growing[::-1]), 80, [H100], prices)
    assert falling.hours < sum(growing) / 40 * 80 / 3600


def test_a_quote_is_the_same_every_time(prices: Prices) -> None:
    assert make_quote(trace(), 80, [H100], prices, 2.0) == make_quote(trace(), 80, [H100], prices, 2.0)


# -- what it adds up --------------------------------------------------------------------------------------------------


def test_the_lines_add_up_to_the_total(prices: Prices) -> None:
    usage = {"judge": 0.01, "sandboxes": 0.002}
    quote = make_quote(trace(usage=usage), 100, [H100], prices, interruptions_per_day=3, idle_seconds=300)
    assert list(quote.lines) == ["cold start", "gpu", "cpu", "idle", "judge", "sandboxes"]
    assert quote.usd == pytest.approx(sum(line.usd for line in quote.lines.values()))
    assert all(line.low <= line.usd <= line.high for line in quote.lines.values())
    assert quote.lines["judge"].usd == pytest.approx(1.0) and quote.lines["judge"].hours == 0
    rate = prices.gpu["H100"] + 4 * prices.cpu + 16 * prices.memory
    assert quote.lines["idle"].usd == pytest.approx(rate * 300 / 3600)
    assert quote.lines["gpu"].usd == pytest.approx(quote.lines["gpu"].hours * prices.gpu["H100"])
    assert json.loads(json.dumps(quote.as_json(), allow_nan=False))["steps"] == 100


def test_checkpoints_start_up_and_the_tail_are_counted(prices: Prices) -> None:
    bare = make_quote(trace(), 100, [H100], prices)
    full = trace(checkpoints=(30.0,), save_steps=10, startup=(50.0,), tail=25.0)
    seconds = (make_quote(full, 100, [H100], prices).hours - bare.hours) * 3600
    assert seconds == pytest.approx(9 * 30 + 50 + 25)


def test_interruptions_cost_a_start_and_the_steps_since_the_checkpoint(prices: Prices) -> None:
    long = trace(save_steps=10, checkpoints=(0.0,), startup=(40.0,))
    calm = make_quote(long, 4320, [H100], prices)  # a day of steps
    rough = make_quote(long, 4320, [H100], prices, interruptions_per_day=24)
    assert (rough.hours - calm.hours) * 3600 == pytest.approx(24 * (60 + 40 + 5 * 20), rel=0.05)
    assert rough.hours_high - rough.hours_low > calm.hours_high - calm.hours_low
    assert any("24 interruption(s) a day" in note for note in rough.notes)


def test_the_first_choice_is_the_estimate_and_the_interval_spans_all(prices: Prices) -> None:
    first, second, both = (make_quote(trace(), 80, choice, prices) for choice in ([H100], [H200], [H100, H200]))
    assert both.usd == first.usd and both.hours == first.hours
    assert (both.usd_low, both.usd_high) == (first.usd_low, second.usd_high)


def test_the_own_machine_costs_hours_and_nothing_else(prices: Prices) -> None:
    quote = make_quote(trace(gpu=None, where="here", cold=()), 80, [HERE], prices)
    assert quote.usd == quote.usd_high == 0 and quote.hours > 0 and list(quote.lines) == ["here"]


# -- what it says -----------------------------------------------------------------------------------------------------


def test_the_notes_say_what_was_measured_and_what_was_not(prices: Prices) -> None:
    quote = make_quote(trace(STEADY[:3], cold=(), save_steps=10), 80, [H200], prices)
    text = "\n".join(quote.notes)
    assert "measured from r: 3 step(s) after start-up" in text and "few steps were measured" in text
    assert "measured on H100, quoted for H200: the seconds are not scaled" in text
    assert f"no cold start was metered: {COLD_START[0]:.0f} s are assumed" in text
    assert "no checkpoint was seen" in text and f"prices of {prices.date} from configs/prices.yaml" in text
    assert "drift" in "\n".join(make_quote(trace(), 1000, [H100], prices).notes)


def test_answers_that_may_still_grow_are_told(tmp_path: Path, prices: Prices) -> None:
    rows = [{**row, "completions/mean_length": 40.0} for row in records([10.0] * 5)]
    folder = write_run(tmp_path / "r", rows)
    for limit, told in ((400, True), (64, False)):
        (folder / "config.json").write_text(json.dumps({"sampling": {"completion_limit": limit}}))
        notes = make_quote(read_trace(folder), 80, [H100], prices).notes
        assert any("answers had 40 of the 400 tokens allowed" in note for note in notes) == told


def test_a_quote_from_the_same_gpu_does_not_speak_of_scaling(prices: Prices) -> None:
    assert not any("scaled" in note for note in make_quote(trace(), 80, [H100], prices).notes)


def test_old_prices_are_told(prices: Prices) -> None:
    import datetime

    old = prices.model_copy(update={"date": datetime.date.today() - datetime.timedelta(days=400)})
    new = prices.model_copy(update={"date": datetime.date.today() - datetime.timedelta(days=100)})
    assert any("the prices are 400 days old: check them" in note for note in make_quote(trace(), 8, [H100], old).notes)
    assert not any("days old" in note for note in make_quote(trace(), 8, [H100], new).notes)


def test_what_cannot_be_quoted_is_refused_with_what_to_do(tmp_path: Path, prices: Prices) -> None:
    with pytest.raises(CostError, match=r"r has measured no step.*`--probe`, or name an earlier run"):
        make_quote(trace(()), 10, [H100], prices)
    with pytest.raises(CostError, match="measured no step"):
        make_quote(read_trace(tmp_path / "nowhere"), 10, [H100], prices)
    for steps in (0, -1):
        with pytest.raises(CostError, match="at least 1 step"):
            make_quote(trace(), steps, [H100], prices)
    with pytest.raises(CostError, match="at least one choice"):
        make_quote(trace(), 10, [], prices)
    for bad in (-1.0, float("nan")):
        with pytest.raises(CostError, match="interruptions_per_day must be"):
            make_quote(trace(), 10, [H100], prices, interruptions_per_day=bad)
        with pytest.raises(CostError, match="idle_seconds must be"):
            make_quote(trace(), 10, [H100], prices, idle_seconds=bad)


# -- reading a trace --------------------------------------------------------------------------------------------------


def test_a_trace_keeps_start_up_checkpoints_and_steps_apart(tmp_path: Path) -> None:
    walls = [50.0, *[10.0] * 9]
    rows = records(walls)
    rows[5]["time"] += 7  # the checkpoint after step 5 shows between steps 5 and 6
    for row in rows[6:]:
        row["time"] += 7
    end = rows[-1]["time"]
    folder = write_run(tmp_path / "r", rows, {"started": 100, "ready": 160, "seen": 160 + end + 12}, save_steps=5)
    (folder / "cost" / "usage.jsonl").write_text('{"role": "judge", "usd": 2.0}\n')
    found = read_trace(folder)
    assert found.steps == pytest.approx((10.0,) * 9) and found.startup == pytest.approx((40.0,))
    assert found.checkpoints == pytest.approx((7.0,)) and found.save_steps == 5
    assert found.cold == (60.0,) and found.tail == pytest.approx(12) and found.usage == {"judge": 0.2}
    assert (found.gpu, found.where) == ("H100", "modal")


def test_checkpoints_are_found_without_step_times_too(tmp_path: Path) -> None:
    rows = records([50.0, 10, 10, 10, 10, 17, 10, 10, 10, 10])
    for row in rows:
        del row["step_time"]
    found = read_trace(write_run(tmp_path / "r", rows, save_steps=5))
    assert found.steps == pytest.approx((10.0,) * 9) and found.checkpoints == pytest.approx((7.0,))


def test_a_resumed_run_has_a_start_up_for_each_process(tmp_path: Path) -> None:
    rows = [*records([30.0, 10, 10, 10]), *records([40.0, 10, 10, 10], first=5)]
    found = read_trace(write_run(tmp_path / "r", rows))
    assert found.startup == pytest.approx((20.0, 30.0)) and found.steps == pytest.approx((10.0,) * 6)


def test_a_resume_is_seen_where_the_time_does_not_fall(tmp_path: Path) -> None:
    rows = [*records([5.0]), *records([12.0, 10, 10], first=2)]
    rows[1]["step_time"] = 11.0
    assert len(read_trace(write_run(tmp_path / "r", rows)).startup) == 2


def test_slow_steps_at_the_beginning_are_start_up(tmp_path: Path) -> None:
    found = read_trace(write_run(tmp_path / "r", records([50.0, 40, 30, *[10.0] * 9])))
    assert found.startup == pytest.approx((90.0,)) and found.steps == pytest.approx((10.0,) * 9)


def test_damaged_records_lose_only_themselves(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "r", records([30.0, 10, 10, 10]))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('not json\n[]\n{"step": 5}\n{"step": 5, "time": "x"}\n{"step": 5, "time": NaN}\n{"step": 5, "ti')
    (folder / "config.json").write_text("{")
    found = read_trace(folder)
    assert found.steps == pytest.approx((10.0,) * 3) and found.save_steps is None


def test_a_trace_of_one_step_can_be_quoted_widely(tmp_path: Path, prices: Prices) -> None:
    found = read_trace(write_run(tmp_path / "r", records([30.0])))
    assert found.steps == pytest.approx((29.9,))
    quote = make_quote(found, 50, [H100], prices)
    assert quote.usd_high > 2 * quote.usd_low
