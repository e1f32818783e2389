"""Honest comparisons: intervals that cover, pairs that belong together, and what is left out."""

from __future__ import annotations

import math
import random
import sys
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from lib import show
from lib.paired import (
    RESAMPLES,
    PassAt,
    by_category,
    by_part,
    compare,
    interval,
    most_changed,
    paired,
    pass_at_k,
    row_rewards,
    summarize,
)


def record(
    row: object, reward: float | None, *, masked: bool = False, category: str | None = None, **parts: Any
) -> dict[str, Any]:
    return {
        "row": str(row), "category": category, "prompt": f"? {row}", "answer": f"{row}: {reward}", "reward": reward,
        "masked": masked, "parts": parts, "notes": {}, "stop": "done",
    }  # fmt: skip


def records(*rewards: float | None) -> list[dict[str, Any]]:
    return [record(i, reward) for i, reward in enumerate(rewards)]


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["normal", "skewed", "mostly zero"])
def test_the_interval_covers_the_true_gain_as_often_as_it_says(shape: str) -> None:
    rng = np.random.default_rng(1)
    draw = {
        "normal": lambda: rng.normal(0.1, 0.3, 80),
        "skewed": lambda: rng.exponential(0.1, 80),
        "mostly zero": lambda: rng.choice([0.0, 1.0, -1.0], 80, p=[0.7, 0.2, 0.1]),
    }[shape]
    experiments, covered = 200, 0
    for seed in range(experiments):
        low, high = interval(draw(), seed)
        covered += low <= 0.1 <= high
    # Four standard deviations of Binomial(200, 0.95), and 1 % because a percentile bootstrap of 80 rows is narrow.
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / experiments) - 0.01 <= covered / experiments <= 1.0


def test_the_interval_is_as_wide_as_theory_says() -> None:
    values = np.random.default_rng(0).normal(0, 1, 1000)
    low, high = interval(values)
    error = values.std(ddof=1) / math.sqrt(1000)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.05)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.1 * error)


def test_the_same_seed_gives_the_same_interval_and_another_hardly_differs() -> None:
    values = np.random.default_rng(0).normal(0, 1, 50)
    assert interval(values, 3) == interval(values, 3) != interval(values, 4)
    assert interval(values, 3) == pytest.approx(interval(values, 4), abs=0.05)


@pytest.mark.parametrize("rows", [1, 999, 5_000, 5_001, 40_000])
def test_resampling_in_blocks_draws_every_resample(rows: int) -> None:
    from lib.paired import _blocks

    assert sum(_blocks(rows)) == RESAMPLES and all(block * rows <= max(rows, 5_000_000) for block in _blocks(rows))


def test_pairing_takes_the_rows_own_difficulty_out() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.uniform(0, 1, 200)
    before, after = difficulty.tolist(), (difficulty + rng.normal(0.02, 0.02, 200)).tolist()
    gain = paired(before, after)
    assert gain.clear and gain.mean == pytest.approx(0.02, abs=0.005)
    unpaired = math.hypot(np.std(before), np.std(after)) / math.sqrt(200)
    assert gain.high - gain.low < unpaired / 5


# -- the smallest gain that can be shown ------------------------------------------------------------------------------


def test_a_gain_of_the_detectable_size_is_shown_four_times_in_five() -> None:
    rng = np.random.default_rng(2)
    rows, spread = 100, 0.4
    size = paired([0.0] * 2_000, rng.normal(0, spread, 2_000).tolist()).detectable * math.sqrt(2_000 / rows)
    assert size == pytest.approx(2.8 * spread / math.sqrt(rows), rel=0.05)
    shown = sum(paired([0.0] * rows, rng.normal(size, spread, rows).tolist(), seed).clear for seed in range(150))
    assert shown / 150 == pytest.approx(0.8, abs=4 * math.sqrt(0.8 * 0.2 / 150))


def test_no_gain_is_hardly_ever_shown() -> None:
    rng = np.random.default_rng(3)
    shown = sum(paired([0.0] * 100, rng.normal(0, 0.4, 100).tolist(), seed).clear for seed in range(150))
    assert shown / 150 <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 150)


# -- few rows ---------------------------------------------------------------------------------------------------------


def test_without_a_row_nothing_is_claimed() -> None:
    gain = paired([], [])
    assert (gain.n, gain.left_out) == (0, 0) and not gain.clear
    assert all(math.isnan(value) for value in (gain.mean, gain.low, gain.high, gain.detectable))
    assert compare(records(None), records(1.0)).n == 0


def test_one_row_has_a_mean_and_nothing_to_compare_it_with() -> None:
    gain = paired([0.25], [0.75])
    assert (gain.mean, gain.n) == (0.5, 1) and math.isnan(gain.detectable)


def test_one_row_shows_no_clear_gain() -> None:
    assert not paired([0.25], [0.75]).clear


def test_lists_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="2 rows before and 1 after: pair the same rows"):
        paired([0.1, 0.2], [0.3])


# -- pairs ------------------------------------------------------------------------------------------------------------


