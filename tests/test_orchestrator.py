"""The orchestrator against simulated roles: order, stealing, staleness, proofs, faults, kills. No model."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from simulated_roles import (
    CANARIES,
    USUAL,
    Draw,
    Killed,
    SimulatedHosts,
    SimulatedTask,
    StopAfter,
    Timing,
    Witness,
    lognormal,
    make_config,
    no_faults,
    random_faults,
    run_virtually,
    scripted_faults,
    training,
)

from lib import PROJECT_ROOT, WorkbenchError
from lib.backends import distributed
from lib.config import Config, ConfigError
from lib.orchestrator import DataOrder, FleetError, OrchestratorError, Plan
from lib.orchestrator.actor import ActorDesk
from lib.orchestrator.draft import Draft, Played
from lib.orchestrator.events import Busy, Events
from lib.orchestrator.order import permutations
from lib.roles import ActorError
from lib.rollout import Scored, UnscoredLimitError
from lib.runfolder import Run, RunError, read_lines
from lib.task import Rollout, Score

ROWS, STEPS = 22, 6


class Outcome(NamedTuple):
    folder: Path
    witness: Witness
    hosts: SimulatedHosts
    product: dict[str, Any] | None
    error: BaseException | None

    def events(self, kind: str, role: str = "") -> list[dict[str, Any]]:
        found = read_lines(self.folder / "events.jsonl")
        return [event for event in found if event["kind"] == kind and role in ("", event["role"])]

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return list(read_lines(self.folder / "metrics.jsonl"))

    @property
    def rollouts(self) -> list[dict[str, Any]]:
        return list(read_lines(self.folder / "rollouts.jsonl"))


def attempt(
    folder: Path,
    config: Config | None = None,
    draw: Draw = no_faults,
    timing: Timing = USUAL,
    task: SimulatedTask | None = None,
    steps: int = STEPS,
    stop: StopAfter | None = None,
    witness: Witness | None = None,
    kill_at: float | None = None,
    actor_dies_at: int | None = None,
) -> Outcome:
    """One attempt of a run in virtual time; what ended it is in the outcome."""
    config = config or make_config()
    witness = witness or Witness(Plan.of(config).staleness)
    run = Run(folder, config)
    hosts = SimulatedHosts(run, witness, steps, timing, draw, actor_dies_at)
    work = training(folder, config, hosts, task or SimulatedTask(), ROWS, stop)
    error: BaseException | None = None
    try:
        run_virtually(work, kill_at)
    except (WorkbenchError, Killed) as raised:
        error = raised
    final = folder / "adapter" / "state.json"
    product = json.loads(final.read_text()) if final.is_file() else None
    return Outcome(folder, witness, hosts, product, error)


def check_finished(done: Outcome, config: Config, steps: int = STEPS) -> None:
    """Trained to the end on every rollout once, in the data's order, on proven and fresh turns only, and logged."""
    assert done.error is None and done.product is not None and done.product["step"] == steps
    check_honest(done)
    plan = Plan.of(config)
    order = DataOrder(range(ROWS), plan.prompts, config.training.seed)
    batches = plan.batches_left(steps)
    expected = [[row for row in order.batch(index) for _ in range(plan.group)] for index in range(batches)]
    shown = done.product["rows"]
    assert len(shown) == batches
    for ours, theirs in zip(expected, shown, strict=True):
        assert all(row in (None, wanted) for wanted, row in zip(ours, theirs, strict=True))
    assert [record["row"] for record in done.rollouts] == [f"r{row}" for batch in expected for row in batch]
    assert [record["step"] for record in done.metrics] == list(range(1, steps + 1))
    trained = [record["completion"] for record in done.rollouts if record["reward"] is not None]
    assert len(set(trained)) == len(trained)


def check_honest(done: Outcome) -> None:
    assert done.witness.violations == []
    if done.product:
        assert len(set(done.product["trained"])) == len(done.product["trained"])


# -- the order of the data ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32 + 7])
@pytest.mark.parametrize("count", [1, 2, 3, 100, 5000])
def test_permutations_are_those_of_torch(count: int, seed: int) -> None:
    import torch

    generator = torch.Generator()
    generator.manual_seed(seed)
    ours = permutations(count, seed)
    for _ in range(3):
        assert next(ours) == torch.randperm(count, generator=generator).tolist()


@pytest.mark.parametrize(("rows", "prompts"), [(10, 10), (10, 3), (97, 8)])
def test_the_order_is_that_of_trls_sampler(rows: int, prompts: int) -> None:
    from trl.trainer.utils import RepeatSampler

    sampler = RepeatSampler(range(rows), mini_repeat_count=4, batch_size=prompts, repeat_count=3, shuffle=True, seed=5)
    order = DataOrder(range(rows), prompts, seed=5)
    index = 0
    for _ in range(4):  # epochs
        drawn = list(sampler)
        for start in range(0, len(drawn), prompts * 4 * 3):
            assert drawn[start : start + prompts * 4 : 4] == order.batch(index)
            index += 1


