"""The GRPO workbench: what the notebooks call. `import lib` imports nothing heavy.

python -m lib.run --help
"""

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parent.parent
"""Relative paths in configs resolve against this folder, never against the working directory."""


class WorkbenchError(Exception):
    """Something that a user can mend: the message says what was given, what is allowed, and what to do."""


@contextmanager
def without(*modules: str) -> Iterator[None]:
    """Hide installed packages from what is imported inside: some libraries import others just because they exist."""
    hidden = [name for name in modules if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


# torch and transformers make millions of small objects that live as long as the process: collecting them over and over
# costs a second at import, and another at exit.
gc.set_threshold(50_000, 20, 20)
atexit.register(gc.freeze)

# Libraries read these once, when they are imported, so they are set before any of them can be.
for _name, _value in {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # libgomp's default is to spin: one busy neighbour then makes a two-thread CPU step eight times slower.
    "GOMP_SPINCOUNT": "3000",
    # On a CPU with AVX512-BF16 bitsandbytes asks the Hub for a kernel as soon as it is imported: name an empty place.
    "LOCAL_KERNELS": "kernels-community/quantization-bitsandbytes=/nonexistent",
}.items():
    os.environ.setdefault(_name, _value)
