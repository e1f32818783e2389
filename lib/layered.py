"""Small environments on top of the workbench's own: only what it lacks is installed, in seconds.

Owns how such an environment is made and when it is made anew. Must not know what is in it.

    python -c "from lib.layered import make_environment; help(make_environment)"
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

from lib import WorkbenchError

logger = logging.getLogger(__name__)

DONE = "pins.json"


def make_environment(folder: Path, pins: Sequence[str], paths: Sequence[Path] = ()) -> Path:
    """The interpreter of an environment with `pins` in it; makes it where it is not there as pinned.

    What is not pinned is found in the workbench's own packages; `paths` are further folders to import from. Nothing
    that a pin depends on is installed. Raises WorkbenchError.
    """
    python = folder / "bin" / "python"
    shared = [sysconfig.get_path("purelib"), *map(str, paths)]
    wanted = json.dumps({"pins": list(pins), "shared": shared, "python": sys.version})
    done = folder / DONE
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, symlinks=True, with_pip=False)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    # After the environment's own packages, which go before the workbench's.
    (own / "workbench.pth").write_text("".join(f"{path}\n" for path in shared), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", *pins]
    installed = subprocess.run(command, capture_output=True, text=True, check=False)
    if installed.returncode:
        raise WorkbenchError(f"{folder} cannot be made: {installed.stderr.strip()[-1000:]}")
    done.write_text(wanted, encoding="utf-8")
    logger.info("made %s", folder)
    return python
