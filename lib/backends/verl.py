"""The verl backend: verl's own trainer on Ray, in verl's environment, with the workbench's rewards and rollouts.

Owns the way from a config to verl's process and back into the run folder. Must not know how verl trains, task names or
notebooks.

    python -m lib.run train-child outputs/my-run
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lib import PROJECT_ROOT, WorkbenchError, models
from lib.config import Config
from lib.generate import check_turns, unloaded_chat
from lib.places import locate
from lib.program import Process, Program
from lib.runfolder import Run, atomic_file
from lib.task import Row, Task
from lib.tools import check_tools
from lib.training import StopSignal, kept_rows, say_step, write_csv
from lib.verl import batches, check, checkpoints, cluster, overrides
from lib.verl.environment import interpreter
from lib.verl.parquet import check_parquet, write_parquet
from lib.verl.record import last_step

logger = logging.getLogger(__name__)

LOOP = "workbench"
"""Our agent loop (lib/verl/agent_loop.py)."""

_STOP, _ERROR = "stop", "error.txt"
_FILTER = "data.filter_overlong_prompts"
_POLL = 0.5
_DEAD = re.compile(r"EngineCore encountered a fatal error|EngineDeadError|Engine core \S+ died|raylet .* died")
"""verl waits for ever for an engine that is gone."""
_GRACE = 60.0
"""Seconds in which it may still notice."""
_KV_CACHE_GB = "1"
"""Of a vLLM engine on the processor, where nothing else says it."""

_ADVICE = (
    (r"CUDA out of memory|OutOfMemoryError", "set training.batch or sampling.vllm.memory_share down, or verl.gpus up"),
    (r"No available memory for the cache blocks", "set sampling.vllm.memory_share up, or max_length down"),
    (
        r"no materializable trajectories",
        "every rollout failed, and the first `Error in _run_prompt` of verl/log.txt says why (verl's environment lacks "
        "a package that the task needs, for example)",
    ),
    (r"is less than total desired GPUs", "verl.gpus or verl.nodes is more than the Ray cluster has free"),
)


class VerlTrainingError(WorkbenchError, RuntimeError):
    """verl ended before its time; the message says why."""


def train(config: Config, task: Task, rows: Sequence[Row], run: Run, stop: StopSignal) -> Path | None:
    """Train to the end, or until `stop` asks; returns the output folder, or None where it stopped early."""
    python = interpreter(config.verl.python)
    machines = cluster.cluster_of(config)
    if config.verl.ray_address:
        cluster.probe(config.verl.ray_address)
    folder = run.path("verl", "")
    folder.mkdir(parents=True, exist_ok=True)
    done = cluster.check_checkpoints(run.folder / checkpoints.FOLDER)
    source = models.resolve_model(config, rows)
    chat = unloaded_chat(config, source)
    check_tools(chat, rows)
    kept = kept_rows(rows, chat, config)
    if task.max_turns > 1:
        check_turns(chat, rows[kept[0]])
    written = write_parquet(task, run, kept=kept)
    check_parquet([written.folder / name for name in ("train.parquet", "test.parquet")])
    logger.info("%s", batches.describe_epoch(config, len(kept)))
    told = _told(config, run, source, machines, _loop(folder))
    answer = check.check(told, python, locate(config.paths.cache) / "verl")
    for text in (*overrides.notes(config), *answer.notes):
        logger.info("verl: %s", text)
    if done:
        logger.info("training: resuming from global_step_%d", done)
    steps = batches.steps(config, len(kept)) * config.steps_per_batch
    stopped = _run(config, run, told, python, machines, stop, steps)
    converted = checkpoints.convert_all(run, python, _base(config, source))
    if config.training.completions_csv:
        write_csv(run, config.training.completions_csv)
    if stopped:
        return None
    return _publish(run, converted)


def _told(config: Config, run: Run, source: str, machines: cluster.Cluster, loop: dict[str, Any]) -> list[str]:
    prefix = "actor_rollout_ref.rollout.agent"
    own = [f"{prefix}.{key}={overrides.hydra(value)}" for key, value in loop.items()]
    own.append(f"{_FILTER}=false")  # kept_rows did it, by all that the loop shows: tools and date as well
    told = overrides.overrides(config, run.folder.resolve(), run.folder.resolve() / "verl", source, machines)
    last = len(told) - len(config.verl.overrides)  # the user's own come last, and win
    return [*(one for one in told[:last] if not one.startswith(_FILTER)), *own, *told[last:]]


def _loop(folder: Path) -> dict[str, Any]:
    """verl plays every row through our agent loop: chat, turns, scores and masks as with the other backends."""
    file = folder / "agent_loop.yaml"
    order = str((folder / "reward.json").resolve())
    loop = {"name": LOOP, "_target_": "lib.verl.agent_loop.WorkbenchLoop", "order": order}
    with atomic_file(file) as handle:
        handle.write(json.dumps([loop]))  # JSON is YAML
    return {"default_agent_loop": LOOP, "agent_loop_config_path": str(file.resolve())}


def _run(
    config: Config,
    run: Run,
    told: Sequence[str],
    python: str,
    machines: cluster.Cluster,
    stop: StopSignal,
    steps: int,
) -> bool:
    """verl's process from its start to its end; whether it was asked to end early. Raises VerlTrainingError."""
    folder = run.folder / "verl"
    for name in (_STOP, _ERROR):
        (folder / name).unlink(missing_ok=True)
    order = folder / "overrides.json"
    with atomic_file(order) as file:
        file.write(json.dumps(list(told), indent=1))
    program = Program(name="verl", log=folder / "log.txt", environment=_environment(run, machines), advice=_ADVICE)
    process = Process(program, [python, "-m", "lib.verl.program", str(order)], {})
    try:
        asked = _follow(run, process, stop, steps)
    finally:
        process.close()
    if process.failed():
        said = folder / _ERROR
        if said.is_file():
            raise VerlTrainingError(said.read_text(encoding="utf-8"))
        raise VerlTrainingError(process.report(process.ending()))
    return asked and last_step(run.folder) < steps


