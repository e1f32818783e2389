"""The local backend: this machine, TRL's GRPOTrainer, LoRA or full fine-tuning.

Owns the rollouts that feed the trainer, and when it stops. Must not know task names or notebooks.

    python -m lib.run train-child outputs/decisions
"""

from __future__ import annotations

import json
import logging
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import WorkbenchError, memory, models, program, without
from lib.config import Config, SamplingSection
from lib.engine import ADVICE, vllm_environment
from lib.generate import Chat, Sample, batched, chat_of, check_turns
from lib.patience import Patience
from lib.rollout import check_unscored, collect
from lib.room import within_room
from lib.runfolder import Run
from lib.task import Row, Task
from lib.tools import check_tools
from lib.trainer import Batch, make_trainer_class, to_batch
from lib.training import (
    MaskedWatch,
    StopSignal,
    complete_checkpoint,
    explain,
    kept_rows,
    last_checkpoint,
    make_trainer,
    rollout_record,
    save_trained,
    say_step,
    step_metrics,
    train_or_load,
    write_csv,
)

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)


class LocalError(WorkbenchError, RuntimeError):
    """This machine cannot run the config; the message says what to change."""


def train(config: Config, task: Task, rows: Sequence[Row], run: Run, stop: StopSignal) -> Path | None:
    """Train to the end, or until `stop` asks; returns the output folder, or None where it stopped early."""
    _check_machine(config)
    # TRL imports all of vLLM where it is installed: seconds that only a run that samples with it should pay.
    with without(*(["vllm"] if config.sampling.engine != "vllm" else [])):
        make_trainer_class()
    source = models.resolve_model(config, rows)
    if config.model.name != models.STARTER:  # a toy fits anywhere
        memory.check(config, models.load_shape(source, config.model))
    tokenizer = models.load_tokenizer(source, config.model)
    model = models.load_model(source, config.model, train_all=not config.lora.enabled, purpose="train")
    chat = chat_of(config, model, tokenizer)
    model.generation_config.eos_token_id = sorted(chat.end_ids)  # TRL reads them there
    check_tools(chat, rows)
    kept = kept_rows(rows, chat, config)
    if task.max_turns > 1:
        check_turns(chat, rows[kept[0]])
    checkpoint = last_checkpoint(run)
    run.cut_logs(json.loads((checkpoint / "logs.json").read_text()) if checkpoint else {})
    with _engine(config.sampling):
        trainer = make_trainer(config, model, tokenizer, kept, run)
    trainer.source = RolloutSource(config, task, rows, chat, run)
    trainer.add_callback(_callbacks(run, trainer, stop))
    if checkpoint:
        logger.info("training: resuming from %s", checkpoint.name)
    try:
        train_or_load(trainer, checkpoint)
    except Exception as error:
        reason = explain(error, trainer.phase, config, run)
        if reason is None:
            raise
        raise LocalError(reason) from error
    if config.training.completions_csv:
        write_csv(run, config.training.completions_csv)
    if trainer.state.global_step < trainer.state.max_steps:
        return None
    return save_trained(trainer, run)


