"""The gate: what the base policy's answers say about the training to come, and whether to start it.

Owns the checks, their thresholds, and the knob of each. Must not know how anything is drawn.

    python -m lib.run notebooks/2_reward_inspection.ipynb configs/decisions.yaml
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from lib import models
from lib.attacks import UNSEEN
from lib.config import Config
from lib.generate import Chat, TemplateError, check_turns, unloaded_chat, within_limit
from lib.grading import JudgedTask
from lib.preflight.answers import grouped_rewards, share
from lib.preflight.groups import useful_groups
from lib.preflight.judging import judge_bill
from lib.preflight.suite import AttackTable
from lib.runfolder import Run
from lib.task import Row, Task
from lib.tools import ToolsError, check_tools

Level = Literal["go", "caution", "no-go"]
Answers = Sequence[Mapping[str, Any]]
"""Records of `sample_base`: row, answer, reward, masked, parts, notes, stop; group after group."""


class Limits(NamedTuple):
    """Beyond which value a check is worth a thought, and beyond which training is not worth its money."""

    caution: float
    no_go: float


TRUNCATED = Limits(0.1, 0.5)
"""An answer that is cut off earns what it had said by then: over one half, the limit decides the reward."""
INVALID = Limits(0.3, 0.9)
"""Formats are learnt quickly from a part that succeeds; with one in ten hardly a group has two to compare."""
DEAD = Limits(0.6, 0.95)
"""Sampling is most of a step's cost: at 60 % dead groups more than half of it is wasted, at 95 % all but nothing."""
USEFUL = Limits(2.0, 0.5)
"""Useful groups in a step. Below 2 one prompt decides a step's direction; below 0.5 most steps change nothing."""
OVER_LONG = Limits(0.1, 0.5)
"""Dropped prompts are often the hard ones; over one half the training is about other data than meant."""
LOOKED_AT = 1000
"""Prompts whose length is measured."""


class Check(NamedTuple):
    """One thing that was looked at before training."""

    check: str
    value: float | None
    shown: str
    """The value as it is read: "12 % of 256 answers"."""
    level: Level
    meaning: str
    knob: str
    """What to turn where the level is not go."""


def gate(config: Config, task: Task, run: Run, answers: Answers, attacked: AttackTable | None = None) -> list[Check]:
    """Every check on what the base policy answered (`sample_base`), and on the cheats where they were tried."""
    rows = run.read_rows("train")
    chat = unloaded_chat(config, models.resolve_model(config, rows))
    return [
        *(_of_attacks(attacked) if attacked else []),
        *_of_answers(config, task, answers),
        *_of_groups(config, answers),
        *_tools(rows, chat),
        *_of_prompts(config, rows, chat),
        _template(task, rows[0], chat),
        *_of_judge(config, task, rows, answers),
    ]


def verdict(checks: Sequence[Check]) -> str:
    """The gate in one line: GO, GO WITH CAUTION or NO-GO, and why."""
    bad = [check.check for check in checks if check.level == "no-go"]
    if bad:
        return f"NO-GO: {'; '.join(bad)}"
    doubtful = [check.check for check in checks if check.level == "caution"]
    return f"GO WITH CAUTION: {'; '.join(doubtful)}" if doubtful else f"GO: {len(checks)} checks passed"


def _of_attacks(table: AttackTable) -> list[Check]:
    working = table.working
    seen = [one for one in working if one.family != UNSEEN]
    level: Level = "no-go" if seen else "caution" if working or table.unscored else "go"
    meaning = "; ".join(f"{one.name}: {one.works}" for one in (seen or working)[:5])
    if working and not seen:
        meaning += ". These need the criteria, which the policy is not shown: see that no prompt holds them"
    if table.unscored:
        meaning = f"{table.unscored:.0%} of the cheats could not be judged somewhere. {meaning}".strip()
    of = f"{len(working)} of {len(table.attacked)}"
    knob = "the task's scorer: it must not pay for them"
    cheats = Check("cheats that work", float(len(working)), of, level, meaning or "none pays", knob)
    if not table.gold:
        return [cheats]
    wrong = len(table.misjudged)
    known = Check(
        "gold answers that do not come first",
        float(wrong),
        f"{wrong} of {len(table.gold)}",
        "no-go" if wrong else "go",
        "the reward points away from the right answer" if wrong else "gold comes first",
        "the task's scorer, or the rows' gold answers",
    )
    return [cheats, known]


def _of_answers(config: Config, task: Task, answers: Answers) -> list[Check]:
    """Cut off, unreadable, unscored."""
    n, several = f"of {len(answers)} answers", task.max_turns > 1
    cut = share(a["stop"] == "length" for a in answers)
    invalid = share(a["masked"] or a["parts"].get("valid") == 0 for a in answers)
    unscored = [a for a in answers if a["reward"] is None and not a["masked"]]
    causes = Counter(str(a["notes"].get("error", "no reason given")) for a in unscored)
    lost = share(a["reward"] is None and not a["masked"] for a in answers)
    return [
        Check(
            "answers cut off",
            cut,
            f"{cut:.1%} {n}",
            _level(cut, TRUNCATED),
            "a cut-off answer is not judged on what it would have said",
            f"sampling.completion_limit (now {config.sampling.completion_limit}) up, or ask for shorter answers"
            + "; where all turns together are too long, sampling.vllm.max_length up or task.max_turns down" * several,
        ),
        Check(
            "answers that cannot be read",
            invalid,
            f"{invalid:.1%} {n}",
            _level(invalid, INVALID),
            "masked by the task, or not valid: the policy does not know the format",
            "say the format in the prompt, with an example; a stronger model.name",
        ),
        Check(
            "answers unscored",
            lost,
            f"{lost:.1%} {n}",
            _level(lost, Limits(0.0, config.rewards.max_unscored)),
            "; ".join(f"{count} x {cause}" for cause, count in causes.most_common(3)) or "every answer was judged",
            "the judge, the sandbox or the scorer",
        ),
    ]


