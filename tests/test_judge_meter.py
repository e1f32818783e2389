"""The judge meter: what it counts, what it leaves out, the sheet that people fill in, and how it is shown."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from judge_server import running_judge

from lib import meter
from lib.config import load_config
from lib.ledger import Verdict, hash_text
from lib.meter import JudgeMeter, kappa, label_sheet, labels, measure
from lib.meter.advantages import Gap, advantages, gaps, rms, simulated_gap
from lib.meter.intervals import balance, chance_within, correlation_within, root_mean_square, share
from lib.meter.labels import COLUMNS, Judged, read_sheet, set_labels
from lib.meter.readings import Asked, reward_noise
from lib.rollout import submit
from lib.runfolder import Run, open_run, plain
from lib.show.labels import LabelForm
from lib.show.labels import label_sheet as show_sheet
from lib.show.meter import meter as show_meter
from lib.task import Rollout, Row, Score, Task, TaskError, load_task

SIZE = 4


class Criterion(NamedTuple):
    id: str
    text: str


class Spelling(Task, frozen=True):
    """A judged task whose judge can be told how to err. It passes criterion cN when the answer holds the letter N."""

    noise: float = 0.0
    """Chance that an ask turns a verdict over."""
    order: float = 0.0
    """Chance that the reversed order turns a verdict over."""
    lost: float = 0.0
    """Chance that an ask brings no verdict."""
    price: float | None = 0.001
    """Dollars a verdict."""
    letters: str = "abcdef"
    log: str = ""
    """A file that every ask is written to."""

    def criteria(self, row: Row) -> list[Criterion]:
        return [Criterion(f"c{letter}", f"Holds the letter {letter}") for letter in self.letters]

    async def verdicts(self, rollout: Rollout, ask: int = 0, reverse: bool = False) -> dict[str, Verdict]:
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(f"{rollout.text} {ask} {reverse}\n")
        if not rollout.text:
            return {one.id: Verdict("fail", 0.0) for one in self.criteria(rollout.row)}
        return {one.id: self._verdict(rollout, one.id, ask, reverse) for one in self.criteria(rollout.row)}

    def _verdict(self, rollout: Rollout, criterion: str, ask: int, reverse: bool) -> Verdict:
        chance = random.Random(repr((rollout.row["id"], rollout.text, criterion, ask, reverse)))
        if chance.random() < self.lost:
            return Verdict("unknown", None, "judge: HTTP 503 after 5 attempts", attempts=5)
        passes = criterion[1] in rollout.text
        passes ^= chance.random() < self.noise
        passes ^= reverse and chance.random() < self.order
        return Verdict("pass" if passes else "fail", float(passes), "so it seems", usd=self.price, attempts=1)

    def reward_of(self, row: Row, verdicts: Mapping[str, Verdict]) -> Score:
        if any(one.verdict == "unknown" for one in verdicts.values()):
            return Score(reward=None, notes={"error": "unknown"})
        return Score(reward=sum(one.verdict == "pass" for one in verdicts.values()) / len(verdicts))

    async def score(self, rollout: Rollout) -> Score:
        return self.reward_of(rollout.row, await self.verdicts(rollout))


class Plain(Task, frozen=True):
    """A task without a judge."""


def make_rows(count: int) -> list[Row]:
    return [{"id": f"r{n}", "prompt": [{"role": "user", "content": f"Spell {n}"}]} for n in range(count)]


def make_run(folder: Path, rows: Sequence[Row], **overrides: Any) -> Run:
    values = {"training.group_size": SIZE, "training.batch": SIZE, "paths.outputs": str(folder), **overrides}
    run = open_run("metered", load_config("configs/smoke/decisions.yaml", values))
    run.write_rows("train", rows)
    return run


def answer(row: Row, text: str, reward: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "row": row["id"], "category": None, "prompt": row["prompt"][-1]["content"], "answer": text, "reward": reward,
        "masked": False, "parts": {}, "notes": {}, "stop": "done", **changes,
    }  # fmt: skip


def make_answers(task: Spelling, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A group for every row; each answer holds some of the letters, and a word of its own."""
    chance = random.Random(0)
    found = []
    for row in rows:
        for number in range(SIZE):
            text = "".join(letter for letter in task.letters if chance.random() < 0.5) + f" {number}"
            found.append(answer(row, text, submit(task.score(Rollout.of(row, text))).result().reward))
    return found


