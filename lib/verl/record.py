"""A step of verl as a run folder keeps it: its rollouts as records, its metrics under the workbench's names.

Owns what verl's figures are called here, and which parts of a record verl does not know. Must not know verl, Ray or how
a step came to be.

    python -c "from lib.verl.record import metrics_of; print(metrics_of({'actor/grad_norm': 1.0}, [], 4))"
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, Literal, NamedTuple

from lib.rollout import Scored
from lib.runfolder import Run, atomic_file, plain, read_lines, to_line
from lib.task import Rollout, Score, Turn
from lib.trainer import batch_metrics
from lib.training import rollout_record

NAMES = {
    "actor/loss": "loss",
    "actor/pg_loss": "loss",
    "actor/grad_norm": "grad_norm",
    "actor/entropy": "entropy",
    "actor/kl_loss": "kl",
    "actor/lr": "learning_rate",
    "response_length/mean": "completions/mean_length",
    "response_length/max": "completions/max_length",
    "response_length/clip_ratio": "completions/clipped_ratio",
    "timing_s/step": "step_time",
    "perf/throughput": "tokens_per_second_per_gpu",
}
"""verl's name of a figure -> ours; the later of two wins. All others are kept as `verl/<name>`."""


STOP = "stop"
"""The file in <run>/verl that asks verl's trainer for the end."""

SCORED = "workbench"
"""Where lib/verl/agent_loop.py leaves a rollout and its score among a sample's extra fields."""


def scored_as_json(scored: Scored) -> str:
    """A rollout and its score on their way through verl's queue; tokens stay behind, but for their number."""
    rollout, score = scored
    turns = tuple(
        turn.model_copy(update={"prompt_ids": None, "logprobs": None, "output_ids": (0,) * len(turn.output_ids or ())})
        for turn in rollout.turns
    )
    rollout = rollout.model_copy(update={"turns": turns})
    return json.dumps({"rollout": rollout.model_dump(mode="json"), "score": score.model_dump(mode="json")})


def scored_from_json(text: str) -> Scored:
    told = json.loads(text)
    return Scored(Rollout.model_validate(told["rollout"]), Score.model_validate(told["score"]))


class Answer(NamedTuple):
    """One rollout of a step, as verl's queue holds it."""

    uid: str
    """Of the prompt in this step."""
    session: int
    row: Mapping[str, Any]
    text: str
    tokens: int
    complete: bool
    """It ended by itself, not for want of room."""
    told: Mapping[str, Any]
    """What the reward said of it (lib/verl/reward.py)."""


def scored_of(answer: Answer) -> Scored:
    """The rollout and its score, as far as verl has kept them."""
    told = answer.told
    judged, masked = told.get("scored") == 1.0, told.get("masked") == 1.0
    notes = {"error": told["reason"]} if told.get("reason") and not masked else {}
    score = Score(
        reward=float(told["score"]) if judged else None,
        masked=masked,
        parts=json.loads(told.get("parts") or "{}"),
        notes=notes | json.loads(told.get("notes") or "{}"),
    )
    message = {"role": "assistant", "content": answer.text}
    turn = Turn(message=message, output_ids=(0,) * answer.tokens, stop="stop" if answer.complete else "length")
    prompt = tuple(answer.row["prompt"])
    messages = (*prompt, message)
    ended: Literal["done", "length"] = "done" if answer.complete else "length"
    rollout = Rollout(row=dict(answer.row), messages=messages, turns=(turn,), stop=ended)
    return Scored(rollout, score)


def in_groups(answers: Sequence[Answer], group: int) -> list[Answer]:
    """Whole groups one after the other, in the order in which their first answer came.

    verl goes on without an answer that its engine failed to give: here it is an empty one that was not judged.
    """
    known = {(answer.uid, answer.session): answer for answer in answers}
    firsts = {answer.uid: answer for answer in reversed(answers)}
    lost = {"text": "", "tokens": 0, "complete": False, "told": {"reason": "verl has no answer: see verl/log.txt"}}
    return [
        known.get((uid, session)) or firsts[uid]._replace(session=session, **lost)
        for uid in dict.fromkeys(answer.uid for answer in answers)
        for session in range(group)
    ]


def records_of(scored: Sequence[Scored], group: int, step: int, micro_step: int) -> list[dict[str, Any]]:
    """Lines of rollouts.jsonl; `group` answers to each prompt."""
    return [rollout_record(one, index, group, step, micro_step) for index, one in enumerate(scored)]


def metrics_of(logged: Mapping[str, Any], scored: Sequence[Scored], group: int) -> dict[str, Any]:
    """A line of metrics.jsonl, without its step."""
    figures = {name: value for name, value in plain(dict(logged)).items() if isinstance(value, int | float)}
    told: dict[str, Any] = {f"verl/{name}": value for name, value in figures.items() if name not in NAMES}
    told |= {ours: figures[name] for name, ours in NAMES.items() if name in figures}
    rewards = [None if one.score.masked else one.score.reward for one in scored]
    known = [reward for reward in rewards if reward is not None]
    groups = [[r for r in rewards[i : i + group] if r is not None] for i in range(0, len(rewards), group)]
    spreads = [stdev(one) for one in groups if len(one) > 1]
    told |= {"reward": fmean(known) if known else None, "reward_std": fmean(spreads) if spreads else None}
    return told | (batch_metrics(scored, rewards, group) if scored else {})


def cut_after(run: Run, step: int) -> None:
    """Forget what was logged of later steps than a checkpoint's: a killed step is sampled anew."""
    for log in ("metrics.jsonl", "rollouts.jsonl"):
        path = run.folder / log
        if path.is_file():
            kept = [record for record in read_lines(path) if record["step"] <= step]
            with atomic_file(path) as file:
                file.writelines(map(to_line, kept))
