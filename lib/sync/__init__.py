"""Weights from the actor to the workers: published whole, checked before they are taken, proven after.

Owns the folders of versions (publish), their manifest (check), and canaries (make_canaries, canary_of, compare). Must
not know tasks, engines, or how roles talk.

    actor:   release = publish(model, run / "weights", version=3, step=12, method="reload", run=name)
             canary = canary_of(model, 3, prompts)                 # prompts = make_canaries(real ones, block, longest)
    worker:  check(release, run=name), then load; afterwards the prompts' log-probabilities as it serves them
    between: compare(canary, answered, before=the canary of the version before) -> Proof

    python -c "import lib.sync; print(lib.sync.__all__)"
"""

from lib.sync.errors import SyncError
from lib.sync.folders import publish, versions
from lib.sync.manifest import Manifest, check, read_manifest
from lib.sync.proof import BLOCK, NOISE, canary_of, compare, make_canaries
from lib.sync.tensors import read_tensors

__all__ = [
    "BLOCK",
    "NOISE",
    "Manifest",
    "SyncError",
    "canary_of",
    "check",
    "compare",
    "make_canaries",
    "publish",
    "read_manifest",
    "read_tensors",
    "versions",
]