def _follow(run: Run, process: Process, stop: StopSignal, steps: int) -> bool:
    """Say every step as it is logged, and hand on the wish to stop; returns whether there was one."""
    known, asked, began = len(run.metrics()), False, time.monotonic()
    dead = 0.0
    while process.is_alive():
        time.sleep(_POLL)
        if not dead and any(_DEAD.search(line) for line in process.tail()):
            dead = time.monotonic()
        if dead and time.monotonic() - dead > _GRACE:
            process.kill()
            process.wait()
            raise VerlTrainingError(process.report("has lost an engine or its Ray, and waits for it in vain"))
        metrics = run.metrics()
        for record in metrics[known:]:
            say_step(record, record["step"], steps)
        # verl is in its next step already: the money has to pay that one and one more
        seconds = 2 * (metrics[-1].get("step_time") or 0.0) if len(metrics) > known else 0.0
        known = len(metrics)
        if not asked and stop.requested(seconds):
            (run.folder / "verl" / _STOP).touch()
            asked = True
            logger.info("verl: asked to stop after its step, %.0f s after its start", time.monotonic() - began)
    for record in run.metrics()[known:]:
        say_step(record, record["step"], steps)
    return asked


def _environment(run: Run, machines: cluster.Cluster) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH"))))
    told = {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "VERL_USE_EXTERNAL_MODULES": "lib.verl.plugin",
        "VERL_FILE_LOGGER_PATH": str(run.folder / "verl" / "verl_metrics.jsonl"),
        "WORKBENCH_RUN": str(run.folder.resolve()),
        "RAY_USAGE_STATS_ENABLED": "0",
        "HYDRA_FULL_ERROR": "1",
    }
    if machines.cpu:
        told |= {"VERL_PLATFORM": "cpu", "VERL_ENGINE_DEVICE": "cuda"}
        told["VLLM_CPU_KVCACHE_SPACE"] = os.environ.get("VLLM_CPU_KVCACHE_SPACE", _KV_CACHE_GB)
    return told


def _base(config: Config, source: str) -> str:
    return source if config.model.name == models.STARTER else config.model.name


def _publish(run: Run, converted: Sequence[Path]) -> Path:
    """The newest checkpoint as the run's result: whole or not at all."""
    if not converted:
        raise VerlTrainingError("verl ended without a checkpoint: trainer.save_freq was changed by verl.overrides")
    final = run.path("adapter" if run.config.lora.enabled else "model")
    temporary = final.with_name(f".{final.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(converted[-1], temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    logger.info("training finished: %s", final)
    return final
