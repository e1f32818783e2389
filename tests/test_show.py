"""What notebook 2 shows: the banner, the attack table, the figure of useful groups, and the browser of groups."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lib import show
from lib.preflight import Attacked, AttackTable, Check, UsefulGroups
from lib.show.preflight import visible


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The HTML that cells put out."""
    pages: list[str] = []
    for name in ("preflight", "groups"):
        monkeypatch.setattr(f"lib.show.{name}.put", pages.append)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    return pages


def check(name: str, level: Any, knob: str = "turn me") -> Check:
    return Check(name, 0.5, "50 %", level, "what it means", knob)


@pytest.mark.parametrize(
    ("levels", "banner", "color"),
    [
        (["go", "go"], "GO: 2 checks passed", show.GREEN),
        (["go", "caution"], "GO WITH CAUTION: check 1", show.ORANGE),
        (["no-go", "caution"], "NO-GO: check 0", show.RED),
    ],
)
def test_the_gate_opens_with_one_banner_in_the_colour_of_the_worst_check(
    levels: list[str], banner: str, color: str, shown: list[str]
) -> None:
    show.gate([check(f"check {i}", level) for i, level in enumerate(levels)])
    first = re.findall(r'<div style="background:(#\w+)[^>]*>([^<]*)</div>', shown[0])
    assert first == [(color, banner)]
    assert shown[0].count("turn me") == sum(level != "go" for level in levels)


def cheat(name: str, text: str, reward: float | None, works: str = "", left_out: str = "") -> Attacked:
    return Attacked(name, "echo", text, {"row": reward}, left_out, works)


def test_cheats_that_work_come_first_and_no_cheat_gets_into_the_page_as_markup(shown: list[str]) -> None:
    attacked = [
        cheat("quiet", "<script>alert(1)</script>", 0.0),
        cheat("loud", "a\n\u200bb", 1.0, "earns 1, more than 0.2"),
        cheat("gone", "", None, left_out="unscored: judge: HTTP 503"),
    ]
    show.attacks(AttackTable(attacked, 0.2, None, {}, [], 0.2, ["row"]))
    page = "".join(shown)
    assert "<b>1 of 3 cheats work</b> on 1 rows" in page and show.RED in page
    assert page.index("loud") < page.index("quiet") and page.count("earns 1, more than 0.2") == 2
    assert "<script>" not in page and "a\\n\\u200bb" in page and "unscored: judge: HTTP 503" in page
    assert "None may earn more than 0.200: the base policy's median is 0.200. These rows have no gold answer." in page


def test_a_table_without_working_cheats_is_green(shown: list[str]) -> None:
    show.attacks(AttackTable([cheat("quiet", "?", 0.0)], None, 0.1, {"row": 1.0}, [], 0.1, ["row"]))
    page = "".join(shown)
    assert show.GREEN in page and "why it works" not in page and "A gold answer earns 1.000." in page


@pytest.mark.parametrize("text", ["\ud800", "\0", "x" * 100_000, "", "\u202eabc"])
def test_any_text_can_be_shown(text: str) -> None:
    visible(text).encode()
    assert len(visible(text)) < 120 and visible(text).isprintable()


def test_sizes_that_are_only_bounded_are_marked() -> None:
    figure = show.useful_groups([UsefulGroups(4, 0.5, 2.0, True), UsefulGroups(8, 0.5, 1.0, False)], 4)
    texts = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert texts == ["0.5", "≥ 0.5", "2", "≥ 1"]


def answer(row: str, reward: float | None, verdict: str = "pass", **more: Any) -> dict[str, Any]:
    told = {
        "verdict": verdict,
        "score": None if verdict == "unknown" else reward,
        "reasons": f"<{verdict}>",
        "text": "Names it",
    }
    usual = {"prompt": f"prompt of {row}", "answer": f"answer to {row}", "masked": False, "parts": {}}
    return {"row": row, "reward": reward, **usual, "notes": {"verdicts": {"1": told}}, **more}


GROUPS = [
    *(answer("alike", 0.5) for _ in range(3)),
    answer("apart", 1.0),
    answer("apart", 0.0, "fail"),
    answer("apart", None, "unknown"),
]


def test_the_group_that_differs_most_comes_first_with_verdicts_and_reasons_of_each_answer(shown: list[str]) -> None:
    show.browser(GROUPS, 3)
    (page,) = shown
    assert page.index("apart: 1, 0, unscored") < page.index("alike: 0.5, 0.5, 0.5")
    assert page.count("<details open>") == 1 and "Names it" in page
    assert all(
        f"{mark}</b> <small>&lt;{verdict}&gt;" in page
        for verdict, mark in (("pass", "✓"), ("fail", "✗"), ("unknown", "?"))
    )


def test_without_a_judge_the_parts_stand_side_by_side(shown: list[str]) -> None:
    plain = [answer("r", 0.5, notes={}, parts={"valid": 1.0, "regret": None}), answer("r", None, notes={}, masked=True)]
    show.browser(plain, 2)
    assert "r: 0.5, masked" in shown[0] and "valid" in shown[0] and "Names it" not in shown[0]
    show.browser([], 2)
    assert shown[1] == "<p>(nothing)</p>"


def test_few_groups_are_shown_headless_and_the_rest_is_counted(shown: list[str]) -> None:
    show.browser([answer(f"row {i}", i / 9) for i in range(20)], 2)
    assert "7 more groups" in shown[0] and shown[0].count("<details>") + shown[0].count("<details open>") == 3 + 3


def test_a_person_can_choose_any_group(shown: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    widgets: list[Any] = []
    monkeypatch.setenv("JPY_SESSION_NAME", "2_reward_inspection.ipynb")
    monkeypatch.setattr("IPython.display.display", lambda *some, **_: widgets.extend(some))
    show.browser(GROUPS, 3)
    chooser = next(child for child in widgets[0].children if hasattr(child, "options"))
    assert [title for title, _ in chooser.options] == ["apart: 1, 0, unscored", "alike: 0.5, 0.5, 0.5"]
    chooser.value = 1
    assert "prompt of alike" in shown[-1] and "prompt of apart" not in shown[-1]


def test_prices_are_not_set_as_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    pages: list[Any] = []
    monkeypatch.setattr("IPython.display.display", pages.append)
    show.table([{"answer": "One costs $5, the other $10."}])
    assert pages[0].data.startswith('<div class="tex2jax_ignore mathjax_ignore">')  # MathJax 2 and 3 pass it over
