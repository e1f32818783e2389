"""Runs the corpus as whoever starts it, and prints what went wrong as one line of JSON: {"backend": [lines]}.

python tests/sandbox/as_user.py warm cold
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from corpus import problems_of_all  # noqa: E402

if __name__ == "__main__":
    found = {backend: asyncio.run(problems_of_all(backend)) for backend in sys.argv[1:]}
    sys.stdout.write(json.dumps(found) + "\n")
