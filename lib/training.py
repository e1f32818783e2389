"""What every backend on TRL's trainer shares: from a config to a trainer, checkpoints, logs, and why one ended.

Owns TRL's arguments, the names of checkpoints and what makes one complete, and the lines of metrics and rollouts. Must
not know where batches come from, tasks or notebooks.

    python -c "from lib.runfolder import read_run; from lib.training import last_checkpoint; \
               print(last_checkpoint(read_run('outputs/decisions')))"
"""

from __future__ import annotations

import csv
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from lib import WorkbenchError, models
from lib.config import Config
from lib.generate import Chat, within_limit
from lib.rollout import Scored
from lib.runfolder import Run, atomic_file, plain, read_lines
from lib.task import Row
from lib.trainer import finished_reward, make_trainer_class

logger = logging.getLogger(__name__)

_MANY_MASKED = 0.2
_LITTLE_DISK = 4 * 2**20
"""Bytes below which a failed write is put down to a full disk."""


class StopSignal(Protocol):
    def requested(self, step_seconds: float) -> bool: ...


class RowsError(WorkbenchError, ValueError):
    """The rows do not fit the config; the message says what to change."""


class MaskedWatch:
    """Says it once where many answers are masked: they have no gradient, so a policy that drifts into them is not
    pushed back."""

    def __init__(self) -> None:
        self.warned = False

    def note(self, share: float, step: int) -> None:
        """`share`: of the answers of this step."""
        if share > _MANY_MASKED and not self.warned:
            self.warned = True
            logger.warning(
                "step %d: %.0f%% of the answers are masked by the task as invalid, and nothing pushes the policy back "
                "from them: score them low instead (task.on_invalid: zero, say), or raise training.beta",
                step,
                100 * share,
            )


# rows -----------------------------------------------------------------------------------------------------------------
def kept_rows(rows: Sequence[Row], chat: Chat, config: Config) -> list[int]:
    """Numbers of the rows to train on: prompts over the limit are counted and left out.

    Raises RowsError where there are none, or fewer than one sampling takes: TRL drops an incomplete batch, so it would
    train on nothing, silently.
    """
    limit, training = config.sampling.prompt_limit, config.training
    kept = within_limit(rows, chat, limit)
    dropped = len(rows) - len(kept)
    logger.info("training: %d rows, %d dropped over sampling.prompt_limit %d tokens", len(kept), dropped, limit)
    if not kept:
        raise RowsError(f"all {len(rows)} prompts are longer than sampling.prompt_limit {limit}: raise it")
    prompts = training.batch * training.passes_per_generation // training.group_size
    if len(kept) < prompts:
        most = len(kept) * training.group_size // training.passes_per_generation
        raise RowsError(
            f"one sampling takes {prompts} prompts (batch x steps_per_generation / group_size) and there are only "
            f"{len(kept)} rows: set training.batch to at most {most}"
        )
    return kept