def test_rows_are_paired_by_their_id_whatever_their_order() -> None:
    before, after = records(0.1, 0.5, 0.9), records(0.2, 0.6, 1.0)
    gain = compare(before, reversed(after))
    assert gain.mean == pytest.approx(0.1) and gain.low == pytest.approx(0.1) and gain.high == pytest.approx(0.1)


def test_a_row_that_one_side_lacks_leaves_both_and_is_counted() -> None:
    before = [*records(0.1, 0.5, None, 0.2), record(4, 0.9, masked=True), record(5, None, masked=True)]
    after = [*records(0.2, None, 1.0, 0.4), record(4, 0.9), record(5, 0.9)]
    gain = compare(before, after)
    assert (gain.n, gain.left_out) == (2, 4) and gain.mean == pytest.approx(0.15)


def test_policies_that_answered_different_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="answered different rows: evaluate both on the same ones"):
        compare(records(0.1, 0.2), records(0.1))


def test_samples_of_a_row_are_averaged_before_rows_are_compared() -> None:
    before = [record("a", value) for value in (0.0, 1.0, 0.5, None)] + [record("b", 0.0)]
    after = [record("a", 0.6), record("b", 1.0), record("b", 0.0), record("b", None, masked=True)]
    assert row_rewards(before) == {"a": 0.5, "b": 0.0}
    gain = compare(before, after)
    assert gain.n == 2 and gain.mean == pytest.approx((0.1 + 0.5) / 2)


def test_parts_are_compared_like_rewards() -> None:
    before = [
        record(0, 0.5, regret=4.0),
        record(1, 0.5, regret=None),
        record(2, 0.5),
        record(3, None, masked=True, regret=9.0),
    ]
    after = [record(0, 0.5, regret=1.0), record(1, 0.5, regret=1.0), record(2, 0.5), record(3, 0.5, regret=0.0)]
    gain = compare(before, after, part="regret")
    assert (gain.mean, gain.n, gain.left_out) == (-3.0, 1, 3)


def test_each_category_is_compared_on_its_own_rows() -> None:
    before = [record(i, 0.5, category="even" if i % 2 == 0 else "odd") for i in range(10)] + [record(10, 0.5)]
    after = [record(i, 0.7 if i % 2 == 0 else 0.4, category="even" if i % 2 == 0 else "odd") for i in range(10)] + [
        record(10, 0.5)
    ]
    gains = by_category(before, after)
    assert list(gains) == ["even", "odd"]
    assert (gains["even"].n, gains["odd"].n) == (5, 5)
    assert gains["even"].mean == pytest.approx(0.2) and gains["odd"].mean == pytest.approx(-0.1)


def test_parts_that_are_shares_are_compared_and_those_of_single_rows_or_other_units_are_not() -> None:
    before = [record(i, 0.5, hurdles=0.0, regret=4.0, **{f"criterion/{i}": 1.0}) for i in range(6)]
    after = [record(i, 0.5, hurdles=0.5, regret=1.0, **{f"criterion/{i}": 0.0}) for i in range(6)]
    gains = by_part(before, after)
    assert {name: gain.mean for name, gain in gains.items()} == {"hurdles": 0.5}
    assert list(summarize("base", before).parts) == ["hurdles", "regret"]


def test_pass_at_k_is_the_share_of_draws_of_k_answers_that_hold_a_right_one() -> None:
    right = {"a": [1, 0, 0, 1], "b": [0, 0, 0, 0], "c": [1, 1, 1, 0]}
    answers = [record(row, solved, solved=float(solved)) for row, some in right.items() for solved in some]
    for k, found in pass_at_k(answers).items():
        draws = {row: [any(draw) for draw in combinations(some, k)] for row, some in right.items()}
        exact = sum(sum(hits) / len(hits) for hits in draws.values()) / len(right)
        assert found.mean == pytest.approx(exact) and found.low <= exact <= found.high and found.n == 3
    assert list(pass_at_k(answers)) == [1, 2, 4]


def test_an_unscored_answer_is_no_try_and_other_tasks_have_no_pass_at_k() -> None:
    answers = [record("a", 1.0, solved=1.0), record("a", None, solved=None), record("b", 0.0, solved=0.0)]
    assert {k: found.mean for k, found in pass_at_k(answers).items()} == {1: 0.5}
    assert pass_at_k([record("a", 0.5, regret=1.0)]) == {} and pass_at_k([]) == {}


def test_the_rows_are_the_same_for_every_k_though_some_tries_could_not_be_scored() -> None:
    easy = [record("easy", 1.0, solved=1.0)] * 4
    hard = [record("hard", 0.0, solved=0.0)] * 3 + [record("hard", None)]
    lost = [record("lost", None)] * 4
    found = pass_at_k([*easy, *hard, *lost])
    assert {k: (one.mean, one.n, one.short, one.left_out) for k, one in found.items()} == {
        1: (0.5, 2, 0, 1), 2: (0.5, 2, 0, 1), 4: (0.5, 2, 1, 1),
    }  # fmt: skip


