"""Honest comparisons: the same rows under two policies, paired, with intervals.

Owns means over rows, bootstrap intervals, the smallest gain that n rows can show, and breakdowns. A record is one
scored answer: {row, category, answer, reward, masked, parts, ...}. Must not know models or files.

    python -c "from lib.paired import paired; print(paired([0.1, 0.2, 0.1], [0.3, 0.2, 0.4]))"
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.task import ROW_PART

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 5000
_POWER = 0.84 + 1.96
"""z for 80 % power plus z for a two-sided 5 % test: the smallest detectable gain in standard errors."""


class Gain(NamedTuple):
    """A paired difference `after - before` over rows that both sides scored."""

    mean: float
    low: float
    high: float
    """95 % bootstrap interval over rows."""
    n: int
    """Rows scored on both sides."""
    left_out: int
    """Rows unscored or masked on either side."""
    detectable: float
    """The smallest true gain that this n shows with 80 % power."""

    @property
    def clear(self) -> bool:
        """Whether the interval excludes zero; one row alone shows nothing."""
        return self.n > 1 and (self.low > 0 or self.high < 0)


class PassAt(NamedTuple):
    """The chance that one of k answers solves a row, averaged over rows."""

    mean: float
    low: float
    high: float
    """95 % bootstrap interval over rows."""
    n: int
    """Rows with an answer that was scored."""
    short: int
    """Rows among them with fewer than k such answers: each counts with as many as it has, which is too low if
    anything."""
    left_out: int
    """Rows without any."""


class Summary(NamedTuple):
    """One policy on the held-out rows. Unscored answers are in neither mean, masked ones in `reward_with_invalid`."""

    policy: str
    n: int
    reward: float
    low: float
    high: float
    valid: float
    """Share of judged answers that are valid: not masked, and by the task's own part `valid` where it has one."""
    reward_with_invalid: float
    """Mean with masked answers counted as the lowest reward."""
    unscored: int
    parts: dict[str, float]


def row_rewards(records: Iterable[Mapping[str, Any]], part: str = "reward") -> dict[str, float | None]:
    """One number per row: the mean over its samples of the reward, or of a part; None where nothing was scored."""
    values: dict[str, list[float]] = {}
    for record in records:
        value = record["reward"] if part == "reward" else record["parts"].get(part)
        kept = values.setdefault(record["row"], [])
        if value is not None and not record["masked"]:
            kept.append(value)
    return {row: sum(kept) / len(kept) if kept else None for row, kept in values.items()}


def compare(
    before: Iterable[Mapping[str, Any]], after: Iterable[Mapping[str, Any]], part: str = "reward", seed: int = 0
) -> Gain:
    """The paired gain between two policies' records on the rows that both scored."""
    first, second = row_rewards(before, part), row_rewards(after, part)
    if first.keys() != second.keys():
        raise ValueError("the two policies answered different rows: evaluate both on the same ones")
    pairs = [(a, second[row]) for row, a in first.items() if a is not None and second[row] is not None]
    gain = paired([a for a, _ in pairs], [b for _, b in pairs if b is not None], seed)
    return gain._replace(left_out=len(first) - len(pairs))


