"""The figures of the judge meter, from verdicts on the same answers asked for several times.

Owns what is counted, over which clusters (rows: what is known about these is to hold for others), and the words for it.
Unknown verdicts are in no figure. Must not know how a judge is asked, or files.

    python -c "from lib.meter.readings import repeatability; print(repeatability([], 3))"
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.ledger import Verdict
from lib.meter import intervals
from lib.meter.advantages import Gap, Scaling, rms, simulated_gap
from lib.meter.intervals import Estimate

if TYPE_CHECKING:
    import numpy as np


class Reading(NamedTuple):
    """One figure of the meter, with its 95 % interval; NaN = could not be told."""

    what: str
    n: int
    value: float
    low: float
    high: float
    meaning: str


class Asked(NamedTuple):
    """One answer, asked about several times."""

    row: str
    text: str
    asks: list[Mapping[str, Verdict]]
    reverse: Mapping[str, Verdict] | None
    """With the criteria in reverse order; None where there is one criterion."""
    rewards: list[float | None]
    """Of each ask; None = unscored or masked."""

    @property
    def called(self) -> bool:
        """Whether a judge was asked at all: what is decided without a call (an empty answer) repeats by itself."""
        return any(v.verdict == "unknown" or v.attempts > 0 for v in self.asks[0].values())


Group = list[Asked]
"""The answers to one row, as often as they were given."""


def distinct(groups: Iterable[Group]) -> list[Asked]:
    """Every answer that was asked about, once."""
    return list({id(one): one for group in groups for one in group}.values())


def reading(what: str, n: float, found: Estimate, meaning: str) -> Reading:
    return Reading(what, int(n), *found, meaning)


def _by_row(groups: Iterable[Group], count: Callable[[Asked], tuple[float, float]]) -> tuple[list[float], list[float]]:
    """(hits, sizes) of every row: the sums over its answers that a judge was asked about. Rows are the clusters."""
    sums = [[count(one) for one in distinct([group]) if one.called] for group in groups]
    found = [(math.fsum(h for h, _ in some), math.fsum(n for _, n in some)) for some in sums]
    return [h for h, n in found if n], [n for _, n in found if n]


def repeatability(groups: Sequence[Group], asks: int) -> Reading:
    def count(one: Asked) -> tuple[float, float]:
        asked = [{ask[name].verdict for ask in one.asks} for name in one.asks[0]]
        known = [some for some in asked if "unknown" not in some]
        return sum(len(some) == 1 for some in known), len(known)

    hits, sizes = _by_row(groups, count)
    n = sum(sizes)
    meaning = f"{n - sum(hits):.0f} of {n:.0f} verdicts, on answers to {len(sizes)} rows, changed in {asks} asks."
    return reading("verdicts the same in every ask", n, intervals.share(hits, sizes), meaning)


def reward_repeatability(groups: Sequence[Group], asks: int) -> Reading:
    def count(one: Asked) -> tuple[float, float]:
        known = [reward for reward in one.rewards if reward is not None]
        return (max(known) - min(known) < 1e-9, 1) if len(known) == asks else (0, 0)

    hits, sizes = _by_row(groups, count)
    meaning = "One changed verdict can change a reward; a hurdle's, all of it."
    return reading("rewards the same in every ask", sum(sizes), intervals.share(hits, sizes), meaning)


def reward_noise(groups: Sequence[Group]) -> Reading:
    def count(one: Asked) -> tuple[float, float]:
        known = [reward for reward in one.rewards if reward is not None]
        return (statistics.variance(known), 1) if len(known) > 1 else (0, 0)

    squares, sizes = _by_row(groups, count)
    asks = [ask for group in groups for ask in zip(*(one.rewards for one in group), strict=True)]  # of each group
    spreads = [statistics.variance(some) for ask in asks if len(some := [r for r in ask if r is not None]) > 1]
    between = statistics.mean(spreads) if spreads else math.nan
    meaning = f"Rewards within a group differ by {math.sqrt(between):.3f}, this noise included." if spreads else ""
    found = intervals.root_mean_square(squares, sizes, between)
    return reading("noise of a reward (standard deviation)", sum(sizes), found, meaning)


def position_bias(groups: Sequence[Group]) -> Reading:
    what = "verdicts that the order changes, beyond noise"
    found = [_turned([group]) for group in groups]
    rows = [changes for changes in found if changes]
    if not rows:
        return reading(what, 0, intervals.UNKNOWN, "No answer has several criteria with known verdicts: no order.")
    excess = [[turned - plain for plain, turned in row] for row in rows]
    sizes = [len(row) for row in rows]
    estimate = intervals.balance([math.fsum(row) for row in excess], [_squares(row) for row in excess], sizes)
    plain, turned = (sum(sum(pair[side] for pair in row) for row in rows) / sum(sizes) for side in (0, 1))
    meaning = f"{turned:.1%} changed in reverse order, {plain:.1%} when just asked again."
    return reading(what, sum(sizes), estimate, meaning)


def _turned(groups: Sequence[Group]) -> list[tuple[float, float]]:
    """Of every known verdict: the share of pairs that differ, of plain asks, and of a plain and the reversed one."""
    found = []
    for one in (one for one in distinct(groups) if one.called):
        for name, verdict in (one.reverse or {}).items():
            plain = [ask[name].verdict for ask in one.asks]
            if "unknown" not in (*plain, verdict.verdict):
                pairs = list(itertools.combinations(plain, 2))
                again = sum(a != b for a, b in pairs) / len(pairs)
                found.append((again, sum(a != verdict.verdict for a in plain) / len(plain)))
    return found


def _squares(values: Iterable[float]) -> float:
    return math.fsum(value * value for value in values)


def length_bias(answers: Sequence[Mapping[str, Any]]) -> Reading:
    """Of all answers, not only those asked about again. Cut-off ones are left out: they are long and bad by nature."""
    groups: dict[str, tuple[list[float], list[float]]] = {}
    for record in answers:
        if record["reward"] is not None and not record["masked"] and record["stop"] != "length":
            lengths, earned = groups.setdefault(str(record["row"]), ([], []))
            lengths.append(float(len(record["answer"])))
            earned.append(float(record["reward"]))
    pairs = list(groups.values())
    found, (low, high) = intervals.correlation_within(pairs), intervals.chance_within(pairs)
    if math.isnan(found.value):
        meaning = "Too few groups whose answers differ both in length and in reward."
    else:
        place = "within" if low <= found.value <= high else "beyond"
        meaning = (
            f"It is {place} what shuffled groups give ({low:+.2f} to {high:+.2f}). Alone it proves no bias: "
            f"longer answers may be better. The padding attacks add length and nothing else."
        )
    n = sum(len(lengths) for lengths, _ in pairs)
    return reading("reward and length within groups (rank correlation)", n, found, meaning)


def rewards(groups: Iterable[Group]) -> list[np.ndarray]:
    """Rewards (answers, asks) of every group with at least two answers; NaN = unscored or masked."""
    import numpy as np

    return [np.array([one.rewards for one in group], float) for group in groups if len(group) > 1]


def advantage_error(found: Sequence[Gap]) -> Reading:
    what = "advantages of two asks (root mean square difference)"
    live = [gap for gap in found if gap.size]
    if not live:
        return reading(what, 0, intervals.UNKNOWN, "No group had rewards that differ: there was nothing to learn from.")
    size, unrelated = sum(g.size for g in live), 2 * sum(g.power for g in live)
    error = intervals.root_mean_square([g.squares for g in live], [g.size for g in live], unrelated / size)
    alike = 1 - sum(g.squares for g in live) / unrelated
    meaning = (
        f"The advantages that two asks of the same {len(live)} groups give correlate at {alike:.2f}; "
        f"1 is a judge without noise. Larger groups do not make an answer's own verdict surer."
    )
    return reading(what, len(live), error, meaning)


def sign_flips(found: Sequence[Gap]) -> Reading:
    live = [gap for gap in found if gap.size]
    share = intervals.share([gap.flips for gap in live], [gap.size for gap in live])
    meaning = "Answers that one ask would make likelier and another one less likely."
    return reading("advantages whose sign flips", len(live), share, meaning)


def by_group_size(
    scored: Sequence[np.ndarray], sizes: Iterable[int], scaling: Scaling
) -> dict[int, tuple[float, float]]:
    """(error, share of flips) by group size; NaN without a signal."""
    found = {size: simulated_gap(scored, size, scaling) for size in sizes}
    return {size: (rms(gap), gap.flips / gap.size if gap.size else math.nan) for size, gap in found.items()}
