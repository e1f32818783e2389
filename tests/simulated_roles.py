"""Stand-ins of actor and workers that misbehave on command, in virtual or real time, and a witness of the truth.

Every sampled turn is a serial number under which the witness keeps which process sampled it and from which weights. The
simulated actor looks them up, so that a turn which must not be trained on is seen whatever the orchestrator believes.

    python tests/simulated_roles.py FOLDER NUMBER     # one attempt in real time on this folder: for tests that kill it
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import selectors
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lib.config import Config, parse_config
from lib.generate import Chat
from lib.orchestrator import train
from lib.roles import (
    ActorError,
    ActorState,
    Canary,
    Facts,
    Method,
    RefusedError,
    Release,
    Sampled,
    Sampling,
    StepReport,
    WorkerError,
)
from lib.runfolder import Run, write_json
from lib.task import Message, Rollout, Row, Score, Task

END = 1
FIRST_SERIAL = 1_000_000
KEPT = 2
"""Steps whose weights stay on the disk."""
CANARIES = [[7, 8, 9, 10], [11, 12, 13]]


# time -----------------------------------------------------------------------------------------------------------------
class StuckError(RuntimeError):
    """Nothing will ever happen again: a deadlock."""


class _NoWaiting(selectors.SelectSelector):
    """Where a loop would sleep, its clock is put forward instead."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise StuckError("everything waits for something that never comes")
        self.loop.now += max(0.0, timeout)
        if self.loop.now > self.loop.limit:
            raise StuckError(f"still not done after {self.loop.limit:g} virtual seconds")
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose seconds take no time."""

    def __init__(self, limit: float = 1e6) -> None:
        self.now, self.limit = 0.0, limit
        selector = _NoWaiting()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now


class Killed(KeyboardInterrupt):
    """The orchestrator's process ends in the middle of everything."""


_GRAVES: list[Any] = []
"""Tasks of killed loops: nothing of theirs may run any more, not even to clean up."""


def run_virtually(work: Any, kill_at: float | None = None) -> Any:
    """Run a coroutine in virtual time, or up to a moment in which it is killed (raises Killed)."""
    loop = VirtualLoop()
    asyncio.set_event_loop(loop)

    def kill() -> None:
        raise Killed

    if kill_at is not None:
        loop.call_at(kill_at, kill)
    task = loop.create_task(work)
    try:
        result = loop.run_until_complete(task)
    except (Killed, StuckError):
        for pending in asyncio.all_tasks(loop):
            pending._log_destroy_pending = False  # type: ignore[attr-defined]
            _GRAVES.append(pending)
        raise
    finally:
        loop.close()
    return result


# what is true ---------------------------------------------------------------------------------------------------------
class Fact(NamedTuple):
    """How a turn really came about."""

    worker: str
    process: int
    weights: str
    """What the process really held."""
    version: int
    """What it said."""
    proved: bool
    """Whether it had answered all canaries with these weights."""


class Witness:
    """What really happened, over all attempts of a run."""

    def __init__(self, bound: int, process: int = 0) -> None:
        """`process`: tells the serial numbers of one process from those of another that knows nothing of it."""
        self.bound = bound
        self.facts: dict[int, Fact] = {}
        self.published: dict[int, tuple[str, int]] = {}
        """By version: the weights, and the optimizer steps that they had seen."""
        self.violations: list[str] = []
        self.staleness: list[int] = []
        self.canary: Callable[[str], list[list[float]]] = canary_values
        """What weights say about the canaries."""
        self.processes = 0
        self._serial = FIRST_SERIAL * (process + 1)

    def sample(self, fact: Fact) -> int:
        self._serial += 1
        self.facts[self._serial] = fact
        return self._serial

    def new_process(self) -> int:
        self.processes += 1
        return self.processes

    def check(self, serial: int, step: int, trained: set[int]) -> None:
        """A turn is trained on."""
        fact = self.facts.get(serial)
        if serial in trained:
            self.violations.append(f"turn {serial} trained twice")
        if fact is None:
            return  # of an earlier process of this script
        weights, seen = self.published[fact.version]
        if fact.weights != weights:
            self.violations.append(f"{fact} is not of version {fact.version}: {weights}")
        if not fact.proved:
            self.violations.append(f"{fact} had not been proven")
        self.staleness.append(step - seen)
        if step - seen > self.bound:
            self.violations.append(f"{fact} is {step - seen} steps old")