def test_the_order_is_that_of_the_local_backend(chain: tuple[Path, str]) -> None:
    folder, _ = chain
    run = Run(folder, make_config())
    config = json.loads((folder / "config.json").read_text())
    ids = [row["id"] for row in run.read_rows("train")]
    group = config["training"]["group_size"]
    order = DataOrder(range(len(ids)), config["training"]["batch"] // group, config["training"]["seed"])
    found = [record["row"] for record in run.rollouts()][::group]
    assert found == [ids[row] for index in range(config["training"]["steps"]) for row in order.batch(index)]


def test_a_batch_is_a_pure_function_of_its_number() -> None:
    straight, crooked = DataOrder(range(11), 3, seed=2), DataOrder(range(11), 3, seed=2)
    batches = [straight.batch(index) for index in range(30)]
    for index in (29, 3, 17, 3, 0, 12):
        assert crooked.batch(index) == batches[index]
    assert {tuple(batch) for batch in batches[:3]} != {tuple(batch) for batch in batches[3:6]}  # epochs differ


def test_the_order_is_over_the_kept_rows_only() -> None:
    kept = [3, 5, 8, 13]
    assert sorted(DataOrder(kept, 4, seed=0).batch(7)) == kept
    with pytest.raises(ValueError, match="a batch of 5 prompts cannot be filled from 4 rows"):
        DataOrder(kept, 5, seed=0)


# -- a training without faults -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 1, 3])
@pytest.mark.parametrize("turns", [1, 3])
def test_every_rollout_is_trained_once_in_the_datas_order(tmp_path: Path, overlap: int, turns: int) -> None:
    config = make_config(distributed__overlap=overlap)
    done = attempt(tmp_path, config, task=SimulatedTask(max_turns=turns))
    check_finished(done, config)
    assert {record["stop"] for record in done.rollouts} == {"done"}
    assert done.product and len(done.product["trained"]) == turns * STEPS * 8 == len(done.witness.facts)


@pytest.mark.parametrize(
    ("overlap", "every", "expected"), [(0, 1, {0}), (1, 1, {0, 1}), (2, 1, {0, 1, 2}), (0, 3, {0, 1, 2})]
)
def test_staleness_is_what_overlap_and_the_sync_interval_imply(
    tmp_path: Path, overlap: int, every: int, expected: set[int]
) -> None:
    config = make_config(distributed__overlap=overlap, distributed__sync_weights_every=every)
    done = attempt(tmp_path, config)
    check_finished(done, config)
    assert set(done.witness.staleness) == expected
    assert {record["staleness"] for record in done.rollouts} == expected
    assert max(record["staleness/max"] for record in done.metrics) == max(expected) == Plan.of(config).staleness


def test_batches_that_feed_several_steps_are_stale_in_steps(tmp_path: Path) -> None:
    config = make_config(training__iterations=2, distributed__overlap=1)
    done = attempt(tmp_path, config)
    check_finished(done, config)
    assert set(done.witness.staleness) == {0, 2} and len(done.rollouts) == 8 * STEPS / 2


def test_a_bound_tighter_than_the_overlap_makes_batches_wait(tmp_path: Path) -> None:
    config = make_config(distributed__overlap=4, distributed__max_staleness=1)
    done = attempt(tmp_path, config)
    check_finished(done, config)
    assert max(done.witness.staleness) == 1
    assert not done.events("replayed")  # they waited, and were not thrown away


@pytest.mark.parametrize(
    ("settings", "anew", "oldest"),
    [
        ({"distributed__overlap": 1}, 8, 1),
        # Not due for a sync (every 5), and too old for the bound (3) all the same: synced, or nothing would go on.
        ({"distributed__overlap": 0, "distributed__sync_weights_every": 5, "training__iterations": 3}, 0, 3),
    ],
)
def test_a_batch_that_ends_up_too_old_is_generated_anew(
    tmp_path: Path, settings: dict[str, Any], anew: int, oldest: int
) -> None:
    config = make_config(**settings, training__save_steps=30)

    class Eager(SimulatedHosts):
        async def start_actor(self) -> Any:
            actor = await super().start_actor()
            one_step = actor.train_step

            async def several(batch: dict[str, Any]) -> Any:
                report = await one_step(batch)
                if actor.consumed == (2 if anew else 1):
                    actor.step += 2 if anew else 1  # nobody had planned these
                return report._replace(step=actor.step)

            actor.train_step = several  # type: ignore[method-assign]
            return actor

    witness = Witness(Plan.of(config).staleness)
    hosts = Eager(Run(tmp_path, config), witness, 16)
    run_virtually(training(tmp_path, config, hosts, SimulatedTask(), ROWS))
    done = Outcome(tmp_path, witness, hosts, None, None)
    check_honest(done)
    assert sum(event["rollouts"] for event in done.events("replayed")) == anew
    assert max(done.witness.staleness) == oldest


def test_the_records_are_those_of_the_local_backend_and_say_whose_and_how_old(tmp_path: Path) -> None:
    done = attempt(tmp_path)
    assert set(done.rollouts[0]) == {
        "step", "micro_step", "group", "row", "prompt", "completion", "reward", "masked", "parts", "notes", "stop",
        "tokens", "version", "worker", "staleness",
    }  # fmt: skip
    assert [record["group"] for record in done.rollouts[:8]] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [record["micro_step"] for record in done.rollouts[::8]] == list(range(STEPS))
    assert {record["worker"] for record in done.rollouts} == {"worker-0", "worker-1"}


def test_metrics_show_how_idle_every_role_was(tmp_path: Path) -> None:
    last = attempt(tmp_path, timing=Timing(train=10.0)).metrics[-2]
    # The actor trains 10 s of about 10.2; a worker answers 4 rollouts of 1 s side by side, and syncs.
    assert last["idle/actor"] < 0.02 and 0.8 < last["idle/worker-0"] < 0.95 and 0.95 < last["idle/scoring"] < 1
    assert last["idle/workers"] == pytest.approx((last["idle/worker-0"] + last["idle/worker-1"]) / 2, abs=1e-4)
    assert last["sync/seconds"] == pytest.approx(0.2) and last["tokens_per_second/worker-0"] > 0


def test_events_tell_when_each_role_was_busy(tmp_path: Path) -> None:
    done = attempt(tmp_path)
    for role in ("actor", "scoring", "worker-0", "worker-1"):
        spans = [span for event in done.events("busy", role) for span in event["spans"]]
        assert spans and all(start < end for start, end in spans)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))


