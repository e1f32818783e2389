"""Running the corpus through the public path, and saying what went wrong."""

from __future__ import annotations

import asyncio
import os
from typing import Literal, cast

from attacks import ATTACKS, CARRIED, NOT_REWARDED_BUT_HARMLESS, Attack
from honest import HONEST, Honest

from lib.sandbox import Execution, Limits, SandboxError, SandboxSettings, run_tests

Backend = Literal["warm", "cold", "none", "modal"]


def settings_of(backend: str) -> SandboxSettings:
    """Limits that make endless loops cheap, and leave honest programs room."""
    limits = Limits(test_cpu=0.6, cpu=4.0, wall=20.0)
    return SandboxSettings(backend=cast(Backend, backend), workers=2, limits=limits)


async def run(program: Attack | Honest, backend: str) -> Execution:
    setup = program.setup if isinstance(program, Honest) else ""
    return await run_tests(
        program.source, program.tests, program.entry_points, setup=setup, settings=settings_of(backend)
    )


async def problem(program: Attack | Honest, backend: str) -> str:
    """Empty where an honest program earned all of its tests, or an attack did not."""
    try:
        done = await run(program, backend)
    except SandboxError as error:
        return f"{program.name}: the sandbox broke: {error}"
    earned = set(done.verdicts) == {"pass"}
    if isinstance(program, Attack) and program.name in NOT_REWARDED_BUT_HARMLESS:
        return ""
    return "" if earned is isinstance(program, Honest) else f"{program.name}: {done}"


async def found_again(name: str, backend: str) -> str:
    """Plant something often enough that each worker has run it, then look for it as often."""
    plant, find = CARRIED[name]
    planting = Attack(name, f"try: {plant}\nexcept (OSError, AttributeError): pass\ndef f(x): return 2 * x")
    finding = Attack(name, f"FOUND = {find}\ndef f(x): return 2 * x if FOUND else None")
    await asyncio.gather(*(run(planting, backend) for _ in range(4)))
    done = await asyncio.gather(*(problem(finding, backend) for _ in range(4)))
    return next((line for line in done if line), "")


async def problems_of_all(backend: str) -> list[str]:
    """The whole corpus on two workers."""
    lines = await asyncio.gather(*(problem(program, backend) for program in [*HONEST, *ATTACKS]))
    carried = [await found_again(name, backend) for name in CARRIED]
    return [f"as user {os.getuid()}, {backend}: {line}" for line in [*lines, *carried] if line]
