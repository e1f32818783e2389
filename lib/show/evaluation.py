"""Notebook 4: policies side by side, gains with their intervals, and the result in sentences.

Owns these figures and tables. Must not know how a policy was evaluated.

    python -c "from lib.show import gains; gains({}, 'nothing yet').savefig('/tmp/gains.png')"
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lib.evaluate import Comparison
from lib.paired import Gain, PassAt, Summary
from lib.show.figure import BLUE, GREEN, GREY, RED, done, draw_bars, new_figure
from lib.show.page import put, table, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FEW = 12
"""A part with at most this many values is drawn as shares."""

_FLATTERED = (
    "It is the best of {} runs, chosen on these same rows, which flatters it: confirm it on fresh rows "
    "(evaluation.prompts)."
)


def summaries(policies: Sequence[Summary]) -> None:
    """One line a policy: mean reward with its interval, valid share, parts (of `kind/name` parts see the gains)."""
    table(
        {
            "policy": s.policy,
            "reward": f"{s.reward:.3f} [{s.low:.3f}, {s.high:.3f}]",
            "n": s.n,
            "valid": f"{s.valid:.1%}",
            "reward, invalid = 0": f"{s.reward_with_invalid:.3f}",
            "unscored": s.unscored,
            **{name: value for name, value in s.parts.items() if name != "valid" and "/" not in name},
        }
        for s in policies
    )


def pass_at_k(by_policy: Mapping[str, Mapping[int, PassAt]]) -> None:
    """The share of rows solved in k tries, policy by policy; says so where the task has no part `solved`."""
    lines = [
        {"policy": label, **{f"pass@{k}": _pass_at(one) for k, one in some.items()}}
        for label, some in by_policy.items()
        if some
    ]
    if lines:
        table(lines, "Rows solved in k tries (95 % interval over n rows)")
    else:
        text("pass@k: this task has no answers that are simply right or wrong (no part `solved`)")


def gains(by_name: Mapping[str, Gain], title: str, unit: str = "reward") -> Figure:
    """Paired gains with 95 % intervals; grey where the interval includes zero."""
    figure, axes = new_figure(1, 1, 7.6, 0.9 + 0.34 * max(2, len(by_name)))
    ax = axes[0]
    for y, gain in enumerate(reversed(list(by_name.values()))):
        color = (GREEN if gain.mean > 0 else RED) if gain.clear else GREY
        ax.plot([gain.low, gain.high], [y, y], color=color, linewidth=2.5, solid_capstyle="round")
        ax.plot(gain.mean, y, "o", color=color)
        label = f"{_interval(gain)}  n={gain.n}"
        ax.annotate(label, (gain.high, y), xytext=(8, -3), textcoords="offset points", fontsize=8)
    ax.axvline(0, color="black", linewidth=0.8)
    ax.set_yticks(range(len(by_name)), list(reversed(list(by_name))))
    ax.set(title=title, xlabel=f"gain in {unit} (paired, 95 % interval)", ylim=(-0.6, len(by_name) - 0.4))
    if not by_name:
        ax.set_title(f"{title}: nothing to compare")
    low, high = ax.get_xlim()
    ax.set_xlim(low, high + 0.55 * (high - low))
    return done(figure)


def runs(comparison: Comparison) -> Figure | None:
    """Several runs at a glance, the best first: where their configs differ, reward and gain; a dot with interval each.

    Says so in a word, and draws nothing, where the comparison is of one run.
    """
    if not comparison.settings:
        text("One run: nothing to rank. evaluation.runs names several.")
        return None
    by_name = {s.policy: s for s in comparison.summaries}
    table(_run(name, comparison, by_name[f"{name} sampled"]) for name in comparison.settings)
    put(f"<p>{_over_runner_up(comparison)}</p>")
    return _ranking([by_name[f"{name} sampled"] for name in comparison.settings], by_name["base sampled"])


def part_shares(records: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure | None:
    """For every part with few values (the chosen action, say): how often each value occurs, policy by policy."""
    names = sorted({name for some in records.values() for record in some for name in record["parts"]})
    values = {name: {label: _values(some, name) for label, some in records.items()} for name in names}
    few = [name for name in names if 2 < len({v for some in values[name].values() for v in some}) <= _FEW]
    if not few:
        return None
    figure, axes = new_figure(1, len(few), 6 * len(few), 2.8)
    for ax, name in zip(axes, few, strict=True):
        shares = {
            label: {f"{v:g}": some.count(v) / len(some) for v in set(some)}
            for label, some in values[name].items()
            if some
        }
        draw_bars(ax, shares, name, "value")
    axes[-1].legend()
    return done(figure)


def verdict(comparison: Comparison) -> None:
    """The result in sentences: the gain, what this many rows can show, and how much of it is sharpening."""
    sampled = comparison.gains.get(f"{comparison.final} sampled")
    if sampled is None:
        put(f"<p><b>{html.escape(comparison.final)} was evaluated alone</b>: there is no base beside it.</p>")
        return
    lines = [
        f"<b>{html.escape(comparison.final)} against base, sampled answers: {_interval(sampled)}</b> on {sampled.n} "
        f"rows ({sampled.left_out} left out because a side was masked or unscored).",
        "The interval excludes zero." if sampled.clear else "The interval includes zero: no difference is shown.",
        *([_FLATTERED.format(len(comparison.settings))] if len(comparison.settings) > 1 else []),
        f"With this many rows, a true gain below {sampled.detectable:.3f} would usually be missed.",
    ]
    over = comparison.over_greedy_base
    greedy = next((s for s in comparison.summaries if s.policy == "base greedy"), None)
    base = next(s for s in comparison.summaries if s.policy == "base sampled")
    if over and greedy:
        lines.append(
            f"Sharpening alone (the base answering greedily) would give {greedy.reward - base.reward:+.3f}; "
            f"sampled answers after training against the base's greedy ones: {_interval(over)}."
        )
    put("".join(f"<p>{line}</p>" for line in lines))


def _run(name: str, comparison: Comparison, summary: Summary) -> dict[str, Any]:
    return {
        "run": name,
        **comparison.settings[name],
        "reward": f"{summary.reward:.3f} [{summary.low:.3f}, {summary.high:.3f}]",
        "gain over base": _interval(comparison.gains[f"{name} sampled"]),
        "valid": f"{summary.valid:.1%}",
        "reward, invalid = 0": f"{summary.reward_with_invalid:.3f}",
    }


def _over_runner_up(comparison: Comparison) -> str:
    over, names = comparison.over_runner_up, list(comparison.settings)
    if over is None:
        return f"Only {names[0]} was named: there is no runner-up."
    shown = "the interval excludes zero" if over.clear else "no difference is shown"
    return (
        f"The best, {names[0]}, against the runner-up, {names[1]}: {_interval(over)} on the {over.n} rows "
        f"that both scored ({over.left_out} left out): {shown}. "
        f"{_FLATTERED.format(len(names))}"
    )


def _ranking(ranked: Sequence[Summary], base: Summary) -> Figure:
    """Mean reward with its 95 % interval by run, the best on top, and the base's as a band."""
    figure, axes = new_figure(1, 1, 7.6, 1.1 + 0.34 * max(2, len(ranked)))
    ax = axes[0]
    ax.axvspan(base.low, base.high, color=GREY, alpha=0.2, linewidth=0)
    ax.axvline(base.reward, color=GREY, linestyle="--", linewidth=1, label=f"base {base.reward:.3f}")
    for y, summary in enumerate(reversed(ranked)):
        color = BLUE if summary is ranked[0] else GREY
        ax.plot([summary.low, summary.high], [y, y], color=color, linewidth=2.5, solid_capstyle="round")
        ax.plot(summary.reward, y, "o", color=color)
        ax.annotate(f"{summary.reward:.3f}", (summary.high, y), xytext=(8, -3), textcoords="offset points", fontsize=8)
    ax.set_yticks(range(len(ranked)), [s.policy.removesuffix(" sampled") for s in reversed(ranked)])
    ax.set(title="Runs by held-out reward", xlabel="mean reward (95 % interval)", ylim=(-0.6, len(ranked) - 0.4))
    ax.legend()
    ax.margins(x=0.15)
    return done(figure)


def _pass_at(one: PassAt) -> str:
    counts = {"with fewer tries": one.short, "never scored": one.left_out}
    lacking = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}] n={one.n}" + f" ({lacking})" * bool(lacking)


def _interval(gain: Gain) -> str:
    return f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]"


def _values(records: Sequence[Mapping[str, Any]], part: str) -> list[float]:
    return [record["parts"][part] for record in records if record["parts"].get(part) is not None]