def test_overlap_hides_the_shorter_of_sampling_and_training(tmp_path: Path) -> None:
    timing = Timing(train=3.0, publish=0.01, load=0.01, canary=0.01)
    times = []
    for overlap in (0, 1):
        done = attempt(tmp_path / str(overlap), make_config(distributed__overlap=overlap), timing=timing)
        times.append(done.metrics[-1]["time"] - done.metrics[0]["time"])
    sampling = 1.1
    hidden = (times[0] - times[1]) / (STEPS - 1)
    assert hidden > 0.9 * sampling


def test_scoring_goes_on_while_others_are_sampled(tmp_path: Path) -> None:
    """8 groups for one worker that takes one at a time: 8 s of sampling, 8 x 0.9 s of scoring, together about 9 s."""
    config = make_config(distributed__workers=1, distributed__in_flight=2, training__batch=16, distributed__overlap=0)
    done = attempt(tmp_path, config, task=SimulatedTask(seconds=0.9), steps=2)
    assert done.events("batch")[0]["waited"] < 11


def test_a_run_that_is_over_only_saves(tmp_path: Path) -> None:
    config = make_config()
    check_finished(attempt(tmp_path, config), config)
    before = (tmp_path / "rollouts.jsonl").read_bytes()
    again = attempt(tmp_path, config)
    check_finished(again, config)
    assert (tmp_path / "rollouts.jsonl").read_bytes() == before and not again.hosts.workers


# -- work stealing -----------------------------------------------------------------------------------------------------


def test_a_slow_worker_gets_less_to_do(tmp_path: Path) -> None:
    config = make_config(training__batch=40, training__save_steps=6, distributed__in_flight=2, distributed__overlap=0)

    def draw(name: str, what: str) -> str | None:
        return "slow" if (name, what) == ("worker-0", "turn") else None

    done = attempt(tmp_path, config, draw, steps=2)
    played = Counter(record["worker"] for record in done.rollouts)
    # 20 groups a batch: while the slow one plays one for 10 s, the other plays ten of 1 s.
    assert played["worker-0"] == 2 * 2 * 2 and played["worker-1"] == 2 * 2 * 18
    assert done.metrics[-1]["time"] < 60


def test_a_worker_is_never_given_more_than_its_share_in_flight(tmp_path: Path) -> None:
    config = make_config(training__batch=40, training__save_steps=6, distributed__in_flight=6)
    seen: list[int] = []

    class Watching(SimulatedHosts):
        async def start_worker(self, name: str, model: str) -> Any:
            worker = await super().start_worker(name, model)
            generate, flying = worker.generate, [0]

            async def counted(prompts: Any, sampling: Any) -> Any:
                flying[0] += 1
                seen.append(flying[0])
                try:
                    return await generate(prompts, sampling)
                finally:
                    flying[0] -= 1

            worker.generate = counted  # type: ignore[method-assign]
            return worker

    witness = Witness(1)
    hosts = Watching(Run(tmp_path, config), witness, 3, Timing(lognormal(1, 1.0, 0.5)))
    run_virtually(training(tmp_path, config, hosts, SimulatedTask(), ROWS))
    assert max(seen) == 6 and not witness.violations


# -- workers that misbehave --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["dies", "hangs", "twice", "nothing", "short", "empty", "wrong version", "error"])
def test_what_a_worker_was_lost_with_is_played_anew_and_counted_once(tmp_path: Path, fault: str) -> None:
    config = make_config()
    done = attempt(tmp_path, config, scripted_faults(("worker-1", "turn", 7, fault)))
    check_finished(done, config)
    assert all(record["reward"] is not None for record in done.rollouts)
    assert sum(event["rollouts"] for event in done.events("lost") + done.events("died")) > 0
    started = len(done.events("start", "worker-1"))
    assert started == (2 if fault in ("dies", "hangs") else 1)  # a process that proves itself again is kept


def test_rollouts_of_a_worker_that_hangs_do_not_wait_for_their_deadline_where_a_sync_shows_it(tmp_path: Path) -> None:
    config = make_config(distributed__turn_deadline=1000)
    done = attempt(tmp_path, config, scripted_faults(("worker-1", "turn", 7, "hangs")))
    check_finished(done, config)
    assert done.metrics[-1]["time"] < 100
    assert "its canaries took longer" in done.events("died", "worker-1")[0]["why"]


def test_a_worker_is_given_up_after_its_restarts_and_the_others_go_on(tmp_path: Path) -> None:
    config = make_config(distributed__restarts=2)

    def draw(name: str, what: str) -> str | None:
        return "dies" if (name, what) == ("worker-1", "turn") else None

    done = attempt(tmp_path, config, draw)
    check_finished(done, config)
    assert len(done.events("start", "worker-1")) == 3 and len(done.events("given_up", "worker-1")) == 1
    assert {record["worker"] for record in done.rollouts} == {"worker-0"}


def test_losses_long_apart_do_not_add_up(tmp_path: Path) -> None:
    config = make_config(distributed__restarts=1)
    script = [("worker-1", "turn", count, "dies") for count in (5, 12, 19)]
    done = attempt(tmp_path, config, scripted_faults(*script))
    check_finished(done, config)
    assert len(done.events("died", "worker-1")) == 3 and not done.events("given_up")


def test_without_a_worker_left_the_training_stops_and_says_why(tmp_path: Path) -> None:
    def draw(name: str, what: str) -> str | None:
        return "dies" if what == "turn" else None

    done = attempt(tmp_path, make_config(distributed__restarts=1, distributed__attempts=100), draw)
    assert isinstance(done.error, FleetError)
    for text in ("no rollout worker is left", "worker-0: lost 2 times", "worker-1: lost 2 times", "SIGKILL"):
        assert text in str(done.error)


