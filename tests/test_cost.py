"""The bill: prices that can be edited, a meter that survives kills, a budget that ends a run within one step."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from lib import PROJECT_ROOT, WorkbenchError
from lib.cost import (
    PRICES,
    Budget,
    CostError,
    Prices,
    Resources,
    beat,
    begin_attempt,
    load_prices,
    rates,
    read_bill,
    record_usage,
    token_price,
)
from lib.gpu import MOST, GpuError

HERE = Resources(where="here")
H100 = Resources(gpu="H100:2", cpu=4, memory_gb=16, where="modal")
FLAT = {"gpu": {"H100": 3.0}, "cpu": 0.1, "memory": 0.01, "sandbox_cpu": 0.3, "sandbox_memory": 0.03, "here": 0.0}
RATE = 2 * 3.0 + 4 * 0.1 + 16 * 0.01
"""USD per hour of H100 at the prices FLAT."""


def write_prices(folder: Path, **changes: Any) -> Path:
    tokens = {"judge-1": {"input": 1.0, "output": 4.0}}
    values = {"date": "2026-07-01", "source": "a test", **FLAT, "tokens": tokens, **changes}
    path = folder / "prices.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return path


@pytest.fixture
def prices(tmp_path: Path) -> Prices:
    return load_prices(write_prices(tmp_path))


def put_attempt(folder: Path, name: str, started: float, seen: float, ready: float | None, **changes: Any) -> None:
    """The file of an attempt as another container left it."""
    values = {**H100.model_dump(), "rates": {"gpu": 6.0, "cpu": 0.56}, "started": started, "seen": seen, "ready": ready}
    (folder / "cost").mkdir(parents=True, exist_ok=True)
    (folder / "cost" / f"{name}.json").write_text(json.dumps({"attempt": name, **values, **changes}))


# -- prices -----------------------------------------------------------------------------------------------------------


def test_the_committed_prices_know_every_gpu_that_can_be_asked_for() -> None:
    prices = load_prices()
    assert set(prices.gpu) == set(MOST) and all(price > 0 for price in prices.gpu.values())
    assert prices.gpu["A100"] == prices.gpu["A100-40GB"]
    assert prices.here == 0 and prices.sandbox_cpu > prices.cpu > prices.memory > 0
    assert prices.gpu["H100"] == pytest.approx(0.001097 * 3600)
    for name in MOST:
        assert rates(Resources(gpu=name, where="modal"), prices)["gpu"] == prices.gpu[name]


def test_an_edited_price_is_used(tmp_path: Path, prices: Prices) -> None:
    dear = load_prices(write_prices(tmp_path, gpu={"H100": 5}))
    assert rates(H100, prices)["gpu"] == 6 and rates(H100, dear)["gpu"] == 10


def test_rates_are_of_the_gpus_and_of_cores_with_memory(prices: Prices) -> None:
    assert rates(H100, prices) == {"gpu": 6.0, "cpu": pytest.approx(0.56)}
    assert rates(Resources(cpu=1, where="modal"), prices) == {"cpu": 0.1}
    assert rates(Resources(gpu="none", cpu=1, where="modal"), prices) == {"cpu": 0.1}
    assert rates(Resources(gpu="H100", where="here"), prices) == {"here": 0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cpu": -0.1}, r"cpu: .*greater than or equal to 0 \(given: -0\.1\)"),
        ({"gpu": {"H100": -1}}, r"gpu\.H100: .*\(given: -1\)"),
        ({"memory": math.nan}, r"memory: .*finite.*\(given: nan\)"),
        ({"here": math.inf}, r"here: .*finite.*\(given: inf\)"),
        ({"gpu": {"H100": "3,95"}}, r"gpu\.H100: .*valid number \(given: '3,95'\)"),
        ({"gpu": {"H100": True}}, r"gpu\.H100: .*\(given: True\)"),
        ({"gpu": {"H10O": 4}}, r"unknown GPU 'H10O'\. Did you mean 'H100'\?"),
        ({"sandbox_gpu": 1}, r"sandbox_gpu: unknown key\. Did you mean 'sandbox_cpu'\?"),
        ({"cpu": None}, r"cpu: Field required"),
        ({"tokens": {"m": {"input": 1}}}, r"tokens\.m\.output: Field required"),
        ({"date": "some day"}, r"date: .*\(given: 'some day'\)"),
    ],
)
def test_a_bad_price_file_is_refused_with_what_to_change(tmp_path: Path, changes: Any, message: str) -> None:
    path = write_prices(tmp_path, **changes)
    with pytest.raises(CostError, match=message) as caught:
        load_prices(path)
    assert str(path) in str(caught.value) and isinstance(caught.value, (WorkbenchError, ValueError))


@pytest.mark.parametrize("content", [b"gpu: [", b"", b"just words", b"\xff\xfe\x00", b"- 1\n"])
def test_a_file_that_holds_no_prices_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "prices.yaml"
    path.write_bytes(content)
    with pytest.raises(CostError, match=r"prices\.yaml cannot be (read|used)"):
        load_prices(path)


def test_a_missing_price_file_says_how_to_get_it_back(tmp_path: Path) -> None:
    with pytest.raises(CostError, match=r"none\.yaml is missing: restore it with `git checkout"):
        load_prices(tmp_path / "none.yaml")


def test_a_gpu_without_a_price_says_what_to_add_where(tmp_path: Path, prices: Prices) -> None:
    place = re.escape(str(tmp_path / "prices.yaml"))
    with pytest.raises(CostError, match=rf"no price for the GPU B200: add `B200: USD per hour` under `gpu` in {place}"):
        rates(Resources(gpu="B200:4", where="modal"), prices)
    with pytest.raises(GpuError, match="unknown GPU 'H1000'"):
        rates(Resources(gpu="H1000", where="modal"), prices)


def test_tokens_are_priced_per_million(prices: Prices) -> None:
    assert token_price(prices, "judge-1", 1_000_000, 500_000) == 3.0
    assert token_price(prices, "judge-1", 0, 0) == 0
    with pytest.raises(CostError, match=r"add `judge-2: .*under `tokens` in .*prices\.yaml\. Did you mean 'judge-1'\?"):
        token_price(prices, "judge-2", 1, 1)


def test_a_message_names_the_committed_file_from_the_project_root() -> None:
    with pytest.raises(CostError, match=r"under `tokens` in configs/prices\.yaml"):
        token_price(load_prices(), "nobody's", 1, 1)
    assert PRICES == PROJECT_ROOT / "configs" / "prices.yaml"


# -- the meter --------------------------------------------------------------------------------------------------------


def test_a_run_that_metered_nothing_has_an_empty_bill(tmp_path: Path) -> None:
    bill = read_bill(tmp_path)
    assert (bill.usd, bill.hours, bill.attempts, bill.lines) == (0, 0, 0, {})


def test_rates_of_roles_that_run_beside_each_other_add_up(prices: Prices) -> None:
    alone = rates(H100, prices)
    orchestrator = Resources(cpu=2, memory_gb=8, where="modal", beside=(H100, H100))
    together = rates(orchestrator, prices)
    assert together["gpu"] == pytest.approx(2 * alone["gpu"])
    assert together["cpu"] == pytest.approx(2 * alone["cpu"] + 2 * 0.1 + 8 * 0.01)


def test_the_bill_splits_an_attempt_into_cold_start_gpu_and_cpu(tmp_path: Path) -> None:
    put_attempt(tmp_path, "a", 1000, 1000 + 3600, ready=1000 + 900)
    bill = read_bill(tmp_path)
    assert {role: (line.hours, line.usd) for role, line in bill.lines.items()} == {
        "cold start": (0.25, pytest.approx(0.25 * 6.56)),
        "gpu": (0.75, pytest.approx(4.5)),
        "cpu": (0.75, pytest.approx(0.42)),
    }
    assert bill.usd == pytest.approx(6.56) and bill.hours == 1 and bill.attempts == 1
    assert json.loads(json.dumps(bill.as_json(), allow_nan=False))["lines"]["gpu"] == {"hours": 0.75, "usd": 4.5}


def test_an_attempt_is_metered_from_its_beginning_to_its_last_beat(tmp_path: Path, prices: Prices) -> None:
    begun = begin_attempt(tmp_path, "a", H100, prices)
    assert begun.rates == rates(H100, prices) and begun.ready is None
    beat(tmp_path, "a", now=begun.started + 100)
    beat(tmp_path, "a", ready=True, now=begun.started + 200)
    beat(tmp_path, "a", ready=True, now=begun.started + 3600)
    bill = read_bill(tmp_path)
    assert bill.hours == pytest.approx(1) and bill.usd == pytest.approx(RATE)
    assert bill.lines["cold start"].hours == pytest.approx(200 / 3600)
    assert [path.name for path in (tmp_path / "cost").iterdir()] == ["a.json"]


def test_an_attempt_killed_before_it_was_ready_is_all_cold_start(tmp_path: Path) -> None:
    put_attempt(tmp_path, "a", 1000, 1360, ready=None)
    assert list(read_bill(tmp_path).lines) == ["cold start"]
    assert read_bill(tmp_path).hours == pytest.approx(0.1)


def test_a_process_killed_while_it_beats_is_billed_up_to_its_last_beat(tmp_path: Path, prices: Prices) -> None:
    begun = begin_attempt(tmp_path, "a", H100, prices)
    code = (
        "import itertools, sys; from lib.cost import beat\n"
        "for i in itertools.count(1): print(i, beat(sys.argv[1], 'a', True, float(sys.argv[2]) + i), flush=True)"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(begun.started)]
    with subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = [int(line.split()[0]) for line in itertools.islice(process.stdout, 100)][-1]
        process.kill()
        more = [line for line in process.stdout if line.endswith("\n")]
    seen = last + len(more)
    assert seen <= read_bill(tmp_path).hours * 3600 + 0.001 <= seen + 1.002 and not read_bill(tmp_path).damaged


def test_attempts_that_overlap_are_both_paid(tmp_path: Path) -> None:
    put_attempt(tmp_path, "a", 1000, 4600, ready=1000)
    put_attempt(tmp_path, "b", 2000, 5600, ready=2000)
    bill = read_bill(tmp_path)
    assert bill.attempts == 2 and bill.hours == 2 and bill.usd == pytest.approx(2 * 6.56)


def test_with_a_time_a_running_attempt_counts_up_to_it_and_a_dead_one_does_not(tmp_path: Path) -> None:
    put_attempt(tmp_path, "dead", 0, 3600, ready=0)
    put_attempt(tmp_path, "alive", 7000, 9970, ready=7000)
    assert read_bill(tmp_path, now=10_000).hours == pytest.approx((3600 + 3000) / 3600)
    assert read_bill(tmp_path).hours == pytest.approx((3600 + 2970) / 3600)
    assert read_bill(tmp_path, now=0).hours == pytest.approx((3600 + 2970) / 3600)  # a reader whose clock is behind


def test_a_clock_that_is_set_back_never_makes_a_bill_negative(tmp_path: Path, prices: Prices) -> None:
    put_attempt(tmp_path, "skewed", 5000, 4000, ready=3000)
    assert read_bill(tmp_path).usd == 0
    begun = begin_attempt(tmp_path, "b", H100, prices)
    beat(tmp_path, "b", now=begun.started + 50)
    assert beat(tmp_path, "b", ready=True, now=begun.started - 999).seen == begun.started + 50
    bill = read_bill(tmp_path)
    assert bill.usd == pytest.approx(RATE * 50 / 3600) and "cold start" not in bill.lines


def test_a_later_edit_of_the_prices_does_not_change_what_was_billed(tmp_path: Path, prices: Prices) -> None:
    begun = begin_attempt(tmp_path, "a", H100, prices)
    write_prices(tmp_path, gpu={"H100": 100.0})
    beat(tmp_path, "a", ready=True, now=begun.started + 3600)
    assert read_bill(tmp_path).usd == pytest.approx(RATE)


def test_an_attempt_here_is_billed_at_the_price_of_the_machine(tmp_path: Path) -> None:
    prices = load_prices(write_prices(tmp_path, here=0.5))
    begun = begin_attempt(tmp_path, "a", HERE, prices)
    beat(tmp_path, "a", ready=True, now=begun.started)
    beat(tmp_path, "a", now=begun.started + 7200)
    assert read_bill(tmp_path).lines["here"].model_dump() == {"hours": pytest.approx(2), "usd": pytest.approx(1)}


def test_a_name_is_begun_once_and_beats_only_after_that(tmp_path: Path, prices: Prices) -> None:
    begin_attempt(tmp_path, "a", H100, prices)
    with pytest.raises(CostError, match="attempt 'a' has begun before"):
        begin_attempt(tmp_path, "a", H100, prices)
    with pytest.raises(CostError, match="attempt 'b' was not begun: call begin_attempt first"):
        beat(tmp_path, "b")
    for name in ("", "../x", ".hidden", "a/b"):
        with pytest.raises(CostError, match="not usable as a file name"):
            begin_attempt(tmp_path, name, H100, prices)


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"[]", b'{"attempt": "x"}', b"null"])
def test_a_damaged_attempt_loses_only_itself_and_is_named(tmp_path: Path, damage: bytes) -> None:
    put_attempt(tmp_path, "a", 0, 3600, ready=0)
    (tmp_path / "cost" / "b.json").write_bytes(damage)
    (tmp_path / "cost" / ".c.json.x1.tmp").write_bytes(b"half a wri")  # what a kill leaves of a write
    bill = read_bill(tmp_path)
    assert bill.usd == pytest.approx(6.56) and bill.damaged == ("b.json",)
    with pytest.raises(CostError, match=r"b\.json is damaged"):
        beat(tmp_path, "b")


@pytest.mark.parametrize("change", [{"rates": {"gpu": -1}}, {"started": "x"}, {"rates": {"gpu": 1e999}}])
def test_an_attempt_with_impossible_numbers_is_damaged(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "cost" / "a.json"
    put_attempt(tmp_path, "a", 0, 3600, ready=0)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert read_bill(tmp_path).damaged == ("a.json",)


def test_an_attempt_of_a_newer_version_still_counts(tmp_path: Path) -> None:
    put_attempt(tmp_path, "a", 0, 3600, ready=0, region="eu")
    assert read_bill(tmp_path).usd == pytest.approx(6.56)


def test_what_services_cost_is_in_the_bill(tmp_path: Path, prices: Prices) -> None:
    for _ in range(3):
        usd = token_price(prices, "judge-1", 1000, 100)
        record_usage(tmp_path, "judge", usd, model="judge-1", input_tokens=1000, output_tokens=100)
    record_usage(tmp_path, "sandboxes", 0.25, seconds=12)
    bill = read_bill(tmp_path)
    assert bill.lines["judge"].usd == pytest.approx(0.0042) and bill.lines["sandboxes"].usd == 0.25
    assert bill.usd == pytest.approx(0.2542) and bill.hours == 0


def test_bad_usage_is_refused_before_it_is_written(tmp_path: Path) -> None:
    for usd in (-1.0, math.nan, math.inf):
        with pytest.raises(CostError, match="usd must be a number of at least 0"):
            record_usage(tmp_path, "judge", usd)
    with pytest.raises(CostError, match="'sandbox' is not paid by use"):
        record_usage(tmp_path, "sandbox", 1.0)
    assert not (tmp_path / "cost").exists()


def test_a_cut_or_damaged_usage_line_loses_only_itself(tmp_path: Path) -> None:
    record_usage(tmp_path, "judge", 1.0)
    path = tmp_path / "cost" / "usage.jsonl"
    with path.open("ab") as file:
        file.write(b'garbage\n[1]\n{"role": "judge"}\n{"role": "judge", "usd": NaN}\n{"role": "judge", "us')
    assert read_bill(tmp_path).usd == 1 and read_bill(tmp_path).damaged == ("usage.jsonl: 4 line(s)",)
    record_usage(tmp_path, "judge", 2.0)  # does not grow into the cut line
    assert read_bill(tmp_path).usd == 3


def test_threads_that_record_at_once_lose_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: record_usage(tmp_path, "judge", 0.5, call=i), range(200)))
    assert read_bill(tmp_path).usd == 100 and read_bill(tmp_path).damaged == ()


def test_a_reader_never_sees_half_a_beat(tmp_path: Path, prices: Prices) -> None:
    begun = begin_attempt(tmp_path, "a", H100, prices)
    with ThreadPoolExecutor(1) as pool:
        beats = pool.submit(lambda: [beat(tmp_path, "a", now=begun.started + i) for i in range(200)])
        while not beats.done():
            assert read_bill(tmp_path).attempts == 1
        beats.result()


# -- the budget -------------------------------------------------------------------------------------------------------


def spend(budget: Budget, started: float, steps: list[float], save: float = 0.0, every: int = 20) -> tuple[float, int]:
    """Run steps of these seconds until the budget ends it; when its last checkpoint is made, and how many were run."""
    now = started
    for i, seconds in enumerate(steps, 1):
        now += seconds
        if budget.exhausted(seconds, now):
            return now + save, i
        now += save if i % every == 0 else 0.0
    return now, len(steps)


@pytest.mark.parametrize("seed", range(30))
def test_a_budget_is_overshot_by_less_than_one_step(tmp_path: Path, prices: Prices, seed: int) -> None:
    chance = random.Random(seed)
    save = chance.choice([0.0, 2.0, 25.0])
    begun = begin_attempt(tmp_path, "a", H100, prices)
    steps = [20 * math.exp(chance.gauss(0, 0.3)) * (5 if chance.random() < 0.05 else 1) for _ in range(2000)]
    limit = RATE / 3600 * chance.uniform(200, 8000)
    budget = Budget(tmp_path, "a", limit)
    end, run = spend(budget, begun.started, steps, save)
    over = (budget.spent(end) - limit) / (RATE / 3600)
    assert run < 2000 and over <= steps[run - 1]
    assert -over <= 2 * max(steps[:run]) + 2 * save  # nor does it end much too early


def test_a_budget_of_nothing_ends_a_paid_run_after_a_step_and_lets_a_free_one_go_on(
    tmp_path: Path, prices: Prices
) -> None:
    paid = begin_attempt(tmp_path / "paid", "a", H100, prices)
    assert Budget(tmp_path / "paid", "a", 0).exhausted(1.0, paid.started + 1)
    free = begin_attempt(tmp_path / "free", "a", HERE, prices)
    budget = Budget(tmp_path / "free", "a", 0)
    assert not any(budget.exhausted(1.0, free.started + i) for i in range(100))
    record_usage(tmp_path / "free", "judge", 0.01)
    assert budget.exhausted(1.0, free.started + 102)


def test_what_earlier_attempts_and_services_cost_is_part_of_the_budget(tmp_path: Path, prices: Prices) -> None:
    put_attempt(tmp_path, "killed", 0, 3600, ready=60)
    record_usage(tmp_path, "judge", 2.0)
    begun = begin_attempt(tmp_path, "b", H100, prices)
    budget = Budget(tmp_path, "b", 10.0)
    assert budget.spent(begun.started) == pytest.approx(8.56)
    assert budget.spent(begun.started + 360) == pytest.approx(8.56 + 0.656)
    assert budget.spent(begun.started - 360) == pytest.approx(8.56)
    assert not budget.exhausted(30, begun.started + 30)
    assert budget.exhausted(30, begun.started + 760)


def test_a_run_goes_on_after_its_budget_was_raised(tmp_path: Path, prices: Prices) -> None:
    first = begin_attempt(tmp_path, "1", H100, prices)
    end, run = spend(Budget(tmp_path, "1", 1.0), first.started, [10.0] * 1000)
    beat(tmp_path, "1", ready=True, now=end)
    assert run < 60 and read_bill(tmp_path).usd <= 1.0
    second = begin_attempt(tmp_path, "2", H100, prices)
    assert Budget(tmp_path, "2", 1.0).exhausted(10.0, second.started + 10)
    raised = Budget(tmp_path, "2", 2.0)
    end, run = spend(raised, second.started, [10.0] * 1000)
    assert 45 < run < 60 and 1.9 < raised.spent(end) <= 2.0


def test_a_checkpoint_that_was_seen_is_kept_in_reserve(tmp_path: Path, prices: Prices) -> None:
    begun = begin_attempt(tmp_path, "a", H100, prices)
    budget = Budget(tmp_path, "a", RATE)
    end, _ = spend(budget, begun.started, [10.0] * 1000, save=300, every=5)
    assert budget.spent(end) <= RATE


def test_judge_calls_that_cost_more_than_the_gpu_end_a_run_too(tmp_path: Path, prices: Prices) -> None:
    begun = begin_attempt(tmp_path, "a", HERE, prices)
    budget = Budget(tmp_path, "a", 1.0)
    for i in range(1, 1000):
        record_usage(tmp_path, "judge", 0.03)
        if budget.exhausted(5.0, begun.started + 5 * i):
            break
    assert 0.9 < read_bill(tmp_path).usd <= 1.03


def test_a_budget_looks_at_the_others_once_a_second(tmp_path: Path, prices: Prices) -> None:
    begun = begin_attempt(tmp_path, "a", H100, prices)
    budget = Budget(tmp_path, "a", 1000.0)
    assert budget.spent(begun.started) == 0
    put_attempt(tmp_path, "b", 0, 3600, ready=0)
    record_usage(tmp_path, "judge", 1.0)
    assert budget.spent(begun.started + 0.9) == pytest.approx(RATE * 0.9 / 3600)
    assert budget.spent(begun.started + 1.1) == pytest.approx(RATE * 1.1 / 3600 + 6.56 + 1.0)


def test_a_usage_file_that_was_replaced_is_counted_anew(tmp_path: Path, prices: Prices) -> None:
    begun = begin_attempt(tmp_path, "a", HERE, prices)
    budget = Budget(tmp_path, "a", 1000.0)
    for _ in range(5):
        record_usage(tmp_path, "judge", 1.0)
    assert budget.spent(begun.started) == 5
    (tmp_path / "cost" / "usage.jsonl").write_text('{"role": "judge", "usd": 0.5}\n')
    assert budget.spent(begun.started + 2) == 0.5


def test_a_budget_needs_a_limit_and_an_attempt(tmp_path: Path, prices: Prices) -> None:
    begin_attempt(tmp_path, "a", H100, prices)
    for limit in (-1.0, math.nan):
        with pytest.raises(CostError, match="a budget must be a number of USD of at least 0"):
            Budget(tmp_path, "a", limit)
    with pytest.raises(CostError, match="was not begun"):
        Budget(tmp_path, "b", 1.0)
