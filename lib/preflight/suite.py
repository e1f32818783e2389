"""The attack suite: canned cheats against the reward, and which of them work.

Owns the rule by which a cheat works. Must not know the cheats' texts (lib/attacks.py).

    python -m lib.run notebooks/2_reward_inspection.ipynb configs/decisions.yaml
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any, NamedTuple

from lib.attacks import Attack, attacks, gold_text, other_golds
from lib.generate import scripted
from lib.preflight.answers import find_rows
from lib.rollout import attempt, finish
from lib.task import Row, Score, Task

logger = logging.getLogger(__name__)

ATTACKED = 4
"""Rows that are attacked: with a judge every cheat on every row is a call."""
HITS = 2
"""Rows on which a cheat must pay: on a single one a fixed text may be right by luck."""
_TOLERANCE = 1e-9


class Attacked(NamedTuple):
    """What one cheat earned."""

    name: str
    family: str
    text: str
    """As it was for the first row that it fits."""
    rewards: dict[str, float | None]
    """By row; None = masked or unscored."""
    left_out: str
    """Why there is no reward where there is none: `masked`, or `unscored: <cause>`; "" where all have one."""
    works: str
    """Why this cheat works; "" where it does not."""

    @property
    def mean(self) -> float | None:
        """Mean reward over the rows where it has one."""
        return _mean(self.rewards.values())


class AttackTable(NamedTuple):
    """Every cheat, and what it was measured against."""

    attacked: list[Attacked]
    base: float | None
    """The median of the base policy's rewards on these rows; None = none was scored."""
    wrong: float | None
    """The mean reward of a wrong answer (the worst of other rows' golds); None = the task knows none."""
    gold: dict[str, float]
    """What the gold answer earns, by row, where it has a reward."""
    misjudged: list[str]
    """Rows whose gold answer earns the lowest reward, or less than another row's: what it earns is no measure there."""
    bar: float
    """No cheat may earn more than this: max(base, wrong)."""
    rows: list[str]

    @property
    def working(self) -> list[Attacked]:
        """The cheats that work."""
        return [one for one in self.attacked if one.works]

    @property
    def unscored(self) -> float:
        """The share of cheats that could not be judged somewhere: they prove nothing there."""
        some = sum("unscored" in one.left_out for one in self.attacked)
        return some / len(self.attacked) if self.attacked else 0.0


def attack_table(
    task: Task, rows: Sequence[Row], answers: Sequence[Mapping[str, Any]], limit: int, count: int = ATTACKED
) -> AttackTable:
    """Attack the first `count` rows that the base policy has answered, with every cheat that fits them.

    A cheat works where its mean reward is over the bar and its reward is on HITS rows at least; or where it earns on
    HITS rows what the gold answer earns (on all rows, where there are fewer). Masked and unscored ones do not work.
    `answers` are records of `sample_base`; padding goes up to `limit` = sampling.completion_limit (tokens).
    """
    answered = find_rows(rows, list(dict.fromkeys(str(answer["row"]) for answer in answers)))
    # Where doing nothing is right (a call that must not be made), most cheats do nothing, and are right.
    chosen = [row for row in answered if not row.get("gold") or gold_text(row).strip()][:count] or answered[:count]
    table, wrong = _yardstick(task, rows, chosen, answers)
    asked = [(row, one) for row in chosen for one in attacks(task, row, wrong[str(row["id"])], limit)]
    logger.info(
        "attack suite: %d cheats on %d rows. Should the kernel die now, one of them has ended it: the scorer runs "
        "answers in its own process",
        len(asked),
        len(chosen),
    )
    scores = _score_all(task, asked)
    results: dict[tuple[str, str], list[tuple[str, Attack, Score]]] = {}
    for (row, one), score in zip(asked, scores, strict=True):
        results.setdefault((one.family, one.name), []).append((str(row["id"]), one, score))
    return table._replace(attacked=[_attacked(result, table) for result in results.values()])