def test_engines_that_do_not_start_stop_the_training(tmp_path: Path) -> None:
    def draw(name: str, what: str) -> str | None:
        return "hangs" if what == "start" else None

    done = attempt(tmp_path, make_config(distributed__start_deadline=100), draw)
    assert isinstance(done.error, FleetError)
    assert "its start took longer than distributed.start_deadline 100 s" in str(done.error)


def test_a_rollout_that_no_worker_survives_counts_as_unscored(tmp_path: Path) -> None:
    config = make_config(distributed__workers=3, distributed__attempts=2, distributed__overlap=0)
    poison = DataOrder(range(ROWS), 4, 0).batch(1)[2]

    class Poisoned(SimulatedHosts):
        async def start_worker(self, name: str, model: str) -> Any:
            worker = await super().start_worker(name, model)
            generate = worker.generate

            async def picky(prompts: Any, sampling: Any) -> Any:
                answers = await generate(prompts, sampling)
                text = "".join(chr(token - 10) for token in prompts[0] if token > 10)
                return [] if f"row {poison}<" in text else answers

            worker.generate = picky  # type: ignore[method-assign]
            return worker

    witness = Witness(0)
    hosts = Poisoned(Run(tmp_path, config), witness, STEPS)
    run_virtually(training(tmp_path, config, hosts, SimulatedTask(), ROWS))
    done = Outcome(tmp_path, witness, hosts, json.loads((tmp_path / "adapter" / "state.json").read_text()), None)
    check_finished(done, config)
    lost = [record for record in done.rollouts if record["row"] == f"r{poison}"]
    assert [record["reward"] for record in lost] == [None] * len(lost) and len(lost) >= 2
    assert "lost with 2 workers (distributed.attempts)" in lost[0]["notes"]["error"]
    assert done.metrics[1]["rollouts/unscored"] == 0.25 and len(done.product["rows"]) == STEPS


# -- proofs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["skipped", "wrong weights", "stale cache", "refused"])
def test_a_worker_that_cannot_prove_its_weights_is_fenced_and_gets_them_by_the_next_method(
    tmp_path: Path, fault: str
) -> None:
    config = make_config()
    done = attempt(tmp_path, config, scripted_faults(("worker-0", "reload", 3, fault)))
    check_finished(done, config)
    (fenced,) = done.events("fenced")
    assert (fenced["role"], fenced["method"], fenced["next"]) == ("worker-0", "reload", "volume")
    failed = [event for event in done.events("proof", "worker-0") if not event["holds"]]
    assert [event["version"] for event in failed] == ([fenced["version"]] if fault != "refused" else [])
    assert not done.events("died")
    after = [event["method"] for event in done.events("proof", "worker-0") if event["version"] > fenced["version"]]
    assert after and set(after) == {"volume"}  # what has failed once is not tried again on every sync
    assert {event["method"] for event in done.events("proof", "worker-1")} == {"reload"}
    assert {event["method"] for event in done.events("publish")} == {"reload"}  # volume loads the same files


def test_the_way_leads_from_reload_over_volume_to_checkpoint_and_ends_there(tmp_path: Path) -> None:
    def draw(name: str, what: str) -> str | None:
        return "skipped" if name == "worker-0" and what in ("reload", "volume", "checkpoint") else None

    config = make_config()
    done = attempt(tmp_path, config, draw)
    check_finished(done, config)
    assert [(event["method"], event["next"]) for event in done.events("fenced")] == [
        ("reload", "volume"), ("volume", "checkpoint"), ("checkpoint", None)
    ]  # fmt: skip
    assert {record["worker"] for record in done.rollouts} == {"worker-1"}
    assert "could not prove its weights by any method" in done.events("given_up", "worker-0")[0]["why"]


def test_weights_that_several_workers_need_another_way_are_written_once(tmp_path: Path) -> None:
    config = make_config(distributed__sync_method="volume", distributed__workers=3)
    script = [(f"worker-{number}", "volume", 2, "skipped") for number in (0, 2)]
    done = attempt(tmp_path, config, scripted_faults(*script))
    check_finished(done, config)
    assert len(done.events("fenced")) == 2
    written = Counter((event["step"], event["method"]) for event in done.events("published"))
    assert set(written.values()) == {1}
    assert [method for step, method in sorted(written) if step > 2] == ["checkpoint", "volume"] * 3


def test_a_worker_that_comes_too_late_for_a_version_takes_the_next_one(tmp_path: Path) -> None:
    class Late(SimulatedHosts):
        async def start_worker(self, name: str, model: str) -> Any:
            worker = await super().start_worker(name, model)
            canary, late = worker.canary, [name == "worker-0"]

            async def slow_at_first(prompts: Any) -> Any:
                await asyncio.sleep(12 if late.pop() else 0)
                late.append(False)
                return await canary(prompts)

            worker.canary = slow_at_first  # type: ignore[method-assign]
            return worker

    config = make_config(distributed__canary_deadline=60)
    hosts = Late(Run(tmp_path, config), Witness(1), 12)
    run_virtually(training(tmp_path, config, hosts, SimulatedTask(), ROWS))
    done = Outcome(tmp_path, hosts.witness, hosts, None, None)
    check_honest(done)
    first = done.events("sync", "worker-0")[0]
    assert first["version"] > 3 and not done.events("fenced")  # the folder of version 1 was gone when it asked for it
    assert "worker-0" in {record["worker"] for record in done.rollouts}


