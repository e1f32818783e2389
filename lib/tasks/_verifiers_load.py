"""Finding an environment in its own interpreter: an installed module, a file, or a folder as verifiers lays them out.

Owns how a name becomes a module, and which API of verifiers serves it. Part of the child process of the task
`verifiers`: standard library only at import. Must not know rollouts.

    python -c "from lib.tasks._verifiers_load import module_name; print(module_name('prime/vf-gsm8k@0.1'))"
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

from lib.tasks._verifiers_live import Endpoint, RefusedError
from lib.tasks._verifiers_play import Adapter

CLASSIC = "the classic API (load_environment) is that of verifiers 0.1.5 to 0.3.1: install one of them in task.python"


async def load(request: dict[str, Any], endpoint: Endpoint) -> Adapter:
    """The environment of a request {environment, args, rows}, to be played against the endpoint.

    Raises RefusedError, with what to do, where it cannot be used.
    """
    try:
        installed = version("verifiers")
    except PackageNotFoundError:
        raise RefusedError(
            f"{sys.executable} has no verifiers in it: {sys.executable} -m pip install verifiers"
        ) from None
    facts: dict[str, Any] = {"version": installed, "python": platform.python_version()}
    try:
        module = import_environment(request["environment"])
    except AttributeError as error:  # vf.SingleTurnEnv, say
        if getattr(getattr(error, "obj", None), "__name__", "") != "verifiers":
            raise
        raise RefusedError(f"verifiers {installed} has no {error.name!r}: {CLASSIC}") from None
    if hasattr(module, "load_environment"):
        from lib.tasks._verifiers_classic import Classic

        verifiers: Any = importlib.import_module("verifiers")
        if not hasattr(verifiers, "load_environment"):
            raise RefusedError(f"verifiers {installed} cannot load this environment: {CLASSIC}")
        return Classic(verifiers, module, request, facts, endpoint)
    if any(_is_taskset(getattr(module, name, None)) for name in getattr(module, "__all__", ())):
        from lib.tasks._verifiers_v1 import V1

        return await V1.start(module, request, facts, endpoint)
    raise RefusedError(
        f"{request['environment']!r} ({module.__file__}) has neither load_environment (classic) nor a Taskset named in "
        f"__all__ (v1): is it an environment of verifiers?"
    )


def import_environment(name: str) -> ModuleType:
    """The module of an environment: `vf-gsm8k`, `owner/vf-gsm8k`, a .py file, or a folder that holds its namesake."""
    path = Path(name)
    if not (name.endswith(".py") or path.is_dir()):
        return _import(module_name(name), name)
    if not path.exists():
        raise RefusedError(f"no such file: {path}")
    own = module_name(path.stem)
    package = path.is_dir() and (path / "__init__.py").is_file()
    _let_import_from(path.parent if package or path.is_file() else path)
    return _import(own, name)


def module_name(name: str) -> str:
    """The module of an environment's id, as verifiers derives it."""
    return name.rsplit("/", 1)[-1].split("@", 1)[0].replace("-", "_")


def _import(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise RefusedError(
                f"{name!r} needs the module {error.name!r}, which is not in {sys.executable}: install it there"
            ) from error
        raise RefusedError(
            f"no environment {name!r} (module {module!r}) in {sys.executable}: install its package there, or give the "
            f"path of its .py file or folder"
        ) from None


def _let_import_from(folder: Path) -> None:
    """For this process and those that it starts (v1 serves tools from processes of their own)."""
    place = str(folder.resolve())
    sys.path.insert(0, place)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [place, os.environ.get("PYTHONPATH", "")]))


def _is_taskset(value: object) -> bool:
    if not isinstance(value, type):
        return False
    return any(base.__name__ == "Taskset" and base.__module__.startswith("verifiers.v1") for base in value.__mro__)