def paired(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Gain:
    """Mean difference of two equally long lists of row rewards, with its bootstrap interval over rows."""
    import numpy as np

    if len(before) != len(after):
        raise ValueError(f"{len(before)} rows before and {len(after)} after: pair the same rows")
    if not before:
        return Gain(math.nan, math.nan, math.nan, 0, 0, math.nan)
    difference = np.asarray(after, float) - np.asarray(before, float)
    low, high = interval(difference, seed)
    error = float(difference.std(ddof=1)) / math.sqrt(len(before)) if len(before) > 1 else math.nan
    return Gain(float(difference.mean()), low, high, len(before), 0, _POWER * error)


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean; values: (rows,)."""
    import numpy as np

    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [  # in blocks: 5,000 x 100,000 rows at once would not fit in memory
            values[rng.integers(0, len(values), (block, len(values)))].mean(1) for block in _blocks(len(values))
        ]
    )
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def summarize(policy: str, records: Sequence[Mapping[str, Any]], lowest: float = 0.0, seed: int = 0) -> Summary:
    """One policy's means over rows, with an interval, the valid share and the mean of every part."""
    import numpy as np

    rewards = [value for value in row_rewards(records).values() if value is not None]
    low, high = interval(np.asarray(rewards), seed) if rewards else (math.nan, math.nan)
    judged = [record for record in records if record["reward"] is not None or record["masked"]]
    counted = _by_row(judged, lambda record: lowest if record["masked"] else record["reward"])
    valid = _by_row(judged, lambda record: 0.0 if record["masked"] else record["parts"].get("valid", 1.0))
    parts = sorted({name for record in records for name in record["parts"] if not name.startswith(ROW_PART)})
    return Summary(
        policy=policy,
        n=len(rewards),
        reward=_mean(rewards),
        low=low,
        high=high,
        valid=_mean(list(valid.values())),
        reward_with_invalid=_mean(list(counted.values())),
        unscored=len(records) - len(judged),
        parts={name: _mean([v for v in row_rewards(records, name).values() if v is not None]) for name in parts},
    )


def pass_at_k(records: Iterable[Mapping[str, Any]], seed: int = 0) -> dict[int, PassAt]:
    """By k = 1, 2, 4, ... and the most that a row has: the chance that one of k answers solves a row, over rows.

    The unbiased estimate 1 - C(n - c, k) / C(n, k) of a row with c of n answers right (part `solved` at 1; Chen et al.
    2021, arXiv 2107.03374), averaged over rows. A masked answer solves nothing, an unscored one is no try. The rows are
    the same for every k: to leave out those with fewer than k tries would leave out the hard ones, where answers that
    could not be scored are long or late. {} where no answer has the part.
    """
    tries: dict[str, list[bool]] = {}
    named = False
    for record in records:
        solved = record["parts"].get("solved")
        named |= solved is not None
        kept = tries.setdefault(record["row"], [])
        if record["masked"] or (solved is not None and record["reward"] is not None):
            kept.append(solved is not None and solved >= 1 and not record["masked"])
    most = max(map(len, tries.values()), default=0) if named else 0
    counts = sorted({2**power for power in range(most.bit_length())} | {most}) if most else []
    return {k: _pass_at(tries, k, seed) for k in counts}


def _pass_at(tries: Mapping[str, Sequence[bool]], k: int, seed: int) -> PassAt:
    import numpy as np

    scored = [some for some in tries.values() if some]
    values = np.array([_chance(len(some), sum(some), min(k, len(some))) for some in scored])
    low, high = interval(values, seed)
    short = sum(len(some) < k for some in scored)
    return PassAt(float(values.mean()), low, high, len(scored), short, len(tries) - len(scored))


def _chance(tries: int, right: int, k: int) -> float:
    """That k tries, drawn without putting back, hold a right one."""
    return 1.0 - math.comb(tries - right, k) / math.comb(tries, k)


def by_category(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], seed: int = 0
) -> dict[str, Gain]:
    """The paired gain within every category of rows."""
    categories = sorted({str(record["category"]) for record in before if record["category"] is not None})
    return {
        name: compare(
            [r for r in before if str(r["category"]) == name],
            [r for r in after if str(r["category"]) == name],
            seed=seed,
        )
        for name in categories
    }


def by_part(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Gain]:
    """The paired gain of every part that is a share or a verdict (0 to 1); parts of single rows are left out."""
    if not before or not after:
        return {}
    values: dict[str, list[float]] = {}
    for record in [*before, *after]:
        for name, value in record["parts"].items():
            if value is not None and not name.startswith(ROW_PART):
                values.setdefault(name, []).append(value)
    shares = sorted(name for name, some in values.items() if min(some) >= 0 and max(some) <= 1)
    gains = {name: compare(before, after, name, seed) for name in shares}
    return {name: gain for name, gain in gains.items() if gain.n}


def most_changed(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]], count: int = 20
) -> list[dict[str, Any]]:
    """The rows whose reward changed most, both ways, largest change first, each with its first scored answers."""
    first, second = _scored(before), _scored(after)
    old, new = row_rewards(before), row_rewards(after)
    pairs = [
        {
            "row": row,
            "prompt": first[row]["prompt"],
            "before": first[row]["answer"],
            "after": second[row]["answer"],
            "change": (new[row] or 0.0) - (old[row] or 0.0),
        }
        for row in first
        if row in second
    ]
    return sorted(pairs, key=lambda pair: -abs(pair["change"]))[:count]


def _scored(records: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """The first scored record of every row that has one."""
    found: dict[str, Mapping[str, Any]] = {}
    for record in records:
        if record["reward"] is not None and not record["masked"]:
            found.setdefault(record["row"], record)
    return found


def _by_row(records: Iterable[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float]) -> dict[str, float]:
    """One number per row: the mean of `value` over its records."""
    values: dict[str, list[float]] = {}
    for record in records:
        values.setdefault(record["row"], []).append(value(record))
    return {row: _mean(some) for row, some in values.items()}


def _blocks(rows: int) -> list[int]:
    size = max(1, min(RESAMPLES, 5_000_000 // rows))
    full, rest = divmod(RESAMPLES, size)
    return [size] * full + ([rest] if rest else [])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
