"""The one TRL subclass: GRPOTrainer fed with finished rollouts instead of its own generation.

Owns the hand-over of tokens, masks and rewards to TRL, and the limit to how far a sampler may be from the policy that
trains. Must not know tasks, hosts or files. Pinned to TRL 1.16: a test holds the signature of `_generate` and the eight
items it returns.

    python -c "from lib.trainer import make_trainer_class; print(make_trainer_class())"
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from lib import WorkbenchError
from lib.rollout import Scored, TokenRow, is_unscored, to_tokens
from lib.task import ROW_PART, Row

if TYPE_CHECKING:
    import torch
    from trl import GRPOTrainer

ROW_MEANS = ("grpo", "dr_grpo", "luspo")
"""Loss types that average over sequences: a row left out would count there as a zero, so the mean is scaled up."""

REWARD = "reward_value"
"""The extra column that carries finished rewards through TRL to its reward function."""

TRUNCATED_LIMIT = 0.2
"""Share of trained tokens whose ratio of policy to sampler may be cut off at TRL's largest (3 by default)."""


class BatchError(WorkbenchError, ValueError):
    """What was handed over is not one generation batch; nothing has been trained on it."""


class OffPolicyError(WorkbenchError, RuntimeError):
    """The policy that trains and the one that sampled are too far apart for a correction."""


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


def to_batch(scored: Sequence[Scored], group: int, end_id: int | None = None) -> Batch:
    """Rollouts as TRL takes them; unscored and masked ones get reward None and an all-zero mask.

    With `end_id`, a rollout that no policy has answered (it failed, or is missing) becomes that one token, left out of
    training, as TRL takes no empty row.
    """
    tokens = [_token_row(s, end_id) for s in scored]
    rewards = [
        None if s.score.masked or not any(row.mask) else s.score.reward for s, row in zip(scored, tokens, strict=True)
    ]
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


def _token_row(scored: Scored, end_id: int | None) -> TokenRow:
    answered = any(turn.output_ids for turn in scored.rollout.turns)
    if answered or end_id is None:
        return to_tokens(scored.rollout)
    return TokenRow(prompt_ids=[end_id], output_ids=[end_id], mask=[0], logprobs=[0.0])


def batch_metrics(scored: Sequence[Scored], rewards: Sequence[float | None], group: int) -> dict[str, float]:
    """Shares of unscored and masked rollouts, of groups with signal and of empty groups, and the mean of every part."""
    groups = [rewards[i : i + group] for i in range(0, len(rewards), group)]
    metrics = {
        "rollouts/unscored": sum(is_unscored(s.score) for s in scored) / len(scored),
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


def check_batch(batch: Batch, completions: int) -> None:
    """Refuse what TRL would break on, or train on by mistake. Raises BatchError."""
    by_token: dict[str, Sequence[Sequence[float]]] = {"mask": batch.mask}
    if batch.logprobs is not None:
        by_token["logprobs"] = batch.logprobs
    by_row: dict[str, Sequence[Any]] = {"prompt_ids": batch.prompt_ids, "output_ids": batch.output_ids, **by_token}
    for name, column in {**by_row, "rewards": batch.rewards}.items():
        if len(column) != completions:
            raise BatchError(f"{name} has {len(column)} rows: one generation batch is {completions} completions")
    for index, (prompt, output, reward) in enumerate(
        zip(batch.prompt_ids, batch.output_ids, batch.rewards, strict=True)
    ):
        if not prompt or not output:
            raise BatchError(f"row {index} is empty: a rollout that failed is one end token, mask 0 and reward None")
        for name, values in by_token.items():
            if len(values[index]) != len(output):
                raise BatchError(f"row {index}: {len(values[index])} of {name} for {len(output)} tokens")
        if reward is None and any(batch.mask[index]):
            raise BatchError(f"row {index} has no reward, so its mask must be all zero, or it enters KL and the mean")


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
        sampled_elsewhere = False
        """Another engine samples: where its log-probabilities come along, TRL corrects for the difference."""

        def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
            self.phase = "sampling"
            batch = self.source(self, [json.loads(prompt) for prompt in prompts])
            if self.sampled_elsewhere:
                # TRL corrects where it believes that it runs vLLM; with `_generate` ours it reads this nowhere else.
                self.use_vllm = batch.logprobs is not None
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

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            outputs: dict[str, Any] = super()._generate_and_score_completions(inputs)
            if "importance_sampling_ratio" in outputs:
                _check_truncated(self, outputs)
            return outputs

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


def _check_truncated(trainer: Any, outputs: dict[str, Any]) -> None:
    """Log the share of trained tokens whose ratio was cut off. Raises OffPolicyError before a step is made of them."""
    trained = outputs["completion_mask"] * outputs.get("tool_mask", 1) > 0
    cut = (outputs["importance_sampling_ratio"] >= trainer.vllm_importance_sampling_clip_max) & trained
    share = float(cut.sum()) / max(1, int(trained.sum()))
    trainer._metrics["train"]["sampling/truncated_share"].append(share)
    if share > TRUNCATED_LIMIT:
        raise OffPolicyError(
            f"{share:.0%} of the tokens are more than {trainer.vllm_importance_sampling_clip_max:g} times as likely "
            f"under the policy that trains as they were when sampled; {TRUNCATED_LIMIT:.0%} are allowed. Either the "
            f"sampler's weights or log-probabilities are wrong, or they are too old: sync more often, overlap less, "
            f"or lower training.learning_rate"
        )