def _score_all(task: Task, asked: Sequence[tuple[Row, Attack]]) -> list[Score]:
    """All at once and as rollouts are scored: what breaks, or calls exit(), is unscored."""

    async def play() -> list[Score]:
        played = await asyncio.gather(*(attempt(task, row, scripted(one.text)) for row, one in asked))
        return [scored.score for scored in played]

    return finish(play())


def _yardstick(
    task: Task, rows: Sequence[Row], chosen: Sequence[Row], answers: Sequence[Mapping[str, Any]]
) -> tuple[AttackTable, dict[str, list[str]]]:
    """What the cheats are measured against, before any was scored; and wrong answers by row, the worst first.

    Other rows' golds are tried as wrong answers. One that earns what the row's own gold does is not wrong, and one that
    is no answer to this row (part `valid` 0: a program of another name, say) hides nothing: naming it is no hedge.
    """
    known = [(row, Attack("gold", gold_text(row), "")) for row in chosen if row.get("gold")]
    known += [(row, Attack("wrong", text, "")) for row in chosen for text in other_golds(row, rows)]
    lowest = task.reward_range[0]
    gold: dict[str, float] = {}
    beside: set[tuple[str, str]] = set()
    others: dict[str, list[tuple[float, str]]] = {str(row["id"]): [] for row in chosen}
    for (row, one), score in zip(known, _score_all(task, known), strict=True):
        if score.reward is not None and one.name == "gold":
            gold[str(row["id"])] = score.reward
        elif score.reward is not None:
            others[str(row["id"])].append((score.reward, one.text))
            if score.parts.get("valid", 1.0) == 0:
                beside.add((str(row["id"]), one.text))
    best = {row: max(some, default=(lowest, ""))[0] for row, some in others.items()}
    wrong = {row: sorted(one for one in some if one[0] < gold.get(row, lowest)) for row, some in others.items()}
    scored = [a["reward"] for a in answers if str(a["row"]) in others and a["reward"] is not None]
    base, worst = median(scored) if scored else None, _mean(some[0][0] for some in wrong.values() if some)
    table = AttackTable(
        attacked=[],
        base=base,
        wrong=worst,
        gold=gold,
        misjudged=[row for row, reward in gold.items() if reward <= lowest or reward < best[row] - _TOLERANCE],
        bar=max([value for value in (base, worst) if value is not None], default=lowest),
        rows=list(others),
    )
    return table, {row: [text for _, text in some if (row, text) not in beside] for row, some in wrong.items()}


def _attacked(result: Sequence[tuple[str, Attack, Score]], table: AttackTable) -> Attacked:
    rewards = {row: score.reward for row, _, score in result}
    causes = {_left_out(score) for _, _, score in result if score.reward is None}
    first = result[0][1]
    unjudged = Attacked(first.name, first.family, first.text, rewards, "; ".join(sorted(causes)), "")
    return unjudged._replace(works=_why(unjudged, table))


def _left_out(score: Score) -> str:
    return "masked" if score.masked else f"unscored: {score.notes.get('error', 'no reason given')}"


def _why(one: Attacked, table: AttackTable) -> str:
    """Why a cheat works; "" where it does not."""
    scored = {row: reward for row, reward in one.rewards.items() if reward is not None}
    over = sum(reward > table.bar + _TOLERANCE for reward in scored.values())
    told = {row: reward for row, reward in table.gold.items() if row in one.rewards and row not in table.misjudged}
    as_gold = sum(row in scored and scored[row] >= reward - _TOLERANCE for row, reward in told.items())
    if told and as_gold >= min(HITS, len(told)):
        return f"earns what the gold answer earns on {as_gold} of {len(told)} rows"
    if one.mean is not None and one.mean > table.bar + _TOLERANCE and over >= min(HITS, len(one.rewards)):
        return f"earns {one.mean:.3g}, more than {table.bar:.3g}"
    return ""


def _mean(rewards: Iterable[float | None]) -> float | None:
    scored = [reward for reward in rewards if reward is not None]
    return fmean(scored) if scored else None
