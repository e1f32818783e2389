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

from lib import WorkbenchError, models
from lib.config import Config
from lib.generate import check_turns, unloaded_chat
from lib.places import locate
from lib.program import Process, Program
from lib.runfolder import Run, atomic_file
from lib.task import Row, Task
from lib.tools import check_tools
from lib.training import StopSignal, kept_rows, publish_trained, say_step, write_csv
from lib.verl import batches, check, checkpoints, cluster, overrides
from lib.verl.environment import import_path, interpreter
from lib.verl.parquet import FILES, check_parquet, write_parquet
from lib.verl.program import ERROR
from lib.verl.record import STOP
from lib.verl.reward import ORDER

logger = logging.getLogger(__name__)

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
    (
        r"InvalidAuthToken",
        "the Ray cluster asks for its token: copy ~/.ray/auth_token of its head to this machine, or set RAY_AUTH_TOKEN "
        "(docs.ray.io, ray-security/token-auth)",
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
    done = cluster.check_checkpoints(run.folder / checkpoints.FOLDER)
    source = _fetched(config, models.resolve_model(config, rows))
    chat = unloaded_chat(config, source)
    check_tools(chat, rows)
    kept = kept_rows(rows, chat, config)
    if task.max_turns > 1:
        check_turns(chat, rows[kept[0]])
    written = write_parquet(task, run, kept=kept)
    check_parquet(written.folder / name for name in FILES.values())
    logger.info("%s", batches.describe_epoch(config, len(kept)))
    _write_loop(written.folder)
    told = overrides.overrides(config, run.folder.resolve(), written.folder, source, machines)
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


def _fetched(config: Config, source: str) -> str:
    """The base policy's folder. A Hub model is looked at before gigabytes are fetched, and fetched but once."""
    if Path(source).is_dir():
        return source
    overrides.check_shape(config, source, models.load_shape(source, config.model).to_dict())
    return str(models.download(source, config.model))


def _write_loop(folder: Path) -> None:
    """verl plays every row through our agent loop: chat, turns, scores and masks as with the other backends."""
    order = str(folder / ORDER)
    loop = {"name": overrides.LOOP, "_target_": "lib.verl.agent_loop.WorkbenchLoop", "order": order}
    with atomic_file(folder / overrides.LOOP_FILE) as handle:
        handle.write(json.dumps([loop]))  # JSON is YAML


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
    for name in (STOP, ERROR):
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
        said = folder / ERROR
        if said.is_file():
            raise VerlTrainingError(said.read_text(encoding="utf-8"))
        raise VerlTrainingError(process.report(process.ending()))
    return asked and run.last_logged() < steps


def _follow(run: Run, process: Process, stop: StopSignal, steps: int) -> bool:
    """Say every step as it is logged, and hand on the wish to stop; returns whether there was one."""
    known, asked, began = len(run.metrics()), False, time.monotonic()
    sizes, dead = run.log_sizes(), 0.0
    while process.is_alive():
        time.sleep(_POLL)
        if not dead and any(_DEAD.search(line) for line in process.tail()):
            dead = time.monotonic()
        if dead and time.monotonic() - dead > _GRACE:
            process.kill()
            process.wait()
            raise VerlTrainingError(process.report("has lost an engine or its Ray, and waits for it in vain"))
        seconds = 0.0
        before, sizes = sizes, run.log_sizes()
        if sizes != before:
            metrics = run.metrics()
            for record in metrics[known:]:
                say_step(record, record["step"], steps)
            # verl is in its next step already: the money has to pay that one and one more
            seconds = 2 * (metrics[-1].get("step_time") or 0.0) if len(metrics) > known else 0.0
            known = len(metrics)
        if not asked and stop.requested(seconds):
            (run.folder / "verl" / STOP).touch()
            asked = True
            logger.info("verl: asked to stop after its step, %.0f s after its start", time.monotonic() - began)
    for record in run.metrics()[known:]:
        say_step(record, record["step"], steps)
    return asked


def _environment(run: Run, machines: cluster.Cluster) -> dict[str, str]:
    told = {
        "PYTHONPATH": import_path(),
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
    return publish_trained(run, lambda folder: shutil.copytree(converted[-1], folder))