@pytest.fixture(autouse=True)
def fresh_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_run names its run in the environment, for scoring; here it must not reach other tests."""
    monkeypatch.setenv("WORKBENCH_RUN", "")


def measured(folder: Path, task: Spelling, count: int = 12, **options: Any) -> JudgeMeter:
    rows = make_rows(count)
    run = make_run(folder, rows)
    found = measure(run.config, task, make_answers(task, rows), run, **options)
    assert found is not None
    return found


# -- what is measured --------------------------------------------------------------------------------------------------


def test_a_judge_that_repeats_itself_has_no_noise(tmp_path: Path) -> None:
    found = measured(tmp_path, Spelling())
    assert (found.repeatability.value, found.reward_repeatability.value) == (1.0, 1.0)
    assert (found.reward_noise.value, found.advantage_error.value, found.sign_flips.value) == (0.0, 0.0, 0.0)
    assert found.position_bias.value == 0.0 and found.unknown == {}
    assert found.repeatability.n == 20 * 6 and found.repeatability.low < 1  # 20 answers prove no certainty
    assert all(value == (0.0, 0.0) for value in found.by_group_size.values())


def test_noise_shows_in_verdicts_rewards_and_advantages(tmp_path: Path) -> None:
    found = measured(tmp_path, Spelling(noise=0.1), items=48, asks=2)
    assert found.repeatability.value == pytest.approx(0.9**2 + 0.1**2, abs=0.07)
    assert found.reward_noise.value == pytest.approx(math.sqrt(6 * 0.09) / 6, rel=0.25)
    assert found.reward_repeatability.value < found.repeatability.value < 1
    assert 0.2 < found.advantage_error.value < 1.2 and found.sign_flips.value > 0
    assert found.advantage_error.low < found.advantage_error.value < found.advantage_error.high
    assert abs(found.position_bias.value) < 0.1  # the order changes nothing that asking again does not


def test_noise_in_groups_whose_first_ask_was_all_equal_has_an_upper_end_above_it() -> None:
    def told(*rewards: float) -> Asked:
        return Asked("r", str(rewards), [{"c": Verdict("fail", 0.0, attempts=1)}] * 3, None, list(rewards))

    quiet = [[told(0.0, 0.0, 0.0) for _ in range(5)] for _ in range(3)]
    found = reward_noise([[told(0.0, 0.0, 0.6), *quiet[0][1:]], *quiet[1:]])
    assert found.low < found.value < found.high
    assert "differ by 0.000" not in found.meaning  # that one answer's noise is a difference within its group


def test_an_order_that_sways_the_judge_is_told_from_its_noise(tmp_path: Path) -> None:
    found = measured(tmp_path, Spelling(noise=0.02, order=0.4), items=48)
    assert found.position_bias.value == pytest.approx(0.4, abs=0.1) and found.position_bias.low > 0
    assert found.repeatability.value > 0.9


def test_one_criterion_has_no_order_and_is_not_asked_about_in_reverse(tmp_path: Path) -> None:
    log = tmp_path / "asks.txt"
    found = measured(tmp_path, Spelling(letters="a", log=str(log)))
    assert found.position_bias.n == 0 and math.isnan(found.position_bias.value)
    assert "True" not in log.read_text()


def test_unknown_verdicts_are_counted_with_their_causes_and_are_in_no_figure(tmp_path: Path) -> None:
    found = measured(tmp_path, Spelling(lost=0.2), items=48)
    (cause, count) = next(iter(found.unknown.items()))
    assert cause == "judge: HTTP 503 after 5 attempts" and count == pytest.approx(48 * 6 * 4 * 0.2, rel=0.2)
    assert found.repeatability.value == 1.0  # a lost verdict is not a changed one
    assert found.repeatability.n == pytest.approx(48 * 6 * 0.8**3, rel=0.25)
    assert found.reward_noise.value == 0.0 and found.advantage_error.value in (
        0.0,
        pytest.approx(math.nan, nan_ok=True),
    )


def test_a_judge_that_is_gone_gives_no_figures(tmp_path: Path) -> None:
    found = measured(tmp_path, Spelling(lost=1.0))
    assert all(math.isnan(one.value) and one.n == 0 for one in found.readings)
    assert sum(found.unknown.values()) == 20 * 6 * 4


def test_a_task_without_a_judge_has_no_meter_and_no_sheet(tmp_path: Path) -> None:
    run = make_run(tmp_path, make_rows(2))
    assert measure(run.config, Plain(), [], run) is None and label_sheet(run, Plain(), []) is None
    assert not isinstance(Plain(), Judged) and isinstance(Spelling(), Judged)


def test_fewer_than_two_asks_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path, make_rows(2))
    with pytest.raises(ValueError, match="asks=1: repeatability needs at least 2"):
        measure(run.config, Spelling(), [], run, asks=1)


def test_about_as_many_answers_are_asked_again_as_was_said_in_whole_groups(tmp_path: Path) -> None:
    log = tmp_path / "asks.txt"
    rows = make_rows(12)
    run = make_run(tmp_path, rows)
    answers = make_answers(Spelling(), rows)
    measure(run.config, Spelling(log=str(log)), answers, run, items=9, asks=3)
    asks = log.read_text().splitlines()
    assert len(asks) == 12 * 4  # three groups of four; three asks and one in reverse
    assert sum(line.endswith("True") for line in asks) == 12


def test_equal_answers_of_a_group_are_asked_about_once_and_count_as_often_as_given(tmp_path: Path) -> None:
    rows, log = make_rows(3), tmp_path / "asks.txt"
    task = Spelling(log=str(log))
    run = make_run(tmp_path, rows)
    answers = [answer(row, text, 0.5) for row in rows for text in ("abc", "abc", "a", "")]
    found = measure(run.config, task, answers, run, asks=2)
    assert found is not None and len(log.read_text().splitlines()) == 3 * 3 * 3
    assert (
        found.repeatability.n == found.position_bias.n == 3 * 2 * 6
    )  # "" is decided without a call: that it repeats says nothing
    assert found.advantage_error.n == 3


def test_what_asking_again_cost_is_known_only_where_the_price_is(tmp_path: Path) -> None:
    assert measured(tmp_path / "a", Spelling(), asks=2).usd == pytest.approx(20 * 6 * 2 * 0.001)
    assert measured(tmp_path / "b", Spelling(price=None), asks=2).usd is None
    assert measured(tmp_path / "c", Spelling(lost=0.5), asks=2).usd == pytest.approx(0.12, rel=0.3)  # of what is known


def test_the_meter_is_a_json_record_and_what_was_measured_is_in_the_runs_log(tmp_path: Path) -> None:
    found = measured(tmp_path, Spelling(noise=0.1))
    lines = [line for line in (tmp_path / "metered" / "log.txt").read_text().splitlines() if "judge meter:" in line]
    assert len(found.readings) == 8 and len(lines) == 7 and not any("nan" in line for line in lines)  # no labels
    record = json.loads(json.dumps(plain(found.as_json()), allow_nan=False))
    assert record["repeatability"]["value"] == found.repeatability.value
    assert list(record["by_group_size"]) == ["4", "6", "8", "12", "16"]


# -- length ------------------------------------------------------------------------------------------------------------


def length_of(rewards_by_length: Mapping[int, float | None], folder: Path, **changes: Any) -> meter.Reading:
    rows = make_rows(10)
    run = make_run(folder, rows)
    answers = [answer(row, "a" * n, r, **changes) for row in rows for n, r in rewards_by_length.items()]
    found = measure(run.config, Spelling(), answers, run, items=4, asks=2)
    assert found is not None
    return found.length_bias


def test_a_reward_that_grows_with_length_is_beyond_chance(tmp_path: Path) -> None:
    found = length_of({10: 0.1, 20: 0.4, 30: 0.3, 40: 0.9}, tmp_path)
    assert found.value == pytest.approx(0.8) and found.n == 40
    assert "beyond what shuffled groups give" in found.meaning and "longer answers may be better" in found.meaning


def test_cut_off_masked_and_unscored_answers_say_nothing_about_length(tmp_path: Path) -> None:
    assert length_of({10: 0.1, 20: None, 30: 0.9}, tmp_path / "a").n == 20
    assert math.isnan(length_of({10: 0.1, 20: 0.9}, tmp_path / "b", masked=True).value)
    assert length_of({10: 0.1, 20: 0.9}, tmp_path / "c", stop="length").n == 0


def test_shuffled_lengths_are_rarely_called_a_bias() -> None:
    rng = np.random.default_rng(0)
    outside = 0
    for seed in range(100):
        groups = [(rng.normal(size=5).tolist(), rng.normal(size=5).round(1).tolist()) for _ in range(20)]
        low, high = chance_within(groups, seed, 300)
        outside += not low <= correlation_within(groups).value <= high
    assert outside <= 5 + 4 * math.sqrt(100 * 0.05 * 0.95)


def test_differences_between_groups_are_no_correlation_within_them() -> None:
    groups = [([n, n + 1, n], [10.0 * n, 10.0 * n, 10.0 * n + 1]) for n in range(8)]
    assert correlation_within(groups).value == pytest.approx(-0.5)
    assert math.isnan(correlation_within([([1, 1], [0, 1]), ([0, 1], [1, 1])]).value)


# -- advantages --------------------------------------------------------------------------------------------------------


def test_advantages_are_those_of_trl() -> None:
    rewards = np.array([[0.0, 0.5, 1.0, 0.5], [1.0, 1.0, 1.0, 1.0]])
    centred = np.array([-0.5, 0.0, 0.5, 0.0])
    assert advantages(rewards, "none")[0] == pytest.approx(centred)
    assert advantages(rewards, "group")[0] == pytest.approx(centred / (np.std([0, 0.5, 1, 0.5], ddof=1) + 1e-4))
    assert advantages(rewards, "batch", 0.4)[0] == pytest.approx(centred / (0.4 + 1e-4))
    assert (advantages(rewards, "group")[1] == 0).all()


def test_the_gap_of_a_group_is_worked_out_by_hand() -> None:
    turned = np.array([[0.0, 1.0], [1.0, 0.0]])  # two answers, two asks: each wins once
    (gap,) = gaps([turned], "group")
    assert rms(gap) == pytest.approx(2 * math.sqrt(0.5), rel=1e-3) and gap.flips / gap.size == 1.0
    assert gaps([np.array([[0.0, 0.0], [1.0, 1.0]])], "group")[0].squares == 0


def test_groups_without_a_signal_in_any_ask_are_left_out() -> None:
    dead, one_sided = np.full((3, 2), 0.5), np.array([[0.5, 0.5], [0.5, 1.0]])
    assert gaps([dead], "group") == [Gap(0.0, 0.0, 0.0, 0.0)] and math.isnan(rms(gaps([dead], "group")[0]))
    (gap,) = gaps([one_sided], "group")
    assert gap.size == 2 and gap.flips == 0 and gap.squares == pytest.approx(1.0, rel=1e-3)


def test_an_answer_that_one_ask_lacks_leaves_the_comparison() -> None:
    whole = np.array([[0.0, 0.0], [1.0, 1.0], [0.2, 0.8]])
    holed = np.array([[0.0, 0.0], [1.0, 1.0], [0.2, 0.8], [0.5, np.nan]])
    assert gaps([holed], "group") == gaps([whole], "group")
    assert gaps([np.array([[0.0, np.nan], [1.0, 0.5]])], "group")[0].size == 0


def test_the_mean_over_pairs_of_asks_counts_each_answer_once() -> None:
    rng = np.random.default_rng(0)
    assert gaps([rng.random((5, 4))], "group")[0].size == 5


def test_noise_at_other_group_sizes_is_foreseen_from_the_groups_at_hand() -> None:
    rng = np.random.default_rng(0)

    def groups(count: int, size: int) -> list[np.ndarray]:
        return [rng.normal(size=(size, 1)) + rng.normal(0, 0.5, (size, 3)) for _ in range(count)]

    at_hand = groups(60, 5)
    for size in (4, 8, 16):
        fresh = gaps(groups(400, size), "group")
        truth = math.sqrt(sum(gap.squares for gap in fresh) / sum(gap.size for gap in fresh))
        assert rms(simulated_gap(at_hand, size, "group")) == pytest.approx(truth, rel=0.12), size


def test_without_a_known_reward_nothing_is_foreseen() -> None:
    for groups in ([], [np.full((4, 2), np.nan)], [np.array([[0.5, 0.5]])]):
        assert math.isnan(rms(simulated_gap(groups, 8, "group", 50)))


# -- intervals ---------------------------------------------------------------------------------------------------------


def test_no_failure_in_few_clusters_is_no_certainty() -> None:
    found = share([8.0] * 20, [8.0] * 20)
    assert found.value == 1.0 and 0.9 < found.low < 0.98 and found.high == 1.0
    assert 0.6 < share([40.0] * 4, [40.0] * 4).low < 0.85  # as many verdicts, on a fifth of the clusters


def test_verdicts_that_go_together_count_less_than_their_number() -> None:
    apart, together = share([3.0] * 20, [4.0] * 20), share([4.0] * 15 + [0.0] * 5, [4.0] * 20)
    assert apart.value == together.value == 0.75
    assert together.high - together.low > 1.5 * (apart.high - apart.low)


def test_one_cluster_has_a_value_and_no_interval() -> None:
    for found in (share([3], [4]), root_mean_square([3], [4], 1.0), balance([1], [1], [4])):
        assert not math.isnan(found.value) and math.isnan(found.low) and math.isnan(found.high)
    for found in (share([], []), root_mean_square([], [], 1.0), balance([], [], []), kappa([])):
        assert math.isnan(found.value)


@pytest.mark.parametrize(("clusters", "size", "truth"), [(4, 40, 0.95), (10, 6, 0.8), (20, 8, 0.99)])
def test_the_interval_of_a_share_covers_it(clusters: int, size: int, truth: float) -> None:
    rng = np.random.default_rng(1)
    held = 0
    for _ in range(200):
        chance = rng.beta(20 * truth, 20 * (1 - truth), clusters)
        found = share(rng.binomial(size, chance).tolist(), [size] * clusters)
        held += found.low <= truth <= found.high
    assert held / 200 >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 200)


def test_the_interval_of_a_root_mean_square_covers_rare_large_noise() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(200):
        found = root_mean_square((rng.exponential(1, 10) * (rng.random(10) < 0.1)).tolist(), [1] * 10, 1.0)
        held += found.low <= math.sqrt(0.1) <= found.high
    assert held / 200 >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 200)


# -- kappa -------------------------------------------------------------------------------------------------------------


def test_kappa_is_the_textbooks() -> None:
    pairs = [(True, True)] * 20 + [(True, False)] * 5 + [(False, True)] * 10 + [(False, False)] * 15
    found = kappa(pairs)  # Cohen 1960: observed 0.7, by chance 0.5
    assert found.value == pytest.approx(0.4) and found.low < 0.4 < found.high


def test_kappa_of_raters_who_never_differ_still_has_an_interval() -> None:
    found = kappa([(True, True), (False, False)] * 15)
    assert found.value == 1.0 and found.high == 1.0 and 0.6 < found.low < 0.95


def test_kappa_is_unknown_where_both_say_the_same_of_everything() -> None:
    assert math.isnan(kappa([(True, True)] * 30).value)


def test_opposite_raters_have_a_negative_kappa() -> None:
    assert kappa([(True, False), (False, True)] * 10).value == -1.0


def test_labels_of_one_answer_make_a_wider_interval_than_labels_of_many() -> None:
    pairs = [(n % 2 == 0, n % 2 == (0 if n < 30 else 1)) for n in range(36)]
    many, few = kappa(pairs), kappa(pairs, [n // 6 for n in range(36)])
    assert many.value == few.value and few.high - few.low > 1.3 * (many.high - many.low)


@pytest.mark.parametrize(("right", "each"), [(0.97, 1), (0.8, 1), (0.9, 3)])
def test_the_interval_of_kappa_covers_it_near_one_too(right: float, each: int) -> None:
    rng = np.random.default_rng(3)
    held, truth = 0, 2 * right - 1
    for seed in range(150):
        label = rng.random(30) < 0.5
        judge = label ^ (rng.random(30) >= right)
        answers = np.repeat(np.arange(30 // each), each).tolist()
        found = kappa(list(zip(label.tolist(), judge.tolist(), strict=True)), answers, seed)
        held += found.low <= truth <= found.high
    assert held / 150 >= 0.95 - 4 * math.sqrt(0.95 * 0.05 / 150) - 0.01


# -- the sheet ---------------------------------------------------------------------------------------------------------


def fill(path: Path, given: Mapping[int, str]) -> None:
    """Write labels into the sheet by place, as a person would."""
    lines = read_sheet(path)
    set_labels(path, {lines[place].key: label for place, label in given.items()})  # type: ignore[misc]


def sheet_of(folder: Path, task: Spelling, count: int = 30) -> tuple[Run, list[dict[str, Any]], Path]:
    rows = make_rows(12)
    run = make_run(folder, rows)
    answers = make_answers(task, rows)
    path = label_sheet(run, task, answers, count)
    assert path == run.folder / "labels.csv"
    return run, answers, path


def test_the_sheet_spreads_over_rows_and_hides_the_judges_verdict(tmp_path: Path) -> None:
    run, _, path = sheet_of(tmp_path, Spelling())
    lines = read_sheet(path)
    assert len(lines) == 30 and labels(run) == []
    assert len({line.row for line in lines}) == 10 and len({line.answer_hash for line in lines}) == 10
    assert path.read_text("utf-8-sig").splitlines()[0].split(",") == list(COLUMNS)
    assert path.read_bytes().startswith(b"\xef\xbb\xbfrow,")  # so that Excel reads UTF-8
    assert "so it seems" not in path.read_text() and "verdict" not in path.read_text()
    assert all(line.answer_hash == hashlib.sha256(line.answer.encode()).hexdigest() for line in lines)


def test_labels_stay_when_the_sheet_is_written_again(tmp_path: Path) -> None:
    task = Spelling()
    run, answers, path = sheet_of(tmp_path, task)
    fill(path, {0: "pass", 5: "fail"})
    before = read_sheet(path)
    label_sheet(run, task, answers)
    assert read_sheet(path) == before
    label_sheet(run, task, answers, 33)
    assert read_sheet(path)[:30] == before and len(read_sheet(path)) == 33


def test_after_a_new_sampling_labelled_lines_stay_and_the_others_make_way(tmp_path: Path) -> None:
    task = Spelling()
    run, answers, path = sheet_of(tmp_path, task)
    fill(path, {3: "pass"})
    kept = read_sheet(path)[3]
    label_sheet(run, task, [{**record, "answer": record["answer"] + " new"} for record in answers])
    lines = read_sheet(path)
    assert lines[0][:7] == kept[:7] and len(lines) == 30
    assert all(line.answer.endswith(" new") for line in lines[1:])


def test_labels_are_read_back_whatever_their_case(tmp_path: Path) -> None:
    run, _, path = sheet_of(tmp_path, Spelling())
    fill(path, {1: "pass", 2: "fail"})
    path.write_text(path.read_text().replace(",pass,", ", PASS ,"))
    assert [(one.label, one.line) for one in labels(run)] == [("pass", 3), ("fail", 4)]


def test_columns_that_a_person_adds_stay(tmp_path: Path) -> None:
    run, answers, path = sheet_of(tmp_path, Spelling())
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([f"{head},remark", *(f"{line},so-so {n}" for n, line in enumerate(lines))]) + "\n")
    fill(path, {0: "pass"})
    label_sheet(run, Spelling(), answers, 31)
    assert [dict(line.more)["remark"] for line in read_sheet(path)] == [*(f"so-so {n}" for n in range(30)), ""]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (",pass,", ",maybe,", "labels.csv, line 2, label: 'maybe' is no label. Allowed: pass, fail, or nothing"),
        ("row,criterion", "row;criterion", "line 1: no column row, criterion. The file has: row;criterion"),
        (",pass,", ",pass", "cells; the header has 7"),
    ],
)
def test_a_broken_sheet_is_refused_with_the_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    run, _, path = sheet_of(tmp_path, Spelling())
    fill(path, {0: "pass"})
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(TaskError) as caught:
        labels(run)
    assert message in str(caught.value)


def test_every_wrong_label_is_named_at_once_and_a_line_given_twice_too(tmp_path: Path) -> None:
    run, _, path = sheet_of(tmp_path, Spelling())
    fill(path, {0: "pass", 1: "fail"})
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, lines[1]]).replace(",fail,", ",wrong,"))
    with pytest.raises(TaskError, match=r"2 problems in the data:\n.*line 3, label(.|\n)*line 32, row: .* as line 2"):
        labels(run)


@pytest.mark.parametrize("text", ["=1+1", "- a list", "@x", "'- quoted", "''=x", "'plain", 'a,"b"\r\nc', "é 中 🙂"])
def test_a_text_comes_back_from_the_sheet_as_it_was_and_is_no_formula_in_it(tmp_path: Path, text: str) -> None:
    rows = make_rows(1)
    run = make_run(tmp_path, rows)
    path = label_sheet(run, Spelling(), [answer(rows[0], text, 0.0)])
    assert path and read_sheet(path)[0].answer == text
    with path.open(newline="", encoding="utf-8") as file:
        cells = list(csv.reader(file))
    assert not cells[1][5].startswith(("=", "+", "-", "@"))


def test_texts_that_no_file_can_hold_are_labelled_by_their_hash(tmp_path: Path) -> None:
    rows = make_rows(3)
    run = make_run(tmp_path, rows)
    text = "half \ud800 and nul \0 abc"
    path = label_sheet(run, Spelling(), [answer(rows[0], text, 0.0), answer(rows[1], " ", 0.0)])
    assert path
    assert {line.answer_hash for line in read_sheet(path)} == {hash_text(text)}  # and " " is nothing to label
    fill(path, {0: "pass"})
    found = measure(run.config, Spelling(), [answer(rows[0], text, 0.0)] * 2, run)
    assert found is not None and found.agreement.n == 1


def test_a_secret_in_an_answer_stays_out_of_the_sheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-verysecret-1234567890")
    rows = make_rows(1)
    path = label_sheet(make_run(tmp_path, rows), Spelling(), [answer(rows[0], "sk-verysecret-1234567890 abc", 0.0)])
    assert path and "verysecret" not in path.read_text()


# -- agreement ---------------------------------------------------------------------------------------------------------


def label_all(path: Path) -> None:
    """Labels of a person who knows the truth."""
    truth = [line.criterion[1] in line.answer for line in read_sheet(path)]
    fill(path, {place: "pass" if passes else "fail" for place, passes in enumerate(truth)})


def test_without_labels_agreement_is_said_to_be_not_measured(tmp_path: Path) -> None:
    found = measured(tmp_path, Spelling()).agreement
    assert found.n == 0 and math.isnan(found.value) and "fill in 20 to 50 lines of labels.csv" in found.meaning


def test_a_judge_that_is_right_agrees_with_the_labels(tmp_path: Path) -> None:
    task = Spelling()
    run, answers, path = sheet_of(tmp_path, task)
    label_all(path)
    found = measure(run.config, task, answers, run)
    assert found is not None and found.agreement.value == 1.0 and found.agreement.n == 30
    assert found.agreement.low < 0.95 and "almost perfect" in found.agreement.meaning


def test_a_judge_that_errs_agrees_less_and_is_told_how_many_labels_it_takes(tmp_path: Path) -> None:
    task = Spelling(noise=0.15)
    run, answers, path = sheet_of(tmp_path, task, count=120)
    label_all(path)
    found = measure(run.config, task, answers, run)
    assert found is not None and found.agreement.n == 120
    assert (
        found.agreement.value == pytest.approx(0.7, abs=0.2)
        and "labels would narrow it to ±0.1" in found.agreement.meaning
    )


def test_the_interval_of_the_agreement_is_over_answers(tmp_path: Path) -> None:
    task = Spelling(noise=0.15)
    run, answers, path = sheet_of(tmp_path, task, count=60)
    label_all(path)
    lines = labels(run)
    rollouts = [Rollout.of(make_rows(12)[int(line.row[1:])], line.answer) for line in lines]
    said = [submit(task.verdicts(rollout)).result() for rollout in rollouts]
    pairs = [
        (line.label == "pass", one[line.criterion].verdict == "pass") for line, one in zip(lines, said, strict=True)
    ]
    found = measure(run.config, task, answers, run)
    assert found is not None
    assert tuple(found.agreement[2:5]) == kappa(pairs, [line.answer_hash for line in lines]) != kappa(pairs)


def test_labels_outlive_a_new_sampling_because_the_sheet_holds_the_answer(tmp_path: Path) -> None:
    task = Spelling()
    run, answers, path = sheet_of(tmp_path, task)
    label_all(path)
    found = measure(run.config, task, [{**record, "answer": "abc"} for record in answers], run)
    assert found is not None and found.agreement.n == 30


def test_labels_whose_answer_or_criterion_is_gone_and_unknown_verdicts_are_left_out_and_counted(tmp_path: Path) -> None:
    task = Spelling()
    run, answers, path = sheet_of(tmp_path, task)
    label_all(path)
    path.write_text(path.read_text().replace("Holds the letter a", "Has an a").replace("r0,", "r999,"))
    gone = sum(line.text == "Has an a" or line.row == "r999" for line in read_sheet(path))
    found = measure(run.config, task, answers, run)
    assert gone and found is not None and found.agreement.n == 30 - gone
    assert f"{gone} left out" in found.agreement.meaning
    lost = measure(run.config, Spelling(lost=0.3), answers, run)
    assert lost is not None and lost.agreement.n < 30 - gone


def test_labels_of_one_kind_make_no_kappa_and_say_so(tmp_path: Path) -> None:
    task = Spelling()
    run, answers, path = sheet_of(tmp_path, task)
    passing = [i for i, line in enumerate(read_sheet(path)) if line.criterion[1] in line.answer]
    fill(path, dict.fromkeys(passing, "pass"))
    found = measure(run.config, task, answers, run)
    assert found is not None and math.isnan(found.agreement.value) and found.agreement.n == len(passing)
    assert "Both always say pass: kappa needs both kinds" in found.agreement.meaning


# -- the real thing ----------------------------------------------------------------------------------------------------


def test_a_judge_over_http_is_measured_and_a_second_measurement_asks_nothing(tmp_path: Path) -> None:
    rubric = {name: {"text": f"Speaks about {name} things"} for name in ("yellow", "bitter", "silent")}
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps({"id": f"r{n}", "prompt": f"Say {n}"}) + "\n" for n in range(8)))
    with running_judge(flip=0.1, seed=3) as server:
        judge = {"provider": "compatible", "model": "loopback", "base_url": server.base_url}
        task = load_task("judged", path=str(table), rubric=rubric, judge=judge, ledger=str(tmp_path / "l.sqlite"))
        rows = [*task.rows("train")]
        run = make_run(tmp_path, rows)
        words = ("yellow things", "bitter silent", "silent yellow bitter things", "loud")
        answers = [answer(row, f"{text} {row['id']}", float(n)) for row in rows for n, text in enumerate(words)]
        assert isinstance(task, Judged)
        found = measure(run.config, task, answers, run, items=16)
        asked = server.stats()["requests"]
        assert found is not None and asked == 16 * 4 and found.unknown == {}
        assert found.repeatability.n == 16 * 3 and 0.5 < found.repeatability.value < 0.95
        assert found.reward_noise.value > 0 and found.advantage_error.value > 0
        again = measure(run.config, task, answers, run, items=16)
        assert again == found and server.stats()["requests"] == asked
        path = label_sheet(run, task, answers)
        assert path is not None
        fill(path, {0: "pass", 1: "fail"})
        labelled = measure(run.config, task, answers, run, items=16)
        assert labelled is not None and labelled.agreement.n == 2


# -- how it looks ------------------------------------------------------------------------------------------------------


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a cell displays."""
    seen: list[Any] = []
    monkeypatch.setattr("IPython.display.display", lambda *things, **_: seen.extend(things))
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    return seen


