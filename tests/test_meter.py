"""The meter in a training process: what is billed, and how a budget ends a real training and lets it go on."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import SMOKE
from safetensors.numpy import load_file

from lib import PROJECT_ROOT
from lib.backends import Meter, Stop, TrainingFailed, TrainingStopped, train
from lib.config import load_config
from lib.cost import ATTEMPT, Resources, beat, begin_attempt, load_prices, read_attempts
from lib.prepare import prepare
from lib.runfolder import Run, open_run
from lib.task import load_task

STEPS = 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace whose price file says that this machine costs a dollar a second."""
    folder = tmp_path_factory.mktemp("meter")
    prices = (PROJECT_ROOT / "configs" / "prices.yaml").read_text()
    assert "here: 0.0" in prices
    (folder / "prices.yaml").write_text(prices.replace("here: 0.0", "here: 3600.0"))
    return folder


@pytest.fixture(autouse=True)
def own_meter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ATTEMPT, raising=False)


def opened(name: str, folder: Path, **overrides: Any) -> Run:
    paths = {"paths.outputs": str(folder / "outputs"), "paths.cache": str(folder / "cache")}
    price = {"cost.prices": str(folder / "prices.yaml")}
    settings = {"training.steps": STEPS, "training.save_steps": 6, "starter.steps": 5}
    return open_run(name, load_config(SMOKE, paths | price | settings | overrides))


def trained(name: str, folder: Path, budget: float | None = None) -> Run:
    run = opened(name, folder, **{"cost.budget_usd": budget})
    task = load_task(run.config.task.name, **run.config.task.params)
    prepare(task, run)
    train(run.config, task, run.read_rows("train"), run)
    return run


class Stopped:
    """A training that had money for nothing but the way to its first step: its folder, and what it said."""

    def __init__(self, folder: Path) -> None:
        with pytest.raises(TrainingStopped) as caught:
            trained("broken", folder, 0.01)
        self.said = str(caught.value)
        self.run = opened("broken", folder)
        result = self.run.folder / "result.json"
        self.result = json.loads(result.read_text()) if result.is_file() else {}


@pytest.fixture(scope="module")
def stopped(folder: Path) -> Stopped:
    return Stopped(folder)


def records(run: Run, log: str) -> list[dict[str, Any]]:
    lines = (run.folder / log).read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "time" not in k} for line in lines]


# -- a real training --------------------------------------------------------------------------------------------------


def test_a_budget_stops_a_training_after_a_step_and_a_checkpoint(stopped: Stopped) -> None:
    assert re.match(r"the budget is used up: \$.* of cost\.budget_usd 0\.01\. Raise it", stopped.said)
    assert "it goes on from step 1" in stopped.said
    assert [path.name for path in stopped.run.checkpoints()] == ["step-1"] and len(stopped.run.metrics()) == 1


def test_the_bill_of_a_training_that_its_budget_stopped_is_in_its_result(stopped: Stopped) -> None:
    assert stopped.result["cost"]["usd"] > 0.01


def test_without_money_there_is_no_step_and_with_more_a_training_goes_on_bit_identical(
    stopped: Stopped, folder: Path
) -> None:
    run = stopped.run
    with pytest.raises(TrainingFailed, match=r"the budget is used up(.|\n)*goes on from step 1"):
        trained("broken", folder, 0.01)
    assert len(run.metrics()) == 1

    # Money for loading again and about four seconds of steps.
    load = read_attempts(run.folder)[0][0].cold_seconds()  # in dollars as well
    limit = run.bill().usd + load + 3.0
    with suppress(TrainingStopped):
        trained("broken", folder, limit)
    seconds = [record["step_time"] for record in run.metrics()]
    spent = run.bill().usd
    assert spent <= limit + max(seconds)
    if len(seconds) < STEPS:
        assert run.checkpoints()[-1].name == f"step-{len(seconds)}"
        assert limit - spent <= 4 * max(seconds) + 1.0, (
            f"${limit - spent:.2f} were left for steps of ${max(seconds):.2f}"
        )

    whole, after = trained("whole", folder), trained("broken", folder, 1000.0)
    a, b = (load_file(r.folder / "adapter" / "adapter_model.safetensors") for r in (whole, after))
    assert a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
    for log in ("metrics.jsonl", "rollouts.jsonl"):
        assert records(whole, log) == records(after, log)


