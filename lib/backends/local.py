"""The local backend: this machine, TRL's GRPOTrainer, LoRA or full fine-tuning.

Owns the mapping from config to TRL, the rollout source, checkpoints and logs. Must not know task names or notebooks.

    python -m lib.run train-child outputs/decisions
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lib import WorkbenchError, models, without
from lib.config import Config
from lib.generate import Chat, Sample, batched, chat_of, check_turns, within_limit
from lib.patience import Patience
from lib.rollout import Scored, check_unscored, collect, to_tokens
from lib.room import within_room
from lib.runfolder import Run, atomic_file, plain, read_lines
from lib.task import ROW_PART, Row, Task
from lib.tools import check_tools
from lib.trainer import Batch, finished_reward, make_trainer_class

if TYPE_CHECKING:
    from transformers import TrainerCallback

logger = logging.getLogger(__name__)


_MANY_MASKED = 0.2
_LITTLE_DISK = 4 * 2**20
"""Bytes below which a failed write is put down to a full disk."""


class StopSignal(Protocol):
    def requested(self, step_seconds: float) -> bool: ...


class LocalError(WorkbenchError, RuntimeError):
    """This machine cannot run the config; the message says what to change."""


def train(config: Config, task: Task, rows: Sequence[Row], run: Run, stop: StopSignal) -> Path | None:
    """Train to the end, or until `stop` asks; returns the output folder, or None where it stopped early."""
    _check_machine(config)
    # TRL imports all of vLLM where it is installed: seconds that only a run that samples with it should pay.
    with without(*(["vllm"] if config.sampling.engine != "vllm" else [])):
        make_trainer_class()
    source = models.resolve_model(config, rows)
    tokenizer = models.load_tokenizer(source, config.model)
    model = models.load_model(source, config.model, train_all=not config.lora.enabled)
    chat = chat_of(config, model, tokenizer)
    check_tools(chat, rows)
    kept = _kept_rows(rows, chat, config.sampling.prompt_limit)
    _check_rows(config, len(kept))
    if task.max_turns > 1:
        check_turns(chat, rows[kept[0]])
    checkpoint = last_checkpoint(run)
    run.cut_logs(json.loads((checkpoint / "logs.json").read_text()) if checkpoint else {})
    trainer = _make_trainer(config, model, tokenizer, kept, run)
    trainer.source = RolloutSource(config, task, rows, chat, run)
    trainer.add_callback(_callbacks(run, trainer, stop))
    if checkpoint:
        logger.info("training: resuming from %s", checkpoint.name)
    try:
        _train_or_load(trainer, checkpoint)
    except Exception as error:
        if models.is_out_of_memory(error):
            raise LocalError(models.out_of_memory_advice(trainer.phase, config)) from error
        if free_disk(run) < _LITTLE_DISK:  # torch and safetensors each say it in their own words
            raise LocalError(
                f"the disk is full: {free_disk(run) / 2**20:.0f} MiB are free where the run is. Free some space there"
            ) from error
        raise
    if config.training.completions_csv:
        write_csv(run, config.training.completions_csv)
    if trainer.state.global_step < trainer.state.max_steps:
        return None
    return _save(trainer, run, "adapter" if config.lora.enabled else "model")


def _train_or_load(trainer: Any, checkpoint: Path | None) -> None:
    """Train on from a checkpoint; from the very last one only load it (TRL would add a step)."""
    if checkpoint is None:
        trainer.train()
        return
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    if state["global_step"] < state["max_steps"]:
        trainer.epochs_done = int(state["epoch"])
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    trainer._load_from_checkpoint(str(checkpoint))
    trainer.state.global_step = trainer.state.max_steps = state["global_step"]


def free_disk(run: Run) -> int:
    """Bytes free where the run folder is."""
    return shutil.disk_usage(run.folder).free


def _kept_rows(rows: Sequence[Row], chat: Chat, limit: int) -> list[int]:
    """The rows to train on: prompts over the limit are counted and left out."""
    kept = within_limit(rows, chat, limit)
    dropped = len(rows) - len(kept)
    logger.info("training: %d rows, %d dropped over sampling.prompt_limit %d tokens", len(kept), dropped, limit)
    if not kept:
        raise LocalError(f"all {len(rows)} prompts are longer than sampling.prompt_limit {limit}: raise it")
    return kept


def _check_rows(config: Config, rows: int) -> None:
    """TRL drops an incomplete batch: with fewer rows than one sampling needs it would train on nothing, silently."""
    training = config.training
    prompts = training.batch * training.passes_per_generation // training.group_size
    if rows < prompts:
        raise LocalError(
            f"one sampling takes {prompts} prompts (batch x steps_per_generation / group_size) and there are only "
            f"{rows} rows: set training.batch to at most {rows * training.group_size // training.passes_per_generation}"
        )


def last_checkpoint(run: Run) -> Path | None:
    """The newest complete checkpoint: a step-N folder gets its name only once everything is in it."""
    for unfinished in (run.folder / "checkpoints").glob("checkpoint-*"):
        shutil.rmtree(unfinished)  # a kill or a full disk came in between
    found = run.checkpoints()
    return found[-1] if found else None


class RolloutSource:
    """Fills TRL's generation from the task's rollouts, and writes every one of them to rollouts.jsonl."""

    def __init__(self, config: Config, task: Task, rows: Sequence[Row], chat: Chat, run: Run) -> None:
        self.config, self.task, self.rows, self.chat, self.run = config, task, rows, chat, run
        self.passes_before: int | None = None
        """Forward-backward passes of earlier processes: TRL counts from 0 again after a resume."""
        self.warned = False

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
        self._warn_of_masked(scored, step)
        self.run.append("rollouts.jsonl", (_record(s, i, group, step, micro_step) for i, s in enumerate(scored)))
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

    def _warn_of_masked(self, scored: Sequence[Scored], step: int) -> None:
        """Say it once: masked answers have no gradient, so a policy that drifts into them is not pushed back."""
        share = sum(s.score.masked for s in scored) / len(scored)
        if share > _MANY_MASKED and not self.warned:
            self.warned = True
            logger.warning(
                "step %d: %.0f%% of the answers are masked by the task as invalid, and nothing pushes the policy back "
                "from them: score them low instead (task.on_invalid: zero, say), or raise training.beta",
                step,
                100 * share,
            )


def to_batch(scored: Sequence[Scored], group: int) -> Batch:
    """Rollouts as TRL takes them; unscored and masked ones get reward None and an all-zero mask."""
    tokens = [to_tokens(s.rollout) for s in scored]
    rewards = [None if s.score.masked else s.score.reward for s in scored]
    masks = [
        row.mask if reward is not None else [0] * len(row.mask) for row, reward in zip(tokens, rewards, strict=True)
    ]
    logprobs = [row.logprobs for row in tokens]
    return Batch(
        prompt_ids=[row.prompt_ids for row in tokens],
        output_ids=[row.output_ids for row in tokens],
        mask=masks,
        logprobs=None if any(row is None for row in logprobs) else [row for row in logprobs if row is not None],
        rewards=rewards,
        metrics=batch_metrics(scored, rewards, group),
    )


def batch_metrics(scored: Sequence[Scored], rewards: Sequence[float | None], group: int) -> dict[str, float]:
    """Shares of unscored and masked rollouts, of groups with signal and of empty groups, and the mean of every part."""
    groups = [rewards[i : i + group] for i in range(0, len(rewards), group)]
    metrics = {
        "rollouts/unscored": sum(s.score.reward is None and not s.score.masked for s in scored) / len(scored),
        "rollouts/masked": sum(s.score.masked for s in scored) / len(scored),
        "groups/useful": sum(len({r for r in g if r is not None}) > 1 for g in groups) / len(groups),
        "groups/empty": sum(all(r is None for r in g) for g in groups) / len(groups),
    }
    totals: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for s in scored:
        for name, value in s.score.parts.items():
            if value is not None and not name.startswith(ROW_PART):
                totals[name] += value  # type: ignore[assignment]
                counts[name] += 1
    return metrics | {f"parts/{name}": totals[name] / counts[name] for name in totals}


def write_csv(run: Run, name: str) -> Path:
    """Every logged completion as one CSV row; parts become columns."""
    path = run.path(name)
    parts = sorted({part for record in read_lines(run.folder / "rollouts.jsonl") for part in record["parts"]})
    columns = ["step", "micro_step", "group", "row", "prompt", "completion", "reward", "masked", "stop", *parts]
    with atomic_file(path, newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        for record in read_lines(run.folder / "rollouts.jsonl"):
            writer.writerow(record | record["parts"])
    return path


def _record(scored: Scored, index: int, group: int, step: int, micro_step: int) -> dict[str, Any]:
    """One line of rollouts.jsonl. micro_step counts forward-backward passes before this batch was sampled."""
    rollout, score = scored
    return {
        "step": step,
        "micro_step": micro_step,
        "group": index // group,
        "row": rollout.row["id"],
        "prompt": rollout.row["prompt"][-1].get("content"),
        "completion": rollout.text,
        "reward": score.reward,
        "masked": score.masked,
        "parts": score.parts,
        "notes": score.notes,
        "stop": rollout.stop,
        "tokens": sum(len(turn.output_ids or ()) for turn in rollout.turns),
    }


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
    if config.model.liger and not gpus:
        raise LocalError("model.liger needs a GPU (its kernels are Triton): set it to false")


def trl_arguments(config: Config, run: Run, checkpointing: bool) -> dict[str, Any]:
    """TRL's GRPOConfig from ours: every knob by its TRL name."""
    import torch

    training, sampling = config.training, config.sampling
    gpu = torch.cuda.is_available()
    dtype = models.torch_dtype(config.model)
    return {
        "output_dir": str(run.path("checkpoints", "")),
        "max_steps": training.steps,
        "num_train_epochs": training.epochs,
        "learning_rate": training.learning_rate,
        "warmup_steps": training.warmup,
        "lr_scheduler_type": training.schedule,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "per_device_train_batch_size": training.batch,
        "gradient_accumulation_steps": training.accumulation,
        "steps_per_generation": training.steps_per_generation,
        "num_generations": training.group_size,
        "num_iterations": training.iterations,
        "beta": training.beta,
        "loss_type": training.loss_type,
        "epsilon": training.clip_low,
        "epsilon_high": training.clip_high,
        "scale_rewards": training.reward_scaling,
        "max_completion_length": sampling.completion_limit,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "use_vllm": sampling.engine == "vllm",
        "vllm_gpu_memory_utilization": sampling.vllm.memory_share,
        "vllm_max_model_length": sampling.vllm.max_length,
        "vllm_importance_sampling_mode": "token_truncate",  # the default can zero whole answers
        "trust_remote_code": config.model.trust_remote_code,
        "seed": training.seed,
        "gradient_checkpointing": checkpointing,
        "use_liger_kernel": config.model.liger,
        "use_cpu": not gpu,
        "bf16": gpu and dtype == torch.bfloat16,
        "fp16": gpu and dtype == torch.float16,
        "save_strategy": "steps",
        "save_steps": training.save_steps,
        "logging_steps": 1,
        "disable_tqdm": True,
        **_tracker(config, run),
    }


