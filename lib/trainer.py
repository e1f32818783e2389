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
        """Overrides generation only, and leaves rows without a single trained token out of the loss."""

        source: Source
        phase = "starting"
        """What it is doing, for the message when memory runs out: sampling or loss."""

        def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
            self.phase = "sampling"
            batch = self.source(self, [json.loads(prompt) for prompt in prompts])
            _log_lengths(self, batch)
            for name, value in batch.metrics.items():
                self._metrics["train"][name].append(value)
            self.phase = "loss"
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

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            return super()._compute_loss(model, _without_masked_rows(inputs))  # type: ignore[no-any-return, no-untyped-call]

    def _without_masked_rows(inputs: dict[str, Any]) -> dict[str, Any]:
        # Loss types that average over sequences (grpo, dr_grpo, luspo) would count an all-masked row as a zero.
        if "tool_mask" not in inputs:
            return inputs
        keep = (inputs["completion_mask"] * inputs["tool_mask"]).sum(-1) > 0
        if keep.all() or not keep.any():
            return inputs
        rows = keep.size(0)
        return {
            name: value[keep] if torch.is_tensor(value) and value.dim() and value.size(0) == rows else value
            for name, value in inputs.items()
        }

    return RolloutTrainer


def _log_lengths(trainer: Any, batch: Batch) -> None:
    """The figures that TRL logs in the method that we override: lengths, and the share cut off."""
    import torch

    device = trainer.accelerator.device
    lengths = torch.tensor([sum(mask) for mask in batch.mask], device=device, dtype=torch.float32)
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
