"""Is the judge meter right? Simulated judges whose faults are known, measured by it again and again.

For kappa, repeatability, position bias, reward noise, advantage error and sign flips: the mean error of the estimate
and how often the 95 % interval holds the truth; the noise simulated for other group sizes against groups of that size;
and how many hand labels kappa needs for ±0.1. Judges differ in where their doubt sits: anywhere, in certain criteria,
in certain rows. Rows are new in every experiment, as they are when a result is meant for more than those looked at.

    python benchmarks/meter.py               # five minutes
    python benchmarks/meter.py --experiments 1000
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lib.ledger import Verdict
from lib.meter import kappa
from lib.meter.advantages import gaps, simulated_gap
from lib.meter.intervals import Estimate, chance_within, correlation_within
from lib.meter.readings import (
    Asked,
    Group,
    Reading,
    advantage_error,
    position_bias,
    repeatability,
    reward_noise,
    reward_repeatability,
    rewards,
    sign_flips,
)

ASKS, CRITERIA = 3, 8
PASS, FAIL = Verdict("pass", 1.0, attempts=1), Verdict("fail", 0.0, attempts=1)
MEAN_BAR, WORST_BAR = 0.93, 0.75
"""Coverage that is asked of an interval that says 95 %: over all judges, and of the worst one. That one is in doubt
about 30 % of the rows as a whole, and in a quarter of the cases about none of the four rows seen: nothing shows it."""


class Judge(NamedTuple):
    """Where a judge is in doubt (cell, criterion, row), how often, and how far the order of the criteria moves it."""

    doubt: str
    share: float
    order: float = 0.0


JUDGES = [
    Judge(doubt, share, order) for doubt in ("cell", "criterion", "row") for share, order in ((0.05, 0.0), (0.3, 0.1))
]


def group_of(judge: Judge, size: int, rng: np.random.Generator) -> Group:
    """`size` answers to a new row, judged ASKS times and once in reverse order. The first criterion is a hurdle."""
    shape = {"cell": (size, CRITERIA), "criterion": (1, CRITERIA), "row": (1, 1)}[judge.doubt]
    doubtful = np.broadcast_to(rng.random(shape) < judge.share, (size, CRITERIA))
    quality = rng.beta(2, 2)
    clear = (rng.random((size, CRITERIA)) < quality).astype(float)
    chance = np.where(doubtful, rng.uniform(0.2, 0.8, (size, CRITERIA)), clear)
    chance[:, 0] = np.where(rng.random(size) < 0.5, 1.0, chance[:, 0])
    turned = chance + np.where(rng.random((size, CRITERIA)) < judge.order, 1 - 2 * chance, 0)
    passed = rng.random((ASKS, size, CRITERIA)) < chance
    reverse = rng.random((size, CRITERIA)) < turned
    return [
        Asked("", "", [_verdicts(ask[i]) for ask in passed], _verdicts(reverse[i]), [_reward(ask[i]) for ask in passed])
        for i in range(size)
    ]


def _verdicts(passed: np.ndarray) -> dict[str, Verdict]:
    return {str(number): PASS if one else FAIL for number, one in enumerate(passed)}


def _reward(passed: np.ndarray) -> float:
    return float(passed.mean()) if passed[0] else 0.0


FIGURES: dict[str, Callable[[Sequence[Group]], Reading]] = {
    "repeatability": lambda groups: repeatability(groups, ASKS),
    "reward repeatability": lambda groups: reward_repeatability(groups, ASKS),
    "reward noise": reward_noise,
    "position bias": position_bias,
    "advantage error": lambda groups: advantage_error(gaps(rewards(groups), "group")),
    "sign flips": lambda groups: sign_flips(gaps(rewards(groups), "group")),
}


class Result(NamedTuple):
    """Over many experiments: how far the estimates were off on average, and how often the interval held the truth."""

    name: str
    truth: float
    bias: float
    held: float
    width: float


def result_of(name: str, truth: float, found: Sequence[Estimate | Reading]) -> Result | None:
    """None where too few experiments had anything to tell it from."""
    told = [one for one in found if not math.isnan(one.low)]
    if len(told) < len(found) / 2:
        return None
    bias = statistics.mean(one.value for one in told) - truth
    held = statistics.mean(one.low <= truth <= one.high for one in told)
    return Result(name, truth, bias, held, statistics.median(one.high - one.low for one in told))


def judge_results(rows: int, size: int, experiments: int) -> Iterator[Result]:
    """Every figure for every judge, from `rows` groups of `size` answers."""
    for number, judge in enumerate(JUDGES):
        rng = np.random.default_rng(number)
        everything = [group_of(judge, size, rng) for _ in range(3000)]
        samples = [[group_of(judge, size, rng) for _ in range(rows)] for _ in range(experiments)]
        for name, figure in FIGURES.items():
            found = result_of(f"{name}, {judge}", figure(everything).value, [figure(groups) for groups in samples])
            if found:
                yield found


def kappa_results(experiments: int) -> Iterator[Result]:
    """Kappa from 30 to 180 labels, 1 or 3 of an answer, of judges that err more on some answers than on others."""
    judges = [(0.5, 0.9, 0.9), (0.5, 0.8, 0.7), (0.8, 0.95, 0.8), (0.5, 0.97, 0.97), (0.7, 0.95, 0.9)]
    for answers, each in ((30, 1), (50, 1), (10, 3), (17, 3), (60, 3)):
        for number, (passing, right_pass, right_fail) in enumerate(judges):
            rng = np.random.default_rng(number)
            truth = true_kappa(passing, right_pass, right_fail)
            found = [kappa(*labels_of(passing, right_pass, right_fail, answers, each, rng)) for _ in range(experiments)]
            name = f"{answers * each} labels of {answers} answers, {passing:.0%} pass"
            if result := result_of(name, truth, found):
                yield result


def true_kappa(passing: float, right_pass: float, right_fail: float) -> float:
    says = passing * right_pass + (1 - passing) * (1 - right_fail)
    same = passing * right_pass + (1 - passing) * right_fail
    chance = passing * says + (1 - passing) * (1 - says)
    return (same - chance) / (1 - chance)


def labels_of(
    passing: float, right_pass: float, right_fail: float, answers: int, each: int, rng: np.random.Generator
) -> tuple[list[tuple[bool, bool]], list[int]]:
    """(label, judge) pairs and their answers. With several an answer, quality and errors go together in an answer."""

    def spread(mean: float) -> np.ndarray:
        return rng.beta(4 * mean, 4 * (1 - mean), (answers, 1)) if each > 1 else np.full((answers, 1), mean)

    label = rng.random((answers, each)) < spread(passing)
    right = np.where(label, spread(right_pass), spread(right_fail))
    judge = label ^ (rng.random((answers, each)) >= right)
    place = np.repeat(np.arange(answers), each).tolist()
    return list(zip(label.ravel().tolist(), judge.ravel().tolist(), strict=True)), place


def length_results(experiments: int) -> Iterator[tuple[str, float, float]]:
    """(judge, true correlation, how often it is called beyond chance) for judges that do and do not reward length."""
    for weight in (0.0, 0.3, 0.6):
        rng = np.random.default_rng(0)
        truth = correlation_within(list(length_groups(weight, 3000, rng))).value
        called = []
        for number in range(experiments):
            groups = list(length_groups(weight, 32, rng))
            low, high = chance_within(groups, number, 400)
            called.append(not low <= correlation_within(groups).value <= high)
        yield f"length weighs {weight}", truth, statistics.mean(called)


def length_groups(weight: float, groups: int, rng: np.random.Generator) -> Iterator[tuple[list[float], list[float]]]:
    for _ in range(groups):
        length = rng.lognormal(6, 0.4, 5)
        reward = weight * (np.log(length) - 6) / 0.4 + math.sqrt(1 - weight**2) * rng.normal(size=5)
        yield length.tolist(), np.round(reward, 1).tolist()


def labels_needed(passing: float, right: float, experiments: int) -> int:
    """The fewest labels, of different answers, whose interval for kappa is ±0.1 in the median."""
    for count in (50, 75, 100, 150, 200, 250, 300, 400, 500, 700, 1000):
        rng = np.random.default_rng(count)
        found = [kappa(*labels_of(passing, right, right, count, 1, rng)) for _ in range(experiments)]
        if statistics.median(one.high - one.low for one in found) <= 0.2:
            return count
    return 0


def size_errors() -> Iterator[tuple[str, float, float]]:
    """(judge and size, true advantage error, mean of those simulated from 4 groups of 5 answers)."""
    for number, judge in enumerate(JUDGES):
        rng = np.random.default_rng(number)
        samples = [rewards([group_of(judge, 5, rng) for _ in range(4)]) for _ in range(60)]
        for size in (4, 8, 16):
            groups = rewards([group_of(judge, size, rng) for _ in range(1000)])
            found = [simulated_gap(sample, size, "group", 400) for sample in samples]
            squares, sizes = sum(gap.squares for gap in found), sum(gap.size for gap in found)
            whole = gaps(groups, "group")
            truth = math.sqrt(sum(gap.squares for gap in whole) / sum(gap.size for gap in whole))
            yield f"{judge}, group of {size}", truth, math.sqrt(squares / sizes)


def show(title: str, results: Sequence[Result]) -> list[str]:
    """Print a block of results; returns what misses its bar."""
    print(f"\n{title:66} truth    bias  held  median width")
    for one in results:
        print(f"{one.name:66}{one.truth:6.3f}{one.bias:+8.3f}{one.held:6.0%}{one.width:8.3f}", flush=True)
    mean, worst = statistics.mean(one.held for one in results), min(one.held for one in results)
    print(f"{'mean and worst coverage':66}{mean:20.1%}{worst:7.1%}")
    return [f"{title}: {mean:.1%}, worst {worst:.1%}"] if mean < MEAN_BAR or worst < WORST_BAR else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiments", type=int, default=200)
    n = parser.parse_args().experiments
    missed = show("kappa", list(kappa_results(n)))
    for rows, size in ((4, 5), (10, 2), (3, 8)):
        missed += show(f"figures from {rows} groups of {size}", list(judge_results(rows, size, n)))
    print("\nlabels for kappa ±0.1 (median), one of each answer: share that passes, judge right, kappa, labels")
    for passing, right in ((0.5, 0.7), (0.5, 0.8), (0.5, 0.9), (0.5, 0.95), (0.8, 0.9)):
        needed = labels_needed(passing, right, 40) or "over 1000"
        print(f"  {passing:.0%}  {right:.0%}  {true_kappa(passing, right, right):.2f}  {needed}")
    print("\nlength, 32 groups of 5: true correlation, called beyond chance")
    for name, truth, called in length_results(n):
        print(f"  {name}  {truth:+.2f}  {called:.0%}")
        if not truth and called > 0.1:
            missed.append(f"length: {called:.0%} false alarms")
    print("\nadvantage error at other group sizes: truth, simulated from 4 groups of 5")
    for name, truth, simulated in size_errors():
        print(f"  {name:66}{truth:7.3f}{simulated:8.3f}")
        if abs(simulated / truth - 1) > 0.25:
            missed.append(f"{name}: {simulated:.3f} for {truth:.3f}")
    print(f"\nverdict: {'FAIL: ' + '; '.join(missed) if missed else 'PASS'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