def test_where_nobody_can_prove_anything_the_training_stops_and_says_why(tmp_path: Path) -> None:
    def draw(name: str, what: str) -> str | None:
        return "wrong weights" if what in ("reload", "volume", "checkpoint") else None

    done = attempt(tmp_path, draw=draw)
    assert isinstance(done.error, FleetError) and "could not prove its weights by any method" in str(done.error)
    assert not done.rollouts and not done.metrics


def test_a_sync_that_falls_due_while_the_last_worker_ends_does_not_hide_why_none_is_left(tmp_path: Path) -> None:
    class Slow(SimulatedHosts):
        async def start_worker(self, name: str, model: str) -> Any:
            worker = await super().start_worker(name, model)
            close = worker.close

            async def close_late() -> None:
                await asyncio.sleep(9.0)
                await close()

            worker.close = close_late  # type: ignore[method-assign]
            return worker

    def draw(name: str, what: str) -> str | None:
        tried[what] = tried.get(what, 0) + 1
        return "wrong weights" if tried.get("reload", 0) > 1 and what in ("reload", "volume", "checkpoint") else None

    tried: dict[str, int] = {}
    config = make_config(distributed__workers=1, distributed__overlap=3)
    quick = Timing(turn=lambda prompt: 0.05)
    hosts = Slow(Run(tmp_path, config), Witness(Plan.of(config).staleness), STEPS, quick, draw)
    with pytest.raises(FleetError, match="could not prove its weights by any method"):
        run_virtually(training(tmp_path, config, hosts, SimulatedTask(), ROWS))


class Rotting(SimulatedHosts):
    """The first worker's weights rot a while after its second sync, without a word; `then` may break its next turn."""

    wait = 0.5
    then = ""

    async def start_worker(self, name: str, model: str) -> Any:
        worker = await super().start_worker(name, model)
        update, syncs = worker.update_weights, [0]

        async def update_and_rot(release: Any) -> float:
            seconds = await update(release)
            syncs[0] += 1
            if (name, syncs[0]) == ("worker-0", 2) and worker.process == 1:
                asyncio.get_running_loop().call_later(self.wait, rot)
            return seconds

        def rot() -> None:
            worker.weights += " rotten"
            worker.cached.clear()
            if self.then:
                worker.draw = scripted_faults((name, "turn", 2, self.then))

        worker.update_weights = update_and_rot  # type: ignore[method-assign]
        return worker


@pytest.mark.parametrize(("overlap", "wait", "then"), [(2, 0.5, ""), (1, 0.5, ""), (0, 0.5, ""), (2, 0.5, "error")])
def test_turns_of_a_worker_that_lost_what_it_had_proven_are_not_trained_on(
    tmp_path: Path, overlap: int, wait: float, then: str
) -> None:
    """What shows it is the canary while the next weights are written, or the proof after a loss: what it had sampled
    since, and is not trained on yet, is played anew."""
    config = make_config(distributed__overlap=overlap, distributed__in_flight=2, training__save_steps=6)
    witness = Witness(overlap)
    hosts = Rotting(Run(tmp_path, config), witness, STEPS, Timing(train=5.0))
    hosts.wait, hosts.then = wait, then
    run_virtually(training(tmp_path, config, hosts, SimulatedTask(), ROWS))
    done = Outcome(tmp_path, witness, hosts, None, None)
    (revoked,) = done.events("revoked")
    assert revoked["role"] == "worker-0" and len(done.events("lost")) == bool(then)
    assert not done.events("given_up") and len(done.events("fenced")) == bool(then)
    trained = {int(record["completion"]) for record in done.rollouts}
    rotten = {serial for serial, fact in witness.facts.items() if "rotten" in fact.weights}
    handed_over = {event["batch"]: event["time"] for event in done.events("batch")}
    for event in done.events("replayed"):
        assert event["time"] <= handed_over[event["batch"]]
    if overlap:
        assert done.events("replayed") and rotten and not rotten & trained
    else:  # its step was done when it showed
        assert rotten & trained and not done.events("replayed")


def test_workers_load_while_the_actor_answers_its_canary_and_it_trains_only_after(tmp_path: Path) -> None:
    config = make_config(distributed__workers=1, distributed__overlap=0)
    timing = Timing(publish=1.0, load=5.0, canary=4.0, train=0.5)
    done = attempt(tmp_path, config, timing=timing)
    check_finished(done, config)
    for published, loaded in zip(done.events("published"), done.events("sync", "worker-0"), strict=True):
        (said,) = [one for one in done.events("canary") if one["version"] == published["version"]]
        assert said["time"] == pytest.approx(published["time"] + 4.0, abs=0.01)
        if published["version"] > 1:  # the first one waits for the worker to start
            # It was asked for its canary of before when the actor began to write: 4 s, of which 3 are left.
            assert loaded["time"] == pytest.approx(published["time"] + 3.0 + 5.0, abs=0.01)


def test_an_actor_that_dies_over_its_canary_ends_the_training_with_its_words(tmp_path: Path) -> None:
    class Speechless(SimulatedHosts):
        async def start_actor(self) -> Any:
            actor = await super().start_actor()
            say = actor.canary

            async def canary(version: int) -> Any:
                if version == 2:
                    raise ActorError("out of memory in the canary")
                return await say(version)

            actor.canary = canary  # type: ignore[method-assign]
            return actor

    hosts = Speechless(Run(tmp_path, make_config()), Witness(1), STEPS)
    with pytest.raises(OrchestratorError, match="out of memory in the canary"):
        run_virtually(training(tmp_path, make_config(), hosts, SimulatedTask(), ROWS))


