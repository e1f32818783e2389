"""How the artifacts of a run are used: the lines to type, and what to mind.

Owns these lines. Must not know how an artifact was made or proven.

    python -c "from lib.export.usage import how_to_use; help(how_to_use)"
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from lib.config import ArtifactKind
from lib.export.folder import Artifact
from lib.export.gguf import FILE
from lib.export.ollama import commands
from lib.runfolder import Run

SERVED: tuple[ArtifactKind, ...] = ("adapter", "merged", "mxfp4")
"""What vLLM and Transformers take."""


class Usage(NamedTuple):
    lines: list[str]
    """For a terminal, in the project's folder; comments begin with #."""
    caveats: list[str]


def how_to_use(run: Run, artifacts: Sequence[Artifact]) -> Usage:
    """Serving here and on Modal, Ollama, llama.cpp: as far as the artifacts are there."""
    lines: list[str] = []
    caveats: list[str] = []
    for artifact in artifacts:
        if artifact.kind in SERVED:
            lines.append(f"python -m lib.run serve --run {run.name} --artifact {artifact.kind}")
        elif artifact.kind == "ollama":
            lines += commands(artifact.folder, artifact.facts["facts"])
            caveats += artifact.facts["facts"]["caveats"]
        elif artifact.kind == "gguf":
            lines.append(f"llama-server --model {shlex.quote(str(artifact.folder / FILE))}")
    served = [artifact.kind for artifact in artifacts if artifact.kind in SERVED]
    if served:
        named = f"run: {run.name}, artifact: {served[-1]}"
        lines += [f"# on Modal, once configs/serve.yaml says {named}:", "modal deploy -m lib.modal_app"]
    return Usage(lines, caveats)
