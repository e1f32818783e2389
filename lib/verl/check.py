"""Whether verl takes what it is told, asked of verl itself before anything is launched.

Owns the call of the program that composes verl's config in verl's environment (lib/verl/compose.py), and its answers,
which are kept: the same question is asked once. Must not know what the overrides mean.

    python -m lib.verl.check configs/ace_verl.yaml trainer.total_training_steps=1
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib import WorkbenchError
from lib.config import load_config
from lib.places import locate
from lib.runfolder import atomic_file
from lib.verl.cluster import Cluster, cluster_of
from lib.verl.environment import call, interpreter
from lib.verl.errors import VerlError
from lib.verl.overrides import notes, overrides

DEADLINE = 300.0
"""Seconds for verl to be imported (10) and to compose (1 to 2 for a config)."""

_SOURCES = ("compose.py", "ignored.py", "advantage.py")
"""What an answer depends on beside the question."""


class Answer(NamedTuple):
    """What verl makes of a list of overrides."""

    problems: tuple[str, ...]
    """Why it must not be launched, each with what to write instead."""
    notes: tuple[str, ...]
    config: dict[str, Any]
    """verl's whole config, resolved; {} where it cannot be composed."""


def check(told: Sequence[str], python: str, cache: Path | None = None) -> Answer:
    """verl's config of these overrides. Raises VerlError with everything that is wrong with them, one a line."""
    answer = ask([told], python, cache)[0]
    if answer.problems:
        raise VerlError("verl cannot be launched like this:\n" + "\n".join(f"  {text}" for text in answer.problems))
    return answer


def ask(runs: Sequence[Sequence[str]], python: str, cache: Path | None = None) -> list[Answer]:
    """What verl makes of each list of overrides, in one process of `python`. `cache`: a folder for the answers.

    Raises VerlError where that program cannot be run, or takes longer than DEADLINE seconds.
    """
    files = [cache / f"{_key(told, python)}.json" if cache else None for told in runs]
    known = [_read(file) for file in files]
    open_runs = [list(told) for told, answer in zip(runs, known, strict=True) if answer is None]
    found = iter(_ask(open_runs, python) if open_runs else [])
    answers = []
    for file, answer in zip(files, known, strict=True):
        if answer is None:
            answer = next(found)
            if file:
                file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(file) as handle:
                    handle.write(json.dumps(answer._asdict()))
        answers.append(answer)
    return answers


def _ask(runs: list[list[str]], python: str) -> list[Answer]:
    try:
        done = call(python, "lib.verl.compose", seconds=DEADLINE, given=json.dumps({"runs": runs}))
    except subprocess.TimeoutExpired:
        raise VerlError(
            f"verl ({python}) did not check its config within {DEADLINE:g} s: is the machine busy?"
        ) from None
    except OSError as error:
        raise VerlError(f"verl's interpreter {python} cannot be run: {error.strerror}") from None
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise VerlError(f"verl ({python}) could not check its config. It said:\n{said}")
    return [Answer(tuple(one["problems"]), tuple(one["notes"]), one["config"] or {}) for one in json.loads(done.stdout)]


def _key(told: Sequence[str], python: str) -> str:
    sources = [(Path(__file__).parent / name).read_text(encoding="utf-8") for name in _SOURCES]
    return hashlib.sha256(json.dumps([list(told), python, sources]).encode()).hexdigest()[:32]


def _read(file: Path | None) -> Answer | None:
    if file is None or not file.is_file():
        return None
    kept = json.loads(file.read_text(encoding="utf-8"))
    return Answer(tuple(kept["problems"]), tuple(kept["notes"]), kept["config"])


def main(argv: Sequence[str]) -> int:
    """`python -m lib.verl.check CONFIG [OVERRIDE ...]`: what verl would be told, and what it makes of that."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.verl.check", description="What verl would be told by a config."
    )
    parser.add_argument("config", help="a YAML file, e.g. configs/ace_verl.yaml")
    parser.add_argument("overrides", nargs="*", help="keys of verl's own: key=value, +key=value, ~key")
    parser.add_argument("--gpus", type=int, help="GPUs of one machine, where they are not here")
    options = parser.parse_intermixed_args(argv)
    try:
        given = load_config(options.config)
        more = {"backend": "verl", "verl.overrides": [*given.verl.overrides, *options.overrides]}
        config = load_config(options.config, more)
        cluster = Cluster(options.gpus, config.verl.nodes) if options.gpus else cluster_of(config)
        run = locate(config.paths.outputs) / Path(options.config).stem
        told = overrides(config, run, run / "verl", config.model.name, cluster)
        answer = check(told, interpreter(config.verl.python), locate(config.paths.cache) / "verl")
    except WorkbenchError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    lines = [*told, *(f"note: {text}" for text in (*notes(config), *answer.notes))]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
