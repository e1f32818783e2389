"""Where the files are that a config names: on this machine, or in a container that they were brought to.

Owns the one rule for relative paths, and the names under which files travel. Must not know configs or clouds.

    python -c "from lib.places import travel_name; print(travel_name('../tables/a.csv'))"
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath

from lib import PROJECT_ROOT

DATA = "WORKBENCH_DATA"
"""Environment variable of a container: the folder that uploaded files lie in."""

OUTPUTS = "WORKBENCH_OUTPUTS"
"""Environment variable of a container: the folder of its runs."""

RUN = "WORKBENCH_RUN"
"""Environment variable: the folder of the run that this process works for; what scoring keeps and costs goes there."""

LEDGER = "WORKBENCH_LEDGER"
"""Environment variable of a container: the ledger file on its own disk, instead of the run's own."""

ROLES = "WORKBENCH_ROLES"
"""Environment variable of a container: the Modal app that holds the classes of its distributed roles."""

OUTSIDE = "outside"


def locate(path: str | Path) -> Path:
    """The absolute path of what a config names; relative ones count from the project root, never from where one is.

    In a container a file that was shipped or uploaded is found under its travel name, a run under the volume's runs.
    """
    given = str(path)
    expanded = Path(given).expanduser()
    here = expanded if expanded.is_absolute() else PROJECT_ROOT / expanded
    if DATA not in os.environ or here.exists():
        return here
    name = travel_name(given)
    places = [PROJECT_ROOT / name, Path(os.environ[DATA]) / name]
    if name.startswith("outputs/"):
        places.append(Path(os.environ[OUTPUTS]) / name.removeprefix("outputs/"))
    return next((place for place in places if place.exists()), here)


def travel_name(path: str | Path) -> str:
    """The name under which a file that a config names travels: its own inside the project, else one that cannot clash.

    It depends on the text in the config only, so that a container finds it without knowing this machine.
    """
    given = str(path)
    if given.startswith(f"{PROJECT_ROOT}{os.sep}"):
        given = str(Path(given).relative_to(PROJECT_ROOT))
    name = os.path.normpath(given)
    if not os.path.isabs(name) and not name.startswith(("..", "~")):
        return PurePosixPath(name).as_posix()
    return f"{OUTSIDE}/{hashlib.sha256(name.encode()).hexdigest()[:8]}/{Path(name).name}"


def input_name(path: Path) -> str:
    """A file's name as an input of a stage: the same wherever the file is."""
    path = Path(os.path.normpath(path))
    roots = [PROJECT_ROOT, *([Path(os.environ[DATA])] if DATA in os.environ else [])]
    for root in roots:
        if path.is_relative_to(root):
            name = path.relative_to(root)
            return name.name if name.parts[0] == OUTSIDE else name.as_posix()
    return path.name