def _tracker(config: Config, run: Run) -> dict[str, Any]:
    tracker = config.tracker
    if tracker.name == "wandb":
        # The same id after a kill: a resumed run goes on in the same chart.
        os.environ.setdefault("WANDB_PROJECT", tracker.project)
        os.environ.setdefault("WANDB_RUN_ID", f"{run.name}-{int((run.folder / 'provenance.json').stat().st_ctime)}")
        os.environ.setdefault("WANDB_RESUME", "allow")
    return {
        "report_to": "none" if tracker.name == "none" else tracker.name,
        "run_name": tracker.run or run.name,
        "project": tracker.project,
    }


def _make_trainer(config: Config, model: Any, tokenizer: Any, kept: Sequence[int], run: Run) -> Any:
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig

    # TRL warns about every rollout without a reward, reward and prompt included: here they are counted instead.
    logging.getLogger("trl.trainer.grpo_trainer").setLevel(logging.ERROR)
    checkpointing = models.gradient_checkpointing(config.model, model)
    if config.sampling.engine == "vllm":
        logger.info(
            "engine: starting vLLM, which takes %.0f %% of the GPU's memory; the first start takes minutes",
            100 * config.sampling.vllm.memory_share,
        )
    trainer = make_trainer_class()(
        model=model,
        reward_funcs=finished_reward,
        args=GRPOConfig(**trl_arguments(config, run, checkpointing)),
        # The dataset is the rows' numbers: the rows stay on disk, and a number rides through TRL as its prompt.
        train_dataset=Dataset.from_dict({"prompt": [str(index) for index in kept]}),
        processing_class=tokenizer,
        peft_config=models.lora_config(config.lora, model),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _callbacks(run: Run, trainer: Any, stop: StopSignal) -> TrainerCallback:
    from transformers import TrainerCallback

    training = run.config.training
    window = training.passes_per_generation * training.iterations
    started = began = time.monotonic()

    class Follow(TrainerCallback):
        """Writes metrics and progress, completes checkpoints, and stops where asked."""

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if not logs or "loss" not in logs:  # the last log of all is a summary
                return
            numbers = plain({name: value for name, value in logs.items() if not name.startswith("rewards/")})
            run.append(
                "metrics.jsonl", [{"step": state.global_step, "time": round(time.monotonic() - started, 3), **numbers}]
            )
            # A step that goes on with samples of an earlier one has no reward of its own.
            reward = "none" if numbers.get("reward") is None else f"{numbers['reward']:.4f}"
            empty = numbers.get("groups/empty")
            note = f" ({empty:.0%} of the groups without a valid answer)" if empty else ""
            progress = f"{state.global_step}/{state.max_steps}"
            logger.info("step %s loss %.4f reward %s%s", progress, numbers["loss"], reward, note)

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal began
            began = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            wanted = stop.requested(time.monotonic() - began)
            boundary = (state.global_step * training.accumulation) % window == 0
            if wanted and boundary and state.global_step < state.max_steps:
                control.should_save = control.should_training_stop = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            complete_checkpoint(run, state.global_step)

    return Follow()


def complete_checkpoint(run: Run, step: int) -> Path:
    """Note the logs' sizes in TRL's checkpoint and give it its name: from then on it counts."""
    written = run.folder / "checkpoints" / f"checkpoint-{step}"
    (written / "logs.json").write_text(json.dumps(run.log_sizes()))
    complete = written.with_name(f"step-{step}")
    if complete.exists():
        shutil.rmtree(complete)
    os.replace(written, complete)
    logger.info("checkpoint saved: step-%d", step)
    return complete


def _save(trainer: Any, run: Run, name: str) -> Path:
    final = run.path(name)
    temporary = final.with_name(f".{name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    trainer.save_model(str(temporary))
    trainer.processing_class.save_pretrained(str(temporary))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    logger.info("training finished: %s", final)
    return final
