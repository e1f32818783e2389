"""From YAML and overrides to a config, or what is wrong with them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from lib import PROJECT_ROOT, WorkbenchError
from lib.config.section import Section
from lib.config.tree import Config, TaskSection
from lib.places import locate
from lib.task import describe_invalid, nearest


class ConfigError(WorkbenchError, ValueError):
    """The config cannot be used as given; the message says what to change."""


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """defaults < YAML file < model.overrides of the task < overrides (`{"training.steps": 2}` or nested).

    `{"task": "functions"}` swaps the task: the fields of the file's own task are dropped, with a note (`config.notes`,
    which opening a run logs). Raises ConfigError.
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ConfigError(
            f"overrides must be a mapping, not {'the text ' * isinstance(overrides, str)}{overrides!r}. "
            f"With plain papermill: "
            f"-y 'overrides: {{training.steps: 2}}'"
        )
    values = _read_yaml(locate(path))
    given = {str(key): copy.deepcopy(value) for key, value in (overrides or {}).items()}
    notes = [*_swap_task(values, given), *_take_model_of_task(values, given)]
    _set_all(values, given)
    config = parse_config(values, where=str(path))
    config = config.model_copy(update={"model": config.model.model_copy(update={"overrides": {}})})
    config._notes = tuple(notes)
    return config


def own_task(path: str | Path) -> str:
    """The name of the task that a config file itself names."""
    task = _read_yaml(locate(path)).get("task")
    return str(task.get("name", "")) if isinstance(task, dict) else ""


def _swap_task(values: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Put another task, if one is given, in the place of the file's own, whose fields mean nothing to it: what to note.

    It is given as task=NAME, task.name=NAME or {task: {name: NAME}}.
    """
    if isinstance(given.get("task"), str):
        given["task"] = {"name": given["task"]}
    nested = given.get("task")
    name = given.get("task.name", nested.get("name") if isinstance(nested, Mapping) else None)
    old = values.get("task")
    old = old if isinstance(old, dict) else {}
    if name is None or name == old.get("name"):
        return []
    values["task"] = {"name": name}
    dropped = sorted(set(old) - {"name"})
    return [f"task {name} instead of {old.get('name')}: dropped its fields {', '.join(dropped)}"] if dropped else []


def _take_model_of_task(values: dict[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Put the keys of model.overrides for the task in place; those given by hand are stronger. What to note."""
    whole = copy.deepcopy(values)
    _set_all(whole, given)
    task, model = whole.get("task"), whole.get("model")
    overrides = model.get("overrides") if isinstance(model, dict) else None
    notes = []
    if isinstance(overrides, dict) and isinstance(task, dict):
        name = str(task.get("name"))
        chosen = overrides.get(name, overrides.get(Path(name).stem))
        chosen = {"name": chosen} if isinstance(chosen, str) else chosen
        if isinstance(chosen, dict):  # else none, or one that the checks refuse
            chosen = {key: value for key, value in chosen.items() if key != "overrides"}
            _change_model(values, chosen)
            notes = [f"model.overrides: {chosen} for the task {name}"]
    _change_model(values, _model_keys(given))
    return notes


def _change_model(values: dict[str, Any], keys: Mapping[str, Any]) -> None:
    """Another name is another repository: neither the old one's revision nor the trust in its code goes with it."""
    model = values.setdefault("model", {})
    if not isinstance(model, dict):
        return  # the checks refuse it
    if "name" in keys and keys["name"] != model.get("name"):
        model.pop("revision", None)
        model.pop("trust_remote_code", None)
    model.update(keys)


def _model_keys(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given for the section `model`, dotted or nested, its overrides apart."""
    nested = given.get("model")
    keys = dict(nested) if isinstance(nested, Mapping) else {}
    keys |= {key.removeprefix("model."): value for key, value in given.items() if key.startswith("model.")}
    return {key: value for key, value in keys.items() if not key.startswith("overrides")}


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
        if get_origin(inner) is Mapping:
            return  # its keys are the user's
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


_HOW_ASKED = {
    "evaluation.endpoint": ("key", "concurrency", "timeout", "attempts"),
    "distributed": (
        "workers",
        "in_flight",
        "attempts",
        "restarts",
        "start_deadline",
        "turn_deadline",
        "sync_deadline",
        "canary_deadline",
        "step_deadline",
    ),
    "verl": ("ray_address", "python"),
    "rewards": ("max_unscored", "world_seconds", "score_seconds"),
    "sampling.vllm": ("memory_share", "enforce_eager", "block_size", "tool_calls", "tool_parser"),
}
HOW_ASKED = frozenset(f"{section}.{name}" for section, names in _HOW_ASKED.items() for name in names)
"""Keys that decide how long a stage takes, or when it is given up, and never what an answer earns: they may change
between its attempts. Not the endpoint's base_url, behind which another model may have the same id, and not beside_base,
which decides what rows are asked and what is compared."""

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
