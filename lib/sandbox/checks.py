"""The start-up self-test: attacks through the normal path, before the first reward.

Owns what a sandbox must withstand before it is believed. Must not know how it does it.

    python -c "from lib.sandbox import self_test; print(self_test())"
"""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from lib.sandbox.settings import Check, Execution, Kind, Limits, ProgramRun
from lib.sandbox.worker import Job

Run = Callable[[Job], Execution | ProgramRun]

LIMITS = Limits(test_cpu=0.3, cpu=3.0, wall=15.0)
"""Shorter than a row's, so that the endless loops among the attacks cost little."""


class _Attack(NamedTuple):
    name: str
    source: str
    boundary: bool = True
    """What only namespaces keep: not promised by backend none."""


_PROBE = """
def probe():
    try:
        return attempt()
    except (OSError, MemoryError, ValueError, AttributeError) as error:
        return "refused"
def attempt():
"""
"""The solution under test: it says "refused" where the sandbox held, and anything else where it did not."""


def _attacks(canary: str, file: str) -> list[_Attack]:
    """Each body returns, or raises, "refused" exactly where it got nothing."""
    writes = "import sys, os\n    for place in ('/', '/dev', '/usr', os.path.dirname(os.__file__)):\n        "
    writes += "try: open(place + '/x', 'w').close()\n        except OSError: continue\n        return place\n    "
    return [
        _Attack("environment", f"import os\n    return 'refused' if {canary!r} not in os.environ else 'read'"),
        _Attack("files of this machine", f"return open({file!r}).read()"),
        _Attack("other processes", "return open('/proc/1/environ').read()"),
        _Attack("writing to the system", writes + "return 'refused'"),
        _Attack("network", "import socket\n    socket.socket()\n    return 'connected'", boundary=False),
        _Attack("new processes", "import os\n    os.fork()\n    return 'forked'", boundary=False),
        _Attack("namespaces", _CALL.format("unshare(0x10000000)"), boundary=False),
        _Attack("shared memory", _CALL.format("shmget(7777, 4096, 0o1666)"), boundary=False),
        _Attack("memory", "return len(bytearray(1 << 30))", boundary=False),
        _Attack(
            "raising limits",
            "import resource\n    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n    return 'raised'",
            boundary=False,
        ),
        _Attack("a file for the next program", "open('/tmp/carried', 'x').close()\n    return 'refused'"),
    ]


_CALL = "import ctypes\n    return 'refused' if ctypes.CDLL(None).{} < 0 else 'allowed'"

_LYING = """
class Lie:
    def __eq__(self, other): return True
    def __bool__(self): return True
def probe(): return Lie()
"""


def check(run: Run, kind: Kind) -> list[Check]:
    """All lines, in order; the same worker runs them all, so that what one leaves behind the next would find."""
    with _planted() as (canary, file):
        checks = [_function(run), _program(run)]
        for attack in _attacks(canary, file):
            if attack.boundary and kind == "none":
                continue
            checks.append(_refused(run, attack))
        if kind != "none":
            checks.append(_refused(run, _attacks(canary, file)[-1])._replace(name="a file of the program before"))
    loop = "def probe():\n    import re\n    return re.match('(a+)+$', 'a' * 64 + 'b')"
    checks += [
        _verdict(run, "an endless loop in C", loop, "timeout"),
        _verdict(run, "leaving with status 0", "import os\nos._exit(0)", "died"),
        _verdict(run, "leaving in a test", "import os\ndef probe(): os._exit(0)", "died"),
        _verdict(run, "an object that equals everything", _LYING, "fail"),
    ]
    return checks


def _job(source: str) -> Job:
    return Job(source, (("assert probe() == 'refused'",), ("probe",), "", True))


def _refused(run: Run, attack: _Attack) -> Check:
    return _verdict(run, attack.name, _PROBE + "    " + attack.source, "pass")


def _function(run: Run) -> Check:
    return _verdict(run, "a right solution", "def probe(): return 'refused'", "pass")


def _program(run: Run) -> Check:
    done = run(Job("print(input()[::-1])", stdin="desufer\n"))
    assert isinstance(done, ProgramRun)
    return Check("a right program", done.stdout == "refused\n", f"{done.stop}: {done.stdout!r} {done.log}")


def _verdict(run: Run, name: str, source: str, expected: str) -> Check:
    done = run(_job(source))
    assert isinstance(done, Execution)
    (verdict,) = done.verdicts
    return Check(name, verdict == expected, f"{verdict}, expected {expected}. {done.log}".strip())


@contextmanager
def _planted() -> Iterator[tuple[str, str]]:
    """A variable and a file of this machine that no program may find."""
    canary = f"CANARY_{secrets.token_hex(8)}"
    os.environ[canary] = "planted"
    try:
        with tempfile.NamedTemporaryFile(prefix="canary-") as file:
            file.write(b"planted")
            file.flush()
            os.chmod(file.name, 0o644)
            yield canary, file.name
    finally:
        del os.environ[canary]
