"""What people are shown of graded calls: a verdict on each expected one, and the calls that were made, cut short.

Owns the wording and the lengths. Must not know how calls are graded.

    python -c "from lib.tasks._functions_notes import shown; print(shown([]))"
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lib.tasks._functions_check import Call, Problem
from lib.tasks._functions_grade import Grade

_SHOWN = 500
"""Characters of a call that notes keep: an answer may be a megabyte."""


def verdicts(answers: Sequence[Mapping[str, Any]], grades: Sequence[Grade], found: Problem | None) -> dict[str, Any]:
    """One verdict for each expected call, by its name; a name's second call is `name 2`."""
    told: dict[str, Any] = {}
    for number, (answer, one) in enumerate(zip(answers, grades, strict=True), start=1):
        name, accepted = next(iter(answer.items()))
        told[name if name not in told else f"{name} {number}"] = {
            "verdict": "pass" if one.mean == 1 else "fail",
            "score": one.mean,
            "reasons": ""
            if found is None
            else f"{found.kind}: {found.text}"[:_SHOWN].encode(errors="replace").decode(),
            "text": f"{name}({json.dumps(accepted)[:_SHOWN]})",
        }
    return told


def shown(calls: Sequence[Call] | None) -> list[str]:
    """Calls as texts, for people: cut short, and plain ASCII whatever the answer held."""
    return [f"{call.name[:80]}({json.dumps(call.arguments)[:_SHOWN]})" for call in list(calls or [])[:16]]
