"""What tasks whose rewards come from a judge share.

Owns the fields `judge` and `ledger`, and the way from a rollout to its verdicts. Must not know what they are worth.

    python -c "from lib.grading import JudgedTask; print(JudgedTask.model_fields['judge'])"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lib.data import RowsTask
from lib.grading.asking import grade
from lib.grading.prompt import Criterion
from lib.judge import JudgeSettings, check_judge
from lib.ledger import Verdict, open_ledger
from lib.task import Rollout, Row, Score


class JudgedTask(RowsTask, frozen=True):
    """A task whose reward comes from a judge's verdicts. A subclass says what is judged and what verdicts are worth."""

    judge: JudgeSettings = JudgeSettings()
    """The model that judges: provider, model, base_url, key (the name of an environment variable), limits."""
    ledger: str = ""
    """The file in which verdicts are kept; "" = the run's own. A shared one lets runs use each other's verdicts."""

    version: ClassVar[str] = "1"
    """Part of the ledger's keys: raise it when the verdicts kept so far are no longer right."""
    instructions: ClassVar[str] = ""
    """What the judge is told beside the rules that hold for every task."""

    def criteria(self, row: Row) -> list[Criterion]:
        """What is judged about an answer to a row."""
        raise NotImplementedError(f"{type(self).__name__}.criteria is missing")

    def reward_of(self, row: Row, verdicts: Mapping[str, Verdict]) -> Score:
        """What the verdicts are worth; reward None where an unknown one decides."""
        raise NotImplementedError(f"{type(self).__name__}.reward_of is missing")

    async def verdicts(self, rollout: Rollout, ask: int = 0, reverse: bool = False) -> dict[str, Verdict]:
        """The verdict on each criterion by its id. `ask` > 0: asked again, independently. Raises LedgerError."""
        return await grade(
            rollout.row["prompt"],
            rollout.text,
            self.criteria(rollout.row),
            judge=self.judge,
            ledger=self.ledger,
            task=f"{type(self).__name__.lower()}/{self.version}",
            row=rollout.row["id"],
            instructions=self.instructions,
            reference=rollout.row.get("reference") or "",
            ask=ask,
            reverse=reverse,
        )

    async def score(self, rollout: Rollout) -> Score:
        """The reward of the verdicts on the answer."""
        return self.reward_of(rollout.row, await self.verdicts(rollout))

    def env_keys(self) -> list[str]:
        """The environment variable that holds the judge's key."""
        return [self.judge.key_name] if self.judge.key_name else []

    def check(self) -> list[str]:
        """Warnings about the judge; raises where it can never work as configured, or a ledger of one's own is none."""
        if self.ledger:
            open_ledger(self.ledger)
        return check_judge(self.judge)

    def notes(self, row: Row, verdicts: Mapping[str, Verdict], scored: bool) -> dict[str, Any]:
        """What a score says about its verdicts, and where it is unscored the causes, for counting."""
        notes: dict[str, Any] = {
            "verdicts": {
                one.id: {
                    "verdict": verdicts[one.id].verdict,
                    "reasons": verdicts[one.id].reasons,
                    "score": verdicts[one.id].score,
                    "text": one.text,
                }
                for one in self.criteria(row)
            }
        }
        causes = {verdict.reasons for verdict in verdicts.values() if verdict.verdict == "unknown"}
        return notes if scored else {**notes, "error": "; ".join(sorted(causes))}