# faults ---------------------------------------------------------------------------------------------------------------
TURN_FAULTS = ("dies", "hangs", "twice", "nothing", "short", "empty", "wrong version", "error", "slow")
LOAD_FAULTS = ("refused", "skipped", "wrong weights", "stale cache", "dies", "hangs", "slow")
Draw = Callable[[str, str], str | None]
"""(the worker's name, what it is about to do) -> a fault, or None. What: "start", "turn", "canary" or a method."""


def no_faults(name: str, what: str) -> str | None:
    return None


def random_faults(seed: int, rate: float) -> Draw:
    """Every kind of fault now and then."""
    rng = random.Random(seed)

    def draw(name: str, what: str) -> str | None:
        if what == "start":
            return rng.choice(("dies", "hangs")) if rng.random() < rate else None
        if what == "turn":
            return rng.choice(TURN_FAULTS) if rng.random() < rate / 3 else None
        if what == "canary":
            return rng.choice(("dies", "hangs")) if rng.random() < rate / 3 else None
        return rng.choice(LOAD_FAULTS) if rng.random() < rate else None

    return draw


def scripted_faults(*script: tuple[str, str, int, str]) -> Draw:
    """(worker, what, from which time on it is done, fault), each once."""
    left = list(script)
    done: dict[tuple[str, str], int] = {}

    def draw(name: str, what: str) -> str | None:
        count = done[name, what] = done.get((name, what), 0) + 1
        for entry in left:
            if entry[:2] == (name, what) and count >= entry[2]:
                left.remove(entry)
                return entry[3]
        return None

    return draw


# roles ----------------------------------------------------------------------------------------------------------------
class Timing(NamedTuple):
    """Seconds; of a turn, by its prompt. And the tokens that every engine takes."""

    turn: Callable[[Sequence[int]], float] = lambda prompt: 1.0
    train: float = 2.0
    publish: float = 0.1
    load: float = 0.2
    canary: float = 0.02
    start: float = 1.0
    save: float = 0.1
    max_length: int = 10**6


USUAL = Timing()


def lognormal(seed: int, median: float, sigma: float) -> Callable[[Sequence[int]], float]:
    """A latency that is the prompt's own, whoever answers it and when."""

    @cache
    def latency(prompt: tuple[int, ...]) -> float:
        return median * random.Random(f"{seed} {prompt}").lognormvariate(0.0, sigma)

    return lambda prompt: latency(tuple(prompt))


def canary_values(weights: str) -> list[list[float]]:
    """What weights say about the canaries."""
    return [
        [-random.Random(f"{weights} {prompt} {place}").random() * 5 for place in range(len(prompt) - 1)]
        for prompt in CANARIES
    ]