def _of_groups(config: Config, answers: Answers) -> list[Check]:
    training = config.training
    size, completions = training.group_size, training.batch * training.passes_per_generation
    groups = grouped_rewards(answers, size)
    dead = share(len({reward for reward in group if reward is not None}) < 2 for group in groups)
    useful = useful_groups(groups, completions, (size,))[0].per_step
    larger = f"training.group_size (now {size}) up, training.batch (now {training.batch}) up"
    return [
        Check(
            "groups without a signal",
            dead,
            f"{dead:.1%} of {len(groups)} groups",
            _level(dead, DEAD),
            "all answers of the group earn the same: nothing to learn from it",
            f"{larger}; sampling.temperature up; rows that are neither too easy nor too hard",
        ),
        Check(
            "useful groups in a step",
            useful,
            f"{useful:.2g} of {completions // size}",
            _level(-useful, Limits(-USEFUL.caution, -USEFUL.no_go)),
            "expected, of those that one sampling feeds",
            f"{larger}; training.accumulation up",
        ),
    ]


def _of_prompts(config: Config, rows: Sequence[Row], chat: Chat) -> list[Check]:
    limit = config.sampling.prompt_limit
    looked_at = random.Random(config.training.seed).sample(range(len(rows)), min(LOOKED_AT, len(rows)))
    kept = len(within_limit([rows[index] for index in looked_at], chat, limit))
    over = 1 - kept / len(looked_at)
    training = config.training
    prompts = training.batch * training.passes_per_generation // training.group_size
    left = round(len(rows) * (1 - over))
    return [
        Check(
            "prompts over the limit",
            over,
            f"{over:.1%} of {len(looked_at)} prompts",
            _level(over, OVER_LONG),
            "they are dropped from training",
            f"sampling.prompt_limit (now {limit}) up",
        ),
        Check(
            "prompts left for one sampling",
            float(left),
            f"{left} for {prompts}",
            "no-go" if left < prompts else "go",
            "one sampling takes batch x steps_per_generation / group_size different prompts",
            f"training.batch (now {training.batch}) down, or more rows",
        ),
    ]


def _tools(rows: Sequence[Row], chat: Chat) -> list[Check]:
    """Whether the policy is shown the functions that it is to call; nothing where no row has any."""
    try:
        if not check_tools(chat, rows):
            return []
    except ToolsError as error:
        return [Check("tools in the prompt", 0.0, "left out", "no-go", error.why, error.knob)]
    return [Check("tools in the prompt", 1.0, "shown", "go", "the chat template names the functions", "")]


def _template(task: Task, row: Row, chat: Chat) -> Check:
    """Whether a longer conversation starts with the tokens of the shorter one, as several turns need."""
    kept = keeps_prefix(chat, row)
    several = task.max_turns > 1
    meaning = "a longer conversation starts with the shorter one's tokens"
    if not kept:
        meaning = "the chat template rewrites earlier turns: sampled tokens cannot be kept over several turns"
        meaning += "" if several else "; this task has one turn, so it does no harm"
    knob = "model.name, or the tokenizer's chat template"
    level: Level = "no-go" if several and not kept else "go"
    return Check("chat template", float(kept), "keeps its prefix" if kept else "rewrites", level, meaning, knob)


def keeps_prefix(chat: Chat, row: Row) -> bool:
    """Whether the chat template keeps an answered prompt as it is when another message is added."""
    try:
        check_turns(chat, row)
    except TemplateError:
        return False
    return True


def _of_judge(config: Config, task: Task, rows: Sequence[Row], answers: Answers) -> list[Check]:
    bill = judge_bill(config, task, rows, answers)
    if bill is None or not isinstance(task, JudgedTask):
        return []
    limits = [usd for usd in (task.judge.budget_usd, config.cost.budget_usd) if usd is not None]
    meaning = f"{bill.completions} answers of the training, at what the base policy's took to judge"
    if bill.usd is None:
        paid = task.judge.provider in ("openai", "gemini")
        level: Level = "caution" if paid else "go"
        knob = f"a price of the judge's model under `tokens` in {config.cost.prices}"
        return [Check("judging", None, f"{bill.calls:,.0f} calls, price unknown", level, meaning, knob)]
    over = bool(limits) and bill.usd > min(limits)
    if limits:
        meaning += f": {'over' if over else 'within'} the limit of ${min(limits):g}" + ", where it would stop" * over
    knob = "training.steps down, or task.judge.budget_usd and cost.budget_usd up"
    shown = f"{bill.calls:,.0f} calls, ${bill.usd:,.2f}"
    return [Check("judging", bill.usd, shown, "no-go" if over else "go", meaning, knob)]


def _level(value: float, limits: Limits) -> Level:
    return "no-go" if value > limits.no_go else "caution" if value > limits.caution else "go"