def test_one_canary_is_asked_before_every_sync(tmp_path: Path) -> None:
    asked: list[tuple[str, int]] = []

    class Listening(SimulatedHosts):
        async def start_worker(self, name: str, model: str) -> Any:
            worker = await super().start_worker(name, model)
            update, canary = worker.update_weights, worker.canary

            async def heard_update(release: Any) -> float:
                asked.append((name, 0))
                return await update(release)

            async def heard_canary(prompts: Any) -> Any:
                asked.append((name, len(prompts)))
                return await canary(prompts)

            worker.update_weights, worker.canary = heard_update, heard_canary  # type: ignore[method-assign]
            return worker

    config = make_config(distributed__workers=1)
    run_virtually(training(tmp_path, config, Listening(Run(tmp_path, config), Witness(1), 3), SimulatedTask(), ROWS))
    assert [count for _, count in asked] == [1, 0, len(CANARIES)] * 3


def test_a_worker_that_skipped_a_step_too_small_to_differ_is_fenced_all_the_same(tmp_path: Path) -> None:
    def drifting(weights: str) -> list[list[float]]:
        steps = float(weights.split()[0]) if weights != "base" else 0.0
        return [[-1.0 - 3e-4 * steps for _ in prompt[1:]] for prompt in CANARIES]  # the tolerance is 1e-3

    config = make_config()
    witness = Witness(1)
    witness.canary = drifting
    done = attempt(tmp_path, config, scripted_faults(("worker-0", "reload", 2, "skipped")), witness=witness)
    check_finished(done, config)
    (fenced,) = done.events("fenced")
    assert "of the change since version 1" in fenced["why"]


def test_a_worker_that_skips_every_step_is_fenced_once_steps_too_small_to_tell_have_added_up(tmp_path: Path) -> None:
    def drifting(weights: str) -> list[list[float]]:
        steps = float(weights.split()[0]) if weights != "base" else 0.0
        return [[-1.0 - 6e-5 * steps for _ in prompt[1:]] for prompt in CANARIES]  # told from noise from about 2e-4 on

    def never_after_the_first(name: str, what: str) -> str | None:
        asked.append((name, what))
        return "skipped" if what == "reload" and asked.count((name, what)) > 1 else None

    asked: list[tuple[str, str]] = []
    witness = Witness(1)
    witness.canary = drifting
    done = attempt(tmp_path, make_config(distributed__workers=1), never_after_the_first, witness=witness)
    first = done.events("fenced")[0]
    assert "of the change since version 1" in first["why"] and first["version"] > 3


# -- scoring -----------------------------------------------------------------------------------------------------------


def test_more_unscored_than_allowed_stops_with_the_reasons_counted(tmp_path: Path) -> None:
    done = attempt(tmp_path, make_config(rewards__max_unscored=0.05), task=SimulatedTask(broken=0.4))
    assert isinstance(done.error, UnscoredLimitError) and "the judge does not answer" in str(done.error)
    assert done.rollouts and not done.metrics  # what was not trained on can be looked at


def test_unscored_and_masked_rollouts_reach_the_actor_with_empty_masks(tmp_path: Path) -> None:
    config = make_config(rewards__max_unscored=0.9)
    done = attempt(tmp_path, config, task=SimulatedTask(broken=0.2, masked=0.2))
    check_finished(done, config)
    kept = sum(record["reward"] is not None for record in done.rollouts)
    assert done.product and 0 < kept == len(done.product["trained"]) < len(done.rollouts)


def test_many_masked_answers_are_warned_about_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    attempt(tmp_path, task=SimulatedTask(masked=0.6))
    assert len([r for r in caplog.records if "masked by the task as invalid" in r.message]) == 1


@pytest.mark.parametrize("limited", ["by the config", "by the engine"])
def test_a_conversation_without_room_for_a_turn_ends_with_the_turn_before_and_is_no_workers_fault(
    tmp_path: Path, limited: str
) -> None:
    config = make_config(
        sampling__vllm={"max_length": 64 if limited == "by the config" else 1000}, rewards__max_unscored=0.05
    )
    done = attempt(tmp_path, config, timing=USUAL._replace(max_length=64), task=SimulatedTask(max_turns=3))
    check_honest(done)
    assert done.error is None and {record["stop"] for record in done.rollouts} == {"length"}
    assert all(record["reward"] is not None for record in done.rollouts) and not done.events("lost")


# -- stop, kill, resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0, 2])
def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path, overlap: int) -> None:
    config = make_config(distributed__overlap=overlap)
    first = attempt(tmp_path, config, stop=StopAfter(3))
    assert first.error is None and first.product is None and len(first.metrics) == 3
    assert first.events("stopped")[0]["step"] == 3
    second = attempt(tmp_path, config, witness=first.witness)
    check_finished(second, config)
    versions = [event["version"] for event in second.events("publish")]
    assert versions == sorted(set(versions))  # a number is used once, over all attempts


def test_an_actor_that_dies_in_a_step_ends_the_attempt_and_the_next_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    config = make_config()
    first = attempt(tmp_path, config, actor_dies_at=3)
    assert isinstance(first.error, OrchestratorError) and "out of memory in the loss" in str(first.error)
    assert len(first.rollouts) == 4 * 8 and len(first.metrics) == 3
    second = attempt(tmp_path, config, witness=first.witness)
    check_finished(second, config)
    assert second.hosts.actor.consumed == 6 and second.events("ready", "actor")[-1]["step"] == 2


def test_an_actor_that_hangs_is_named(tmp_path: Path) -> None:
    done = attempt(tmp_path, make_config(distributed__step_deadline=5), timing=Timing(train=6))
    assert isinstance(done.error, OrchestratorError)
    assert "the actor cannot go on: no answer within distributed.step_deadline 5 s" in str(done.error)


