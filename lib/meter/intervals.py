"""95 % intervals for few, clustered observations: verdicts of a handful of answers to a handful of rows.

Owns shares, balances, Cohen's kappa, root mean squares and correlations within groups. A cluster is what
was drawn together (an answer, a row). Must not know judges, tasks or files.

    python -c "from lib.meter.intervals import share; print(share([18, 20, 19], [20, 20, 20]))"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 4000
_Z = 1.96
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
"""97.5 % quantiles of Student's t for 1 to 10 degrees of freedom."""
_PRIOR = 0.5
"""Jeffreys' prior for a table's cell, in labels: without it a judge that never erred would have no interval at all."""


_ALIKE = 0.05
"""Correlation within clusters that is taken for granted: from so few clusters a smaller one cannot be told from it."""


class Estimate(NamedTuple):
    """A value and its 95 % interval; NaN where there is nothing to tell it from."""

    value: float
    low: float
    high: float


UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def share(hits: Sequence[float], sizes: Sequence[float]) -> Estimate:
    """A share over clusters of unequal size, `hits` of `sizes` in each; one cluster alone has no interval.

    Wilson's interval at the effective sample size (Korn & Graubard 1998): the design effect shrinks that, and so does
    Student's t for few clusters. It holds at shares of 0 and 1, where a percentile bootstrap has no width at all.
    """
    total = sum(sizes)
    if not total:
        return UNKNOWN
    value = min(1.0, sum(hits) / total)
    if len(sizes) < 2:
        return Estimate(value, math.nan, math.nan)
    simple = value * (1 - value) / total
    design = 1 + _ALIKE * (sum(size * size for size in sizes) / total - 1)
    design = max(design, _ratio_variance(hits, sizes, value) / simple) if simple else design
    n = total / design * (_Z / _quantile(len(sizes) - 1)) ** 2
    centre = (value + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(value * (1 - value) / n + _Z**2 / (4 * n * n))
    return Estimate(value, max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half)))


def balance(sums: Sequence[float], squares: Sequence[float], sizes: Sequence[float]) -> Estimate:
    """The mean of values from -1 to 1 that are mostly 0 (changes for and against), from sums by cluster.

    Student's t over clusters, and no narrower than independent values would make it, one more change counted.
    """
    total, clusters = sum(sizes), len(sizes)
    if not total:
        return UNKNOWN
    value = sum(sums) / total
    if clusters < 2:
        return Estimate(value, math.nan, math.nan)
    variance = max(_ratio_variance(sums, sizes, value), (sum(squares) + 1) / total**2)
    half = _quantile(clusters - 1) * math.sqrt(variance)
    return Estimate(value, max(-1.0, value - half), min(1.0, value + half))


def root_mean_square(squares: Sequence[float], sizes: Sequence[float], unrelated: float) -> Estimate:
    """The root of the mean square over clusters, `squares` being the sum of `sizes` squares in each.

    The mean square is skewed: its interval is taken on the log scale, with Student's t. What is rare and large is often
    not in the clusters seen, so the upper end also counts half a cluster more whose mean square is `unrelated`, that of
    two measurements with nothing in common.
    """
    total, clusters = sum(sizes), len(sizes)
    if not total:
        return UNKNOWN
    mean = sum(squares) / total
    if clusters < 2:
        return Estimate(math.sqrt(mean), math.nan, math.nan)
    more = 0.5 * total / clusters
    seen, counted = [*squares, more * unrelated], [*sizes, more]
    rare = sum(seen) / sum(counted)
    high = rare + _quantile(clusters) * math.sqrt(_ratio_variance(seen, counted, rare))
    if not mean:
        return Estimate(0.0, 0.0, math.sqrt(high))
    relative = _quantile(clusters - 1) * math.sqrt(_ratio_variance(squares, sizes, mean)) / mean
    factor = math.exp(min(20.0, relative))
    high = max(mean, min(max(high, mean * factor), 2 * unrelated))  # twice: every pair as far apart as it can be
    return Estimate(math.sqrt(mean), math.sqrt(mean / factor), math.sqrt(high))