# the trainer ----------------------------------------------------------------------------------------------------------
def make_trainer(config: Config, model: Any, tokenizer: Any, rows: Sequence[int], run: Run, **arguments: Any) -> Any:
    """The trainer of a loaded model. `rows`: numbers that ride through TRL as prompts, as the rows stay on disk.

    `arguments` are GRPOConfig's, over those of the config. Its `source` is still to be set.
    """
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig

    # TRL warns about every rollout without a reward, reward and prompt included: here they are counted instead.
    logging.getLogger("trl.trainer.grpo_trainer").setLevel(logging.ERROR)
    checkpointing = models.gradient_checkpointing(config.model, model)
    trainer: Any = make_trainer_class()(
        model=model,
        reward_funcs=finished_reward,
        args=GRPOConfig(**trl_arguments(config, run, checkpointing) | arguments),
        train_dataset=Dataset.from_dict({"prompt": [str(index) for index in rows]}),
        processing_class=tokenizer,
        peft_config=models.lora_config(config.lora, model),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


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
        "router_aux_loss_coef": 0.0,  # TRL would add the base's own load balancing loss: 0.9 times it for gpt-oss
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
        **({"vllm_mode": "server", "vllm_server_base_url": sampling.vllm.server} if sampling.vllm.server else {}),
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


def finish_tracker(config: Config) -> None:
    """Have the tracker hand over what it holds. In the thread that trained, where a process ends without its exit."""
    if config.tracker.name == "wandb":
        import wandb

        wandb.finish()
    elif config.tracker.name == "trackio":
        import trackio

        with suppress(RuntimeError):  # it was finished when training was
            trackio.finish()  # type: ignore[no-untyped-call]


def train_or_load(trainer: Any, checkpoint: Path | None) -> None:
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


def explain(error: BaseException, phase: str, config: Config, run: Run) -> str | None:
    """What to do about memory or a disk that ran out; None for any other error. `phase`: what was being done."""
    if models.is_out_of_memory(error):
        return models.out_of_memory_advice(phase, config)
    free = shutil.disk_usage(run.folder).free
    if free < _LITTLE_DISK:  # torch and safetensors each say it in their own words
        return f"the disk is full: {free / 2**20:.0f} MiB are free where the run is. Free some space there"
    return None


# checkpoints ----------------------------------------------------------------------------------------------------------
def last_checkpoint(run: Run) -> Path | None:
    """The newest complete checkpoint: a step-N folder gets its name only once everything is in it."""
    for unfinished in (run.folder / "checkpoints").glob("checkpoint-*"):
        shutil.rmtree(unfinished)  # a kill or a full disk came in between
    found = run.checkpoints()
    return found[-1] if found else None


def complete_checkpoint(run: Run, step: int, logs: Mapping[str, int], **notes: Any) -> Path:
    """Note the logs' sizes in TRL's checkpoint and give it its name: from then on it counts.

    `notes`: more JSON files beside logs.json, by name without .json.
    """
    written = run.folder / "checkpoints" / f"checkpoint-{step}"
    for name, note in {"logs": logs, **notes}.items():
        (written / f"{name}.json").write_text(json.dumps(note))
    complete = written.with_name(f"step-{step}")
    if complete.exists():
        shutil.rmtree(complete)
    os.replace(written, complete)
    logger.info("checkpoint saved: step-%d", step)
    return complete


def save_trained(trainer: Any, run: Run) -> Path:
    """The trained adapter, or the whole model, in the run folder: whole or not at all."""

    def write(folder: Path) -> None:
        trainer.save_model(str(folder))
        trainer.processing_class.save_pretrained(str(folder))

    return publish_trained(run, write)


def publish_trained(run: Run, write: Callable[[Path], object]) -> Path:
    """What `write` puts into a folder (it makes it), as the run's adapter or model: whole or not at all."""
    final = run.path("adapter" if run.config.lora.enabled else "model")
    temporary = final.with_name(f".{final.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    logger.info("training finished: %s", final)
    return final


# logs -----------------------------------------------------------------------------------------------------------------
def step_metrics(logs: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A step's figures out of what TRL logs, as JSON takes them; None for the summary that it logs last of all."""
    if not logs or "loss" not in logs:
        return None
    return dict(plain({name: value for name, value in logs.items() if not name.startswith("rewards/")}))


def say_step(metrics: Mapping[str, Any], step: int, max_steps: int) -> None:
    """A step's line of progress."""
    # A step that goes on with samples of an earlier one has no reward of its own.
    reward = "none" if metrics.get("reward") is None else f"{metrics['reward']:.4f}"
    empty = metrics.get("groups/empty")
    note = f" ({empty:.0%} of the groups without a valid answer)" if empty else ""
    loss = "none" if metrics.get("loss") is None else f"{metrics['loss']:.4f}"  # of no token at all, it is no number
    logger.info("step %s loss %s reward %s%s", f"{step}/{max_steps}", loss, reward, note)


def rollout_record(scored: Scored, index: int, group: int, step: int, micro_step: int) -> dict[str, Any]:
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