def test_an_actor_that_does_not_start_is_named(tmp_path: Path) -> None:
    class Slow(SimulatedHosts):
        async def start_actor(self) -> Any:
            actor = await super().start_actor()
            await asyncio.sleep(1000)
            return actor

    config = make_config()
    hosts = Slow(Run(tmp_path, config), Witness(1), 3)
    with pytest.raises(OrchestratorError, match=r"it did not start within distributed\.start_deadline 900 s"):
        run_virtually(training(tmp_path, config, hosts, SimulatedTask(), ROWS))


def test_whatever_ends_an_attempt_ends_all_roles(tmp_path: Path) -> None:
    done = attempt(tmp_path, actor_dies_at=1)
    assert done.hosts.actor.gone and all(worker.gone.done() for worker in done.hosts.workers)


def test_logs_that_are_shorter_than_the_checkpoint_are_refused(tmp_path: Path) -> None:
    config = make_config()
    attempt(tmp_path, config, stop=StopAfter(4))
    os.truncate(tmp_path / "metrics.jsonl", 0)
    again = attempt(tmp_path, config)
    assert isinstance(again.error, RunError) and "changed by hand" in str(again.error)


@pytest.mark.parametrize("seed", range(25))
def test_a_run_killed_at_any_moment_trains_on_every_rollout_once(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    config = make_config(distributed__overlap=rng.choice([0, 1, 2]), distributed__workers=rng.choice([1, 3]))
    timing = Timing(lognormal(seed, 1.0, 0.5))
    witness = Witness(Plan.of(config).staleness)
    for _ in range(rng.randint(1, 5)):
        done = attempt(tmp_path, config, timing=timing, witness=witness, kill_at=rng.uniform(0, 25))
        if done.error is None:
            break
    check_finished(attempt(tmp_path, config, timing=timing, witness=witness), config)


@pytest.mark.parametrize("kill_at", [1.001, 1.03, 1.2])
def test_a_version_number_is_never_given_twice_even_where_nothing_else_was_written_yet(
    tmp_path: Path, kill_at: float
) -> None:
    timing = Timing(publish=0.0)
    killed = attempt(tmp_path, timing=timing, kill_at=kill_at)
    assert isinstance(killed.error, Killed) and list(killed.witness.published) == [1]
    check_honest(attempt(tmp_path, timing=timing, witness=killed.witness))
    assert list(killed.witness.published)[1] == 2


def test_half_a_line_of_events_does_not_spoil_the_next(tmp_path: Path) -> None:
    attempt(tmp_path, stop=StopAfter(1))
    path = tmp_path / "events.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    attempt(tmp_path)
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_real_process_killed_by_the_kernel_goes_on_with_the_same_data(tmp_path: Path) -> None:
    """SIGKILL at random moments, until one attempt gets to the end by itself."""
    rng = random.Random(3)
    command = [sys.executable, "tests/simulated_roles.py", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)}
    kills = 0
    while True:
        child = subprocess.Popen([*command, str(kills)], cwd=PROJECT_ROOT, env=env, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 60
        lines = _lines(tmp_path / "events.jsonl") + rng.randint(5, 80)
        while kills < 8 and child.poll() is None and _lines(tmp_path / "events.jsonl") < lines:
            assert time.monotonic() < until
            time.sleep(0.002)
        if kills < 8 and child.poll() is None:
            child.send_signal(signal.SIGKILL)
            kills += 1
        _, told = child.communicate(timeout=60)
        if child.returncode != -signal.SIGKILL:
            break
    assert child.returncode == 0, told
    assert kills >= 3
    config = make_config(distributed__workers=3, training__save_steps=3, distributed__overlap=1)
    product = json.loads((tmp_path / "adapter" / "state.json").read_text())
    check_finished(Outcome(tmp_path, Witness(1), None, product, None), config, steps=30)  # type: ignore[arg-type]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.is_file() else 0


# -- hundreds of ways to go wrong --------------------------------------------------------------------------------------


def random_config(rng: random.Random) -> Config:
    iterations = rng.choice([1, 1, 2])
    every = rng.randint(1, 4)
    overlap = rng.randint(0, 3)
    lag = (-(-every // iterations) - 1) * iterations
    return make_config(
        training__iterations=iterations,
        training__save_steps=2 * iterations,
        distributed__workers=rng.randint(1, 4),
        distributed__in_flight=rng.choice([1, 2, 5, 50]),
        distributed__sync_weights_every=every,
        distributed__overlap=overlap,
        distributed__max_staleness=rng.choice([None, None, lag, lag + rng.randint(0, 3)]),
        distributed__sync_method=rng.choice(["reload", "lora", "volume", "checkpoint"]),
        distributed__restarts=rng.randint(1, 5),
        distributed__attempts=rng.randint(2, 4),
        rewards__max_unscored=0.9,
    )


@pytest.mark.parametrize("block", range(10))
def test_no_fault_schedule_gets_an_unproven_a_stale_or_a_second_turn_into_a_step(tmp_path: Path, block: int) -> None:
    """25 schedules a block: faults of all kinds and kills at random, until the last attempt is left in peace."""
    ended = Counter[str]()
    for seed in range(25 * block, 25 * (block + 1)):
        rng = random.Random(seed)
        config, folder = random_config(rng), tmp_path / str(seed)
        timing = Timing(lognormal(seed, 1.0, 0.5), train=rng.choice([0.1, 3.0]), load=rng.choice([0.0, 0.2, 4.0]))
        task = SimulatedTask(max_turns=rng.randint(1, 3), broken=0.05, masked=0.05, seconds=rng.choice([0.0, 1.0]))
        witness = Witness(Plan.of(config).staleness)
        folder.mkdir()
        for _ in range(rng.randint(1, 4)):
            kill_at = rng.choice([None, rng.uniform(0, 60)])
            draw = random_faults(rng.randrange(10**6), rng.choice([0.02, 0.1, 0.3]))
            done = attempt(folder, config, draw, timing, task, STEPS, witness=witness, kill_at=kill_at)
            ended[type(done.error).__name__] += 1
            check_honest(done)
            if done.error is None:
                break
        last = attempt(folder, config, timing=timing, task=task, witness=witness)
        check_finished(last, config)
    assert ended["Killed"] and ended["NoneType"] and ended["FleetError"], ended


def test_the_witness_sees_what_it_is_there_for(tmp_path: Path) -> None:
    """Without the checks of the draft, the same faults do get through: the property above is not empty."""
    from lib.orchestrator import fleet, slot

    config = make_config(distributed__overlap=2)
    honest = slot.compare
    try:
        slot.compare = lambda canary, answered, *rest: honest(canary, canary.logprobs, None)  # type: ignore[assignment]
        done = attempt(tmp_path, config, scripted_faults(("worker-0", "reload", 2, "skipped")))
    finally:
        slot.compare = honest  # type: ignore[assignment]
    assert any("is not of version" in text for text in done.witness.violations)
    assert fleet.Fleet.trusts is not None


def test_a_place_is_filled_once() -> None:
    scored = Scored(Rollout.of({"id": "a", "prompt": []}, "x"), Score(reward=1.0))
    draft = Draft(0, [3], 2)
    for position in draft.positions(0):
        draft.put(position, Played(scored, ()))
    assert draft.full.is_set()
    with pytest.raises(ValueError, match="place 1 was filled twice"):
        draft.put(1, Played(scored, ()))
    draft.take_back([1])
    assert not draft.full.is_set()
    with pytest.raises(ValueError, match="1 of 2 are missing"):
        _ = draft.scored
    draft.put(1, Played(scored, ()))
    assert draft.full.is_set() and len(draft.scored) == 2


async def test_what_is_distrusted_at_the_last_moment_never_reaches_the_actor(tmp_path: Path) -> None:
    class Untouched:
        async def train_step(self, batch: dict[str, Any]) -> Any:
            raise AssertionError("it was asked")

    async def nothing() -> None:
        raise AssertionError("nothing has begun")

    desk = ActorDesk(Untouched(), make_config().distributed, Events(Run(tmp_path, make_config())), 0)  # type: ignore[arg-type]
    assert await desk.train(lambda: None, nothing) is None


# -- the backend ---------------------------------------------------------------------------------------------------


class Easy(SimulatedTask, frozen=True):
    async def score(self, rollout: Rollout) -> Score:
        return Score(reward=0.5)


def test_the_backend_reads_the_actors_policy_and_leaves_long_prompts_out(tmp_path: Path) -> None:
    """In real time, on the loop that all tasks share, with a tokenizer from the folder that the actor names."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import GptOssConfig, PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: n for n, word in enumerate(["<?>", "<end>", "row", "and"])}, unk_token="<?>"))
    words.pre_tokenizer = WhitespaceSplit()
    template = "{% for message in messages %}{{ message['content'] }} <end> {% endfor %}"
    fast = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", unk_token="<?>", chat_template=template)
    fast.save_pretrained(tmp_path / "policy")
    GptOssConfig(max_position_embeddings=64).save_pretrained(tmp_path / "policy")
    config = make_config(sampling__prompt_limit=4, training__completions_csv="all.csv")
    run = Run(tmp_path / "run", config)
    run.folder.mkdir()
    hosts = SimulatedHosts(run, Witness(1), 3, Timing(lambda prompt: 0.01, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0))
    hosts.model = str(tmp_path / "policy")
    rows = [{"id": f"r{n}", "prompt": [{"role": "user", "content": "row" + " and" * n}]} for n in (0, 1, 2, 3, 4, 1, 2)]
    output = distributed.train(config, Easy(), rows, run, StopAfter(), hosts)
    assert output == run.folder / "adapter" and output.is_dir()
    assert {record["row"] for record in run.rollouts()} <= {"r0", "r1", "r2"}
    assert len((run.folder / "all.csv").read_text().splitlines()) == 1 + 3 * 8


# -- the config --------------------------------------------------------------------------------------------------------


def test_a_batch_has_to_feed_whole_steps() -> None:
    with pytest.raises(
        ConfigError, match=r"set training\.steps_per_generation to a multiple of training\.accumulation"
    ):
        make_config(training__steps_per_generation=1, training__accumulation=2)


def test_a_bound_below_the_sync_interval_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise max_staleness to at least 3"):
        make_config(distributed__sync_weights_every=4, distributed__max_staleness=2)


def test_an_adapter_can_only_be_synced_where_there_is_one() -> None:
    with pytest.raises(ConfigError, match=r"sync_method lora needs lora\.enabled"):
        make_config(distributed__sync_method="lora", lora__enabled=False)


def test_busy_time_counts_once_and_short_gaps_do_not_show() -> None:
    busy = Busy()
    busy.begin(1.0)
    busy.begin(2.0)
    busy.end(3.0)
    busy.end(4.0)
    busy.begin(4.01)
    busy.end(5.0)
    busy.begin(7.0)
    spans, seconds = busy.until(8.0)
    assert spans == [(1.0, 5.0), (7.0, 8.0)] and seconds == pytest.approx(3 + 0.99 + 1)
    assert busy.until(9.0) == ([(8.0, 9.0)], 1.0)


async def test_events_go_on_at_the_end_of_earlier_ones(tmp_path: Path) -> None:
    run = Run(tmp_path, make_config())
    for kind in ("start", "ready"):
        events = Events(run)
        events.add("actor", kind)
        events.flush()
    assert [event["kind"] for event in read_lines(tmp_path / "events.jsonl")] == ["start", "ready"]