def test_the_meter_is_shown_as_a_table_and_a_figure(tmp_path: Path, shown: list[Any]) -> None:
    found = measured(tmp_path, Spelling(noise=0.1, lost=0.02), items=48)
    assert show_meter(found) is not None
    html = "".join(thing.data for thing in shown)
    for needed in (*(one.what for one in found.readings[:3]), "not measured", "judge: HTTP 503", "fill in 20 to 50"):
        assert needed.replace("'", "&#x27;") in html, needed
    assert "nan" not in html


def test_a_task_without_a_judge_is_told_so(shown: list[Any]) -> None:
    assert show_meter(None) is None and show_sheet(None) is None
    assert all("has no judge" in thing.data for thing in shown) and len(shown) == 2


def test_a_dead_judge_is_shown_without_a_figure(tmp_path: Path, shown: list[Any]) -> None:
    assert show_meter(measured(tmp_path, Spelling(lost=1.0))) is None
    assert "480 x judge: HTTP 503" in "".join(thing.data for thing in shown)


def test_headless_the_sheet_says_where_it_is_and_what_to_write(tmp_path: Path, shown: list[Any]) -> None:
    _, _, path = sheet_of(tmp_path, Spelling())
    fill(path, {0: "pass"})
    show_sheet(path)
    html = "".join(thing.data for thing in shown)
    assert str(path) in html and "1 of 30 lines are labelled" in html and "Holds the letter" in html


