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
_LIGHT, _DARK = "#dfe2e6", "#30343a"
_FORMS = "osD^"
"""Marks of the sync methods."""
_TROUBLE = ("fenced", "lost", "died", "given_up")
_UNDER = "oldest"
"""A line that another may lie on: a wide one."""
_FEW = 9
"""Points without a line between them worth looking at; names in a legend."""


def roles(events: Sequence[Event], metrics: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Table and figure of the roles; says so where one process trains alone."""
    if not events:
        text("One process trains alone: there are no roles to look at (backend: distributed has them).")
        return None
    table(summary(events, metrics), "Roles")
    table(by_method(events), "Weights that were loaded, and proven")
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


def by_method(events: Sequence[Event]) -> list[dict[str, Any]]:
    """One line a sync method: how often and how quickly weights came by it, and whether they were the right ones."""
    lines = []
    for method in dict.fromkeys(event["method"] for event in events if event["kind"] in ("sync", "proof")):
        own = [event for event in events if event.get("method") == method]
        syncs = [event["seconds"] for event in own if event["kind"] == "sync"]
        proofs = [event for event in own if event["kind"] == "proof"]
        worst = [event["worst"] for event in proofs if event["holds"] and event["worst"] is not None]
        lines.append(
            {
                "method": method,
                "syncs": len(syncs),
                "seconds, median": f"{statistics.median(syncs):.3f}" if syncs else "",
                "slowest": f"{max(syncs):.3f}" if syncs else "",
                "proofs held": f"{sum(p['holds'] for p in proofs)} of {len(proofs)}" if proofs else "",
                "worst difference that held": f"{max(worst):.1e}" if worst else "",
            }
        )
    return lines


def roles_figure(events: Sequence[Event], metrics: Sequence[Mapping[str, Any]], last: float | None = None) -> Figure:
    """Who was busy when (of the `last` seconds), throughput by worker, staleness, and what syncs took."""
    figure, axes = new_figure(2, 2, 11, 5.6)
    workers = [role for role in _names(events) if role not in _COLORS]
    _draw_busy(axes[0], events, workers, last)
    speeds = [(f"tokens_per_second/{worker}", worker, _color(worker, workers)) for worker in workers]
    _draw_steps(axes[1], "Tokens a second", metrics, speeds)
    ages = [("staleness/max", _UNDER, ORANGE), ("staleness/mean", "mean", BLUE)]
    _draw_steps(axes[2], "Staleness (optimizer steps)", metrics, ages)
    axes[2].set_ylim(top=max(1.1, axes[2].get_ylim()[1]))
    _draw_syncs(axes[3], events, workers)
    return done(figure)


def _draw_busy(ax: Axes, events: Sequence[Event], workers: Sequence[str], last: float | None) -> None:
    names = _names(events)
    # The start of engines takes minutes, and would push what comes after it to the edge.
    begin, end = next((e for e in events if e["kind"] == "proof"), events[0])["time"], events[-1]["time"]
    since = max(begin, end - last) if last else begin
    for at, name in enumerate(reversed(names)):
        own = [event for event in events if event["role"] == name]
        for spans, height, color in (
            (_starts(own), 0.6, _LIGHT),
            ([span for event in own if event["kind"] == "busy" for span in event["spans"]], 0.6, _color(name, workers)),
            ([(e["time"] - e["seconds"], e["time"]) for e in own if e["kind"] == "sync"], 0.2, _DARK),
        ):
            shown = [(max(a, since) - begin, b - max(a, since)) for a, b in spans if b > since]
            ax.broken_barh(shown, (at - height / 2, height), facecolors=color)
        proofs = [e["time"] - begin for e in own if e["kind"] == "proof" and e["holds"] and e["time"] > since]
        ax.plot(proofs, [at + 0.4] * len(proofs), "|", color=_DARK, markersize=6)
        trouble = [e["time"] - begin for e in own if e["kind"] in _TROUBLE and e["time"] > since]
        ax.plot(trouble, [at] * len(trouble), "x", color=RED, markersize=9, markeredgewidth=2.5)
    ax.set_yticks(range(len(names)), list(reversed(names)))
    margin = 0.01 * max(end - since, 1e-3)
    ax.set_xlim(since - begin - margin, end - begin + margin)
    ax.set(title="Busy (pale: starts, dark: loads, |: proven, x: out)", xlabel="seconds")
    ax.grid(axis="y", visible=False)


def _starts(own: Sequence[Event]) -> list[tuple[float, float]]:
    """From every start to when it was ready, or was not to be."""
    begun = [at for at, event in enumerate(own) if event["kind"] == "start"]
    ends = [next((e for e in own[at:] if e["kind"] in ("ready", *_TROUBLE)), own[-1]) for at in begun]
    return [(own[at]["time"], ended["time"]) for at, ended in zip(begun, ends, strict=True)]


def _draw_steps(
    ax: Axes, title: str, metrics: Sequence[Mapping[str, Any]], series: Sequence[tuple[str, str, str]]
) -> None:
    steps = [m["step"] for m in metrics]
    for key, label, color in series:
        values = [number(m.get(key)) for m in metrics]
        ax.plot(steps, values, color=color, alpha=0.3, linewidth=1)
        dot, wide = "o" if len(values) < _FEW else "", 4.5 if label == _UNDER else 2.0
        ax.plot(steps, smooth(values), color=color, linewidth=wide, marker=dot, label=label)
    ax.set_title(title)
    ax.set_ylim(bottom=0)
    _along_steps(ax, steps)
    if 1 < len(series) <= _FEW:
        ax.legend()


def _draw_syncs(ax: Axes, events: Sequence[Event], workers: Sequence[str]) -> None:
    """One mark a sync: its colour is the worker's, its form the method's."""
    syncs = [event for event in events if event["kind"] == "sync"]
    methods = list(dict.fromkeys(event["method"] for event in syncs))
    for method, form in zip(methods, _FORMS, strict=False):
        own = [event for event in syncs if event["method"] == method]
        colors = [_color(event["role"], workers) for event in own]
        at, seconds = [event["step"] for event in own], [max(event["seconds"], 1e-4) for event in own]
        ax.scatter(at, seconds, c=colors, marker=form, s=26)
        ax.scatter([], [], c=GREY, marker=form, s=26, label=method)
    ax.set(title="Seconds to load weights", yscale="log")
    _along_steps(ax, [event["step"] for event in syncs])
    if methods:
        ax.legend()


def _along_steps(ax: Axes, steps: Sequence[int]) -> None:
    ax.set_xlabel("step")
    if steps:
        ax.set_xlim(min(steps) - 0.5, max(steps) + 0.5)
    whole_steps(ax)


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
    then = "gets them by " + event["next"] if event.get("next") else ""
    return {
        "role": event["role"],
        "what": event["kind"],
        "weights": f"version {event['version']} by {event['method']}" if "version" in event else "",
        "why": event["why"],
        "then": then,
    }
