"""The schedule: cron entries of configs/schedule.yaml as functions of the deployed app.

Owns the file and its checks. Every tick runs its notebook in a run with the date in its name (lib/container.py, tick).

    modal deploy -m lib.modal_app
"""

from __future__ import annotations

import json
import re
import zoneinfo
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from lib import PROJECT_ROOT, WorkbenchError, container, remote
from lib.config import UniqueKeys
from lib.experiment import Experiment
from lib.task import describe_invalid

if TYPE_CHECKING:
    import modal

FILE = PROJECT_ROOT / "configs" / "schedule.yaml"
CRON = {"minute": (0, 59), "hour": (0, 23), "day of the month": (1, 31), "month": (1, 12), "day of the week": (0, 7)}
"""The five fields, and what each may hold."""


class ScheduleError(WorkbenchError, ValueError):
    """The schedule cannot be deployed; the message says what to change."""


class NothingScheduled(ScheduleError):
    """The file has no entries."""


class Entry(BaseModel):
    """One cron entry."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """The function's name, and the beginning of its runs' names."""
    notebook: str
    config: str
    cron: str
    """Five fields: minute, hour, day of the month, month, day of the week."""
    timezone: str = "UTC"
    gpu: str | None = None
    """None = what the config says."""
    parameters: dict[str, Any] = {}
    """Notebook parameters and config keys, as after -p."""

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]{0,59}", name):
            raise ValueError("begin with a letter; letters, digits, '_' and '-' only, at most 60")
        return name

    @field_validator("cron")
    @classmethod
    def _cron(cls, cron: str) -> str:
        fields = cron.split()
        if len(fields) != len(CRON):
            raise ValueError("write five fields, e.g. '0 6 * * *' for every day at six")
        for (what, (least, most)), field in zip(CRON.items(), fields, strict=True):
            if not _is_cron(field, least, most):
                raise ValueError(f"the {what} is {field!r}: write *, numbers of {least} to {most}, ranges, or */step")
        return " ".join(fields)

    @field_validator("timezone")
    @classmethod
    def _timezone(cls, name: str) -> str:
        try:
            zoneinfo.ZoneInfo(name)
        except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
            raise ValueError("no such time zone: use a name like Europe/Zurich, or UTC") from None
        return name

    def texts(self) -> list[str]:
        """The parameters as they stand on a command line."""
        if "run_name" in self.parameters:
            raise ScheduleError(f"{self.name}: run_name is the entry's name and the date of each tick; leave it out")
        given = {**self.parameters, **({"modal.gpu": self.gpu} if self.gpu else {})}
        return [f"{key}={_as_yaml(value)}" for key, value in given.items()]


def _as_yaml(value: Any) -> str:
    """A value on one line, so that it is read again as what it is."""
    import yaml

    return (
        str(yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True))
        .removesuffix("...\n")
        .strip()
    )


def _is_cron(field: str, least: int, most: int) -> bool:
    for part in field.split(","):
        match = re.fullmatch(r"(?:\*|(\d+)(?:-(\d+))?)(?:/([1-9]\d*))?", part)
        if not match:
            return False
        low = int(match[1] or least)
        if not least <= low <= int(match[2] or low) <= most:
            return False
    return True


class Schedule(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    entries: tuple[Entry, ...]


def read_schedule(file: Path = FILE) -> list[Entry]:
    """The entries of a schedule file. Raises ScheduleError."""
    import yaml

    shown = file.relative_to(PROJECT_ROOT) if file.is_relative_to(PROJECT_ROOT) else file
    if not file.is_file():
        raise ScheduleError(f"{shown} is missing: restore it with `git checkout {shown}`")
    try:
        entries = Schedule.model_validate(yaml.load(file.read_text(encoding="utf-8"), Loader=UniqueKeys)).entries
    except ValidationError as error:
        raise ScheduleError(f"{shown} cannot be used:\n{describe_invalid(error, Schedule)}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ScheduleError(f"{shown} cannot be read: {error}") from None
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ScheduleError(f"{shown}: two entries are called {', '.join(twice)}")
    if not entries:
        raise NothingScheduled(f"there is nothing to deploy: {shown} has no entries, configs/serve.yaml names no run")
    return list(entries)


def define_schedule(app: modal.App, experiment: Experiment, define: Callable[..., Any]) -> list[Entry]:
    """One function for each entry. A function on a schedule takes no arguments: its job comes by its environment."""
    import modal

    entries = read_schedule()
    for entry in entries:
        plan = remote.make_plan(experiment, entry.notebook, entry.config, [*entry.texts(), f"run_name={entry.name}"])
        code = {"commit": plan.job.code["commit"], "diff": "not kept for a schedule"}
        job = plan.job.model_copy(update={"parameters": plan.job.parameters[:-1], "code": code})
        # An environment variable has little room: which commit, but not what it was changed by.
        tick = {"name": entry.name, "timezone": entry.timezone, "job": job.model_dump(mode="json")}
        define(
            app,
            experiment,
            container.tick,
            plan,
            name=entry.name,
            schedule=modal.Cron(entry.cron, timezone=entry.timezone),
            env={"WORKBENCH_TICK": json.dumps(tick)},
        )
    return entries
