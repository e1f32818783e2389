"""Calls that look right and are not: answers to a row of functions that must not earn its reward.

Owns which wrong calls there are. Must not know how calls are written in an answer, nor rewards.

    python -c "from lib.tasks._functions_cheats import calls_for_nothing as c; print(c([], str, True))"
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lib.tasks._functions_check import Call, Function, shown_name
from lib.tasks._functions_rows import calls_json

Written = Callable[[Sequence[Call]], str]
"""How calls are written in an answer."""


def cheats_for(
    functions: Sequence[Function], right: Sequence[Call], written: Written, underscores: bool
) -> dict[str, str]:
    """Answers near the right calls: too many, twice, by name only, with two values, thought or told but not made."""
    names = [shown_name(one["name"], underscores) for one in functions]
    others = [Call(name, right[0].arguments) for name in names if name != right[0].name]
    found = {
        "the right calls twice": written([*right, *right]),
        "the right calls and an unknown one": written([*right, Call("done", {})]),
        "the right calls with a parameter more": written(
            [Call(one.name, {**one.arguments, "correct": True}) for one in right]
        ),
        "the right calls thought, not made": f"<think>{written(right)}</think>",
        "the right calls told, not made": f"I would call {calls_json(right)} for you.",
    }
    if others:
        found["every function called"] = written([*right, *others])
        found["another function, the same arguments"] = written([others[0], *right[1:]])
    if any(one.arguments for one in right):
        hedged = [Call(one.name, {name: [value, ""] for name, value in one.arguments.items()}) for one in right]
        found["values and nothing at once"] = written(hedged)
    if any(function["parameters"]["required"] for function in functions[:1]) or len(names) > 1:
        found["names without arguments"] = written([Call(name, {}) for name in names])
    return found


def calls_for_nothing(functions: Sequence[Function], written: Written, underscores: bool) -> dict[str, str]:
    """Calls where none is wanted."""
    found = {"an unknown function called": written([Call("no_function", {})])}
    if functions:
        found["a call all the same"] = written([Call(shown_name(functions[0]["name"], underscores), {})])
    return found
