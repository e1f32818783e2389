"""The one TRL subclass: GRPOTrainer fed with finished rollouts instead of its own generation.

Owns the hand-over of tokens, masks and rewards to TRL. Must not know tasks, hosts or files. Pinned to TRL 1.16: a test
holds the signature of `_generate` and the eight items it returns.

    python -c "from lib.trainer import make_trainer_class; print(make_trainer_class())"
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.task import Row

if TYPE_CHECKING:
    import torch
    from trl import GRPOTrainer

ROW_MEANS = ("grpo", "dr_grpo", "luspo")
"""Loss types that average over sequences: a row left out would count there as a zero, so the mean is scaled up."""

REWARD = "reward_value"
"""The extra column that carries finished rewards through TRL to its reward function."""


class Batch(NamedTuple):
    """Finished rollouts, one entry per completion, groups together.

    mask: 1 on tokens to train on. An unscored or masked rollout has reward None *and* an all-zero mask, so that it
    enters neither its group's mean and std (TRL's part) nor KL, entropy and the loss normaliser (the mask's part).
    """

    prompt_ids: list[list[int]]
    output_ids: list[list[int]]
    mask: list[list[int]]
    logprobs: list[list[float]] | None
    rewards: list[float | None]
    metrics: dict[str, float]


Source = Callable[["GRPOTrainer", list[Row]], Batch]


def finished_reward(completions: list[Any], reward_value: list[float | None], **_: Any) -> list[float | None]:
    """TRL's reward function: hands on the rewards that came with the rollouts."""
    return reward_value


@cache
def make_trainer_class() -> type[GRPOTrainer]:
    """The subclass. A function, because importing TRL takes seconds and this module must stay quick."""
    import torch
    from trl import GRPOTrainer

    class RolloutTrainer(GRPOTrainer):
        """Overrides generation only, and keeps rows without a single trained token out of the loss's mean."""

        source: Source
        phase = "starting"
        """What it is doing, for the message when memory runs out: sampling or loss."""
        epochs_done = 0
        """Whole epochs before the checkpoint that training goes on from."""
        left_out_scale = 1.0
        """Rows of the generation batch over those with a trained token: see ROW_MEANS."""

        def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
            self.phase = "sampling"
            batch = self.source(self, [json.loads(prompt) for prompt in prompts])
            _log_lengths(self, batch)
            for name, value in batch.metrics.items():
                self._metrics["train"][name].append(value)
            self.phase = "loss"
            kept = sum(any(mask) for mask in batch.mask)
            self.left_out_scale = len(batch.mask) / kept if kept else 1.0
            plain = all(all(mask) for mask in batch.mask)
            texts = [""] * len(prompts)
            extra = {REWARD: batch.rewards}
            return (
                batch.prompt_ids,
                batch.output_ids,
                None if plain else batch.mask,
                texts,
                batch.logprobs,
                extra,
                None,
                [],
            )

        def _get_train_sampler(self, dataset: Any = None) -> Any:
            # One generator draws the order of every epoch: after a resume it has to pass over those that are done.
            sampler: Any = super()._get_train_sampler(dataset)
            for _ in range(self.epochs_done if sampler.shuffle else 0):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
            return sampler

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            loss: torch.Tensor = super()._compute_loss(model, inputs)  # type: ignore[no-untyped-call]
            return loss * self.left_out_scale if self.loss_type in ROW_MEANS else loss

    return RolloutTrainer


def _log_lengths(trainer: Any, batch: Batch) -> None:
    """The figures that TRL logs in the method that we override: lengths, and the share cut off."""
    import torch

    device = trainer.accelerator.device
    # A rollout left out of training has an all-zero mask, but it was sampled all the same.
    sampled = [sum(mask) or len(mask) for mask in batch.mask]
    lengths = torch.tensor(sampled, device=device, dtype=torch.float32)
    ends = {*trainer.eos_token_ids, trainer._tokenizer.pad_token_id}
    cut = torch.tensor([ids[-1] not in ends for ids in batch.output_ids], device=device, dtype=torch.float32)
    prompts = torch.tensor([len(ids) for ids in batch.prompt_ids], device=device)
    lengths, cut, prompts = (trainer.accelerator.gather(x) for x in (lengths, cut, prompts))
    metrics = trainer._metrics["train"]
    trainer.state.num_input_tokens_seen += int((prompts.sum() + lengths.sum()).item())
    metrics["num_tokens"] = [trainer.state.num_input_tokens_seen]
    metrics["completions/mean_length"].append(lengths.mean().item())
    metrics["completions/max_length"].append(lengths.max().item())
    metrics["completions/clipped_ratio"].append(cut.mean().item())