def kappa(tables: Sequence[Sequence[Sequence[float]]], seed: int = 0) -> Estimate:
    """Cohen's kappa of 2 x 2 tables of counts [first rater][second rater], one table a cluster.

    The interval is a Bayesian bootstrap over clusters (Rubin 1981) with Jeffreys' prior in the four cells: the
    percentile bootstrap covers kappas near 1 in half of all cases only, because judges that erred once in 30 labels
    often show no error in them. NaN where both raters say the same of everything.
    """
    import numpy as np

    counts = np.asarray(tables, float).reshape(-1, 2, 2)
    value = float(_kappa(counts.sum(0))) if len(counts) else math.nan
    if math.isnan(value) or len(counts) < 3:
        return Estimate(value, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    shape = _shape(len(counts))
    drawn = np.tensordot(rng.gamma(shape, 1, (RESAMPLES, len(counts))), counts, 1)
    drawn += shape * rng.gamma(_PRIOR, 1, (RESAMPLES, 2, 2))
    low, high = np.nanpercentile(_kappa(drawn), [2.5, 97.5])
    return Estimate(value, min(value, float(low)), max(value, float(high)))


def correlation_within(groups: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Estimate:
    """Spearman's correlation of two quantities within groups: ranks in each group, centred, then pooled.

    Groups in which either is constant say nothing and are left out. The interval is linearised over groups, on
    Fisher's scale, with Student's t.
    """
    import numpy as np

    sums = np.array([[x @ y, x @ x, y @ y] for x, y in _ranked(groups)])
    if len(sums) < 3:
        return UNKNOWN
    xy, xx, yy = sums.sum(0)
    value = float(xy / math.sqrt(xx * yy))
    if abs(value) > 1 - 1e-9:
        return Estimate(value, math.nan, math.nan)
    errors = sums[:, 0] / math.sqrt(xx * yy) - value * (sums[:, 1] / (2 * xx) + sums[:, 2] / (2 * yy))
    error = math.sqrt(len(sums) / (len(sums) - 1) * float(errors @ errors)) / (1 - value**2)
    middle, half = math.atanh(value), _quantile(len(sums) - 1) * error
    return Estimate(value, math.tanh(middle - half), math.tanh(middle + half))


def chance_within(
    groups: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int = 0, shuffles: int = 1000
) -> tuple[float, float]:
    """Between which two values that correlation lies in 95 % of the shuffles within groups: what chance alone gives."""
    import numpy as np

    ranked = _ranked(groups)
    if len(ranked) < 3:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    xy = sum(rng.permuted(np.tile(x, (shuffles, 1)), axis=1) @ y for x, y in ranked)
    scale = math.sqrt(sum(x @ x for x, _ in ranked) * sum(y @ y for _, y in ranked))
    low, high = np.percentile(xy / scale, [2.5, 97.5])
    return float(low), float(high)


def _ratio_variance(sums: Sequence[float], sizes: Sequence[float], ratio: float) -> float:
    """The variance of sum(sums) / sum(sizes) over clusters, linearised."""
    clusters = len(sizes)
    errors = math.fsum((one - ratio * size) ** 2 for one, size in zip(sums, sizes, strict=True))
    return clusters / (clusters - 1) * errors / sum(sizes) ** 2


def _quantile(freedom: int) -> float:
    """Student's t at 97.5 %; beyond the table by its expansion in 1 / freedom (good to 0.003)."""
    return _T[freedom - 1] if freedom <= len(_T) else _Z + 2.372 / freedom + 2.823 / freedom**2


def _shape(clusters: int) -> float:
    """The shape of the bootstrap's gamma weights that gives the variance of n clusters its (n - 1) denominator."""
    return max(0.25, (clusters - 2) / clusters)


def _kappa(tables: np.ndarray) -> np.ndarray:
    """Cohen's kappa of tables (..., 2, 2); NaN where chance alone would agree on everything."""
    import numpy as np

    total = tables.sum((-1, -2))
    observed = (tables[..., 0, 0] + tables[..., 1, 1]) / total
    chance = (tables.sum(-1) * tables.sum(-2)).sum(-1) / total**2
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(chance < 1, (observed - chance) / (1 - chance), np.nan)


def _ranked(groups: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Centred ranks of both quantities in every group where both vary."""
    return [(_ranks(x), _ranks(y)) for x, y in groups if len(x) > 1 and min(x) < max(x) and min(y) < max(y)]


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks about their mean; equal values share theirs."""
    import numpy as np

    _, place, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
    shared = np.cumsum(counts) - (counts + 1) / 2
    return np.asarray(shared[place] - (len(values) - 1) / 2)
