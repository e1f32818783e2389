"""Grading: an answer and its criteria become verdicts, each asked of a judge once and kept in the ledger.

Owns the grading prompt and the reading of replies (`prompt`), the repair of partial replies (`asking`), and what judged
tasks share (`judged`). Must not know what a verdict is worth (lib/tasks) or how a judge is reached (lib/judge).

    python -c "from lib.grading import Criterion, grading_messages as g; \
               print(g([], 'Paris', [Criterion(id='1', text='Names Paris')])[1]['content'])"
"""

from lib.grading.asking import ROUNDS, grade
from lib.grading.judged import JudgedTask
from lib.grading.prompt import PROMPT, Criterion, fence_mark, grading_messages, grading_schema, read_reply

__all__ = [
    "PROMPT",
    "ROUNDS",
    "Criterion",
    "JudgedTask",
    "fence_mark",
    "grade",
    "grading_messages",
    "grading_schema",
    "read_reply",
]
