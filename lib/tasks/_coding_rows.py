"""What a coding record holds, as a problem: tests, helper code, entry points, pairs of input and output.

Owns the reading of test cells and the inference of entry points; parses Python, runs none. Must not know sandboxes or
rewards.

    python -c "from lib.tasks._coding_rows import problem_of as p; print(p({'tests': ['assert f(2) == 4']}))"
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

BUILTINS = frozenset(dir(builtins))


class Unusable(ValueError):
    """A record that no reward can be made of. The text names no row: it is what such records are counted under."""


class Problem(NamedTuple):
    """What decides whether a program is right."""

    tests: list[str]
    """Statements that end in a check; they share their names, in order."""
    entry_points: list[str]
    setup: str
    reference: str
    entry_points_from: Literal["record", "reference", "tests"]
    io: list[list[str]]
    """Pairs of standard input and expected standard output, in place of tests."""


def problem_of(record: dict[str, Any]) -> Problem:
    """The problem in a record. Raises Unusable."""
    setup, reference = _text(record, "setup"), _text(record, "reference")
    io = _pairs(record.get("io"))
    if reference:
        _parse(reference, "the reference solution is not Python")
    if io:
        return Problem([], [], setup, reference, "record", io)
    given = _names(record.get("entry_point"))
    tests = _tests(record.get("tests"), setup, given)
    names, source = _entry_points(given, reference, tests, setup)
    return Problem(tests, names, setup, reference, source, [])


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise Unusable(f"{name} is not a text")
    return value if value.strip() else ""


def _parse(source: str, problem: str) -> list[ast.stmt]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a dataset is its author's business
            return ast.parse(source).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Unusable(problem) from None


# -- tests ------------------------------------------------------------------------------------------------------------


def _tests(cell: Any, setup: str, given: Sequence[str]) -> list[str]:
    """One text for each check: a list of texts, the JSON of one, or a whole test file as one text.

    What checks nothing (imports, helpers, assignments) goes before the check that follows it.
    """
    texts = _strings(cell)
    helpers = _checking_functions(_parse(setup, "setup is not Python"))
    tests: list[str] = []
    before: list[str] = []
    for text in texts:
        statements = _parse(text, "tests that are not Python")
        helpers |= _checking_functions(statements)
        for statement in statements:
            before.append(text.strip() if len(statements) == 1 else _source(statement))
            if _checks(statement, helpers):
                tests.append("\n".join(before))
                before = []
    if not tests and "check" in helpers and given:  # HumanEval's way: def check(candidate)
        tests = ["\n".join([*before, f"check({given[0]})"])]
    if not tests:
        raise Unusable("no test asserts anything" if texts else "no tests")
    return tests


def _source(statement: ast.stmt) -> str:
    try:
        return ast.unparse(statement)
    except RecursionError:
        raise Unusable("tests that are nested too deeply") from None


def _strings(cell: Any) -> list[str]:
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except ValueError:
            raise Unusable("tests that begin with [ but are no JSON list") from None
    if isinstance(cell, str):
        cell = [cell]
    if cell is None:
        return []
    if not isinstance(cell, list) or not all(isinstance(text, str) for text in cell):
        raise Unusable("tests are neither a text nor a list of texts")
    return [text for text in cell if text.strip()]


def _checking_functions(statements: Iterable[ast.stmt]) -> set[str]:
    """Functions that assert something when they are called."""
    functions = (node for node in statements if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
    return {node.name for node in functions if any(isinstance(inner, ast.Assert) for inner in ast.walk(node))}


def _checks(statement: ast.stmt, helpers: set[str]) -> bool:
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False
    return any(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in helpers)
        for node in ast.walk(statement)
    )


# -- entry points -----------------------------------------------------------------------------------------------------


def _names(cell: Any) -> list[str]:
    """Entry points as a list, or as a text with commas or blanks between."""
    names = re.split(r"[\s,]+", cell.strip()) if isinstance(cell, str) else cell
    if not names or names == [""]:
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) and name.isidentifier() for name in names):
        raise Unusable("an entry point that is no name of Python")
    return list(dict.fromkeys(names))


def _entry_points(
    given: list[str], reference: str, tests: Sequence[str], setup: str
) -> tuple[list[str], Literal["record", "reference", "tests"]]:
    """The names that a solution must define, and who says so.

    Those of the record, and what the reference defines and the tests use; else the one unknown name that they call.
    """
    statements = [*_parse(setup, "setup is not Python"), *chain(*(_parse(test, "") for test in tests))]
    foreign = _bound(statements) | BUILTINS
    used = [name for name in _loaded(statements) if name not in foreign]
    defined = [name for name in _defined(reference) if name in used]
    if given:
        return list(dict.fromkeys([*given, *defined])), "record"
    if reference:
        if not defined:
            raise Unusable("the tests use nothing that the reference solution defines")
        return defined, "reference"
    called = [name for name in _called(statements) if name not in foreign]
    if len(called) != 1:
        raise Unusable(
            "no entry point is given, and the tests call nothing of the solution's"
            if not called
            else "no entry point is given, and the tests call several unknown names"
        )
    return called, "tests"


def _defined(source: str) -> list[str]:
    """Functions, classes and variables of a module's top level, in order."""
    names: list[str] = []
    for node in _parse(source, "the reference solution is not Python"):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [target.id for target in targets if isinstance(target, ast.Name)]
    return list(dict.fromkeys(names))


