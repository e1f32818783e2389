"""Where a training that was ended at any point goes on: logs that hold what the actor's checkpoint has consumed.

Owns the cut. The checkpoint is the actor's, which may be on another machine; the lines themselves say which steps they
belong to. Must not know the roles.

    python -c "from lib.orchestrator.resume import cut_back; help(cut_back)"
"""

from __future__ import annotations

import json
from pathlib import Path

from lib.runfolder import LOGS, Run, RunError


def cut_back(run: Run, step: int) -> None:
    """Cut rollouts.jsonl and metrics.jsonl back to `step` optimizer steps: the rest is generated and trained anew.

    Raises RunError where they do not reach that far.
    """
    run.cut_logs({log: _size_up_to(run.folder / log, step) for log in LOGS})
    last = max((record["step"] for record in run.metrics()), default=0)
    if last != step:
        raise RunError(
            f"{run.folder / 'metrics.jsonl'} ends at step {last} and the last checkpoint is of step {step}: it was "
            f"changed by hand; start a new run"
        )


def _size_up_to(path: Path, step: int) -> int:
    """Bytes of the whole lines before the first one of a later step."""
    size = 0
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n") or json.loads(line)["step"] > step:
                    break
                size += len(line)
    return size
