"""Why a model cannot be loaded, as one sentence with a remedy.

Owns what the Hub's and Transformers' errors mean to whoever wrote the config. Must not know tasks.

    python -c "from lib.models.errors import advice; print(advice('o/m', '401 Client Error: gated repo'))"
"""

from __future__ import annotations

import os
import re
from typing import Any

from lib import WorkbenchError

_TOKEN = (
    "accept its terms on https://huggingface.co/{source}, and give a token of that account in the environment variable "
    "HF_TOKEN (on Modal: `modal secret create huggingface HF_TOKEN=...`, and modal.secrets: [huggingface])"
)
_PICKLED = (
    "it has no .safetensors weights, and pickled ones (.bin, .pt) are refused: reading them can run code. Name "
    "a revision with safetensors (model.revision), or convert it: https://huggingface.co/spaces/safetensors/convert"
)
ADVICE: tuple[tuple[str, str], ...] = (
    (r"not in the authorized list|403 Client Error|awaiting a review", "this account may not read it (403): " + _TOKEN),
    (
        r"trust_remote_code=True|custom code",
        "it needs Python code of its own repository, which would run with all your rights. Read that code; then set "
        "model.trust_remote_code: true and pin model.revision to the commit that you have read",
    ),
    (r"and thus cannot be loaded with `safetensors`|pickled", _PICKLED),
    (
        r"not a valid model identifier|Repository Not Found",
        "the Hub knows no such model (or it is private: set HF_TOKEN), and there is no such folder: check model.name",
    ),
    (r"(?i)gated repo", "it is gated (401): " + _TOKEN),
    (r"401 Client Error", "it is private (401): " + _TOKEN),
    (
        r"(?i)is not a valid git identifier|Revision Not Found|Invalid rev id",
        "it has no such model.revision: check it on https://huggingface.co/{source}/commits",
    ),
    (
        r"(?i)offline|connect|couldn't|cached snapshot",
        "it is neither a folder here nor reachable on the Hub: check spelling and network, or give a folder",
    ),
    (
        r"does not recognize this architecture|model type `?\w+`? but Transformers",
        "the installed Transformers does not know its architecture: another model.name",
    ),
)
"""(what stands in the error, what to do), the most telling first."""


class ModelError(WorkbenchError, RuntimeError):
    """The model cannot be loaded or used as asked; the message says what to change."""


class explained:
    """Hub and file errors as one sentence with a remedy."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError)) and not isinstance(error, WorkbenchError):
            raise ModelError(f"cannot load {self.source}: {advice(self.source, _whole_text(error))}") from error


def advice(source: str, text: str) -> str:
    """What to do about an error with this text; its first line where nothing better is known."""
    found = next((told for pattern, told in ADVICE if re.search(pattern, text)), "")
    if not found:
        return text.strip().splitlines()[0] if text.strip() else "unknown error"
    has_token = "HF_TOKEN is set" if os.environ.get("HF_TOKEN") else "HF_TOKEN is not set"
    return found.format(source=source) + (f". Now {has_token}" if _TOKEN in found else "")


def _whole_text(error: BaseException) -> str:
    """The error and what it came from: Transformers puts its own words over the Hub's."""
    texts: list[str] = []
    one: BaseException | None = error
    while one is not None and len(texts) < 5:
        texts.append(str(one))
        one = one.__cause__
    return "\n".join(text for text in texts if text) or type(error).__name__
