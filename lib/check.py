"""`python -m lib.run check`: one part of a distributed training at a time, before a long one is started.

Owns what each check does and prints. Must not know where the roles run.

    python -m lib.run check reward --config configs/mrl.yaml
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from lib import WorkbenchError
from lib.backends.distributed import open_chat, open_hosts
from lib.config import Config, load_config
from lib.orchestrator import Hosts, sampling_of
from lib.places import locate
from lib.preflight import known_answers
from lib.prepare import prepare
from lib.roles import ActorError, ActorRole, ActorState, Method, RefusedError, Worker, WorkerError
from lib.rollout import finish
from lib.runfolder import Run, default_name, open_run, read_run
from lib.sync import compare
from lib.task import Task, load_task

PARTS = ("rollout", "reward", "sync", "checkpoints")
_ROWS = 3


class CheckError(WorkbenchError, RuntimeError):
    """What was checked does not work; the message says what was found."""


def parser() -> argparse.ArgumentParser:
    shown = argparse.ArgumentParser(
        prog="python -m lib.run check",
        description="Try one part of a distributed training: a worker's answers, the reward, a weight sync with its "
        "proof, or what checkpoints a run has.",
    )
    shown.add_argument("part", choices=PARTS)
    shown.add_argument("--config", required=True, help="a YAML file, e.g. configs/mrl.yaml")
    anything = "run_name, or any config key, dotted (distributed.sync_method=lora); repeatable"
    shown.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help=anything)
    return shown


def check(part: str, config_path: str, overrides: Mapping[str, Any], run_name: str = "") -> int:
    """Print what was found; 0 = it works. Raises WorkbenchError."""
    config = load_config(config_path, overrides)
    name = run_name or default_name(config_path, config.task.name)
    if part == "checkpoints":
        return _checkpoints(config, name)
    task = load_task(config.task.name, **config.task.params)
    run = open_run(f"{name}.check", config)
    prepare(task, run)
    if part == "reward":
        return _reward(task, run)
    work: Callable[[Config, Run, Hosts], Coroutine[Any, Any, int]] = _rollout if part == "rollout" else _sync
    try:
        return finish(_with_hosts(config, run, work))
    except (ActorError, WorkerError) as error:
        raise CheckError(str(error)) from None


async def _with_hosts(config: Config, run: Run, work: Callable[[Config, Run, Hosts], Coroutine[Any, Any, int]]) -> int:
    hosts = open_hosts(config, run)
    try:
        return await work(config, run, hosts)
    finally:
        await hosts.close()


def _reward(task: Task, run: Run) -> int:
    """What gold, wrong, empty and cheating answers earn."""
    records = known_answers(task, run.read_rows("train"), _ROWS)
    for record in records:
        _say(json.dumps(record, ensure_ascii=False))
    unscored = sum(record["reward"] == "unscored" for record in records)
    if unscored:
        raise CheckError(f"{unscored} of {len(records)} answers could not be scored")
    return 0


async def _rollout(config: Config, run: Run, hosts: Hosts) -> int:
    """One worker's answers of the base policy to a few prompts."""
    actor, worker, state = await _started(config, hosts)
    async with _in_time(config, "sync_deadline", "the first weights"):
        await worker.update_weights(await actor.publish(1, config.distributed.sync_method))
    chat = open_chat(config, state)
    sampling = sampling_of(config, chat)
    for row in run.read_rows("train")[:_ROWS]:
        prompt = chat.prompt_ids(row["prompt"], row.get("tools"))
        async with _in_time(config, "turn_deadline", f"an answer to {row['id']}"):
            (turn,) = await worker.generate([prompt], sampling)
        text = chat.turn(prompt, turn.output_ids, turn.logprobs).message.get("content")
        mean = sum(turn.logprobs) / len(turn.logprobs)
        _say(f"{row['id']}: {len(turn.output_ids)} tokens, {turn.stop}, mean log-probability {mean:.3f}: {text!r}")
    return 0


async def _sync(config: Config, run: Run, hosts: Hosts) -> int:
    """The weights by every method of this config, loaded by one worker, with the proof of each."""
    actor, worker, _ = await _started(config, hosts)
    methods: list[Method] = ["reload", "volume", "checkpoint"]
    if config.lora.enabled and config.distributed.sync_method == "lora":
        methods.insert(0, "lora")
    failed = []
    for version, method in enumerate(methods, 1):
        async with _in_time(config, "sync_deadline", f"a sync by {method}"):
            release = await actor.publish(version, method)
            try:
                canary, seconds = await asyncio.gather(actor.canary(version), worker.update_weights(release))
            except RefusedError as error:
                _say(f"{method:<11} REFUSED: {error}")
                failed.append(method)
                continue
            answered = await worker.canary(canary.prompts)
        proof = compare(canary, answered, config.distributed.tolerance, None, hosts.dtype)
        told = "proven" if proof.holds else "NOT PROVEN"
        _say(f"{method:<11} {seconds:7.3f} s  {told}: worst {proof.worst:.1e} {proof.why}".rstrip())
        failed += [] if proof.holds else [method]
    if failed:
        raise CheckError(f"a worker could not prove its weights by {', '.join(failed)}")
    return 0


async def _started(config: Config, hosts: Hosts) -> tuple[ActorRole, Worker, ActorState]:
    async with _in_time(config, "start_deadline", "the actor"):
        actor = await hosts.start_actor()
        state = await actor.initialize()
    async with _in_time(config, "start_deadline", "a worker"):
        return actor, await hosts.start_worker("worker-0", state.model), state


@asynccontextmanager
async def _in_time(config: Config, knob: str, what: str) -> AsyncIterator[None]:
    """Raises CheckError where `what` takes longer than distributed.`knob`."""
    seconds: float = getattr(config.distributed, knob)
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise CheckError(f"waited for {what} longer than distributed.{knob} {seconds:g} s") from None


def _checkpoints(config: Config, name: str) -> int:
    """The complete checkpoints of a run: step, batches consumed, size."""
    folder = locate(config.paths.outputs) / name
    if not (folder / "config.json").is_file():
        raise CheckError(f"there is no run {name!r} in {folder.parent}: give -p run_name=NAME")
    found = read_run(folder).checkpoints()
    for path in found:
        consumed = path / "actor.json"
        batches = f"{json.loads(consumed.read_text())['consumed']} batches, " if consumed.is_file() else ""
        _say(f"{path.name}: {batches}{_megabytes(path):.1f} MB")
    _say(f"{len(found)} complete checkpoints in {folder}")
    return 0


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
