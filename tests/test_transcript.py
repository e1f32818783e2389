"""The viewer of rollouts turn by turn: roles, tool calls and results, and letters in the colours of their marks."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

from lib import show
from lib.show.transcript import conversation


def record(identity: str = "a", reward: float | None = 1.0, **values: Any) -> dict[str, Any]:
    messages = [
        {"role": "user", "content": "Guess <b>."},
        {"role": "assistant", "content": "<guess>[crane]</guess>", "thinking": "hm"},
        {"role": "user", "content": "\nC R A N E\nG Y X X G\nYou have 5 guesses left."},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": "<1>"}}}]},
        {"role": "tool", "name": "add", "content": "2"},
    ]
    known = {"row": identity, "reward": reward, "masked": False, "parts": {"solved": 1.0}, "notes": {}, "stop": "done"}
    return {**known, "messages": messages, **values}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The HTML that cells put out."""
    pages: list[str] = []
    monkeypatch.setattr(sys.modules["lib.show.transcript"], "put", pages.append)
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    return pages


def test_letters_stand_in_the_colours_of_their_marks_and_keep_them_as_text() -> None:
    tiles = re.findall(r"background:(#\w+)[^>]*>(\w)<sub>(\w)</sub>", conversation(record()))
    colors = {"G": "#3a9a6b", "Y": "#c9a227", "X": "#787c7e"}
    assert [(letter, mark) for _, letter, mark in tiles] == list(zip("CRANE", "GYXXG", strict=True))
    assert all(color == colors[mark] for color, _, mark in tiles)


@pytest.mark.parametrize("text", ["C R A\nG Y", "C R A N E\nG Q X X G", "G Y X", "C R A and G Y X"])
def test_what_is_no_feedback_stays_as_it_is(text: str) -> None:
    page = conversation(record(messages=[{"role": "user", "content": text}]))
    assert text in page and "<sub>" not in page


def test_the_toy_policys_spelling_and_the_last_guess_of_a_game_are_coloured_too() -> None:
    verdict = {"verdict": "pass", "score": 1.0, "reasons": "CAT GGG", "text": "turn 1"}
    spelt = record(messages=[{"role": "user", "content": " C A T\n G X Y"}], notes={"verdicts": {"turn 1": verdict}})
    assert re.findall(r">(\w)<sub>(\w)</sub>", conversation(spelt)) == [*zip("CATCAT", "GXYGGG", strict=True)]


def test_roles_turns_calls_and_results_are_told_apart_and_no_text_becomes_markup() -> None:
    page = conversation(record())
    for text in (
        "assistant, turn 1",
        "assistant, turn 2",
        "tool add",
        "Guess &lt;b&gt;.",
        "{&quot;a&quot;: &quot;&lt;1&gt;&quot;}",
    ):
        assert text in page, text
    assert "<guess>" not in page and "thinking" in page and "stopped: done; solved 1" in page


@pytest.mark.parametrize(
    ("verdicts", "shown"),
    [
        ({"tone": {"verdict": "maybe", "reasons": "x"}}, "tone: {&quot;verdict&quot;: &quot;maybe&quot;, "),
        ({"tone": {"verdict": ["pass"]}}, "tone: {&quot;verdict&quot;: [&quot;pass&quot;]}"),
        ({"tone": {"verdict": "pass"}}, "✓</b> tone "),
        ({"tone": {"verdict": "fail", "reasons": ["a", 1]}}, "✗</b> tone [&quot;a&quot;, 1]"),
        ({"tone": "<pass>"}, "tone: &lt;pass&gt;"),
        ({"tone": None}, "tone: null"),
        (["<a>"], "verdicts: [&quot;&lt;a&gt;&quot;]"),
        ("fine", "verdicts: fine"),
    ],
)
def test_notes_that_are_no_verdicts_are_shown_as_they_are(verdicts: Any, shown: str) -> None:
    assert shown in conversation(record(notes={"verdicts": verdicts, "error": {"code": 1}}))


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ({"thinking": ["<a>"]}, "[&quot;&lt;a&gt;&quot;]"),
        ({"content": [{"text": "<a>"}]}, "[{&quot;text&quot;: &quot;&lt;a&gt;&quot;}]"),
        ({"tool_calls": ["<add>"]}, "→ &lt;add&gt;"),
        ({"tool_calls": "add"}, "→ add"),
        ({"tool_calls": [{"function": None}]}, "→ {&quot;function&quot;: null}"),
        ({"tool_calls": [{"function": {"name": 5, "arguments": None}}]}, ">5</b>(null)"),
    ],
)
def test_messages_of_another_shape_are_shown_as_they_are(said: dict[str, Any], shown: str) -> None:
    page = conversation(record(messages=[{"role": "assistant", "content": "", **said}, {"content": "by nobody"}]))
    assert shown in page and "by nobody" in page


def test_an_argument_of_a_megabyte_is_cut_and_counted() -> None:
    call = {"id": "1", "function": {"name": "add", "arguments": "x" * 1_000_000}}
    page = conversation(record(messages=[{"role": "assistant", "content": None, "tool_calls": [call]}]))
    assert len(page) < 30_000 and "(1,000,000 characters)" in page


def test_an_executed_notebook_shows_the_best_a_middling_and_the_worst(shown: list[str]) -> None:
    show.transcript([record(str(i), i / 10) for i in range(9)] + [record("lost", None)], "Games")
    (page,) = shown
    assert re.findall(r"<summary>(\w+): ([^,]+), 2 turns", page) == [("8", "0.8"), ("3", "0.3"), ("lost", "unscored")]
    assert "Games" in page and "7 more: open this notebook" in page


def test_answers_of_one_text_are_said_to_be_that(shown: list[str]) -> None:
    show.transcript([{key: value for key, value in record().items() if key != "messages"}])
    assert "Every answer is one text" in shown[0]


def test_in_the_lab_any_rollout_can_be_chosen(shown: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JPY_SESSION_NAME", "4_adapter_evaluation.ipynb")
    widgets: list[Any] = []
    monkeypatch.setattr("IPython.display.display", lambda *things, **_: widgets.extend(things))
    show.transcript([record("a", 0.1), record("b", 0.9)])
    chosen = next(widget for widget in widgets if hasattr(widget, "children")).children[0]
    assert [label for label, _ in chosen.options] == ["1. b: 0.9, 2 turns", "2. a: 0.1, 2 turns"]
