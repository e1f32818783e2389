"""Notebook 5: what is known of each artifact, and how to use one.

Owns these tables. Must not know how anything was proven or made.

    python -c "import lib.show.export as shown; print(shown.MARKS)"
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lib.show.page import put, table

MARKS = {True: "yes", False: "NO", None: "not looked at"}


def artifacts(made: Iterable[Mapping[str, Any]]) -> None:
    """A line an artifact (lib.export.Artifact as a dict): how large, what it was made of, what making it measured."""
    table(
        {
            "artifact": one["kind"],
            "MB": round(one["facts"]["bytes"] / 1e6, 1),
            "tensors": len(one["facts"]["tensors"]) or "",
            "base": one["facts"]["origin"]["base"],
            "step": one["facts"]["origin"]["step"],
            "measured": ", ".join(f"{name}: {_short(value)}" for name, value in one["facts"]["facts"].items()),
        }
        for one in made
    )


def proofs(records: Iterable[Mapping[str, Any]]) -> None:
    """A line an artifact, from the records of proof.json: the verdict, and what was found at each question.

    Below it, in words, why what is not proven is not.
    """
    kept = list(records)
    table(_line(record) for record in kept)
    lines = [
        f"<b>{html.escape(str(r['artifact']))} is NOT proven</b>: {html.escape(r['why'])}" for r in kept if r["why"]
    ]
    put("".join(f"<p>{line}</p>" for line in lines) or "<p>Every artifact is the policy that was trained.</p>")


def commands(lines: Sequence[str], caveats: Sequence[str] = ()) -> None:
    """What to type in a terminal, and what to mind."""
    listed = "".join(f"<li>{html.escape(caveat)}</li>" for caveat in caveats)
    put(f"<pre>{html.escape(chr(10).join(lines))}</pre>" + (f"<p>Mind:</p><ul>{listed}</ul>" if listed else ""))


def _line(record: Mapping[str, Any]) -> dict[str, Any]:
    checks = record["checks"]
    return {
        "artifact": record["artifact"],
        "proven": MARKS[record["proven"]],
        **{name: _cell(check) for name, check in checks.items()},
    }


def _cell(check: Mapping[str, Any]) -> str:
    return check["said"] if check["passed"] else f"{MARKS[check['passed']]}: {check['said']}"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
