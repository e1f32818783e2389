"""No attack of the corpus is paid, every honest program is: warm, cold, as root and as an ordinary user."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

import corpus  # noqa: E402
from attacks import ATTACKS, CARRIED  # noqa: E402
from honest import HONEST  # noqa: E402

from lib.sandbox import SandboxError, self_test  # noqa: E402

USER = 61_002
"""An ordinary user for these tests: nobody's id, not the sandbox's own."""


@pytest.fixture(scope="module", autouse=True)
def sandbox() -> Iterator[None]:
    try:
        self_test(corpus.settings_of("warm"))
    except SandboxError as error:
        assert not os.environ.get("CI"), f"CI claims to have a sandbox: {error}"
        pytest.skip(str(error))
    yield


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(ATTACKS) >= 100
    assert len(HONEST) >= 25
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)


@pytest.mark.parametrize("program", HONEST, ids=lambda program: program.name)
def test_an_honest_program_earns_all_of_its_tests(program: corpus.Honest) -> None:
    assert asyncio.run(corpus.problem(program, "warm")) == ""


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_an_attack_is_not_paid(attack: corpus.Attack) -> None:
    assert asyncio.run(corpus.problem(attack, "warm")) == ""


@pytest.mark.parametrize("name", CARRIED)
def test_nothing_is_carried_to_the_next_program(name: str) -> None:
    assert asyncio.run(corpus.found_again(name, "warm")) == ""


@pytest.mark.slow
def test_the_whole_corpus_in_cold_sandboxes() -> None:
    assert asyncio.run(corpus.problems_of_all("cold")) == []


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["warm", "cold"])
def test_the_whole_corpus_as_an_ordinary_user(backend: str) -> None:
    if os.getuid() != 0:
        pytest.skip("the tests run as an ordinary user already")
    python = shutil.which(f"python{sys.version_info[0]}.{sys.version_info[1]}", path="/usr/local/bin:/usr/bin")
    if python is None:
        pytest.skip("no system Python of this version that an ordinary user can read")
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    done = subprocess.run(
        [python, "-s", "-B", str(FOLDER / "as_user.py"), backend],
        env={"PYTHONPATH": packages, "PATH": "/usr/bin:/bin", "HOME": "/tmp"},
        cwd="/", user=USER, group=USER, extra_groups=[],
        capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    if "Permission denied" in done.stderr or "No module named" in done.stderr:
        pytest.skip(f"an ordinary user cannot read this checkout: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {backend: []}
