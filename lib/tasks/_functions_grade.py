"""Partial credit for calls that the official verdict fails: what of each expected call is right.

Owns the shares and their mean. Must not know the verdict on whole answers, rows, or how calls are written.

    python -c "from lib.tasks._functions_grade import Grade; print(Grade(1.0, 1.0, 0.5, 0.0).mean)"
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lib.tasks._functions_check import (
    Answer,
    Call,
    Function,
    Language,
    accepted_of,
    check_argument,
    described,
    language_of,
    shown_name,
)

_NOT_EXACT = 0.9
"""The most that partial credit gives: an exact answer always earns more."""
_LOOKED_AT = 4
"""Calls for each expected one that partial credit is sought in: a megabyte of them would hold up all other rollouts."""


class Grade(NamedTuple):
    """Shares from 0 to 1 of what is right in a call; all 0 where the name is wrong."""

    name: float
    required: float
    types: float
    values: float

    @property
    def mean(self) -> float:
        return sum(self) / len(self)


def grade_call(
    function: Function, call: Call, accepted: Mapping[str, Sequence[Any]], language: Language, underscores: bool
) -> Grade:
    """How much of one call is right: its name, and the shares of required parameters, types and values."""
    if call.name != shown_name(function["name"], underscores):
        return Grade(0.0, 0.0, 0.0, 0.0)
    required = function["parameters"]["required"]
    given = {name: check_argument(function, name, value, accepted, language) for name, value in call.arguments.items()}
    typed = [not found or found.kind.startswith(("value_", "dict_", "list_")) for found in given.values()]
    missing = [name for name, values in accepted.items() if name not in given and "" not in values]
    right = [found is None for found in given.values()] + [False] * len(missing)
    return Grade(1.0, _share([name in given for name in required]), _share(typed), _share(right))


def grade(
    functions: Sequence[Function], calls: Sequence[Call], answers: Sequence[Answer], category: str, underscores: bool
) -> tuple[list[Grade], float]:
    """(the grade of each expected call, the mean credit of all, at most 0.9: for answers that `check` fails).

    Each expected call takes the best call left; calls too many count as 0, and beyond four times as many are not
    looked at.
    """
    language, left, grades = language_of(category), list(calls[: _LOOKED_AT * len(answers)]), []
    for answer in answers:
        function, accepted = described(functions, answer), accepted_of(answer)
        known = [grade_call(function, call, accepted, language, underscores) for call in left]
        best = max(range(len(left)), key=lambda i: known[i].mean, default=None)
        grades.append(Grade(0.0, 0.0, 0.0, 0.0) if best is None else known[best])
        if best is not None and known[best].name:
            del left[best]
    total = math.fsum(one.mean for one in grades) / max(len(answers), len(calls), 1)
    return grades, min(total, _NOT_EXACT)


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 1.0
