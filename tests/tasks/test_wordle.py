"""The task `wordle`: its rules, its words, its rewards, and how a game of it is trained on."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hub_server import running_hub

from lib import PROJECT_ROOT
from lib.generate import scripted
from lib.rollout import attempt, run_rollout
from lib.task import Message, Rollout, Row, Score, TaskError, Turn, load_task
from lib.tasks import _wordle_words
from lib.tasks._wordle_demos import careless
from lib.tasks._wordle_game import Rules, marks, play
from lib.tasks._wordle_score import format_score
from lib.tasks.wordle import Wordle

CRANE = "<think>\nhm\n</think>\n<guess>[crane]</guess>"


def wordle(**params: Any) -> Wordle:
    task = load_task("wordle", **params)
    assert isinstance(task, Wordle)
    return task


def listed(path: Path, *words: str) -> str:
    path.write_text("\n".join(words) + "\n", encoding="utf-8")
    return str(path)


def row_of(answer: str) -> Row:
    return {"id": answer, "prompt": [{"role": "user", "content": "?"}], "answer": answer}


def said(word: str) -> str:
    return f"<think>\nhm\n</think>\n<guess>[{word}]</guess>"


def game_of(task: Wordle, answer: str, *texts: str | Message, **update: Any) -> tuple[Rollout, Score]:
    """The rollout in which the player says these texts in turn, and its score."""
    row = row_of(answer)

    async def played() -> Rollout:
        return await run_rollout(task, row, scripted(*texts, "out of texts"))

    rollout = asyncio.run(played()).model_copy(update=update)
    return rollout, asyncio.run(task.score(rollout))


def told(rollout: Rollout) -> list[str]:
    return [message["content"] for message in rollout.messages[1:] if message["role"] == "user"]


# -- feedback ---------------------------------------------------------------------------------------------------------


def oracle(guess: str, answer: str) -> str:
    """The rule said otherwise: as many of a letter are coloured as the answer has, greens first, then the leftmost."""
    colours = ["G" if one == other else "X" for one, other in zip(guess, answer, strict=True)]
    for letter in set(guess):
        greens = sum(one == other == letter for one, other in zip(guess, answer, strict=True))
        others = [i for i, one in enumerate(guess) if one == letter and colours[i] != "G"]
        for i in others[: answer.count(letter) - greens]:
            colours[i] = "Y"
    return "".join(colours)


@pytest.mark.parametrize(
    ("answer", "guess", "expected"),
    [("apple", "papal", "YYGXY"), ("apple", "allee", "GYXXG"), ("aab", "baa", "YGY"), ("abc", "ccc", "XXG")],
)
def test_duplicate_letters_are_coloured_as_in_textarena(answer: str, guess: str, expected: str) -> None:
    assert marks(guess, answer) == oracle(guess, answer) == expected


def test_the_feedback_is_the_rules_on_every_pair_of_words_over_three_letters() -> None:
    words = ["".join(letters) for letters in itertools.product("abc", repeat=4)]
    assert all(marks(guess, answer) == oracle(guess, answer) for guess in words for answer in words)


def test_the_feedback_is_the_rules_on_random_pairs_with_repeated_letters() -> None:
    rng = random.Random(0)
    repeated = 0
    for _ in range(50_000):
        letters = "abcdefgh"[: rng.randint(2, 8)]
        guess, answer = ("".join(rng.choices(letters, k=5)) for _ in range(2))
        repeated += len(set(guess)) < 5
        assert marks(guess, answer) == oracle(guess, answer), (guess, answer)
    assert repeated > 25_000


# -- guesses ----------------------------------------------------------------------------------------------------------


def rules(**changes: Any) -> Rules:
    letters = frozenset("abcdefghijklmnopqrstuvwxyz")
    return Rules(5, 6, 1, frozenset({"crane", "apple", "papal", "other"}), letters, False, False)._replace(**changes)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<guess>[crane]</guess>", ""),
        ("<guess>crane</guess>", ""),
        ("<guess> [CRANE]\n</guess>", ""),
        ("<guess>I say [crane] or [apple]</guess>", ""),
        ("<guess>[crane]</guess><guess>[apple]</guess>", ""),
        ("<guess>[crane]</guess> ​", ""),
        ("", "There is no guess"),
        ("[crane]", "There is no guess"),
        ("<guess>[crane]", "There is no guess"),
        ("<GUESS>[crane]</GUESS>", "There is no guess"),
        ("<guess></guess>", "wrong format"),
        ("<guess>crane]</guess>", "wrong format"),
        ("<guess>[cra ne]</guess>", "wrong format"),
        ("<guess>[?????]</guess>", "wrong format"),
        ("<guess>[cran\x00e]</guess>", "wrong format"),
        ("<guess>[cran\u200be]</guess>", "wrong format"),
        ("<guess>[crânes]</guess>", "exactly 5 letters"),
        ("<guess>[cat]</guess>", "exactly 5 letters"),
        ("<guess>[crane\u0301]</guess>", "wrong format"),
        ("<guess>[zzzzz]</guess>", "not a word"),
        ("<guess>[сrane]</guess>", "not a word"),  # the first letter is Cyrillic
        ("<guess>[ｃｒａｎｅ]</guess>", "not a word"),
        ("<guess>[12345]</guess>", "not a word"),
        ("<guess>[_____]</guess>", "not a word"),
        ("<guess>[\u202ecrane]</guess>", "wrong format"),
    ],
)
def test_what_is_a_guess(text: str, problem: str) -> None:
    move = play("apple", [text], rules()).moves[0]
    assert problem in move.problem and bool(problem) == bool(move.problem)
    assert move.word == ("" if problem else "crane")


def test_letters_that_only_look_like_the_words_are_no_guess_even_where_any_letters_are() -> None:
    open_rules = rules(allowed=None)
    assert play("apple", ["<guess>[qwxyz]</guess>"], open_rules).moves[0].word == "qwxyz"
    for look_alike in ("\u212aings", "сrane", "ｃｒａｎｅ", "12345"):  # the first one has the Kelvin sign
        assert play("kings", [f"<guess>[{look_alike}]</guess>"], open_rules).moves[0].problem


def test_a_word_is_not_guessed_twice() -> None:
    first, second = play("apple", [CRANE, CRANE.upper().replace("GUESS", "guess")], rules()).moves
    assert first.word == "crane" and "already guessed 'crane'" in second.problem


def test_a_spelt_guess_is_its_letters_with_single_spaces() -> None:
    spelt = rules(length=3, allowed=frozenset({"cat"}), spelt=True)
    for text, good in ((" C A T ", True), ("c a t", True), ("CAT", True), ("C  A T", False), ("C A T  ", False)):
        assert bool(play("cat", [f"<guess>[{text}]</guess>"], spelt).moves[0].word) == good, text


@pytest.mark.parametrize(
    "text",
    [
        "<guess>" * 140_000,
        "<guess>" + " " * 1_000_000,
        "<guess>" + " " * 500_000 + "</guess>",
        "<guess>" + "[" * 1_000_000 + "</guess>",
        "<guess>[" + "a" * 1_000_000 + "</guess>",
        "<guess>[" + "a " * 500_000 + "</guess>",
        "<guess>[" + "a" * 1_000_000 + "]</guess>",
        "\x00" * 1_000_000,
    ],
    ids=lambda text: text[:12],
)
@pytest.mark.parametrize("params", [{}, {"style": "small"}, {"parity": True}], ids=str)
def test_a_megabyte_of_rubbish_is_an_invalid_guess_and_quickly_read(text: str, params: dict[str, Any]) -> None:
    task = wordle(**params)
    asyncio.run(task.reply(Rollout.of(row_of("crane"), CRANE)))  # the word lists are read once
    started = time.process_time()
    rollout, score = game_of(task, "crane", text)
    assert time.process_time() - started < 2
    assert score.reward is not None and score.parts["invalid"] == 2 and score.parts["valid"] == 0
    assert len(rollout.turns) == 2


THOUGHT = "<think>first I would try <guess>[slate]</guess></think>\n"


@pytest.mark.parametrize(
    ("message", "word"),
    [
        (f"{THOUGHT}<guess>[crane]</guess>", "crane"),
        ("I would try <guess>[slate]</guess></think>\n<guess>[crane]</guess>", "crane"),  # the template opened it
        (f"{THOUGHT}<think>or not</think><guess>[crane]</guess>", "crane"),
        ({"content": "<guess>[crane]</guess>", "thinking": "Try <guess>[slate]</guess>!"}, "crane"),
        ({"content": "<guess>[crane]</guess>", "reasoning_content": "</think><guess>[slate]</guess>"}, "crane"),
        ("<guess>[crane]</guess><think>I hope", "crane"),
        (THOUGHT, ""),
        ("<think>I say <guess>[crane]</guess> and so on", ""),
        ("\n <think>I say <guess>[crane]</guess>", ""),
        ({"content": "", "thinking": "I say <guess>[crane]</guess>"}, ""),
        ({"content": None, "reasoning": "I say <guess>[crane]</guess>"}, ""),
        ("<|channel|>analysis<|message|>I say <guess>[crane]</guess><|end|>", ""),
    ],
)
def test_a_guess_in_the_thoughts_is_no_move(message: str | Message, word: str) -> None:
    said_so = {"role": "assistant", **(message if isinstance(message, dict) else {"content": message})}
    for params in ({}, {"think": False}):
        rollout = Rollout.of(row_of("apple"), said_so)
        moves = asyncio.run(wordle(**params).score(rollout)).notes["verdicts"]
        assert moves["turn 1"]["reasons"].startswith(f"{word.upper()} " if word else "There is no guess")


def test_thoughts_of_a_reasoning_model_count_for_the_format_only() -> None:
    apart = {"role": "assistant", "content": "<guess>[crane]</guess>", "thinking": "<guess>[slate]</guess>"}
    score = asyncio.run(wordle().score(Rollout.of(row_of("crane"), apart)))
    assert score.parts["solved"] == 1 and score.parts["format"] == pytest.approx(1.0)


def test_with_parity_the_first_guess_of_a_message_is_the_move_wherever_it_stands() -> None:
    _, score = game_of(wordle(parity=True), "apple", f"{THOUGHT}<guess>[crane]</guess>")
    assert score.notes["verdicts"]["turn 1"]["reasons"].startswith("SLATE ")


# -- the course of a game ---------------------------------------------------------------------------------------------


def test_a_win_ends_the_game() -> None:
    rollout, score = game_of(wordle(), "crane", said("slate"), said("crane"), said("apple"))
    assert len(rollout.turns) == 2 and rollout.stop == "done"
    assert told(rollout) == ["\nS L A T E\nX X G X G\nYou have 5 guesses left."]
    assert score.notes["end"] == "won" and score.parts["solved"] == 1


def test_the_sixth_wrong_guess_ends_the_game() -> None:
    words = ["slate", "apple", "brown", "plant", "money", "house", "crane"]
    rollout, score = game_of(wordle(), "crane", *map(said, words))
    assert len(rollout.turns) == 6 and score.notes["end"] == "lost" and score.parts["solved"] == 0
    assert [text[-15:-14] for text in told(rollout)] == ["5", "4", "3", "2", "1"]


def test_one_invalid_guess_is_forgiven_and_costs_none_and_two_in_a_row_end_the_game() -> None:
    bad = said("zzzzz")
    rollout, score = game_of(wordle(), "crane", bad, said("slate"), bad, said("apple"), bad, bad, said("crane"))
    assert len(rollout.turns) == 6 and score.notes["end"] == "invalid"
    assert (score.parts["guesses"], score.parts["invalid"], score.parts["valid"]) == (2, 4, 0)
    assert "invalid move" in told(rollout)[0] and "5 guesses left" in told(rollout)[1]


def test_the_longest_game_that_the_rules_allow_fits_into_max_turns() -> None:
    words = ["slate", "apple", "brown", "plant", "money", "crane"]
    rollout, score = game_of(wordle(), "crane", *(text for word in words for text in ("", said(word))))
    assert len(rollout.turns) == wordle().max_turns == 12
    assert rollout.stop == "done" and score.notes["end"] == "won"
    assert wordle(guesses=3, forgiven=2).max_turns == 9 and wordle(max_turns=4).max_turns == 4


def test_the_state_derives_from_the_players_messages_only() -> None:
    task = wordle()
    rollout, score = game_of(task, "crane", said("slate"), said("brown"), said("crane"))
    forged = {"role": "user", "content": "G G G G G"}
    tampered = [message if message["role"] == "assistant" else forged for message in rollout.messages[1:]]
    assert asyncio.run(task.score(Rollout.of(rollout.row, *tampered))) == score
    for number, _ in enumerate(told(rollout)):
        messages = [m for m in rollout.messages[1:] if m["role"] == "assistant"][: number + 1]
        assert asyncio.run(wordle().reply(Rollout.of(rollout.row, *messages)))[0]["content"] == told(rollout)[number]


def test_an_opening_is_a_guess_that_costs_none_and_cannot_be_made_again() -> None:
    task = wordle(openings=2, guesses=1)
    row = task.rows("train")[0]
    assert row["id"] == f"{row['answer']} after {row['opening']}" and row["opening"] != row["answer"]
    assert row["prompt"][1]["content"].endswith(f"{oracle_lines(row)}\nYou have 1 guesses left.")
    again = asyncio.run(task.reply(Rollout.of(row, said(row["opening"]))))[0]["content"]
    assert f"already guessed '{row['opening']}'" in again
    assert asyncio.run(task.score(Rollout.of(row, said(row["answer"])))).parts["consistent"] == 1
    ids = [one["id"] for split in ("train", "eval") for one in task.rows(split)]  # type: ignore[arg-type]
    assert len(ids) == len(set(ids)) == 2 * 1365
    for params in ({"parity": True}, {"path": "words.jsonl"}):
        with pytest.raises(TaskError, match="openings: drawn from a word list"):
            wordle(openings=2, **params)


def oracle_lines(row: Row) -> str:
    return f"{' '.join(row['opening'].upper())}\n{' '.join(oracle(row['opening'], row['answer']))}"


def test_a_spelt_game_says_little() -> None:
    task = wordle(style="small", length=3, guesses=3)
    rollout, _ = game_of(task, "cat", "<guess>[ D O G ]</guess>", "what?", "<guess>[ C A T ]</guess>")
    assert told(rollout) == [" D O G\n X X X", "invalid"]


def test_an_invalid_guess_is_not_repeated_to_the_player() -> None:
    rollout, _ = game_of(wordle(), "crane", said("<|im_end|>" * 1000), CRANE)
    assert len(told(rollout)[0]) < 300 and "im_end" not in told(rollout)[0]


# -- the reward -------------------------------------------------------------------------------------------------------


def test_a_win_at_once_earns_everything() -> None:
    _, score = game_of(wordle(), "crane", CRANE)
    assert score.reward == pytest.approx(1 + 1 + 0.5 + 0.2) == pytest.approx(wordle().reward_range[1])


def test_partial_credit_is_that_of_the_last_valid_guess() -> None:
    _, won = game_of(wordle(), "crane", said("money"), CRANE)
    assert won.parts["partial"] == 1 and won.parts["turns"] == pytest.approx(1 / 3)
    _, lost = game_of(wordle(guesses=2), "crane", said("money"), said("slate"))
    assert lost.parts["partial"] == pytest.approx(0.4) and lost.parts["turns"] == 0
    _, broken = game_of(wordle(), "crane", said("slate"), "", "")
    assert broken.parts["partial"] == pytest.approx(0.4)


def test_the_two_slips_of_the_reference_come_back_with_parity() -> None:
    exact = wordle(parity=True)
    _, at_once = game_of(exact, "crane", CRANE)
    assert at_once.parts["partial"] == pytest.approx(0.1)  # the "Y" of "You have 6 attempts"
    _, second = game_of(exact, "crane", said("money"), CRANE)
    assert second.parts["partial"] == pytest.approx(0.1 + 0.1)  # of "money", not of the word itself
    _, capital = game_of(exact, "crane", said("CRANE"))
    assert capital.parts["solved"] == 0 and capital.notes["end"] == "won"


FORGED = "<guess>Feedback:\nx\n{}</guess>"


@pytest.mark.parametrize("marks_said", ["G G G G G", "G" * 50, "Y" * 1000, "G" * 100_000])
def test_forged_feedback_earns_with_parity_no_more_than_a_green_word_and_otherwise_nothing(marks_said: str) -> None:
    row, forger = row_of("crane"), scripted(FORGED.format(marks_said))
    exact, own = (asyncio.run(attempt(wordle(parity=parity), row, forger)).score for parity in (True, False))
    assert exact.parts["partial"] == pytest.approx(1.0) and exact.parts["solved"] == 0
    assert exact.reward == pytest.approx(1.0 + 0.2 * 0.6)
    assert own.parts["partial"] == 0 and own.reward == pytest.approx(0.2 * 0.6)


def test_with_parity_a_long_words_green_letters_keep_their_fifth_each() -> None:
    exact = wordle(parity=True, length=8)
    assert exact.reward_range[1] == pytest.approx(1 + 1.6 + 0.5 + 0.2)


def test_weights_are_fields_and_the_range_follows_them() -> None:
    task = wordle(partial_weight=0, turns_weight=2, format_weight=0)
    assert task.reward_range == (0, 2)
    assert game_of(task, "crane", CRANE)[1].reward == pytest.approx(2)
    with pytest.raises(TaskError, match="every weight is 0"):
        wordle(correct_weight=0, partial_weight=0, turns_weight=0, format_weight=0)
    with pytest.raises(TaskError, match=r"rewards lie from 0 to 2\.7"):
        wordle(reward_range=(0, 1))


@pytest.mark.parametrize(
    ("text", "fields", "expected"),
    [
        (CRANE, ("think", "guess"), 1.0),
        ("<guess>[crane]</guess>", ("think", "guess"), 0.6),
        ("[crane]", ("think", "guess"), 0.2),
        ("<think>hm</think><guess>[crane]", ("think", "guess"), 0.8),
        ("<guess>[crane]</guess>", ("guess",), 1.0),
        ("", ("guess",), 0.2),
    ],
)
def test_the_format_score_is_the_references(text: str, fields: tuple[str, ...], expected: float) -> None:
    assert format_score([text], fields) == pytest.approx(expected)


def test_thoughts_that_the_tokenizer_took_apart_count_as_thoughts() -> None:
    apart: Message = {"role": "assistant", "content": "<guess>[crane]</guess>", "reasoning_content": "hm"}
    score = asyncio.run(wordle().score(Rollout.of(row_of("crane"), apart)))
    assert score.parts["format"] == pytest.approx(1.0)


def test_a_message_that_was_cut_off_is_no_move() -> None:
    row = row_of("crane")
    turn = Turn(message={"role": "assistant", "content": CRANE}, stop="length")
    rollout = Rollout(row=row, messages=(*row["prompt"], turn.message), turns=(turn,), stop="length")
    score = asyncio.run(wordle().score(rollout))
    assert (score.parts["solved"], score.parts["valid"], score.notes["end"]) == (0, 0, "cut off")


def test_a_whole_guess_counts_where_only_the_next_turn_had_no_room() -> None:
    row = row_of("crane")
    turn = Turn(message={"role": "assistant", "content": said("crate")}, stop="stop")
    rollout = Rollout(row=row, messages=(*row["prompt"], turn.message), turns=(turn,), stop="length")
    score = asyncio.run(wordle().score(rollout))
    assert (score.parts["guesses"], score.parts["valid"], score.notes["end"]) == (1, 0, "cut off")


def test_guesses_that_heed_the_feedback_are_told_from_those_that_do_not() -> None:
    # After "slate" for "crane" (X X G X G), "brake" fits and "money" does not.
    _, heeded = game_of(wordle(guesses=2), "crane", said("slate"), said("brake"))
    _, careless_guess = game_of(wordle(guesses=2), "crane", said("slate"), said("money"))
    assert (heeded.parts["consistent"], careless_guess.parts["consistent"]) == (1, 0)


def test_no_cheat_earns_with_parity_what_the_word_earns_and_each_is_scored() -> None:
    task = wordle(parity=True)
    for row in list(task.rows("eval"))[:5]:
        best = asyncio.run(attempt(task, row, scripted(row["gold"][0]))).score.reward
        cheats = task.cheats(row)
        assert best == pytest.approx(1.8) and "forged feedback as a guess" in cheats
        for name, text in cheats.items():
            score = asyncio.run(attempt(task, row, scripted(text, "", ""))).score
            assert score.reward is not None and score.reward <= best * 2 / 3, (name, score)
            assert score.parts["solved"] == 0, name


@pytest.mark.parametrize("params", [{}, {"style": "small", "length": 3}, {"think": False}], ids=str)
def test_no_cheat_earns_half_of_what_the_word_earns(params: dict[str, Any]) -> None:
    task = wordle(**params)
    for row in list(task.rows("eval"))[:5]:
        best = asyncio.run(task.score(Rollout.of(row, *row["gold"]))).reward
        assert best == pytest.approx(task.reward_range[1])
        for name, text in task.cheats(row).items():
            score = asyncio.run(task.score(Rollout.of(row, text)))
            assert score.reward is not None and score.reward < best / 2, (name, score)
            assert score.parts["solved"] == 0, name


def test_the_verdicts_tell_the_game_turn_by_turn() -> None:
    verdicts = game_of(wordle(), "crane", said("slate"), "", CRANE)[1].notes["verdicts"]
    assert [one["verdict"] for one in verdicts.values()] == ["fail", "fail", "pass"]
    assert verdicts["turn 1"]["reasons"] == "SLATE XXGXG" and "no guess" in verdicts["turn 2"]["reasons"]


# -- rows and words ---------------------------------------------------------------------------------------------------


def test_the_shipped_list_has_the_sizes_that_its_docs_say() -> None:
    said_so = re.findall(r"^ +(\d) letters((?: +[\d,]+){5})$", _wordle_words.__doc__ or "", re.MULTILINE)
    stated = {int(length): [int(n.replace(",", "")) for n in counts.split()] for length, counts in said_so}
    sizes = _wordle_words.SIZES
    counted = {n: [len(_wordle_words.shipped(n, size)) for size in sizes] for n in _wordle_words.LENGTHS}
    assert stated == counted and counted[5] == [600, 1365, 3461, 3685, 4442]
    config = (PROJECT_ROOT / "configs" / "wordle.yaml").read_text(encoding="utf-8")
    assert ", ".join(f"{count:,} ({size})" for size, count in zip(sizes, counted[5], strict=True)) in config
    words = [word for length in _wordle_words.LENGTHS for word in _wordle_words.shipped(length, 50)]
    assert len(words) == len(set(words)) and all(map(_wordle_words.is_word, words))


def test_the_shipped_lists_notice_lies_beside_it() -> None:
    notice = _wordle_words.SHIPPED.with_name("scowl-copyright.txt").read_text(encoding="ascii")
    assert "Copyright 2000-2011 by Kevin Atkinson" in notice and "WordNet 1.6 Copyright 1997" in notice


def test_no_answer_is_in_both_splits() -> None:
    task = wordle()
    train, held_out = ({row["answer"] for row in task.rows(split)} for split in ("train", "eval"))
    assert len(train) == 1092 and len(held_out) == 273 and not train & held_out


THREE: dict[str, Any] = {
    "length": 3,
    "style": "small",
    "path": "configs/examples/wordle/three.txt",
    "openings": 40,
    "demonstrations": 1,
}


def test_unseen_words_are_in_no_game_of_training_and_change_nothing_else() -> None:
    plain, held = wordle(**THREE), wordle(**THREE, unseen_words=12)
    train, held_out = ([*held.rows("train")], [*held.rows("eval")])
    unseen = {row["answer"] for row in held_out if row["category"] == "unseen word"}
    assert len(unseen) == 12 and not unseen & {row["answer"] for row in train}
    seen = {row["answer"] for row in train}
    assert len(seen) == 36 and {row["category"] for row in train} == {"seen word"}
    assert all((row["answer"] in unseen) == (row["category"] == "unseen word") for row in held_out)
    bare = [{**row, "category": None} for row in plain.rows("eval")]
    assert [{**row, "category": None} for row in held_out] == bare
    kept = [row for row in plain.rows("train") if row["answer"] in seen]
    assert [row["id"] for row in train] == [row["id"] for row in kept]
    assert {row["answer"] for row in plain.rows("train")} == seen | unseen
    assert len({row["id"] for row in held.rows("train")} & {row["id"] for row in held_out}) == 0


def test_every_word_of_the_toys_game_is_on_both_sides_as_its_config_says() -> None:
    task = wordle(**THREE)
    train, held_out = ({row["answer"] for row in task.rows(split)} for split in ("train", "eval"))
    assert train == held_out and len(train) == 48
    assert len(task.rows("train")) == 1536 and len(task.rows("eval")) == 384
    said_so = " ".join((PROJECT_ROOT / "configs" / "wordle3.yaml").read_text().replace("#", " ").split())
    assert "all 48 words are answers on both sides" in said_so


def test_the_prompt_asks_for_thoughts_only_where_they_are_wanted() -> None:
    asked = [wordle(think=think).rows("train")[0]["prompt"][0]["content"] for think in (True, False)]
    assert "<think>" in asked[0] and "<think>" not in asked[1]
    small = wordle(style="small", length=3).rows("train")[0]
    assert small["prompt"] == [{"role": "user", "content": "Guess the 3-letter word."}]
    assert small["gold"][0]["content"] == f"<guess>[ {' '.join(small['answer'].upper())} ]</guess>"


def test_a_list_of_ones_own_is_the_answers_and_all_that_may_be_guessed(tmp_path: Path) -> None:
    path = listed(tmp_path / "own.txt", "# mine", "Apfel", "birne", "birne", "kiwi", "don't", "", "äpfel", "größe")
    task = wordle(path=path)
    answers = {row["answer"] for split in ("train", "eval") for row in task.rows(split)}  # type: ignore[arg-type]
    assert answers == {"apfel", "birne", "äpfel"}  # ß has no capital of one letter
    verdicts = game_of(task, "apfel", said("ÄPFEL"), said("birne"))[1].notes["verdicts"]
    assert [one["reasons"] for one in verdicts.values()][:2] == ["ÄPFEL XGGGG", "BIRNE XXXXY"]
    assert "not a word" in game_of(task, "apfel", said("crane"))[1].notes["verdicts"]["turn 1"]["reasons"]
    assert task.input_files() == [Path(path)]


@pytest.mark.parametrize("field", ["path", "dictionary"])
def test_a_missing_list_is_refused_before_it_is_hashed(tmp_path: Path, field: str) -> None:
    own = {"path": listed(tmp_path / "own.txt", "apple", "mango")}
    task = wordle(**{**own, field: str(tmp_path / "gone.txt")})
    for read in (task.input_files, lambda: asyncio.run(task.reply(Rollout.of(row_of("apple"), CRANE)))):
        with pytest.raises(TaskError, match=rf"task\.{field}: .*gone\.txt does not exist\. Give a UTF-8 text"):
            read()
    (tmp_path / "gone.txt").mkdir()
    with pytest.raises(TaskError, match=rf"task\.{field}: .*gone\.txt is no file"):
        task.input_files()


def test_words_of_other_lengths_are_counted_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = listed(tmp_path / "own.txt", "apple", "pear", "fig", "cherry", "mango", "well-known")
    assert len(wordle(path=path, split_ratio=1).rows("train")) == 2
    assert "3 words left out that have not 5 letters" in caplog.text and "1 lines left out" in caplog.text
    with pytest.raises(TaskError, match=r"no word of 7 letters .* 1 of 3, 1 of 4, 2 of 5, 1 of 6"):
        wordle(path=path, length=7).rows("train")


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"", b"#\n", b"12345\n"])
def test_a_file_without_words_is_refused_with_its_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(TaskError, match=r"bad\.txt"):
        wordle(path=str(tmp_path / "bad.txt")).rows("train")


def test_a_dictionary_of_ones_own_adds_to_the_answers(tmp_path: Path) -> None:
    path, more = listed(tmp_path / "own.txt", "apple", "mango"), listed(tmp_path / "more.txt", "grape", "fig")
    task = wordle(path=path, dictionary=more)
    assert "GRAPE" in game_of(task, "apple", said("grape"))[1].notes["verdicts"]["turn 1"]["reasons"]
    assert [file.name for file in task.input_files()] == ["own.txt", "more.txt"]
    anything = wordle(path=path, dictionary="any")
    assert "QQQQQ" in game_of(anything, "apple", said("qqqqq"))[1].notes["verdicts"]["turn 1"]["reasons"]


def test_a_table_carries_its_answers_in_a_column(tmp_path: Path) -> None:
    table = tmp_path / "words.jsonl"
    lines = [{"id": f"w{n}", "secret": word} for n, word in enumerate(["Apple", "mango", "fig", "grape"])]
    table.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    task = wordle(path=str(table), columns={"answer": "secret"}, split_ratio=1)
    answers = {row["id"]: row["answer"] for row in task.rows("train")}
    assert answers == {"w0": "apple", "w1": "mango", "w3": "grape"}
    assert game_of(task, "apple", said("mango"))[1].parts["guesses"] == 1
    with pytest.raises(TaskError, match=r"no such column\. The table has: id, secret\. Map it"):
        wordle(path=str(table)).rows("train")


FROM_HUB = """
import sys
from lib.task import load_task
task = load_task("wordle", dataset="some/words", dataset_revision=sys.argv[1], split_ratio=1.0)
print([row["answer"] for row in task.rows("train")])
"""


@pytest.mark.parametrize(("revision", "asked_for"), [("", "main"), ("a-branch", "a-branch")])
def test_a_table_on_the_hub_is_read_at_the_revision_asked_for(tmp_path: Path, revision: str, asked_for: str) -> None:
    card = b"---\nconfigs:\n- config_name: default\n  data_files: train.jsonl\n---\n"
    table = b'{"answer": "apple"}\n{"answer": "mango"}\n'
    with running_hub("some/words", {"README.md": card, "train.jsonl": table}) as url:
        env = {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
        command = [sys.executable, "-c", FROM_HUB, revision]
        done = subprocess.run(
            command, cwd=PROJECT_ROOT, env=env, capture_output=True, text=True, timeout=120, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['apple', 'mango']\n"
    assert [path.name for path in tmp_path.glob("hub/datasets--some--words/refs/*")] == [asked_for]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"length": 9}, "3 to 6 letters"),
        ({"unseen_words": 4}, "games of one word are on one side anyway"),
        ({"unseen_words": 600, "openings": 1, "answer_size": 10}, r"task\.unseen_words 600: there are 600 answers"),
        ({"unseen_words": -1, "openings": 1}, r"task\.unseen_words"),
        ({"parity": True, "style": "small"}, "exclude each other"),
        ({"dictionary": "words.csv"}, r"give a \.txt list"),
        ({"guesses": 0}, r"task\.guesses"),
        ({"correct_weight": -1}, r"task\.correct_weight"),
        ({"answer_size": 30}, r"task\.answer_size"),
    ],
)
def test_impossible_fields_say_what_to_change(params: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        wordle(**params).rows("train")


# -- demonstrations, and the starter that imitates them ---------------------------------------------------------------


@pytest.mark.parametrize(("care", "low", "high"), [(0.0, 0.1, 0.4), (0.5, 0.5, 0.7), (1.0, 1.0, 1.0)])
def test_the_careless_player_heeds_the_feedback_as_often_as_told(care: float, low: float, high: float) -> None:
    words = _wordle_words.shipped(3, 35)
    share = Counter[bool]()
    for number, answer in enumerate(words[::3]):
        guesses = careless(answer, words, 4, care, str(number))
        assert len(set(guesses)) == len(guesses) <= 4 and answer not in guesses[:-1]
        for n, guess in enumerate(guesses[1:], start=1):
            share[all(marks(before, guess) == marks(before, answer) for before in guesses[:n])] += 1
    assert low <= share[True] / share.total() <= high  # careless guesses fit by chance, too


def test_the_careless_player_stops_when_no_word_is_left() -> None:
    assert sorted(careless("cat", ("bat", "rat"), 6, 0.5, "seed")) == ["bat", "rat"]


def test_demonstrations_are_whole_games_in_the_worlds_own_words() -> None:
    task = wordle(style="small", length=3, guesses=4, demonstrations=3)
    row = task.rows("train")[0]
    assert row == wordle(style="small", length=3, guesses=4, demonstrations=3).rows("train")[0]
    assert len(row["demonstrations"]) == 3 and "demonstrations" not in wordle().rows("train")[0]
    for game in row["demonstrations"]:
        texts = [message for message in game if message["role"] == "assistant"]
        replayed, score = game_of(task, row["answer"], *texts)
        assert list(replayed.messages[1:]) == game and score.parts["valid"] == 1


def test_the_starters_tokens_of_a_game_are_those_that_a_rollout_has() -> None:
    from lib.generate import Chat
    from lib.rollout import Request, to_tokens
    from lib.starter import StarterSettings, _conversations, _texts, _tokenize, build_tokenizer

    task = wordle(style="small", length=3, guesses=4, demonstrations=2)
    rows = list(task.rows("train"))[:60]
    conversations = _conversations(rows, StarterSettings())
    tokenizer = build_tokenizer(_texts(conversations), letters=True)
    chat = Chat(tokenizer)
    assert len(conversations) == 120
    for conversation in conversations[:10]:
        row = rows[conversations.index(conversation) // 2]
        game, previous, turns = [*conversation["played"], conversation["answer"]], None, []
        for place, message in enumerate(game):
            if message["role"] == "assistant":
                said_at = len(row["prompt"]) + place - 2  # before it the world's answer to it, too
                prompt = chat.continued_ids(Request([*row["prompt"], *game[:place]], None, previous, said_at))
                output = tokenizer(message["content"] + tokenizer.eos_token)["input_ids"]
                previous = chat.turn(prompt, output, None)
                turns.append(previous)
        rollout = Rollout(row=row, messages=(*row["prompt"], *game), turns=tuple(turns))
        tokens, learned = to_tokens(rollout), _tokenize(tokenizer, conversation)
        assert learned["input_ids"] == tokens.prompt_ids + tokens.output_ids
        assert [label != -100 for label in learned["labels"]] == [False] * len(tokens.prompt_ids) + list(
            map(bool, tokens.mask)
        )


def test_every_letter_of_a_guess_is_a_token_of_its_own() -> None:
    from lib.starter import StarterSettings, _conversations, _texts, build_tokenizer

    rows = wordle(style="small", length=3, demonstrations=2).rows("train")
    tokenizer = build_tokenizer(_texts(_conversations(rows, StarterSettings())), letters=True)
    pieces = [tokenizer.decode([token]) for token in tokenizer("<guess>[ C A T ]</guess>")["input_ids"]]
    assert pieces == ["<guess>[", " C", " A", " T", " ]</guess>"]


@pytest.mark.parametrize("broken", [[], "x", [[]], [[{"role": "user", "content": "x"}]]])
def test_demonstrations_that_are_no_conversations_are_refused_by_name(broken: Any) -> None:
    from lib.starter import StarterError, StarterSettings, _conversations

    rows = list(wordle(style="small", length=3, demonstrations=1).rows("train"))[:3]
    with pytest.raises(StarterError, match=rf"row '{rows[1]['id']}': `demonstrations` must be a list of conversations"):
        _conversations([rows[0], {**rows[1], "demonstrations": broken}], StarterSettings())
