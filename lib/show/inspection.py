"""Notebooks 1 and 2: prompt lengths, the base policy's rewards, and the groups that a step can learn from.

Owns these figures. Must not know where the numbers come from.

    python -c "from lib.show import reward_spread; reward_spread([[0.1, 0.5], [0.3]]).savefig('/tmp/rewards.png')"
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lib.preflight import UsefulGroups
from lib.show.figure import BLUE, GREEN, GREY, ORANGE, RED, done, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def lengths(tokens: Mapping[str, Sequence[int]], limit: int) -> Figure:
    """Token lengths of the prompts of every split, against the limit."""
    figure, axes = new_figure(1, 1, 7.2, 2.4)
    ax = axes[0]
    for (name, values), color in zip(tokens.items(), (BLUE, ORANGE), strict=False):
        ax.hist(
            values, bins=min(40, max(5, len(set(values)))), alpha=0.65, color=color, label=f"{name} (n={len(values)})"
        )
    longest = max((max(values) for values in tokens.values() if values), default=0)
    if limit <= 2 * longest:
        ax.axvline(limit, color=RED, linestyle="--", label=f"prompt_limit {limit}")
    else:
        ax.plot([], [], " ", label=f"prompt_limit {limit}: far to the right")
    ax.set(title="Prompt length", xlabel="tokens", ylabel="rows")
    ax.legend()
    return done(figure)


def reward_spread(groups: Sequence[Sequence[float | None]]) -> Figure:
    """Rewards of the base policy's answers: all of them, and how far they spread within a group."""
    figure, (left, right) = new_figure(1, 2, 9.5, 2.8)
    scored = [[r for r in group if r is not None] for group in groups]
    left.hist([r for group in scored for r in group], bins=30, color=BLUE, alpha=0.8)
    left.set(title="Rewards of the base policy", xlabel="reward", ylabel="answers")
    ordered = sorted((g for g in scored if g), key=lambda g: sum(g) / len(g))
    for position, group in enumerate(ordered):
        right.plot([position, position], [min(group), max(group)], color=BLUE, alpha=0.35, linewidth=2)
        right.plot(position, sum(group) / len(group), ".", color=ORANGE, markersize=4)
    right.set(title="Within groups: range and mean", xlabel="group, by mean reward", ylabel="reward")
    return done(figure)


def useful_groups(expected: Sequence[UsefulGroups], size: int) -> Figure:
    """Groups with a signal by group size: their share, and how many a step of as many answers has. `size`: today's."""
    figure, (left, right) = new_figure(1, 2, 9.5, 2.8)
    at = [one.size for one in expected]
    for ax, values in ((left, [one.share for one in expected]), (right, [one.per_step for one in expected])):
        ax.plot(at, values, color=GREY, linewidth=1)
        for one, value in zip(expected, values, strict=True):
            ax.plot(one.size, value, "o", color=GREEN, markerfacecolor=GREEN if one.exact else "white", markersize=7)
            label = f"{value:.2g}" if one.exact else f"≥ {value:.2g}"
            ax.annotate(label, (one.size, value), xytext=(0, 7), textcoords="offset points", ha="center", fontsize=8)
        ax.axvline(size, color=ORANGE, linestyle="--", linewidth=1, label=f"training.group_size {size}")
        ax.set(xlabel="group size", xticks=at, ylim=(0, 1.25 * max([*values, 0.01])))
    left.set(title="Groups whose rewards differ", ylabel="share")
    right.set(title="Useful groups in a step, with as many answers as now", ylabel="groups")
    right.legend(loc="upper right")
    return done(figure)
