"""What is known of an artifact: the verdict of its checks, in a record, in a word, and as a refusal.

Owns when an artifact is proven, when a proof has failed, and what follows. A check that could not be made here is
neither: that is a warning. Must not know how anything was checked.

    python -c "from lib.export.verdict import require_proven; help(require_proven)"
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lib.export.checks import Check
from lib.export.errors import ExportError
from lib.runfolder import plain

logger = logging.getLogger(__name__)


class Proof(NamedTuple):
    """What is known of an artifact."""

    kind: str
    folder: Path
    checks: tuple[Check, ...]

    @property
    def proven(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[str]:
        """The questions whose answer is that it is not the policy."""
        return [check.name for check in self.checks if check.passed is False]

    @property
    def why(self) -> str:
        """Why not; "" where it is proven."""
        return "; ".join(f"{check.name}: {check.said}" for check in self.checks if not check.passed)

    @property
    def how(self) -> str:
        """By what it is proven, or that it is not, in a word."""
        if self.failed:
            return "NO"
        if not self.proven:
            return "not proven here"
        return "by header and tensors" if "gguf" in self.kind else "yes"

    def record(self) -> dict[str, Any]:
        """As it stands in proof.json."""
        checks = {check.name: check._asdict() | {"figures": dict(check.figures)} for check in self.checks}
        values: dict[str, Any] = plain({"artifact": self.kind, **self.summary(), "how": self.how, "checks": checks})
        return values

    def summary(self) -> dict[str, Any]:
        """As it stands in result.json."""
        return {"proven": self.proven, "failed": self.failed, "why": self.why}


def require_proven(proofs: Sequence[Proof]) -> None:
    """Raise ExportError where a proof has FAILED; warn of what could not be checked here."""
    for proof in proofs:
        if not proof.proven and not proof.failed:
            logger.warning("export: %s could not be proven here: %s", proof.kind, proof.why)
    wrong = [proof for proof in proofs if proof.failed]
    if wrong:
        told = "; ".join(f"{proof.kind} ({_failures(proof)})" for proof in wrong)
        raise ExportError(
            f"not the policy that was trained: {told}. Do not serve it: delete export/{wrong[0].kind}/ and export "
            f"again. Where that fails too, the check says what to change"
        )


def _failures(proof: Proof) -> str:
    return "; ".join(f"{check.name}: {check.said}" for check in proof.checks if check.passed is False)
