"""verl's own trainer, in a run folder: every step is written there, and it ends after a step where it is asked to.

Owns what happens between verl's steps. It runs in verl's environment, in the process that drives the training, on the
machine that has the run folder; machines that do not see it get what they need through Ray. Must not know configs'
meaning or tasks.

    python -m lib.verl.program --help
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transfer_queue
from verl.plugin.platform import get_platform
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from lib.rollout import Scored
from lib.runfolder import atomic_file, read_run
from lib.verl.advantage import check_judged
from lib.verl.cluster import TRACKER
from lib.verl.machines import Machines
from lib.verl.record import (
    SCORED,
    STOP,
    Answer,
    cut_after,
    in_groups,
    metrics_of,
    records_of,
    scored_from_json,
    scored_of,
)

CHECKPOINTS = "checkpoints"
"""In the folder that verl works in."""

_FIELDS = ["uid", "responses", "reward_model", "extra_fields"]


class RunTrainer(PPOTrainerSync):  # type: ignore[misc]
    """verl's synchronous trainer."""

    def __init__(self, config: Any) -> None:
        self._folder = Path(config.trainer.default_local_dir).parent
        self._machines = Machines(self._folder, get_platform().ray_resource_name())
        if self._machines.staged:
            self._stage(config)
        super().__init__(config)
        self._run = read_run(self._folder.parent)
        self._group: int = config.actor_rollout_ref.rollout.n
        self._per_batch = self._run.config.steps_per_batch
        self._passes = self._run.config.training.passes_per_generation * self._run.config.training.iterations

    def _stage(self, config: Any) -> None:
        """Where machines have disks of their own: the model is brought to each, and checkpoints go by way of these."""
        model = config.actor_rollout_ref.model
        for key in ("path", "tokenizer_path"):
            folder = model.get(key)
            if folder and Path(folder).is_dir():  # else each machine takes it from the Hub
                model[key] = str(self._machines.send(Path(folder), f"model/{key}"))
        config.trainer.default_local_dir = str(self._machines.staging / CHECKPOINTS)

    def _load_checkpoint(self) -> None:
        if not self._machines.staged:
            super()._load_checkpoint()
            return
        tracker = self._folder / CHECKPOINTS / TRACKER
        if tracker.is_file():
            name = f"{CHECKPOINTS}/global_step_{tracker.read_text(encoding='utf-8').strip()}"
            self._machines.send(self._folder / name, name)
            shutil.copy(tracker, self._machines.staging / CHECKPOINTS)
        super()._load_checkpoint()
        self._machines.clear(self._machines.staging / CHECKPOINTS)

    def _save_checkpoint(self) -> None:
        """As verl does; every machine's part of it is in the run folder before the step is noted there."""
        super()._save_checkpoint()
        if self._machines.staged:
            name, folder = f"global_step_{self.global_steps}", self._folder / CHECKPOINTS
            folder.mkdir(exist_ok=True)
            self._machines.bring(f"{CHECKPOINTS}/{name}", folder / name)
            with atomic_file(folder / TRACKER) as file:
                file.write(str(self.global_steps))
            self._drop_old(folder)

    def fit(self, agent_loop_manager: Any) -> None:
        super().fit(agent_loop_manager)
        if self._machines.staged:
            self._machines.clear(self._machines.staging)

    def _drop_old(self, folder: Path) -> None:
        """verl does so in a folder that it keeps them in."""
        keep = self.config.trainer.get("max_actor_ckpt_to_keep")
        if keep:
            steps = sorted(int(path.name.rpartition("_")[2]) for path in folder.glob("global_step_*"))
            for step in steps[:-keep]:
                shutil.rmtree(folder / f"global_step_{step}", ignore_errors=True)

    def on_train_begin(self) -> None:
        super().on_train_begin()
        cut_after(self._run, (self.global_steps - 1) * self._per_batch)

    def step(self, metrics: dict[str, Any], timing_raw: dict[str, Any]) -> Any:
        """A step; asked to stop, it is the last one, with a checkpoint."""
        batch = super().step(metrics, timing_raw)
        if (self._folder / STOP).exists():
            self.total_training_steps = self.global_steps
            self.config.trainer.save_freq = self.global_steps  # verl saves where this divides the step
        return batch

    def _compute_advantage(self, batch: Any, metrics: Any) -> Any:
        """As verl does; but it refuses a step without a single token to train on, in words that tell nobody why."""
        check_judged(self.config.algorithm, sum(not tag.get("is_padding") for tag in batch.tags))
        leave_one(batch)
        return super()._compute_advantage(batch, metrics)

    def _compute_metrics(self, batch: Any, metrics: Any, timing_raw: Any, global_steps: int, epoch: int) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, global_steps=global_steps, epoch=epoch)
        scored, step = self._scored(batch), global_steps * self._per_batch
        passes = (global_steps - 1) * self._passes
        self._run.append("rollouts.jsonl", records_of(scored, self._group, step, passes))
        self._run.append("metrics.jsonl", [{"step": step, **metrics_of(metrics, scored, self._group)}])

    def _scored(self, batch: Any) -> list[Scored]:
        """The step's rollouts, groups one after the other, without the copies that fill a batch up."""
        own = [key for key, tag in zip(batch.keys, batch.tags, strict=True) if not tag.get("is_padding")]
        data = transfer_queue.kv_batch_get(keys=own, partition_id=batch.partition_id, select_fields=_FIELDS)
        columns = {name: _listed(data[name]) for name in _FIELDS}
        whole: dict[str, Scored] = {}
        answers = []
        for index, key in enumerate(own):
            extra = columns["extra_fields"][index]
            ids = columns["responses"][index].tolist()
            answer = Answer(
                uid=columns["uid"][index],
                session=int(key.rsplit("_", 2)[1]),
                row=json.loads(columns["reward_model"][index]["ground_truth"]),
                text=self.tokenizer.decode(ids, skip_special_tokens=True),
                tokens=len(ids),
                complete=bool(ids) and ids[-1] in self._ends(),
                told=extra.get("reward_extra_info") or {},
            )
            answers.append(answer)
            if SCORED in extra:
                whole[f"{answer.uid} {answer.session}"] = scored_from_json(extra[SCORED])
        return [whole.get(f"{one.uid} {one.session}") or scored_of(one) for one in in_groups(answers, self._group)]

    def _ends(self) -> set[int]:
        """The tokens that end an answer."""
        from transformers import GenerationConfig

        if not hasattr(self, "_known_ends"):
            ends = {self.tokenizer.eos_token_id}
            path = Path(self.config.actor_rollout_ref.model.path)
            if (path / "generation_config.json").is_file():
                also = GenerationConfig.from_pretrained(path).eos_token_id
                ends |= set(also if isinstance(also, list) else [also])
            self._known_ends = ends - {None}
        return self._known_ends


def leave_one(batch: Any) -> None:
    """Where every answer of a step is left out, put one back, with a reward of its own alone: advantage 0."""
    names = ["response_mask", "rm_scores"]
    data = transfer_queue.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=names)
    masks, rewards = (_listed(data[name]) for name in names)
    if any(bool(mask.any()) for mask in masks):
        return
    at = next(index for index, tag in enumerate(batch.tags) if not tag.get("is_padding"))
    mask = torch.ones_like(masks[at])
    fields = {"response_mask": mask, "loss_mask": mask, "rm_scores": torch.zeros_like(rewards[at])}
    put = list_of_dict_to_tensordict([fields])
    transfer_queue.kv_batch_put(keys=[batch.keys[at]], partition_id=batch.partition_id, fields=put)


def _listed(column: Any) -> list[Any]:
    """A column of verl's queue, an entry for each rollout: tensors stay tensors."""
    is_plain = hasattr(column, "tolist") and not isinstance(column, torch.Tensor)
    return list(column.tolist() if is_plain else column)
