"""Asking for verdicts: from the ledger where they are known, of the judge where not, and again for what it left out.

Owns the ledger's keys, single flights and the repair of partial replies. Must not know what a verdict is worth.

    python -c "from lib.grading import grade; help(grade)"
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from weakref import WeakKeyDictionary

from lib.grading.prompt import (
    PROMPT,
    Criterion,
    all_unknown,
    conversation_text,
    grading_messages,
    grading_schema,
    read_reply,
    scored,
    sendable,
)
from lib.judge import JudgeError, JudgeSettings, Reply, UselessReply, open_judge
from lib.ledger import Entry, Ledger, Verdict, hash_text, open_ledger, verdict_key
from lib.task import Message

ROUNDS = 3
"""Times that a judge is asked for what its replies have left out so far."""


class _Flight:
    """One exam on its way. Where nobody waits for it any more (an interrupt), it asks nothing more."""

    told: asyncio.Task[dict[str, Verdict]]
    """By key."""

    def __init__(self) -> None:
        self.waiting = 0

    def wanted(self) -> bool:
        return self.waiting > 0


_flights: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[Path, str], _Flight]] = WeakKeyDictionary()
"""What is being asked now, by ledger and key: members of a group that give the same answer are judged once."""


class _Exam(NamedTuple):
    """One answer, and all that its verdicts depend on beside the criteria."""

    conversation: Sequence[Message]
    answer: str
    reference: str
    instructions: str
    judge: JudgeSettings
    task: str
    row: str
    ask: int
    reverse: bool

    def keys(self, criteria: Sequence[Criterion]) -> dict[str, str]:
        """The ledger's key of each criterion, by its id."""
        question = [conversation_text(self.conversation), self.reference, self.instructions, self.ask, self.reverse]
        asked, answer = hash_text(json.dumps(question)), hash_text(self.answer)
        return {
            one.id: verdict_key(self.task, one.text, self.judge.name, PROMPT, answer, one.scale, asked)
            for one in criteria
        }

    def entry(self, key: str, criterion: Criterion, verdict: Verdict) -> Entry:
        """The ledger's line for a verdict."""
        answer = hash_text(self.answer)
        return Entry(key, verdict, self.task, self.row, criterion.id, self.judge.name, PROMPT, answer)


async def grade(
    conversation: Sequence[Message],
    answer: str,
    criteria: Sequence[Criterion],
    *,
    judge: JudgeSettings,
    ledger: str,
    task: str,
    row: str,
    instructions: str = "",
    reference: str = "",
    ask: int = 0,
    reverse: bool = False,
) -> dict[str, Verdict]:
    """The verdict on every criterion, by its id: from the ledger, or asked of the judge and kept there.

    `task` names the task and its version. `ask` > 0 is an independent ask again, with a place of its own in the ledger;
    `reverse` asks in the opposite order. What the judge does not tell is unknown, with the cause as its `reasons`, and
    is asked for again the next time. An answer without any text fails without a call. Raises LedgerError.
    """
    if not any(character.isprintable() and not character.isspace() for character in answer):
        return {one.id: Verdict("fail", 0.0, "The answer has no text.") for one in criteria}
    exam = _Exam(conversation, answer, reference, instructions, judge, task, row, ask, reverse)
    file, keys = open_ledger(ledger), exam.keys(criteria)
    known = {key: found for key, found in file.get_many(keys.values()).items() if found.verdict != "unknown"}
    flights = _flights.setdefault(asyncio.get_running_loop(), {})
    places = {one.id: (file.path, keys[one.id]) for one in criteria if keys[one.id] not in known}
    mine = [one for one in criteria if one.id in places and places[one.id] not in flights]
    if mine:
        flight = _Flight()
        flight.told = asyncio.create_task(_ask(exam, mine, keys, file, flight.wanted))
        flights |= {places[one.id]: flight for one in mine}
        flight.told.add_done_callback(lambda _: [flights.pop(places[one.id], None) for one in mine])
    awaited = {flights[place] for place in places.values()}
    for flight in awaited:
        flight.waiting += 1
    try:
        for flight in awaited:
            known |= await asyncio.shield(flight.told)  # who gives up does not take the verdict from the others
    finally:
        for flight in awaited:
            flight.waiting -= 1
    return {one.id: known[keys[one.id]] for one in criteria}


async def _ask(
    exam: _Exam, criteria: Sequence[Criterion], keys: Mapping[str, str], file: Ledger, wanted: Callable[[], bool]
) -> dict[str, Verdict]:
    """Ask until every criterion has a verdict, ROUNDS times at most, and keep what was told at once. By key."""
    found: dict[str, Verdict] = {}
    left = list(reversed(criteria)) if exam.reverse else list(criteria)
    for _ in range(ROUNDS):
        told, may_help = await _ask_once(exam, left, wanted)
        found |= {name: _after(verdict, found.get(name)) for name, verdict in told.items()}
        file.put([exam.entry(keys[one.id], one, found[one.id]) for one in left])
        left = [one for one in left if found[one.id].verdict == "unknown"]
        if not left or not may_help:
            break
    return {keys[name]: verdict for name, verdict in found.items()}


async def _ask_once(
    exam: _Exam, criteria: Sequence[Criterion], wanted: Callable[[], bool]
) -> tuple[dict[str, Verdict], bool]:
    """What one call tells of each criterion, and whether asking again for the rest may help."""
    try:
        if exam.judge.provider == "reward_model":
            return await _ask_model(exam, criteria), False
        messages = grading_messages(exam.conversation, exam.answer, criteria, exam.reference, exam.instructions)
        reply = await open_judge(exam.judge).ask(messages, grading_schema(criteria), "verdicts", wanted)
        told = read_reply(reply.text, criteria)
    except UselessReply as error:
        reply, told = error.spent, all_unknown(criteria, str(error))
    except JudgeError as error:
        reply, told = error.spent, all_unknown(criteria, str(error))
        return _with_costs(told, reply), False
    return _with_costs(told, reply), True


def _with_costs(told: Mapping[str, Verdict], reply: Reply) -> dict[str, Verdict]:
    """The verdicts of one call, each with its share of what the call cost."""
    usd = None if reply.usd is None else reply.usd / len(told)
    return {
        name: verdict._replace(usd=usd, seconds=reply.seconds, attempts=reply.attempts)
        for name, verdict in told.items()
    }


async def _ask_model(exam: _Exam, criteria: Sequence[Criterion]) -> dict[str, Verdict]:
    """A reward model's number for the whole answer, under the one criterion that it is given."""
    from lib.reward_model import open_reward_model

    answer, reference = sendable(exam.answer), sendable(exam.reference)
    started = time.monotonic()
    score = await open_reward_model(exam.judge).score(exam.conversation, answer, reference)
    verdict = scored(score, "")._replace(usd=0.0, seconds=time.monotonic() - started, attempts=1)
    return {one.id: verdict for one in criteria}


def _after(verdict: Verdict, before: Verdict | None) -> Verdict:
    """The later verdict on a criterion, with what the one before has cost added."""
    if before is None:
        return verdict
    usd = None if verdict.usd is None or before.usd is None else verdict.usd + before.usd
    seconds, attempts = verdict.seconds + before.seconds, verdict.attempts + before.attempts
    return verdict._replace(usd=usd, seconds=seconds, attempts=attempts)
