"""From YAML and overrides to a config, or what is wrong with them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lib import PROJECT_ROOT, WorkbenchError
from lib.config.section import Section
from lib.config.tree import Config, TaskSection
from lib.places import locate
from lib.task import describe_invalid, nearest

logger = logging.getLogger(__name__)


class ConfigError(WorkbenchError, ValueError):
    """The config cannot be used as given; the message says what to change."""


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """defaults < YAML file < model.overrides of the task < overrides (`{"training.steps": 2}` or nested).

    `{"task": "functions"}` swaps the task: the fields of the file's own task are dropped, with a note. Raises
    ConfigError.
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ConfigError(
            f"overrides must be a mapping, not {'the text ' * isinstance(overrides, str)}{overrides!r}. "
            f"With plain papermill: "
            f"-y 'overrides: {{training.steps: 2}}'"
        )
    values = _read_yaml(locate(path))
    given = {str(key): copy.deepcopy(value) for key, value in (overrides or {}).items()}
    if isinstance(given.get("task"), str):
        _swap_task(values, given.pop("task"))
    _set_all(values, given)
    if _take_model_of_task(values):
        _set_all(values, given)  # what was given by hand is stronger
    config = parse_config(values, where=str(path))
    return config.model_copy(update={"model": config.model.model_copy(update={"overrides": {}})})


def own_task(path: str | Path) -> str:
    """The name of the task that a config file itself names."""
    task = _read_yaml(locate(path)).get("task")
    return str(task.get("name", "")) if isinstance(task, dict) else ""


def _swap_task(values: dict[str, Any], name: str) -> None:
    """Another task in the place of the file's own, whose fields mean nothing to it."""
    old = values.get("task")
    old = old if isinstance(old, dict) else {}
    if name == old.get("name"):
        return
    dropped = sorted(set(old) - {"name"})
    if dropped:
        logger.warning("task %s instead of %s: dropped its fields %s", name, old.get("name"), ", ".join(dropped))
    values["task"] = {"name": name}


def _take_model_of_task(values: dict[str, Any]) -> bool:
    """Put the keys of model.overrides for this task in place; whether there were any."""
    model, task = values.get("model"), values.get("task")
    overrides = model.get("overrides") if isinstance(model, dict) else None
    if not (isinstance(model, dict) and isinstance(overrides, dict) and isinstance(task, dict)):
        return False
    name = str(task.get("name"))
    chosen = overrides.get(name, overrides.get(Path(name).stem))
    if isinstance(chosen, str):
        chosen = {"name": chosen}
    if not isinstance(chosen, dict):
        return False  # none, or one that the checks refuse
    logger.info("model.overrides: %s for the task %s", chosen, name)
    model.update({key: value for key, value in chosen.items() if key != "overrides"})
    return True


def _set_all(values: dict[str, Any], given: Mapping[str, Any]) -> None:
    for key, value in given.items():
        _set(values, key.split("."), copy.deepcopy(value))


def parse_config(values: Mapping[str, Any], where: str = "config") -> Config:
    """A config from plain values, with every problem named at once."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where} cannot be used:\n{describe_invalid(error, Config)}") from None


def check_key(key: str) -> None:
    """Refuse a dotted key that the config does not have, before a kernel starts. Task fields pass: load_task checks."""
    model: type[BaseModel] = Config
    for part in key.split("."):
        if model is TaskSection:
            return
        known = {field.alias or name: field for name, field in model.model_fields.items()}
        if part not in known:
            everywhere = {key.rsplit(".", 1)[-1]: key for key in known_keys()}
            hint = f" Did you mean {everywhere[key]!r}?" if key in everywhere else nearest(part, list(known))
            raise ConfigError(f"unknown parameter {key!r}.{hint}")
        inner = known[part].annotation
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else BaseModel


def known_keys() -> list[str]:
    """Every config key by its dotted name, task fields apart."""
    return _leaves(Config)


def _leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section) and inner is not TaskSection:
            keys += _leaves(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + (field.alias or name))
    return keys


HOW_ASKED = frozenset(f"evaluation.endpoint.{name}" for name in ("key", "concurrency", "timeout", "attempts"))
"""Keys that decide how long a stage takes and never its result: they may change between its attempts."""

_MERGE = "tag:yaml.org,2002:merge"


class UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice, where PyYAML would keep the last one without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} is given twice, line {node.start_mark.line + 1} and after")
        return dict(super().construct_mapping(node, deep=deep))


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        known = sorted(str(p.relative_to(PROJECT_ROOT)) for p in (PROJECT_ROOT / "configs").rglob("*.yaml"))
        raise ConfigError(f"config not found: {path}.{nearest(path.name, known)}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping with at least `task: {{name: ...}}`")
    if isinstance(values.get("task"), str):
        values["task"] = {"name": values["task"]}
    # A section whose keys are all commented out reads as nothing: it means its defaults.
    return {key: value for key, value in values.items() if value is not None or key not in Config.model_fields}


def _set(values: dict[str, Any], parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(parts)}: {part} is not a section")
        values = inner
    if isinstance(value, Mapping) and isinstance(values.get(parts[-1]), dict):
        for key, item in value.items():
            _set(values, [parts[-1], str(key)], item)
    else:
        values[parts[-1]] = value