# -- the meter --------------------------------------------------------------------------------------------------------


def test_a_meter_begins_an_attempt_of_its_own_and_ends_it(folder: Path) -> None:
    run = opened("own", folder)
    meter = Meter(run)
    begun = read_attempts(run.folder)[0][0]
    assert (begun.attempt, begun.where, begun.rates, begun.ready) == (meter.attempt, "here", {"here": 3600.0}, None)
    meter.step(0.05)
    time.sleep(0.05)
    meter.end()
    ended = read_attempts(run.folder)[0][0]
    assert ended.ready is not None and ended.seen > ended.ready and run.bill().usd == pytest.approx(ended.usd())


def test_two_trainings_of_a_run_have_two_attempts(folder: Path) -> None:
    run = opened("two", folder)
    assert Meter(run).attempt != "" and len(read_attempts(run.folder)[0]) == 1
    time.sleep(1.1)  # another process would have another id
    Meter(run)
    assert len(read_attempts(run.folder)[0]) == 2


def test_in_a_container_the_container_keeps_the_meter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = opened("container", folder, **{"cost.budget_usd": 5.0})
    begin_attempt(run.folder, "ta-1", Resources(gpu="T4", cpu=1, memory_gb=1, where="modal"), load_prices())
    before = (run.folder / "cost" / "ta-1.json").read_bytes()
    monkeypatch.setenv(ATTEMPT, "ta-1")
    meter = Meter(run)
    assert not meter.step(0.05) and not meter.is_used_up()
    meter.end()
    assert [attempt.attempt for attempt in read_attempts(run.folder)[0]] == ["ta-1"]
    assert (run.folder / "cost" / "ta-1.json").read_bytes() == before


def test_without_a_budget_no_step_is_the_last(folder: Path) -> None:
    meter = Meter(opened("free", folder))
    assert not meter.is_used_up() and not any(meter.step(0.05) for _ in range(50))


def test_a_budget_that_earlier_attempts_have_used_up_pays_no_first_step(folder: Path) -> None:
    run = opened("used-up", folder, **{"cost.budget_usd": 10.0})
    early = begin_attempt(run.folder, "early", Resources(where="here"), load_prices(folder / "prices.yaml"))
    beat(run.folder, "early", now=early.started + 10)
    assert Meter(run).is_used_up()


@pytest.mark.parametrize("name", ["ada's laptop", "rechner-ä.local", "_gateway", f"{'long-name.' * 20}org"])
def test_a_machine_may_have_any_name(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODAL_TASK_ID", name)
    Meter(opened("named", folder))


# -- the question after every step ------------------------------------------------------------------------------------


@pytest.fixture
def signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


class Money:
    """A meter that pays so many steps."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def step(self, seconds: float) -> bool:
        self.steps -= 1
        return self.steps <= 0


def stop_with(steps: int) -> Stop:
    return Stop(Money(steps))  # type: ignore[arg-type]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_for_the_end_and_raises_nothing(signals: None, number: signal.Signals) -> None:
    stop = stop_with(1000)
    assert not stop.requested(0.05)
    os.kill(os.getpid(), number)
    assert stop.requested(0.05) and stop.requested(0.05) and not stop.out_of_money


def test_money_that_runs_out_asks_for_the_end_and_says_why(signals: None) -> None:
    stop = stop_with(3)
    assert [stop.requested(0.05) for _ in range(4)] == [False, False, True, True]
    assert stop.out_of_money


def test_a_question_after_a_signal_still_meters_the_step(signals: None) -> None:
    money = Money(10)
    stop = Stop(money)  # type: ignore[arg-type]
    os.kill(os.getpid(), signal.SIGTERM)
    stop.requested(0.05)
    assert money.steps == 9
