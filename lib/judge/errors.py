"""A judge's reply, and the ways in which there is none.

python -c "from lib.judge.errors import JudgeError; print(JudgeError('judge: HTTP 503 after 5 attempts').spent)"
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from lib import WorkbenchError


class Reply(NamedTuple):
    """One answer of the judge, and what it took."""

    text: str
    input_tokens: int
    output_tokens: int
    """Thinking included."""
    usd: float | None
    """None = no price is known, or the endpoint does not say how many tokens it used."""
    seconds: float
    """Of the HTTP requests, retries included, without the waits between."""
    attempts: int
    """HTTP requests."""


class JudgeError(WorkbenchError, RuntimeError):
    """This call gave no verdict. The message is a cause that can be counted: short, and the same for the same cause."""

    spent: Reply
    """What it took all the same; its text is empty."""

    def __init__(self, cause: str, spent: Reply | None = None) -> None:
        super().__init__(cause)
        self.spent = spent or Reply("", 0, 0, 0.0, 0.0, 0)


class UselessReply(JudgeError):
    """The judge was paid and said nothing that can be read; asking again may help. `spent` says what it cost."""

    def __init__(self, why: Literal["truncated", "refusal", "empty"], cause: str, spent: Reply | None = None) -> None:
        super().__init__(cause, spent)
        self.why = why


class JudgeRefused(JudgeError):
    """Nothing will work as configured: the key, the model's id, the endpoint or the money has to change first."""
