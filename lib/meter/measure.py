"""The judge meter: how far a judge can be trusted on this task, measured before anything is trained on its verdicts.

Owns which answers are judged again, and how the judge compares with hand labels. Must not know how a judge is reached,
or training.

    python -m lib.run notebooks/2_reward_inspection.ipynb configs/ace.yaml
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from lib.config import Config
from lib.ledger import Verdict, hash_text
from lib.meter import intervals
from lib.meter.advantages import gaps
from lib.meter.intervals import Estimate
from lib.meter.labels import Judged, Label, labels, train_rows
from lib.meter.readings import (
    Asked,
    Group,
    Reading,
    advantage_error,
    by_group_size,
    distinct,
    length_bias,
    position_bias,
    reading,
    repeatability,
    reward_noise,
    reward_repeatability,
    rewards,
    sign_flips,
)
from lib.rollout import finish
from lib.runfolder import Run
from lib.task import Rollout, Row, Task

logger = logging.getLogger(__name__)

GROUP_SIZES = (4, 6, 8, 12, 16)
WANTED = 0.1
"""Half width of kappa's interval that tells a moderate judge from a substantial one (steps of 0.2)."""
_LANDIS = ((0.8, "almost perfect"), (0.6, "substantial"), (0.4, "moderate"), (0.2, "fair"), (-1.0, "slight or none"))
"""The usual words for a kappa above each value (Landis & Koch 1977)."""


class JudgeMeter(NamedTuple):
    """What is known about the judge on this task. Unknown verdicts are in none of the figures."""

    repeatability: Reading
    """Share of verdicts that are the same in every ask."""
    reward_repeatability: Reading
    reward_noise: Reading
    """Standard deviation of an answer's reward over asks, in units of the reward."""
    agreement: Reading
    """Cohen's kappa with the hand labels."""
    length_bias: Reading
    """Rank correlation of reward and length (characters) within groups."""
    position_bias: Reading
    """How much oftener a verdict changes when the criteria are asked in reverse order than when just asked again."""
    advantage_error: Reading
    """Root mean square difference of the advantages between two asks of the same groups."""
    sign_flips: Reading
    """Share of answers whose advantage is positive in one ask and negative in the other."""
    by_group_size: dict[int, tuple[float, float]]
    """(advantage error, sign flips) by group size, simulated from the rewards of the asks."""
    unknown: dict[str, int]
    """Verdicts that stayed unknown, by cause."""
    usd: float | None
    """What the known verdicts of the asks after the first cost when they were asked; None = no price known."""

    @property
    def readings(self) -> list[Reading]:
        """The figures, in the order to show them in."""
        return [value for value in self if isinstance(value, Reading)]

    def as_json(self) -> dict[str, Any]:
        """For result.json."""
        return {
            name: value._asdict() if isinstance(value, Reading) else value for name, value in self._asdict().items()
        }


def measure(
    config: Config, task: Task, answers: Sequence[Mapping[str, Any]], run: Run, items: int = 20, asks: int = 3
) -> JudgeMeter | None:
    """Ask the judge again about some of the answers and say how good it is; None where the task has no judge.

    `answers` are records of lib.preflight.sample_base. About `items` of them, in whole groups, are judged `asks` times,
    and once with the criteria in reverse order; the first ask is in the ledger already, and so is everything on a
    second call. Raises ValueError for fewer than two asks.
    """
    if not isinstance(task, Judged):
        return None
    if asks < 2:
        raise ValueError(f"asks={asks}: repeatability needs at least 2")
    given = labels(run)
    rows = train_rows(run, [*answers, *({"row": label.row} for label in given)])
    groups = finish(_ask_all(task, _chosen(answers, rows, items, config.training.seed), rows, asks))
    scaling, size = config.training.reward_scaling, config.training.group_size
    scored = rewards(groups)
    found = JudgeMeter(
        repeatability=repeatability(groups, asks),
        reward_repeatability=reward_repeatability(groups, asks),
        reward_noise=reward_noise(groups),
        agreement=_agreement(task, given, answers, rows),
        length_bias=length_bias(answers),
        position_bias=position_bias(groups),
        advantage_error=advantage_error(gaps(scored, scaling)),
        sign_flips=sign_flips(gaps(scored, scaling)),
        by_group_size=by_group_size(scored, sorted({size, *GROUP_SIZES}), scaling),
        unknown=_causes(groups),
        usd=_usd(groups),
    )
    for one in (one for one in found.readings if one.n):
        logger.info("judge meter: %s %.3f [%.3f, %.3f], n=%d", one.what, one.value, one.low, one.high, one.n)
    return found


def kappa(pairs: Sequence[tuple[bool, bool]], answers: Sequence[Hashable] | None = None, seed: int = 0) -> Estimate:
    """Cohen's kappa of (label, judge) pairs; `answers` says which pairs are of one answer (default: each of its own).

    Labels of one answer go together: the interval is a bootstrap over answers. NaN where both say the same always.
    """
    tables: dict[Hashable, list[list[int]]] = {}
    for (one, other), answer in zip(pairs, answers or range(len(pairs)), strict=True):
        tables.setdefault(answer, [[0, 0], [0, 0]])[one][other] += 1
    return intervals.kappa(list(tables.values()), seed)


# asking ---------------------------------------------------------------------------------------------------------------


