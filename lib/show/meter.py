"""The judge meter as a table and a figure.

Owns how the meter looks. Must not know how anything in it was measured.

    python -c "from lib.show.meter import meter; meter(None)"
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lib.meter import JudgeMeter
from lib.meter.readings import Reading
from lib.show.figure import BLUE, ORANGE, done, new_figure
from lib.show.page import table, text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def meter(found: JudgeMeter | None) -> Figure | None:
    """Every figure of the meter with its interval and what it means; below, the noise by group size."""
    if found is None:
        text("This task has no judge: its reward is computed, and there is nothing to measure here.")
        return None
    table(map(_line, found.readings), "How good is the judge?")
    text(_footer(found))
    return _by_group_size(found)


def _line(one: Reading) -> dict[str, str]:
    return {
        "measured": one.what,
        "value": _number(one.value),
        "95 % interval": f"{_number(one.low)} to {_number(one.high)}" if one.low == one.low else "",
        "n": str(one.n),
        "meaning": one.meaning,
    }


def _number(value: float) -> str:
    return "not measured" if math.isnan(value) else f"{value:.3f}"


def _footer(found: JudgeMeter) -> str:
    cost = "its price is not known" if found.usd is None else f"${found.usd:.4f}"
    asked = f"Asking again cost when it was first done: {cost}."
    if not found.unknown:
        return f"{asked} No verdict stayed unknown."
    causes = "\n".join(f"{count} x {cause}" for cause, count in found.unknown.items())
    return f"{asked}\n{sum(found.unknown.values())} verdicts stayed unknown and are in no figure:\n{causes}"


def _by_group_size(found: JudgeMeter) -> Figure | None:
    """The advantage error and the share of flips by group size; None where there was no signal to disturb."""
    known = {n: value for n, value in found.by_group_size.items() if not math.isnan(value[0])}
    if not known:
        return None
    figure, axes = new_figure(1, 1, 7.2, 2.6)
    ax = axes[0]
    ax.plot(list(known), [error for error, _ in known.values()], "o-", color=BLUE, label="advantage error (RMS)")
    ax.plot(list(known), [flips for _, flips in known.values()], "o-", color=ORANGE, label="share of flipped signs")
    ax.set(title="What the judge's noise does, simulated", xlabel="group size", ylim=(0, None))
    ax.set_xticks(list(known))
    ax.legend()
    return done(figure)
