"""Has every mutation of a right answer the official verdict? bfcl-eval 2026.3.23 judges too, in its own environment.

From the benchmark's 2,501 rows with answers: the right calls of each, then seeded mutations of calls, names,
parameters, types and values. Both checkers see the same decoded calls; the verdicts must agree. Not a test: it needs
bfcl-eval, whose pins clash with ours. Only its standard-library part is imported, so no dependency is installed:

    python3 -m venv build/bfcl && build/bfcl/bin/pip install --no-deps bfcl-eval==2026.3.23
    PYTHONPATH=. .venv/bin/python tests/bfcl_parity.py --python build/bfcl/bin/python

Exit status 0 = all verdicts agree, else 1.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from lib.tasks._functions_check import Call, check, language_of
from lib.tasks._functions_files import BfclTable, bfcl_files
from lib.tasks._functions_rows import needs_answers, right_calls, with_required

OFFICIAL = """
import ast, json, sys, types
from types import SimpleNamespace

class Models(dict):
    def __missing__(self, name):
        return SimpleNamespace(underscore_to_dot=name == "dots")

stub = types.ModuleType("bfcl_eval.constants.model_config")  # the real one imports every model's client
stub.MODEL_CONFIG_MAPPING = Models()
sys.modules["bfcl_eval.constants.model_config"] = stub
from bfcl_eval.constants.enums import Language
from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

for line in open(sys.argv[1]):
    functions, calls, answers, category, language, dots = ast.literal_eval(line)
    try:
        found = ast_checker(functions, calls, answers, Language(language), category, "dots" if dots else "plain")
        verdict = [found["valid"], "" if found["valid"] else found["error_type"]]
    except Exception as error:
        verdict = [False, f"raised {type(error).__name__}"]
    print(json.dumps(verdict))