def test_in_the_lab_every_click_is_written_down(
    tmp_path: Path, shown: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _, path = sheet_of(tmp_path, Spelling(), 3)
    monkeypatch.setenv("JPY_SESSION_NAME", "2_reward_inspection.ipynb")
    show_sheet(path)
    assert type(shown[0]).__name__ == "VBox"
    form = LabelForm(path)
    for name in ("pass", "next", "fail", "fail"):
        form.buttons[name].click()
    assert [line.label for line in read_sheet(path)] == ["pass", "", "fail"]
    form.buttons["back"].click()
    form.buttons["pass"].click()
    assert [one.label for one in labels(run)] == ["pass", "pass", "fail"]
    form.buttons["not sure"].click()
    assert [line.label for line in read_sheet(path)] == ["pass", "pass", ""]
    assert LabelForm(path).place == 2  # a new form goes on where labels are missing


def test_an_answer_cannot_put_markup_into_the_form(tmp_path: Path) -> None:
    rows = make_rows(1)
    run = make_run(tmp_path, rows)
    path = label_sheet(run, Spelling(), [answer(rows[0], "<script>alert(1)</script>", 0.0)])
    assert path and "<script>" not in LabelForm(path).shown.value and "&lt;script&gt;" in LabelForm(path).shown.value
