"""What a sandbox can be told, and what it answers: plain values.

Must not know how programs are run.

    python -c "from lib.sandbox.settings import SandboxSettings; print(SandboxSettings())"
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from pydantic import BaseModel, Field

from lib import WorkbenchError

LONGEST_SOURCE = 1_000_000
"""Characters of a program; a longer one is a bad answer."""

Kind = Literal["warm", "cold", "modal", "none"]
"""How programs are kept apart. warm: bubblewrap, and in it a clone with namespaces of its own per program; cold: a new
bubblewrap per program; modal: in Modal Sandboxes; none: limits and seccomp only, files and processes are in reach."""


class SandboxError(WorkbenchError, RuntimeError):
    """The sandbox itself broke, or there is none: what it should have judged is unscored, never 0."""


class Limits(BaseModel, frozen=True, extra="forbid"):
    """What one program may use. CPU time decides; wall time is the backstop for programs that sleep."""

    test_cpu: float = Field(default=1.0, gt=0, le=600, allow_inf_nan=False)
    """Seconds of CPU time that one test, or loading the program, may take."""
    cpu: float = Field(default=10.0, gt=0, le=3600, allow_inf_nan=False)
    """Seconds of CPU time that all tests together may take."""
    wall: float = Field(default=30.0, gt=0, le=3600, allow_inf_nan=False)
    """Seconds on the clock that all tests together may take."""
    memory_mb: int = Field(default=512, ge=64, le=65536)
    """Address space, in MiB."""
    file_mb: int = Field(default=16, ge=1, le=1024)
    """The largest file, in MiB; all files together may have 64."""
    output_mb: int = Field(default=8, ge=1, le=256)
    """What may be printed, in MiB; a program that prints more is ended."""


class SandboxSettings(BaseModel, frozen=True, extra="forbid"):
    """Where and how untrusted programs run. auto = warm, else cold, else an error that says why and what to do."""

    backend: Literal["auto", "warm", "cold", "modal", "none"] = "auto"
    workers: int = Field(default=0, ge=0, le=256)
    """Programs that run at once; 0 = as many as there are cores."""
    limits: Limits = Limits()
    creations_per_second: float = Field(default=2.0, gt=0, le=100)
    """New Modal Sandboxes per second, at most (modal only)."""


class Execution(NamedTuple):
    """One program against its tests."""

    verdicts: tuple[str, ...]
    """In the order of the tests: pass | fail | error:<Type> | timeout | died | not run."""
    cpu_seconds: float
    """CPU time of the program."""
    wall_seconds: float
    memory_mb: float | None
    """Resident memory of the program at its largest, in MiB."""
    log: str
    """The beginning of what it printed, control characters escaped."""
    opaque_eq: int
    """How often a test compared two objects of the program's own classes: there the program itself was asked."""
    backend: str


class ProgramRun(NamedTuple):
    """One program that reads standard input and writes standard output; what it wrote is to be compared outside."""

    stdout: str
    stop: str
    """done | error (an exception, or an exit status other than 0) | timeout | died | flood (too much output)."""
    cpu_seconds: float
    wall_seconds: float
    memory_mb: float | None
    log: str
    """The beginning of what it wrote to standard error, control characters escaped."""
    backend: str


class Check(NamedTuple):
    """One line of the self-test."""

    name: str
    passed: bool
    found: str


class SelfTest(NamedTuple):
    """What the sandbox showed about itself before its first reward."""

    backend: Kind
    checks: tuple[Check, ...]
    seconds: float
    reason: str
    """Why it is this backend: what was tried before it, and how that failed."""
