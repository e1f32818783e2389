"""Groups with a signal: how many of them a step can expect, at this group size and at others.

Owns the arithmetic of useful groups. Must not know what a reward means.

    python -c "from lib.preflight.groups import useful_groups; print(useful_groups([[0, 0, 0, 1]], 16)[0])"
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

SIZES = (4, 6, 8, 12, 16)
"""Group sizes that are compared: below 4 the group's mean is mostly noise, above 16 answers cost more than they add."""


class UsefulGroups(NamedTuple):
    """What one group size promises."""

    size: int
    share: float
    """Of groups whose scored rewards are not all the same, expected over the prompts that were looked at."""
    per_step: float
    """Such groups in one step of as many answers as now; of one group where that is less than a group."""
    exact: bool
    """False = no prompt has so many answers to draw from: `share` is that of the largest group there is, which a larger
    one has at least."""


def useful_groups(
    groups: Sequence[Sequence[float | None]], completions: int, sizes: Sequence[int] = SIZES
) -> list[UsefulGroups]:
    """Expected useful groups at each size, from groups of answers whose rewards are known (None: masked, unscored).

    `completions`: answers in one step. A group of `size` is drawn from a prompt's answers without replacement
    (hypergeometric), which is unbiased; from fewer answers than that, all of them are the group.
    """
    found = []
    for size in sizes:
        shares = [1 - _dead(group, min(size, len(group))) for group in groups]
        share = math.fsum(shares) / len(shares) if shares else 0.0
        exact = bool(groups) and all(len(group) >= size for group in groups)
        found.append(UsefulGroups(size, share, share * max(1, completions // size), exact))
    return found


def _dead(rewards: Sequence[float | None], size: int) -> float:
    """The probability that `size` of these rewards hold at most one value; None is no value.

    Draws of one value and None, for each value; draws of None alone are in all of these, and are counted once.
    """
    counts = Counter(rewards)
    empty, all_draws = counts.pop(None, 0), math.comb(len(rewards), size)
    draws = sum(math.comb(count + empty, size) for count in counts.values())
    return (draws - (len(counts) - 1) * math.comb(empty, size)) / all_draws