"""
FIND = (
    "import importlib.util, pathlib; print(pathlib.Path(importlib.util.find_spec('bfcl_eval').origin).parent / 'data')"
)
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 1.0, 2.5, 10**400, "", " ", "a", "1", "true", [], {}, (), [1], ["a"], [[1]], [{}],
    {"a": 1}, {"a": [1]}, (1, 2), "new ArrayList<>()", "new HashMap<>()", "[]", "{}", "5L", "1.5f", "é", "ſ", "\n",
)  # fmt: skip


def load(folder: Path) -> list[dict[str, Any]]:
    """Every row with an answer: {functions, answers, category}."""
    rows = []
    for category, questions, answers in bfcl_files(folder, ()):
        if needs_answers(category):
            table = BfclTable(questions, category, answers)
            for record in table:
                functions = [with_required(one) for one in record["function"]]
                rows.append(
                    {
                        "id": record["id"],
                        "functions": functions,
                        "answers": record["ground_truth"],
                        "category": category,
                    }
                )
    return rows


def mutated(calls: list[Call], row: dict[str, Any], random: Random) -> list[Call]:
    """One to three changes to the right calls; some of them change nothing that counts."""
    calls = copy.deepcopy(calls)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        change = random.choice(CHANGES)
        calls = change(calls, row, random)
    return calls


def drop_call(calls: list[Call], row: dict[str, Any], random: Random) -> list[Call]:
    return [call for i, call in enumerate(calls) if i != 0] if random.random() < 0.5 else calls[:-1]


def repeat_call(calls: list[Call], row: dict[str, Any], random: Random) -> list[Call]:
    return [*calls, copy.deepcopy(random.choice(calls))] if calls else calls


def shuffle(calls: list[Call], row: dict[str, Any], random: Random) -> list[Call]:
    return random.sample(calls, len(calls))


def rename(calls: list[Call], row: dict[str, Any], random: Random) -> list[Call]:
    if not calls:
        return calls
    at = random.randrange(len(calls))
    name = calls[at].name
    other = random.choice(row["functions"])["name"]
    names = [other, other.replace(".", "_"), name.upper(), name + " ", name.replace("_", "."), ""]
    return [call._replace(name=random.choice(names)) if i == at else call for i, call in enumerate(calls)]


def drop_parameter(calls: list[Call], row: dict[str, Any], random: Random) -> list[Call]:
    given = [(call, name) for call in calls for name in call.arguments]
    if given:
        call, name = random.choice(given)
        del call.arguments[name]
    return calls


def add_parameter(calls: list[Call], row: dict[str, Any], random: Random) -> list[Call]:
    if calls:
        properties = [name for one in row["functions"] for name in one["parameters"]["properties"]]
        random.choice(calls).arguments[random.choice([*properties, "extra"])] = random.choice(STRANGE)
    return calls


def swap(calls: list[Call], row: dict[str, Any], random: Random) -> list[Call]:
    """Another accepted value, as it stands in the ground truth, or in any other place of it."""
    known = [
        (name, value)
        for answer in row["answers"]
        for one in answer.values()
        for name, values in one.items()
        for value in values
    ]
    if calls and known:
        call, (name, value) = random.choice(calls), random.choice(known)
        own = [one for one in known if one[0] in call.arguments]
        name, value = random.choice(own) if own and random.random() < 0.8 else (name, value)
        call.arguments[name] = copy.deepcopy(value)
    return calls


def change_value(calls: list[Call], row: dict[str, Any], random: Random) -> list[Call]:
    given = [(call, name) for call in calls for name in call.arguments]
    if given:
        call, name = random.choice(given)
        call.arguments[name] = changed(call.arguments[name], random)
    return calls


def changed(value: Any, random: Random) -> Any:
    """A value near to this one: other type, other spelling, another element; now and then something strange."""
    if random.random() < 0.12:
        return copy.deepcopy(random.choice(STRANGE))
    if isinstance(value, bool):
        return random.choice([not value, int(value), str(value), str(value).lower()])
    if isinstance(value, (int, float)) and abs(value) > 1e300:
        return -value
    if isinstance(value, (int, float)):
        return random.choice(
            [value + 1, -value, float(value), int(value), str(value), [value], bool(value), value * 1.5]
        )
    if isinstance(value, str):
        return changed_text(value, random)
    if isinstance(value, (list, tuple)):
        return changed_list(list(value), random)
    if isinstance(value, dict):
        return changed_dict(dict(value), random)
    return random.choice(STRANGE)


def changed_text(value: str, random: Random) -> Any:
    middle, mark = len(value) // 2, random.choice(" ,./-_*^'!x\t\n")
    spelled = [value.upper(), value.lower(), value.title(), f"{value} ", f"{value}s", value[1:], value[::-1]]
    spelled += [value.replace(" ", ""), value.replace(" ", "-"), value.replace(", ", ","), value.replace("1", "2")]
    spelled += [value.replace('"', "'"), value.replace("'", '"'), value.replace("true", "false")]
    spelled += [value[:middle] + mark + value[middle:]] * 2
    others: list[Any] = [[value], (value,), {"a": value}]
    if value.isascii() and value.isdigit() and len(value) < 300:
        others.append(int(value))
    return random.choice([*spelled, *others])


def changed_list(value: list[Any], random: Random) -> Any:
    kind = random.randrange(7)
    if kind == 0:
        return tuple(value)
    if kind == 1:
        return value[::-1]
    if kind == 2:
        return value[:-1]
    if kind == 3:
        return [*value, *value[:1]]
    if kind == 4:
        return value[0] if value else None
    if kind == 5:
        return [float(one) if type(one) is int and abs(one) < 1e300 else one for one in value]
    at = random.randrange(len(value)) if value else 0
    return [changed(one, random) if i == at else one for i, one in enumerate(value)]


def changed_dict(value: dict[str, Any], random: Random) -> Any:
    kind = random.randrange(4)
    name = random.choice(list(value)) if value else ""
    if kind == 0:
        return {**value, random.choice(["extra", name.upper()]): 1}
    if kind == 1:
        return {key: one for key, one in value.items() if key != name}
    if kind == 2:
        return list(value.items())
    return {key: changed(one, random) if key == name else one for key, one in value.items()}


CHANGES = (drop_call, repeat_call, shuffle, rename, drop_parameter, add_parameter, *[swap] * 4, *[change_value] * 8)


def is_rare(row: dict[str, Any]) -> bool:
    """Whether a right call holds a list, a dict, or a literal of another language."""
    known = [values for answer in row["answers"] for one in answer.values() for values in one.values()]
    nested = any(isinstance(value, (list, dict)) for values in known for value in values)
    return nested or language_of(row["category"]) != "python"


def cases(rows: list[dict[str, Any]], count: int, seed: int) -> list[tuple[dict[str, Any], list[Call], bool]]:
    """(row, calls, names without dots): the right calls of every row, in both spellings, then `count` mutations."""
    right = {
        (row["id"], dots): right_calls(row["functions"], row["answers"], row["category"], dots)
        for row in rows
        for dots in (False, True)
    }
    found = [(row, right[row["id"], dots], dots) for row in rows for dots in (False, True)]
    random, rare = Random(seed), [row for row in rows if is_rare(row)]
    for _ in range(count):  # most rows hold plain texts and numbers: half of the mutations go to the others
        row, dots = random.choice(rare if random.random() < 0.5 else rows), random.random() < 0.5
        found.append((row, mutated(right[row["id"], dots], row, random), dots))
    return found


def official(python: str, found: list[tuple[dict[str, Any], list[Call], bool]], folder: Path) -> list[list[Any]]:
    """The other environment's verdicts, [valid, error type], over a file of Python literals: JSON knows no tuples."""
    lines = folder / "cases.txt"
    with lines.open("w", encoding="utf-8") as file:
        for row, calls, dots in found:
            decoded = [{call.name: call.arguments} for call in calls]
            case = (row["functions"], decoded, row["answers"], row["category"], language_of(row["category"]), dots)
            file.write(repr(case) + "\n")
    done = subprocess.run([python, "-c", OFFICIAL, str(lines)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the official checker did not run:\n{done.stderr[-2000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]  # it prints some errors


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", required=True, help="of an environment that has bfcl-eval 2026.3.23")
    parser.add_argument("--data", type=Path, help="the benchmark's folder; its own where it is not given")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("build"), help="where the cases are written")
    options = parser.parse_args()
    data = options.data or Path(
        subprocess.run([options.python, "-c", FIND], capture_output=True, text=True, check=True).stdout.strip()
    )
    rows = load(data)
    found = cases(rows, options.count, options.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    problems = [check(row["functions"], calls, row["answers"], row["category"], dots) for row, calls, dots in found]
    seconds = time.perf_counter() - started
    theirs = official(options.python, found, options.folder)
    assert len(theirs) == len(found), f"{len(theirs)} official verdicts on {len(found)} cases"
    return report(rows, found, problems, theirs, seconds, options.count)


def report(rows: Any, found: Any, problems: Any, theirs: Any, seconds: float, count: int) -> int:
    """Print what agrees and what does not; the exit status."""
    wrong, kinds = [], Counter[str]()
    for (row, calls, dots), problem, (valid, kind) in zip(found, problems, theirs, strict=True):
        if (problem is None) != valid:
            wrong.append((row["id"], calls, dots, problem, kind))
        elif problem is not None and problem.kind != kind and not kind.startswith("raised"):
            kinds[f"{kind} / ours {problem.kind}"] += 1
    right, mutations = theirs[: 2 * len(rows)], theirs[2 * len(rows) :]
    lost = sorted({row["id"] for (row, _, _), (valid, _) in zip(found, right, strict=False) if not valid})
    passed = sum(valid for valid, _ in mutations)
    raised = sum(kind.startswith("raised") for _, kind in mutations)
    print(f"{len(rows)} rows: the right calls of all pass, but for {len(lost)} that accept none: {', '.join(lost)}")
    print(f"{count} mutations: {passed} right, {count - passed} wrong; the official checker raised on {raised}")
    print("official error types:", dict(Counter(kind for valid, kind in mutations if not valid).most_common()))
    print(f"verdicts that differ: {len(wrong)}; error types that differ: {sum(kinds.values())} {dict(kinds)}")
    print(f"ours: {len(found) / seconds:,.0f} checks/s")
    for case in wrong[:10]:
        print("DIFFERENT", *case)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
