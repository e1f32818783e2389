"""Notebook 5: what is known of each artifact, and how to use one.

Owns these tables, and the figure of distances. Must not know how anything was proven or made.

    python -c "import lib.show.export as shown; print(shown.MARKS)"
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib.show.figure import BLUE, GREEN, GREY, done, new_figure
from lib.show.page import put, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = {
    "made_of": "made of", "stops": "ends with", "gguf_version": "GGUF version", "gguf_tensors": "tensors",
    "gguf_keys": "keys", "packed": "stacks packed anew", "packing_error_worst": "worst packing error in scales",
    "packing_error_bound": "bound", "packing_error_relative": "relative packing error",
}  # fmt: skip
"""Facts of a manifest in words."""

FOR_USE = ("caveats", "name")
"""Facts that stand with the commands."""

ASKED = ("answers", "reward")
FLOOR = 1e-9
"""Nats a token: less is drawn here, as 0 has no place on a scale of powers."""

_BESIDE: dict[str, Any] = {"xytext": (8, -3), "textcoords": "offset points", "fontsize": 8}

MARKS = {True: "yes", False: "NO", None: "not looked at"}
STATES = {True: "is NOT the policy that was trained", False: "is not proven here"}


def artifacts(made: Iterable[Mapping[str, Any]]) -> None:
    """A line an artifact (lib.export.Artifact as a dict): how large, what it was made of, what making it measured."""
    table(
        {
            "artifact": one["kind"],
            "MB": round(one["facts"]["bytes"] / 1e6, 1),
            "tensors": len(one["facts"]["tensors"]) or "",
            "base": one["facts"]["origin"]["base"],
            "step": one["facts"]["origin"]["step"],
            "measured": ", ".join(
                f"{WORDS.get(key, key)}: {_short(value)}"
                for key, value in one["facts"]["facts"].items()
                if key not in FOR_USE
            ),
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
        f"<b>{html.escape(str(r['artifact']))} {STATES[bool(r['failed'])]}</b>: {html.escape(r['why'])}"
        for r in kept
        if r["why"]
    ]
    put("".join(f"<p>{line}</p>" for line in lines) or "<p>Every artifact is the policy that was trained.</p>")


def distances(records: Iterable[Mapping[str, Any]]) -> Figure | None:
    """How far each artifact is from the policy, beside the base, and what it earns on the same held-out rows.

    Of those that were asked; draws nothing where none was.
    """
    kept = [(r["artifact"], *(r["checks"].get(name, {}).get("figures") or {} for name in ASKED)) for r in records]
    asked = [(name, said, earned) for name, said, earned in kept if "divergence" in said and "reward" in earned]
    if not asked:
        return None
    figure, (left, right) = new_figure(1, 2, 10, 1.2 + 0.34 * max(2, len(asked)))
    for y, (_, said, earned) in enumerate(reversed(asked)):
        left.plot(max(said["divergence"], FLOOR), y, "o", color=BLUE)
        left.annotate(f"{said['divergence']:.2g}", (max(said["divergence"], FLOOR), y), **_BESIDE)
        right.plot([earned["low"], earned["high"]], [y, y], color=BLUE, linewidth=2.5, solid_capstyle="round")
        right.plot(earned["reward"], y, "o", color=BLUE)
        right.annotate(f"{earned['reward']:.3f}", (earned["high"], y), **_BESIDE)
    _, said, earned = asked[0]
    left.axvline(max(said["divergence_base"], FLOOR), color=GREY, linestyle="--", label="the base")
    right.axvline(earned["reward"] - earned["against_policy"], color=GREEN, linestyle="--", label="the policy itself")
    left.set(xscale="log", title="KL from the policy", xlabel="nats a token", xlim=(FLOOR / 3, None))
    right.set(title="Reward on held-out rows", xlabel=f"greedy, {earned['rows']} rows, 95 % interval")
    for ax in (left, right):
        ax.set_yticks(range(len(asked)), [name for name, _, _ in reversed(asked)])
        ax.set_ylim(-0.6, len(asked) - 0.4)
        ax.legend(fontsize=8, loc="best")
    return done(figure)


def answers(records: Iterable[Mapping[str, Any]], caption: str) -> None:
    """Answers of lib/client.py, without the columns in which nothing stands."""
    kept = list(records)
    used = [name for name in (kept[0] if kept else ()) if any(one[name] not in ("", [], None) for one in kept)]
    table(({name: one[name] for name in used} for one in kept), caption)


def commands(lines: Sequence[str], caveats: Sequence[str] = ()) -> None:
    """What to type in a terminal, and what to mind."""
    listed = "".join(f"<li>{html.escape(caveat)}</li>" for caveat in caveats)
    typed = f"<pre style='font-family:monospace'>{html.escape(chr(10).join(lines))}</pre>"
    put(typed + (f"<p>Mind:</p><ul>{listed}</ul>" if listed else ""))


def _line(record: Mapping[str, Any]) -> dict[str, Any]:
    checks = record["checks"]
    return {
        "artifact": record["artifact"],
        "proven": record["how"],
        **{name: _cell(check) for name, check in checks.items()},
    }


def _cell(check: Mapping[str, Any]) -> str:
    return check["said"] if check["passed"] else f"{MARKS[check['passed']]}: {check['said']}"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)
