"""Notebook 3, where several roles train: who was busy, how fast, on how old weights, and what proved them.

Owns this figure and table. Reads the lines of events.jsonl and metrics.jsonl as the orchestrator writes them. Must not
know processes or weights.

    python -c "from lib.show.roles import summary; print(summary([{'time': 0., 'role': 'actor', 'kind': 'start'}], []))"
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib.show.figure import BLUE, GREEN, GREY, ORANGE, RED, done, new_figure, number, smooth, whole_steps
from lib.show.page import table, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Event = Mapping[str, Any]

LIVE_SECONDS = 120.0
"""How far back the chart of who is busy goes while training runs."""

_COLORS = {"actor": BLUE, "scoring": GREY}
_TROUBLE = ("fenced", "lost", "died", "given_up")


def roles(events: Sequence[Event], metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Table and figure of the roles; says so where one process trains alone."""
    if not events:
        text("One process trains alone: there are no roles to look at (backend: distributed has them).")
        return None
    table(summary(events, metrics), "Roles")
    if troubles := [trouble for trouble in map(_told, events) if trouble]:
        table(troubles[-20:], "Fenced, lost and started again (the last 20)")
    return roles_figure(events, metrics)


def summary(events: Sequence[Event], metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line a role: share of its time in which it was busy, tokens a second, syncs, proofs, losses."""
    lines = []
    for role in _names(events):
        own = [event for event in events if event["role"] == role]
        proofs = [event for event in own if event["kind"] == "proof"]
        syncs = [event["seconds"] for event in own if event["kind"] == "sync"]
        speeds = [speed for m in metrics if (speed := number(m.get(f"tokens_per_second/{role}"))) > 0]
        worst = [event["worst"] for event in proofs if event["holds"] and event["worst"] is not None]
        lines.append(
            {
                "role": role,
                "busy": _share(own),
                "tokens a second": f"{statistics.fmean(speeds):.0f}" if speeds else "",
                "syncs": len(syncs) or "",
                "seconds a sync": f"{statistics.median(syncs):.3f}" if syncs else "",
                "proofs held": f"{sum(p['holds'] for p in proofs)} of {len(proofs)}" if proofs else "",
                "worst difference that held": f"{max(worst):.1e}" if worst else "",
                "out of service": sum(event["kind"] in _TROUBLE for event in own) or "",
            }
        )
    return lines


def roles_figure(events: Sequence[Event], metrics: Sequence[Mapping[str, Any]], last: float | None = None) -> Figure:
    """Who was busy when (of the `last` seconds), throughput by worker, staleness, and what syncs took."""
    figure, axes = new_figure(2, 2, 11, 5.6)
    _draw_busy(axes[0], events, last)
    steps = [m["step"] for m in metrics]
    workers = [role for role in _names(events) if role not in _COLORS]
    for ax, title, series in (
        (axes[1], "Tokens a second", [(f"tokens_per_second/{w}", w, _color(w, workers)) for w in workers]),
        (axes[2], "Staleness (optimizer steps)", [("staleness/max", "oldest", RED), ("staleness/mean", "mean", BLUE)]),
        (axes[3], "Sync (seconds, slowest worker)", [("sync/seconds", "sync", GREEN)]),
    ):
        for key, label, color in series:
            values = [number(m.get(key)) for m in metrics]
            ax.plot(steps, values, color=color, alpha=0.3, linewidth=1)
            ax.plot(steps, smooth(values), color=color, linewidth=2, label=label)
        ax.set(title=title, xlabel="step")
        ax.set_ylim(bottom=0)
        whole_steps(ax)
        if len(series) > 1:
            ax.legend()
    return done(figure)


def _draw_busy(ax: Axes, events: Sequence[Event], last: float | None) -> None:
    names = _names(events)
    workers = [name for name in names if name not in _COLORS]
    # The start of engines takes minutes, and would push what comes after it to the edge.
    begin, end = next((e for e in events if e["kind"] == "proof"), events[0])["time"], events[-1]["time"]
    since = max(begin, end - last) if last else begin
    for at, name in enumerate(reversed(names)):
        own = [event for event in events if event["role"] == name]
        busy = [span for event in own if event["kind"] == "busy" for span in event["spans"] if span[1] > since]
        spans = [(max(a, since) - begin, b - max(a, since)) for a, b in busy]
        ax.broken_barh(spans, (at - 0.3, 0.6), facecolors=_color(name, workers))
        proofs = [e["time"] - begin for e in own if e["kind"] == "proof" and e["holds"] and e["time"] > since]
        ax.plot(proofs, [at + 0.4] * len(proofs), "|", color=GREEN, markersize=6)
        trouble = [e["time"] - begin for e in own if e["kind"] in _TROUBLE and e["time"] > since]
        ax.plot(trouble, [at] * len(trouble), "x", color=RED, markersize=8)
    ax.set_yticks(range(len(names)), list(reversed(names)))
    ax.set_xlim(since - begin, max(end - begin, since - begin + 1e-3))
    ax.set(title="Busy (green: weights proven, red: out of service)", xlabel="seconds")
    ax.grid(axis="y", visible=False)


def _names(events: Sequence[Event]) -> list[str]:
    """The roles that can be busy: the actor, the scoring, the workers by number."""
    found = {event["role"] for event in events} - {"orchestrator"}
    order = {"actor": 0, "scoring": 1}
    return sorted(found, key=lambda name: (order.get(name, 2), len(name), name))


def _color(name: str, workers: Sequence[str]) -> str:
    return _COLORS.get(name) or (ORANGE, GREEN)[workers.index(name) % 2]


def _share(own: Sequence[Event]) -> str:
    """Of the time from its first span on: before that it was not there yet."""
    spans = [span for event in own if event["kind"] == "busy" for span in event["spans"]]
    if not spans:
        return ""
    whole = own[-1]["time"] - spans[0][0]
    return f"{sum(b - a for a, b in spans) / whole:.0%}" if whole > 0 else ""


def _told(event: Event) -> dict[str, Any] | None:
    if event["kind"] not in _TROUBLE:
        return None
    return {"role": event["role"], "what": event["kind"], "weights": event.get("version", ""), "why": event["why"]}