def _chosen(
    answers: Sequence[Mapping[str, Any]], rows: Mapping[str, Row], items: int, seed: int
) -> dict[str, list[Mapping[str, Any]]]:
    """Whole groups drawn at random until there are `items` answers, two groups at least."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in answers:
        if str(record["row"]) in rows:
            groups.setdefault(str(record["row"]), []).append(record)
    chosen: dict[str, list[Mapping[str, Any]]] = {}
    for name in random.Random(seed).sample(list(groups), len(groups)):
        if len(chosen) < 2 or sum(map(len, chosen.values())) < items:
            chosen[name] = groups[name]
    return chosen


async def _ask_all(
    task: Judged, chosen: Mapping[str, Sequence[Mapping[str, Any]]], rows: Mapping[str, Row], asks: int
) -> list[Group]:
    """Every chosen answer asked about; equal answers to a row are asked about once and count as often as given."""
    texts = {(name, record["answer"]): record for name, records in chosen.items() for record in records}
    asked = await asyncio.gather(*(_ask(task, rows[name], r, asks) for (name, _), r in texts.items()))
    found = dict(zip(texts, asked, strict=True))
    return [[found[name, record["answer"]] for record in records] for name, records in chosen.items()]


async def _ask(task: Judged, row: Row, record: Mapping[str, Any], asks: int) -> Asked:
    rollout = Rollout.of(row, record["answer"]).model_copy(update={"stop": record["stop"]})
    plain = list(await asyncio.gather(*(task.verdicts(rollout, ask=number) for number in range(asks))))
    reverse = await task.verdicts(rollout, reverse=True) if len(task.criteria(row)) > 1 else None
    scores = [task.reward_of(row, verdicts) for verdicts in plain]
    return Asked(str(row["id"]), rollout.text, plain, reverse, [None if s.masked else s.reward for s in scores])


def _causes(groups: Sequence[Group]) -> dict[str, int]:
    everything = [v for one in distinct(groups) for ask in (*one.asks, one.reverse or {}) for v in ask.values()]
    return dict(Counter(v.reasons for v in everything if v.verdict == "unknown").most_common())


def _usd(groups: Sequence[Group]) -> float | None:
    asked = [v for one in distinct(groups) for ask in (*one.asks[1:], one.reverse or {}) for v in ask.values()]
    prices = [v.usd for v in asked if v.attempts > 0 and v.verdict != "unknown"]
    return None if None in prices else math.fsum(price for price in prices if price is not None)


# agreement ------------------------------------------------------------------------------------------------------------


def _agreement(
    task: Judged, given: Sequence[Label], answers: Sequence[Mapping[str, Any]], rows: Mapping[str, Row]
) -> Reading:
    what = "agreement with hand labels (Cohen's kappa)"
    if not given:
        return reading(what, 0, intervals.UNKNOWN, "Not measured: fill in 20 to 50 lines of labels.csv and run again.")
    texts = {(one.row, one.answer_hash): one.answer for one in given if hash_text(one.answer) == one.answer_hash}
    texts |= {(str(record["row"]), hash_text(record["answer"])): record["answer"] for record in answers}
    usable = [one for one in given if (one.row, one.answer_hash) in texts and _still_asked(task, rows, one)]
    wanted = {(one.row, one.answer_hash): texts[one.row, one.answer_hash] for one in usable}
    judged = finish(_judge_labelled(task, rows, wanted))
    verdicts = [judged[one.row, one.answer_hash][one.criterion].verdict for one in usable]
    known = [(one, verdict) for one, verdict in zip(usable, verdicts, strict=True) if verdict != "unknown"]
    pairs = [(one.label == "pass", verdict == "pass") for one, verdict in known]
    found = kappa(pairs, [(one.row, one.answer_hash) for one, _ in known])
    return reading(what, len(pairs), found, _agreement_text(pairs, found, len(given) - len(pairs)))


def _still_asked(task: Judged, rows: Mapping[str, Row], label: Label) -> bool:
    """Whether the criterion still reads as it did when it was labelled."""
    texts = {one.id: one.text.split() for one in task.criteria(rows[label.row])} if label.row in rows else {}
    return texts.get(label.criterion) == label.text.split()


async def _judge_labelled(
    task: Judged, rows: Mapping[str, Row], texts: Mapping[tuple[str, str], str]
) -> dict[tuple[str, str], Mapping[str, Verdict]]:
    asked = await asyncio.gather(*(task.verdicts(Rollout.of(rows[row], text)) for (row, _), text in texts.items()))
    return dict(zip(texts, asked, strict=True))


def _agreement_text(pairs: Sequence[tuple[bool, bool]], found: Estimate, left_out: int) -> str:
    gone = f" {left_out} left out: verdict unknown, or answer or criterion gone." if left_out else ""
    if not pairs:
        return f"Not measured.{gone}"
    same = f"Judge and labels say the same of {sum(a == b for a, b in pairs) / len(pairs):.0%}."
    if math.isnan(found.value):
        return f"{same} Both always say {'pass' if pairs[0][0] else 'fail'}: kappa needs both kinds of labels.{gone}"
    word = next(word for least, word in _LANDIS if found.value >= least)
    half = (found.high - found.low) / 2
    needed = len(pairs) * (half / WANTED) ** 2
    more = f" About {needed:.0f} labels would narrow it to ±{WANTED}." if half > WANTED else ""
    return f"{same} Beyond chance that is {word}.{more}{gone}"
