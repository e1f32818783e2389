"""Group-relative advantages, and what noise in the rewards does to them.

Owns GRPO's normalisation as TRL does it, the gap between the advantages of two scorings of the same groups, and that
gap at other group sizes. Must not know judges, tasks or trainers.

    python -c "import numpy; from lib.meter.advantages import advantages; print(advantages(numpy.eye(3), 'group'))"
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np

Scaling = Literal["group", "batch", "none"]

_EPSILON = 1e-4  # TRL's


class Gap(NamedTuple):
    """How far the advantages of two scorings of the same groups lie apart: sums over answers."""

    squares: float
    """Squared differences."""
    flips: float
    """Answers that one scoring pushes up and the other down."""
    size: float
    """Answers compared."""
    power: float
    """Squared advantages, the mean of both scorings."""


NONE = Gap(0.0, 0.0, 0.0, 0.0)


def advantages(rewards: np.ndarray, scaling: Scaling, batch_std: float = 1.0) -> np.ndarray:
    """Advantages of rewards (..., group): centred in the group; over its standard deviation (n - 1), or the batch's."""
    import numpy as np

    centred = rewards - rewards.mean(-1, keepdims=True)
    if scaling == "none":
        return np.asarray(centred)
    std = rewards.std(-1, ddof=1, keepdims=True) if scaling == "group" else batch_std
    return np.asarray(centred / (std + _EPSILON))


def gaps(groups: Sequence[np.ndarray], scaling: Scaling) -> list[Gap]:
    """The gap of every group (answers, scorings), NaN = unscored: the mean over the pairs of its scorings.

    An answer that either scoring lacks leaves the pair. A pair in which both scorings are constant has no signal and
    teaches nothing: it is left out, and a group without any other has size 0.
    """
    import numpy as np

    found = []
    spread = _batch_std(np.concatenate(groups)) if groups and scaling == "batch" else 1.0
    for group in groups:
        pairs = [group[:, pair] for pair in itertools.combinations(range(group.shape[1]), 2)]
        known = [pair[~np.isnan(pair).any(1)] for pair in pairs]
        some = [_gap(pair.T[None], scaling, spread) for pair in known if len(pair) > 1]
        live = [gap for gap in some if gap.size] or [NONE]
        found.append(Gap(*(sum(values) / len(live) for values in zip(*live, strict=True))))
    return found


def simulated_gap(groups: Sequence[np.ndarray], size: int, scaling: Scaling, draws: int = 4000, seed: int = 0) -> Gap:
    """The gap to expect in groups of another size, drawn from the answers (answers, scorings) of every group.

    Each answer brings two scorings of its own, drawn apart from the others', so that its noise stays its own. Without
    replacement where the group has enough answers; otherwise with, and what answers differ by is stretched by
    sqrt(n / (n - 1)): drawn again and again, n answers lie closer together than new ones would.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    whole = [group[~np.isnan(group).any(1)] for group in groups]
    whole = [group for group in whole if len(group) > 1]
    drawn = [_draw(group, size, max(1, draws // len(whole)), rng) for group in whole]
    if not drawn:
        return NONE
    together = np.concatenate(drawn)
    return _gap(together, scaling, _batch_std(together.reshape(-1, 1)))


def rms(gap: Gap) -> float:
    """The root mean square difference of two scorings' advantages; NaN without a signal."""
    return math.sqrt(gap.squares / gap.size) if gap.size else math.nan


def _draw(group: np.ndarray, size: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Groups (draws, 2 scorings, size) from answers (answers, scorings)."""
    import numpy as np

    answers, scorings = group.shape
    if size <= answers:
        who = rng.random((draws, answers)).argsort(1)[:, :size]
    else:
        who = rng.integers(answers, size=(draws, size))
    first = rng.integers(scorings, size=who.shape)
    second = (first + rng.integers(1, scorings, size=who.shape)) % scorings
    pairs = np.stack([group[who, first], group[who, second]], axis=1)
    if size > answers:
        middle = pairs.mean(1, keepdims=True)
        pairs += (math.sqrt(answers / (answers - 1)) - 1) * (middle - group.mean())
    return pairs


def _gap(pairs: np.ndarray, scaling: Scaling, batch_std: float) -> Gap:
    """Of groups (groups, 2 scorings, answers), those with a signal in either scoring."""
    import numpy as np

    live = pairs[(np.ptp(pairs, axis=2) > 1e-9).any(1)]
    both = advantages(live, scaling, batch_std)
    squares = ((both[:, 0] - both[:, 1]) ** 2).sum()
    flips = (both[:, 0] * both[:, 1] < -1e-12).sum()
    return Gap(float(squares), float(flips), float(both[:, 0].size), float((both**2).sum() / 2))


def _batch_std(rewards: np.ndarray) -> float:
    """The standard deviation over all answers (answers, scorings), the mean over scorings that have one."""
    import numpy as np

    known = [column[~np.isnan(column)] for column in rewards.T]
    spreads = [float(column.std(ddof=1)) for column in known if len(column) > 1]
    return sum(spreads) / len(spreads) if spreads else 0.0