class SimulatedWorker:
    """A worker process: holds weights, or says that it does."""

    def __init__(self, name: str, witness: Witness, timing: Timing, draw: Draw) -> None:
        self.name, self.witness, self.timing, self.draw = name, witness, timing, draw
        self.process = witness.new_process()
        self.weights, self.version = "base", 0
        self.proved: set[str] = set()
        self.cached: dict[tuple[int, ...], list[float]] = {}
        """Canaries that were answered since the cache was last reset."""
        self.hung = False
        self.flying = 0
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def facts(self) -> Facts:
        return Facts(self.version, self.timing.max_length, 16, "float32", False)

    async def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Sampled]:
        fault = self._fault("turn")
        if any(len(prompt) + sampling.max_tokens > self.timing.max_length for prompt in prompts):
            self.witness.violations.append(f"{self.name}: asked for more than its engine takes")
        weights, version = self.weights, self.version
        seconds = max(map(self.timing.turn, prompts))
        self.flying += 1
        try:
            await self._pass(10 * seconds if fault == "slow" else seconds)
        finally:
            self.flying -= 1
        answers = []
        for _ in prompts:
            said = version - 1 if fault == "wrong version" else version
            serial = self.witness.sample(Fact(self.name, self.process, weights, said, weights in self.proved))
            answers.append(Sampled([serial, END], [-0.5, -0.5], "stop", said))
        if fault == "error":
            raise WorkerError("this call went wrong")
        if fault == "short":
            answers = [one._replace(logprobs=one.logprobs[:1]) for one in answers]
        if fault == "empty":
            answers = [one._replace(output_ids=[], logprobs=[]) for one in answers]
        return {"twice": answers * 2, "nothing": []}.get(fault or "", answers)

    async def update_weights(self, release: Release) -> float:
        fault = self._fault(release.method)
        if self.flying:
            self.witness.violations.append(f"{self.name}: new weights under {self.flying} turns")
        await self._pass(self.timing.load * (10 if fault == "slow" else 1))
        newest_first = [step for _, (_, step) in sorted(self.witness.published.items(), reverse=True)]
        if release.step not in list(dict.fromkeys(newest_first))[:KEPT]:
            raise RefusedError(f"{release.folder} has no manifest: it is not there")
        if fault == "refused":
            raise RefusedError("the manifest is of another run")
        if fault != "skipped":
            self.weights = self.witness.published[release.version][0]
        if fault == "wrong weights":
            self.weights += " of another run"
        if fault != "stale cache":
            self.cached.clear()
        self.version = release.version
        return self.timing.load

    async def canary(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        self._fault("canary")
        await self._pass(self.timing.canary)
        if len(prompts) == len(CANARIES):
            self.proved.add(self.weights)
        fresh = dict(zip(map(tuple, CANARIES), self.witness.canary(self.weights), strict=True))
        for prompt in map(tuple, prompts):
            self.cached.setdefault(prompt, fresh[prompt])
        return [self.cached[tuple(prompt)] for prompt in prompts]

    async def close(self) -> None:
        if not self.gone.done():
            self.gone.set_result(None)

    def _fault(self, what: str) -> str | None:
        if self.gone.done():
            raise WorkerError("the process is gone")
        fault = self.draw(self.name, what)
        if fault == "dies":
            self.gone.set_result(None)
            raise WorkerError("the process was ended by SIGKILL")
        self.hung = self.hung or fault == "hangs"
        return fault

    async def _pass(self, seconds: float) -> None:
        await asyncio.wait({self.gone}, timeout=None if self.hung else seconds)
        if self.gone.done():
            raise WorkerError("the process is gone")


class SimulatedActor:
    """Trains on whatever it gets, looks every turn up with the witness, and keeps its state in checkpoints."""

    def __init__(self, run: Run, witness: Witness, timing: Timing, max_steps: int, dies_at: int | None = None) -> None:
        self.run, self.witness, self.timing = run, witness, timing
        self.max_steps, self.dies_at = max_steps, dies_at
        self.step = self.consumed = 0
        self.trained: list[int] = []
        self.rows: list[list[int | None]] = []
        """Of every batch, the row of each completion as its prompt shows it."""
        self.model = "simulated"
        self.gone = False

    async def initialize(self) -> ActorState:
        found = self.run.checkpoints()
        if found:
            state = json.loads((found[-1] / "state.json").read_text())
            self.step, self.consumed = state["step"], state["consumed"]
            self.trained, self.rows = state["trained"], state["rows"]
        await asyncio.sleep(self.timing.start)
        return ActorState(self.step, self.max_steps, self.consumed, self.model, [END])

    async def train_step(self, batch: dict[str, Any]) -> StepReport:
        known = set(self.trained)
        self._alive()
        json.dumps(batch, allow_nan=False)  # as the wire does
        serials = [
            token
            for ids, mask in zip(batch["output_ids"], batch["mask"], strict=True)
            for token, kept in zip(ids, mask, strict=True)
            if kept and token >= FIRST_SERIAL
        ]
        for serial in serials:
            self.witness.check(serial, self.step, known)
            known.add(serial)
        await asyncio.sleep(self.timing.train)
        self._alive()
        if self.dies_at is not None and self.step >= self.dies_at:
            self.gone = True
            raise ActorError("out of memory in the loss")
        self.trained += serials
        self.rows.append([_row_of(ids) for ids in batch["prompt_ids"]])
        self.consumed += 1
        steps = range(self.step + 1, min(self.step + self.run.config.steps_per_batch, self.max_steps) + 1)
        self.step = steps[-1]
        records = [{"step": step, "loss": 0.0, "reward": 0.0} for step in steps]
        records[0] |= batch["metrics"]
        return StepReport(self.step, {}, self.timing.train, records)

    async def publish(self, version: int, method: Method) -> Release:
        self._alive()
        await asyncio.sleep(self.timing.publish)
        if version in self.witness.published:
            self.witness.violations.append(f"version {version} published twice")
        weights = f"{self.step} {len(self.trained)} {self.trained[-1:]}"
        self.witness.published[version] = weights, self.step
        return Release(version, self.step, method, f"weights/v-{version}", weights)

    async def canary(self, version: int) -> Canary:
        self._alive()
        await asyncio.sleep(self.timing.canary)
        weights, step = self.witness.published[version]
        if step != self.step:
            self.witness.violations.append(f"the canary of version {version} is asked for at step {self.step}")
        return Canary(version, CANARIES, self.witness.canary(weights))

    async def save_checkpoint(self, logs: dict[str, int] | None = None) -> str:
        self._alive()
        await asyncio.sleep(self.timing.save)
        folder = self.run.path("checkpoints", f"checkpoint-{self.step}", "state.json").parent
        state = {"step": self.step, "consumed": self.consumed, "trained": self.trained, "rows": self.rows}
        write_json(folder / "state.json", state)
        complete = folder.with_name(f"step-{self.step}")
        if not complete.exists():
            os.replace(folder, complete)
        return str(complete)

    async def save_trained(self) -> str:
        write_json(
            self.run.path("adapter", "state.json"), {"step": self.step, "trained": self.trained, "rows": self.rows}
        )
        return str(self.run.folder / "adapter")

    async def close(self) -> None:
        self.gone = True

    def _alive(self) -> None:
        if self.gone:
            raise ActorError("the actor's process is gone")


class SimulatedHosts:
    """Starts the simulated roles."""

    dtype = "float32"

    def __init__(
        self, run: Run, witness: Witness, max_steps: int, timing: Timing = USUAL, draw: Draw = no_faults,
        actor_dies_at: int | None = None,
    ) -> None:  # fmt: skip
        self.actor: SimulatedActor
        self.witness = witness
        self.model = "simulated"
        self.workers: list[SimulatedWorker] = []
        self._arguments = run, witness, timing, max_steps, actor_dies_at
        self._draw = draw

    async def start_actor(self) -> SimulatedActor:
        self.actor = SimulatedActor(*self._arguments)
        self.actor.model = self.model
        return self.actor

    async def start_worker(self, name: str, model: str) -> SimulatedWorker:
        _, witness, timing, *_ = self._arguments
        fault = self._draw(name, "start")
        await asyncio.sleep(timing.start if fault != "hangs" else 1e5)
        if fault:
            raise WorkerError("the engine did not start")
        self.workers.append(SimulatedWorker(name, witness, timing, self._draw))
        return self.workers[-1]

    async def close(self) -> None:
        for role in (self.actor, *self.workers):
            await role.close()


# task and tokens ------------------------------------------------------------------------------------------------------
class Letters:
    """A tokenizer of single characters; serial numbers are tokens of their own."""

    eos_token_id = pad_token_id = END
    chat_template = "simulated"

    def apply_chat_template(
        self, messages: list[Message], tools: Any, add_generation_prompt: bool, tokenize: bool = True, **_: Any
    ) -> Any:
        text = "".join(f"<{message['role']}>{message['content']}<end>\n" for message in messages)
        text += "<assistant>" if add_generation_prompt else ""
        return self.encode(text) if tokenize else text

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(letter) + 10 for letter in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        end = "" if skip_special_tokens else "<end>"
        return "".join(str(one) if one >= FIRST_SERIAL else end if one == END else chr(one - 10) for one in ids)


def _row_of(prompt: Sequence[int]) -> int | None:
    found = re.search(r"row (\d+)", Letters().decode([one for one in prompt if one == END or one >= 10]))
    return int(found[1]) if found else None


def simulated_rows(count: int) -> list[Row]:
    return [{"id": f"r{n}", "prompt": [{"role": "user", "content": f"row {n}"}]} for n in range(count)]


class SimulatedTask(Task, frozen=True):
    """The reward is a digit of the serial; the world says "go on" until the last turn."""

    seconds: float = 0.1
    broken: float = 0.0
    """Share of the rollouts whose scoring fails."""
    masked: float = 0.0

    async def reply(self, rollout: Rollout) -> list[Message]:
        return [{"role": "user", "content": "go on"}] if len(rollout.turns) < self.max_turns else []

    async def score(self, rollout: Rollout) -> Score:
        await asyncio.sleep(self.seconds)
        chance = random.Random(f"{rollout.row['id']} {len(rollout.text)}{rollout.text[-3:]}").random()
        if chance < self.broken:
            raise OSError("the judge does not answer")
        if chance < self.broken + self.masked:
            return Score(reward=None, masked=True)
        return Score(reward=int(rollout.text[-1]) / 9, parts={"last_digit": float(rollout.text[-1])})


# a whole training -----------------------------------------------------------------------------------------------------
def make_config(**overrides: Any) -> Config:
    """Batches of 4 groups of 2; keys with dots go into their section."""
    values: dict[str, Any] = {
        "task": {"name": "decisions"},
        "backend": "distributed",
        "training": {"batch": 8, "group_size": 2, "save_steps": 2},
        "sampling": {"completion_limit": 4},
        "distributed": {"workers": 2, "in_flight": 4, "turn_deadline": 60, "sync_deadline": 30, "canary_deadline": 5},
        "rewards": {"max_unscored": 0.5},
    }
    for key, value in overrides.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return parse_config(values)


class StopAfter:
    """Asks to stop when it has been looked at so many times: once a batch."""

    def __init__(self, batches: int = 10**9) -> None:
        self.batches = batches

    def requested(self, step_seconds: float) -> bool:
        self.batches -= 1
        return self.batches <= 0


async def training(
    folder: Path, config: Config, hosts: SimulatedHosts, task: Task, rows: int, stop: StopAfter | None = None
) -> str | None:
    """The orchestrator on simulated roles."""

    async def read(state: ActorState) -> tuple[Chat, Sequence[int]]:
        limit = config.sampling.vllm.max_length
        return Chat(Letters(), state.end_ids, limit), range(rows)  # type: ignore[arg-type]

    run = Run(folder, config)
    return await train(config, task, simulated_rows(rows), run, stop or StopAfter(), hosts, read)


def main() -> None:
    """One attempt in real time, quick enough to be killed many times; exit status 0 = trained to the end."""
    folder = Path(sys.argv[1])
    config = make_config(distributed__workers=3, training__save_steps=3, distributed__overlap=1)
    timing = Timing(
        lognormal(0, 0.01, 0.5), train=0.02, publish=0.002, load=0.002, canary=0.001, start=0.01, save=0.002
    )
    witness = Witness(bound=1, process=int(sys.argv[2]))
    hosts = SimulatedHosts(Run(folder, config), witness, 30, timing)
    asyncio.run(training(folder, config, hosts, SimulatedTask(seconds=0.002), rows=22))
    assert not witness.violations, witness.violations


if __name__ == "__main__":
    main()