class RolloutSource:
    """Fills TRL's generation from the task's rollouts, and writes every one of them to rollouts.jsonl."""

    def __init__(self, config: Config, task: Task, rows: Sequence[Row], chat: Chat, run: Run) -> None:
        self.config, self.task, self.rows, self.chat, self.run = config, task, rows, chat, run
        self.passes_before: int | None = None
        """Forward-backward passes of earlier processes: TRL counts from 0 again after a resume."""
        self.masked = MaskedWatch()

    def __call__(self, trainer: Any, indices: list[Any]) -> Batch:
        self.chat.end_ids = frozenset(trainer.eos_token_ids)
        group, rewards = trainer.num_generations, self.config.rewards
        patience = Patience(rewards.world_seconds, rewards.score_seconds)
        rows = [self.rows[index] for index in indices]
        scored = collect(self.task, rows, batched(self.chat, self._sample(trainer)), patience)
        step = trainer.state.global_step + 1
        if self.passes_before is None:
            self.passes_before = trainer.state.global_step * self.config.training.accumulation
        micro_step = self.passes_before + trainer._step
        self.masked.note(sum(s.score.masked for s in scored) / len(scored), step)
        self.run.append("rollouts.jsonl", (rollout_record(s, i, group, step, micro_step) for i, s in enumerate(scored)))
        check_unscored((s.score for s in scored), rewards.max_unscored, f"step {step}")
        return to_batch(scored, group)

    def _sample(self, trainer: Any) -> Sample:
        """TRL's engine: vLLM ends an answer where the conversation is full by itself, the other one has to be told."""
        generations = trainer.num_generations  # engines take all copies of a prompt at once, on the first turn only

        def sample(prompts: list[list[int]]) -> tuple[list[list[int]], list[list[float]] | None]:
            nonlocal generations
            copies, generations = generations, 1
            outputs, logprobs = trainer._generate_single_turn(prompts, None, {}, copies)
            return outputs, logprobs

        def ask(prompts: list[list[int]], most: int) -> list[list[int]]:
            trainer.generation_config.max_new_tokens = most
            return sample(prompts)[0]

        if self.config.sampling.engine == "vllm":
            return sample
        return within_room(ask, self.config.sampling.completion_limit, self.chat.room, self.chat.end_ids)


@contextmanager
def _engine(sampling: SamplingSection) -> Iterator[None]:
    """While TRL makes a trainer: the vLLM engine that it starts in this process is as configured, and a failure of it
    reads like that of an engine in a process of its own (lib/hosts.py, lib/rpc). There it cannot be: its weights are
    handed over within the memory of the GPU."""
    if sampling.engine != "vllm":
        yield
        return
    ours = sampling.vllm
    logger.info(
        "engine: starting vLLM, which takes %.0f %% of the GPU's memory; the first start takes minutes",
        100 * ours.memory_share,
    )
    os.environ.update(vllm_environment())
    from trl.generation import vllm_generation

    original: Any = vllm_generation.LLM
    configured = partial(original, enforce_eager=ours.enforce_eager, block_size=ours.block_size)
    vllm_generation.LLM = configured
    try:
        yield
    except Exception as error:  # whatever vLLM raises
        if isinstance(error, WorkbenchError):
            raise
        said = "".join(traceback.format_exception(error)).splitlines()
        cause = program.explain(said, ADVICE) or f" It said: {type(error).__name__}: {error}"
        raise LocalError(f"vLLM did not start in this process.{cause}") from error
    finally:
        vllm_generation.LLM = original


def _check_machine(config: Config) -> None:
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus > 1:
        raise LocalError(
            f"{gpus} GPUs are visible and the local backend uses one: set CUDA_VISIBLE_DEVICES=0, so none idles"
        )
    if config.sampling.engine == "vllm" and not gpus:
        raise LocalError(
            "sampling.engine vllm needs a GPU in the local backend (TRL's weight sync is CUDA only): set it to hf"
        )
    models.check_liger(config.model)


def _callbacks(run: Run, trainer: Any, stop: StopSignal) -> TrainerCallback:
    from transformers import TrainerCallback

    training = run.config.training
    window = training.passes_per_generation * training.iterations
    started = began = time.monotonic()

    class Follow(TrainerCallback):
        """Writes metrics and progress, completes checkpoints, and stops where asked."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            metrics = step_metrics(logs)
            if metrics is None:
                return
            seconds = round(time.monotonic() - started, 3)
            run.append("metrics.jsonl", [{"step": state.global_step, "time": seconds, **metrics}])
            say_step(metrics, state.global_step, state.max_steps)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal began
            began = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wanted = stop.requested(time.monotonic() - began)
            if state.global_step == 1:
                logger.info("memory: the first step took at most %s", models.peak_memory())
            boundary = (state.global_step * training.accumulation) % window == 0
            if wanted and boundary and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            complete_checkpoint(run, state.global_step, run.log_sizes())

    return Follow()
