"""One-line programming problems by the thousand, for policies that have learnt to write at most one line.

Owns their wording, their reference solutions, their tests, and the mediocre answers that a starter policy imitates.
Must not know sandboxes, rewards or models.

    python -c "from lib.tasks._coding_templates import generate; print(generate(1, seed=0)[0])"
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from random import Random
from typing import Any, NamedTuple

from lib.task import TaskError

Oracle = Callable[[Any, int], Any]
"""(argument, constant) -> what the function must return."""


class Kind(NamedTuple):
    """One kind of problem: its words and its answers, with x for the argument and {k} for the constant."""

    words: str
    right: str
    slip: str
    """What someone in a hurry writes: the operands in the wrong order, the other comparison, one item too many."""
    oracle: Oracle
    """The same as `right`, said once more in Python: the tests come from it, and the sandbox compares the two."""
    takes: str = "number"


KINDS = {
    "plus": Kind("x plus {k}", "x + {k}", "x - {k}", lambda x, k: x + k),
    "minus": Kind("x minus {k}", "x - {k}", "{k} - x", lambda x, k: x - k),
    "from": Kind("{k} minus x", "{k} - x", "x - {k}", lambda x, k: k - x),
    "times": Kind("x times {k}", "x * {k}", "x ** {k}", lambda x, k: x * k),
    "power": Kind("x to the power of {k}", "x ** {k}", "x * {k}", lambda x, k: x**k),
    "remainder": Kind("the remainder of x divided by {k}", "x % {k}", "x / {k}", lambda x, k: x % k),
    "quotient": Kind("x divided by {k} rounded down", "x // {k}", "x / {k}", lambda x, k: x // k),
    "larger": Kind("the larger of x and {k}", "max(x, {k})", "min(x, {k})", lambda x, k: x if x > k else k),
    "smaller": Kind("the smaller of x and {k}", "min(x, {k})", "max(x, {k})", lambda x, k: x if x < k else k),
    "above": Kind("whether x is above {k}", "x > {k}", "x >= {k}", lambda x, k: x > k),
    "below": Kind("whether x is below {k}", "x < {k}", "x <= {k}", lambda x, k: x < k),
    "at least": Kind("whether x is at least {k}", "x >= {k}", "x > {k}", lambda x, k: not x < k),
    "first": Kind("the first {k} items of x", "x[:{k}]", "x[{k}]", lambda x, k: x[:k], "list"),
    "without": Kind("x without its first {k} items", "x[{k}:]", "x[:{k}]", lambda x, k: x[k:], "list"),
    "last": Kind("the last {k} items of x", "x[-{k}:]", "x[-{k}]", lambda x, k: x[len(x) - k :], "list"),
    "item": Kind("item {k} of x counting from 0", "x[{k}]", "x[{k} - 1]", lambda x, k: x[k], "list"),
}
WORDINGS = ("Write {name}({x}) that returns {words}.", "Define {name}({x}) to give back {words}.")
NAMES = ("f", "g", "h", "solve", "calc", "make", "take", "apply")
ARGUMENTS = ("a", "b", "n", "v", "x", "y")
CONSTANTS = range(2, 21)

RIGHT, SLIP, PRINTED = 0.3, 0.4, 0.15  # shares of the demonstrations; the others take another kind for this one


def generate(rows: int, seed: int) -> list[dict[str, Any]]:
    """`rows` problems as records, no two with the same prompt. Raises TaskError where there are not so many.

    `demonstration` is the program that a starter policy is to imitate: right in three cases of ten, else with a slip,
    printing in place of returning, or an answer to another kind of problem.
    """
    every = list(product(KINDS, CONSTANTS, NAMES, ARGUMENTS, WORDINGS))
    if rows > len(every):
        raise TaskError(f"generate_rows {rows}: the templates give {len(every)} different problems. Ask for fewer.")
    random = Random(seed)
    return [_record(*one, random) for one in random.sample(every, rows)]


def _record(kind: str, k: int, name: str, argument: str, wording: str, random: Random) -> dict[str, Any]:
    words = _with(KINDS[kind].words, argument, k)
    return {
        "id": f"{kind.replace(' ', '-')}-{k}-{name}-{argument}-{WORDINGS.index(wording)}",
        "instruction": wording.format(name=name, x=argument, words=words),
        "entry_point": name,
        "tests": tests(kind, k, name),
        "reference": program(name, argument, KINDS[kind].right, k),
        "category": kind,
        "demonstration": _demonstration(kind, k, name, argument, random),
    }


def program(name: str, argument: str, expression: str, k: int, verb: str = "return {}") -> str:
    """A function of one line."""
    return f"def {name}({argument}):\n    {verb.format(_with(expression, argument, k))}\n"


def tests(kind: str, k: int, name: str) -> list[str]:
    """Asserts that every other kind, and the same kind with any other constant, fails."""
    oracle = KINDS[kind].oracle
    arguments: list[Any] = [k - 1, k, k + 1, 5 * k + 3, -2, 101]
    if KINDS[kind].takes == "list":
        length = CONSTANTS.stop + 2
        arguments = [[(7 * i + shift) % 50 for i in range(length)] for shift in range(4)]
    return [f"assert {name}({argument!r}) == {oracle(argument, k)!r}" for argument in arguments]


def _demonstration(kind: str, k: int, name: str, argument: str, random: Random) -> str:
    lot = random.random()
    if lot < RIGHT:
        return program(name, argument, KINDS[kind].right, k)
    if lot < RIGHT + SLIP:
        return program(name, argument, KINDS[kind].slip, k)
    if lot < RIGHT + SLIP + PRINTED:
        return program(name, argument, KINDS[kind].right, k, "print({})")
    others = [other for other in KINDS.values() if other.takes == KINDS[kind].takes]
    return program(name, argument, random.choice(others).right, k)


def _with(text: str, argument: str, k: int) -> str:
    """The text for this argument and this constant: the x of "max" is a letter, an x alone is the argument."""
    return re.sub(r"\bx\b", argument, text).format(k=k)
