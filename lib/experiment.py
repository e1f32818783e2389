"""Who runs which experiment on Modal: `.env`, the names of volumes and app, and the secrets that a run needs.

Owns names and secrets. Must not know notebooks or runs. A secret's value is handed to Modal's secret channel only.

    python -c "from lib.experiment import read_experiment; print(read_experiment().volumes)"
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from lib import PROJECT_ROOT, WorkbenchError
from lib.config import Config
from lib.log import name_secrets, scrub
from lib.task import load_task

if TYPE_CHECKING:
    import modal

PROJECT = "grpo-workbench"
MOUNTS = {"/cache": "cache", "/data": "data", "/outputs": "outputs"}
"""Mount path -> the kind of volume there."""

KEYS = {
    "openai-secret": "OPENAI_API_KEY",
    "gemini-secret": "GEMINI_API_KEY",
    "huggingface-secret": "HF_TOKEN",
    "wandb-secret": "WANDB_API_KEY",
}
"""The usual secrets -> the environment variable that each must set."""

OPTIONAL = ("huggingface-secret", "wandb-secret")
"""Used where they exist: public models need no token, and a run goes on without its tracker."""

_LONGEST = 36
"""Modal's names have at most 64 characters; `grpo-workbench.sweep-123456-` takes the others."""


class ExperimentError(WorkbenchError, RuntimeError):
    """`.env`, the login or a secret is missing; the message says how to get it."""


class Experiment(NamedTuple):
    """One experimenter's experiment: everything on Modal carries both names, so that no two ever touch each other."""

    experimenter: str
    name: str

    @property
    def app(self) -> str:
        return f"{PROJECT}-{self.experimenter}-{self.name}"

    def sweep_app(self, mark: str) -> str:
        """The app of a detached sweep: no experiment's own app can be called so."""
        return f"{PROJECT}.sweep-{mark}-{self.experimenter}-{self.name}"

    def roles_app(self, run: str) -> str:
        """The app of a distributed run's actor and workers."""
        mark = hashlib.sha256(run.encode()).hexdigest()[:6]
        return f"{PROJECT}.roles-{mark}-{self.experimenter}-{self.name}"

    @property
    def volumes(self) -> dict[str, str]:
        """Mount path -> name of the volume."""
        return {path: f"{PROJECT}-{kind}-{self.experimenter}-{self.name}" for path, kind in MOUNTS.items()}


def read_experiment(file: Path | None = None) -> Experiment:
    """The experiment of `.env` and the shell (the shell wins); also puts what `.env` holds into the environment."""
    from dotenv import dotenv_values

    file = file or PROJECT_ROOT / ".env"
    for name, value in dotenv_values(file).items() if file.is_file() else ():
        if value:
            os.environ.setdefault(name, value)
            if name not in ("EXPERIMENTER", "EXPERIMENT_NAME"):
                name_secrets([name])
    experimenter, name = os.environ.get("EXPERIMENTER", ""), os.environ.get("EXPERIMENT_NAME") or "default"
    if not experimenter:
        where = f"{file.name} does not set it" if file.is_file() else f"{file.name} is missing"
        raise ExperimentError(
            f"EXPERIMENTER is not set: {where}. Copy .env.example to .env and write your name there, or export it: "
            f"your volumes and apps on Modal carry it"
        )
    # No dash in the first name: otherwise a + b-c and a-b + c would share their volumes.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_]*", experimenter):
        raise ExperimentError(f"EXPERIMENTER={experimenter!r}: letters, digits and '_' only")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise ExperimentError(f"EXPERIMENT_NAME={name!r}: letters, digits, '.', '_' and '-' only")
    if len(experimenter) + len(name) >= _LONGEST:
        raise ExperimentError(
            f"EXPERIMENTER {experimenter!r} and EXPERIMENT_NAME {name!r} are too long together: at most {_LONGEST - 1} "
            f"characters"
        )
    return Experiment(experimenter, name)


def secret_names(config: Config) -> list[str]:
    """The secrets that a run uses: those that the config names, and what its tracker and its model may need."""
    names = [*config.modal.secrets, *_of_the_run(config)]
    if config.tracker.name == "wandb":
        names.append("wandb-secret")
    if config.model.name != "starter":
        names.append("huggingface-secret")
    return list(dict.fromkeys(names))


def find_secrets(config: Config) -> dict[str, modal.Secret]:
    """Modal's secret of each name, else one made from `.env` and the shell. Raises ExperimentError for missing ones."""
    found: dict[str, modal.Secret] = {}
    missing: list[str] = []
    keys = KEYS | _of_the_run(config)
    for name in secret_names(config):
        secret = _secret(name, keys.get(name))
        if secret is not None:
            found[name] = secret
        elif name in config.modal.secrets or name not in OPTIONAL:
            missing.append(name)
    if missing:
        raise ExperimentError(_how_to_make(missing, keys))
    return found


def refuse_secrets(texts: Mapping[str, str]) -> None:
    """Refuse texts (by what they are) that hold a secret's value: they travel, and end up in notebooks and logs."""
    for what, text in texts.items():
        if scrub(text) != text:
            raise ExperimentError(
                f"{scrub(what)} holds the value of a secret. It would travel, and be written into notebooks and logs: "
                f"take it out, and name the secret under modal.secrets"
            )


def _of_the_run(config: Config) -> dict[str, str]:
    """Secret name -> environment variable, for scoring and an endpoint; unusual variables name their secret."""
    usual = {key: name for name, key in KEYS.items()}
    task = load_task(config.task.name, **config.task.params)
    endpoint = config.evaluation.endpoint.key
    keys = [*task.env_keys(), *([endpoint] if endpoint else [])]
    return {usual.get(key, key.lower().replace("_", "-")): key for key in keys}


def _secret(name: str, key: str | None) -> modal.Secret | None:
    import modal

    named = modal.Secret.from_name(name, required_keys=[key] if key else [])
    try:
        named.hydrate()
        return named
    except modal.exception.NotFoundError:
        value = os.environ.get(key, "") if key else ""
        return modal.Secret.from_dict({key: value}) if key and value else None
    except modal.exception.Error as error:
        # It exists but lacks its key: an empty one, say, that was made from a missing .env.
        if "missing key" not in str(error):
            raise
        raise ExperimentError(
            f"the Modal secret {name!r} does not set {key}: modal secret create --force {name} {key}=..."
        ) from None


def _how_to_make(missing: Iterable[str], keys: Mapping[str, str]) -> str:
    lines = [
        f"  {name}: modal secret create {name} {keys.get(name, 'NAME')}=..."
        + (f", or {keys[name]}=... in .env" if name in keys else "")
        for name in missing
    ]
    return "\n".join(["secrets are missing; nothing was started:", *lines])
