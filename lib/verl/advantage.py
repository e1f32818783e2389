"""GRPO over the answers that were judged: the advantage estimator `grpo_scored` for verl.

Owns which rewards enter a group's mean and deviation, and when a step has too few of them. Must not know tasks, or how
an answer is scored.

verl hands a registered estimator the rewards, the mask, the groups and its `algorithm` section, and nothing of the
reward's extra information: what is to be left out is told by a reward of -0.0 (lib/verl/reward.py). A reward that
raises does not stop verl's trainer, which drops the rollout and goes on; an estimator that raises does, so a step with
too few rewards ends here.

    python -c "from lib.verl.advantage import grpo_scored; help(grpo_scored)"
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib import WorkbenchError
from lib.rollout import check_unscored
from lib.task import Score
from lib.verl.reward import Unscored, read_order

if TYPE_CHECKING:
    import numpy
    import torch

NAME = "grpo_scored"

_BEGAN = time.time()
_read: dict[str, int] = {}
"""How far a file of unscored answers has been read, in bytes."""


class EstimatorError(WorkbenchError, ValueError):
    """verl's `algorithm` section does not go with this estimator; the message says what to change."""


def register() -> None:
    """Make `algorithm.adv_estimator=grpo_scored` known to verl; in the process that trains, before it looks."""
    from verl.trainer.ppo.core_algos import register_adv_est

    register_adv_est(NAME)(grpo_scored)


def grpo_scored(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: numpy.ndarray[Any, Any],
    config: Mapping[str, Any],
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages, and returns, of shape (rollouts, tokens); as verl's own `grpo` where every answer has a reward.

    token_level_rewards, response_mask: (rollouts, tokens); index: the group of each rollout; config: verl's section
    `algorithm`, with `order` = the path of the reward's order. An answer without a reward has advantage 0, and its
    response_mask is set to 0 *in place*. So has a judged one that is left alone in a group of several. Raises
    UnscoredLimitError and EstimatorError.
    """
    import numpy
    import torch
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    if config.get("use_kl_in_reward"):
        raise EstimatorError(
            f"algorithm.use_kl_in_reward=True changes the rewards, by which {NAME} knows what was not judged: leave it "
            f"out, and use actor_rollout_ref.actor.use_kl_loss=True"
        )
    left_out = (torch.signbit(token_level_rewards) & (token_level_rewards == 0)).any(dim=-1)
    check_judged(config, rollouts=int((left_out | response_mask.bool().any(dim=-1)).sum()))
    groups, members = numpy.unique(numpy.asarray(index, dtype=str), return_inverse=True)
    judged = numpy.bincount(members, weights=(~left_out).cpu().numpy(), minlength=len(groups))[members]
    alone = torch.from_numpy((judged == 1) & (numpy.bincount(members)[members] > 1)).to(left_out.device)
    used = ~left_out & ~alone
    advantages = torch.zeros_like(token_level_rewards)
    advantages[used], _returns = compute_grpo_outcome_advantage(
        token_level_rewards=token_level_rewards[used],
        response_mask=response_mask[used],
        index=numpy.asarray(index)[used.cpu().numpy()],
        norm_adv_by_std_in_grpo=config.get("norm_adv_by_std_in_grpo", True),
    )
    response_mask[left_out] = 0
    return advantages, advantages


def check_judged(config: Mapping[str, Any], rollouts: int) -> None:
    """Raise UnscoredLimitError, with the reasons counted, where too much of this step could not be judged.

    Each answer counts in the first call after it. `rollouts`: those of the step, without verl's padding. What a task's
    own rule leaves out is in no such file.
    """
    if not config.get("order"):
        raise EstimatorError(f"algorithm.order is not set: {NAME} needs +algorithm.order=<folder>/reward.json")
    order = read_order(config["order"])
    new = [Score(reward=None, notes={"error": line.reason}) for line in _new_lines(order.counts)]
    rest = [Score(reward=0.0)] * max(0, rollouts - len(new))
    check_unscored([*new, *rest], order.unscored_limit, "verl")


def _new_lines(counts: str) -> list[Unscored]:
    """Training answers that could not be judged since the last time, or since this process began."""
    path = Path(counts)
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(_read.get(counts, 0))
        text = file.read()
    whole = text[: text.rfind(b"\n") + 1]
    _read[counts] = _read.get(counts, 0) + len(whole)
    lines = [Unscored.model_validate_json(line) for line in whole.splitlines()]
    return [line for line in lines if line.split == "train" and line.time >= _BEGAN]