def _walk(statements: Iterable[ast.stmt]) -> Iterator[ast.AST]:
    return chain.from_iterable(map(ast.walk, statements))


def _bound(statements: Sequence[ast.stmt]) -> set[str]:
    """Names that the tests themselves import, define, assign or take as parameters."""
    names: set[str] = set()
    for node in _walk(statements):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            names.add(node.id)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            names.add(node.name)
    return names


def _loaded(statements: Sequence[ast.stmt]) -> list[str]:
    return list(dict.fromkeys(node.id for node in _walk(statements) if isinstance(node, ast.Name)))


def _called(statements: Sequence[ast.stmt]) -> list[str]:
    calls = (node.func for node in _walk(statements) if isinstance(node, ast.Call))
    return list(dict.fromkeys(function.id for function in calls if isinstance(function, ast.Name)))


# -- input and output -------------------------------------------------------------------------------------------------


def _pairs(cell: Any) -> list[list[str]]:
    """Pairs of standard input and output: [{input, output}], [[input, output]], {inputs: [], outputs: []}, or JSON."""
    if isinstance(cell, str) and cell.strip():
        try:
            cell = json.loads(cell)
        except ValueError:
            raise Unusable("io is not JSON") from None
    if not cell:
        return []
    if isinstance(cell, dict) and isinstance(cell.get("inputs"), list) and isinstance(cell.get("outputs"), list):
        if len(cell["inputs"]) != len(cell["outputs"]):
            raise Unusable("io holds another number of inputs than of outputs")
        cell = [list(pair) for pair in zip(cell["inputs"], cell["outputs"], strict=True)]
    if not isinstance(cell, list):
        raise Unusable("io is neither a list of pairs nor {inputs, outputs}")
    return [[_lines(value) for value in _pair(one)] for one in cell]


def _pair(one: Any) -> list[Any]:
    if isinstance(one, dict) and {"input", "output"} <= set(one):
        return [one["input"], one["output"]]
    if isinstance(one, (list, tuple)) and len(one) == 2:
        return list(one)
    raise Unusable("io holds something else than pairs of input and output")


def _lines(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise Unusable("io holds an input or output that is neither a text nor a list of lines")
    return value


def same_output(printed: str, expected: str) -> bool:
    """Whether a program printed what was expected; blanks at line ends and blank lines at the end do not count."""
    return _trimmed(printed) == _trimmed(expected)


def _trimmed(text: str) -> list[str]:
    return [line.rstrip() for line in text.replace("\r\n", "\n").rstrip().split("\n")]