def test_more_tries_never_solve_less() -> None:
    rng = random.Random(0)
    answers = [
        record(row, None if lost else 1.0, **({} if lost else {"solved": float(rng.random() < 0.3)}))
        for row in range(40)
        for lost in (rng.random() < 0.2 for _ in range(8))
    ]
    means = [one.mean for one in pass_at_k(answers).values()]
    assert means == sorted(means) and len(means) == 4


@pytest.mark.parametrize(("solved", "chance"), [(0.3, 0.0), (0.999, 0.0), (1.0, 1.0), (True, 1.0)])
def test_only_what_is_wholly_solved_is_solved(solved: float, chance: float) -> None:
    assert pass_at_k([record("a", 1.0, solved=solved)])[1].mean == chance


def test_pass_at_k_is_shown_with_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(sys.modules["lib.show.evaluation"], "table", lambda some, caption: lines.extend(some))
    show.pass_at_k({"m sampled": {1: PassAt(0.5, 0.0, 1.0, 2, 0, 0), 4: PassAt(0.5, 0.0, 1.0, 2, 1, 3)}})
    assert lines == [
        {
            "policy": "m sampled",
            "pass@1": "0.500 [0.000, 1.000] n=2",
            "pass@4": "0.500 [0.000, 1.000] n=2 (1 with fewer tries, 3 never scored)",
        }
    ]


# -- one policy -------------------------------------------------------------------------------------------------------


def test_unscored_answers_are_in_no_mean_and_masked_ones_only_in_that_with_invalid() -> None:
    found = summarize("base", [*records(1.0, 0.5, None), record(3, None, masked=True), record(4, 0.9, masked=True)])
    assert (found.policy, found.n, found.unscored) == ("base", 2, 1)
    assert found.reward == 0.75 and found.low == 0.5 and found.high == 1.0
    assert found.valid == 0.5  # two of the four that were judged
    assert found.reward_with_invalid == pytest.approx(1.5 / 4)


def test_an_invalid_answer_counts_as_the_lowest_reward_of_the_task() -> None:
    found = summarize("base", [*records(1.0), record(1, None, masked=True)], lowest=-1.0)
    assert found.reward_with_invalid == 0.0


def test_means_are_over_rows_not_answers() -> None:
    found = summarize("base", [record("a", 1.0)] * 9 + [record("b", 0.0)])
    assert (found.reward, found.n) == (0.5, 2)


def test_with_nothing_masked_both_means_are_the_same() -> None:
    found = summarize("base", [record("a", 1.0), record("a", 1.0), record("b", 0.0), record("b", None)])
    assert found.reward_with_invalid == found.reward == 0.5


def test_parts_are_averaged_over_the_rows_that_have_them() -> None:
    some = [
        record("a", 1.0, regret=2.0),
        record("a", 1.0, regret=4.0),
        record("b", 1.0, regret=None),
        record("c", None, masked=True, regret=9.0),
    ]
    assert summarize("base", some).parts == {"regret": 3.0}


def test_a_policy_without_a_single_scored_answer_has_no_mean() -> None:
    for some in ([], records(None, None), [record(0, None, masked=True)]):
        found = summarize("base", some)
        assert found.n == 0 and math.isnan(found.reward) and math.isnan(found.low)
    assert found.valid == 0.0 and found.reward_with_invalid == 0.0


# -- what changed most ------------------------------------------------------------------------------------------------


def test_the_largest_changes_come_first_both_ways() -> None:
    changed = most_changed(records(0.5, 0.5, 0.5, None, 0.5), records(0.6, 0.0, 1.0, 1.0, None), count=2)
    assert [(pair["row"], pair["change"]) for pair in changed] == [("1", -0.5), ("2", 0.5)]
    assert changed[0] == {"row": "1", "prompt": "? 1", "before": "1: 0.5", "after": "1: 0.0", "change": -0.5}


def test_rows_answered_several_times_change_by_their_means() -> None:
    before = [record(row, reward) for row in "ab" for reward in (0.0, 1.0)]
    after = [record(row, reward) for row in "ab" for reward in (0.5, 1.0)]
    assert [(pair["row"], pair["change"]) for pair in most_changed(before, after)] == [("a", 0.25), ("b", 0.25)]


def test_answers_of_different_rows_are_never_paired() -> None:
    before, after = records(0.0, 0.5, 1.0), records(0.0, 0.5, 1.0)
    random.Random(1).shuffle(after)
    assert [pair["change"] for pair in most_changed(before, after)] == [0.0, 0.0, 0.0]


def test_policies_may_have_answered_a_different_number_of_times() -> None:
    before = [record(row, 0.0) for row in "ab"]
    after = [record(row, reward) for row in "ab" for reward in (0.25, 0.75)]
    assert [pair["row"] for pair in most_changed(before, after)][:2] == ["a", "b"]


def test_masked_answers_are_no_change() -> None:
    assert most_changed([record(0, 0.0, masked=True)], [record(0, 1.0)]) == []
