"""What every process of verl imports as soon as it imports verl (VERL_USE_EXTERNAL_MODULES).

Owns which of our parts have to be there that early: where there is no GPU, verl's device. Must stay quick.

    VERL_USE_EXTERNAL_MODULES=lib.verl.plugin python -m lib.verl.program --help
"""

from __future__ import annotations

import os

if os.environ.get("VERL_PLATFORM") == "cpu":
    from lib.verl import platform  # noqa: F401  (registers itself)
