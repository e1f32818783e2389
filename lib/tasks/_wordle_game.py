"""The game of Wordle: feedback, which guesses count, and the state of a game from what the player said.

Owns the rules (those of TextArena 0.7.4's Wordle-v0) and the wording of the world's answers. Must not know rows,
rewards or word lists.

    python -c "from lib.tasks._wordle_game import marks; print(marks('papal', 'apple'))"
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from lib.tasks._functions_parse import without_thinking

GREEN, YELLOW, GREY = "G", "Y", "X"

End = Literal["", "won", "lost", "invalid"]
"""How a game stands: "" = it goes on; invalid = ended by too many invalid guesses in a row."""

_BRACKETS = re.compile(r"\[(\w+)\]")
_SPELT = re.compile(r"\[ ?(\w(?: ?\w)*+) ?\]")  # possessive: a megabyte of letters is looked at once

GAME = "\n[GAME] "
INVALID = "invalid"
"""All that is said to an invalid guess where guesses are spelt: a toy reads new words byte by byte."""


class Rules(NamedTuple):
    """What decides a game, beside its answer."""

    length: int
    guesses: int
    forgiven: int
    """Invalid guesses in a row that cost nothing; one more ends the game."""
    allowed: frozenset[str] | None
    """The words that may be guessed; None = any letters of the alphabet."""
    alphabet: frozenset[str]
    spelt: bool
    """Whether guesses are written as [ C A T ], every letter with a space before it: one token, wherever it stands."""
    parity: bool
    """The reference's parsing and its very texts, slips included."""


class Move(NamedTuple):
    """One thing that the player said."""

    said: str
    """The guess as it was written."""
    word: str = ""
    """The guessed word; "" where the guess is invalid."""
    marks: str = ""
    """G, Y and X, one a letter."""
    problem: str = ""
    """Why the guess is invalid."""


class Game(NamedTuple):
    """A game as far as it has been played."""

    answer: str
    rules: Rules
    moves: tuple[Move, ...]
    end: End
    opening: str = ""
    """A guess that was made before the player came; it costs none."""

    @property
    def valid(self) -> list[Move]:
        return [move for move in self.moves if not move.problem]

    @property
    def known(self) -> list[tuple[str, str]]:
        """(word, marks) of the opening and of every valid guess."""
        first = [(self.opening, marks(self.opening, self.answer))] if self.opening else []
        return first + [(move.word, move.marks) for move in self.valid]


def marks(guess: str, answer: str) -> str:
    """G (right letter, right place), Y (right letter, wrong place) or X for each letter of the guess.

    Greens are dealt out first; then, from left to right, a letter is Y while the answer has one of it left.
    """
    left = [theirs for ours, theirs in zip(guess, answer, strict=True) if ours != theirs]
    found = []
    for ours, theirs in zip(guess, answer, strict=True):
        if ours == theirs:
            found.append(GREEN)
        elif ours in left:
            left.remove(ours)
            found.append(YELLOW)
        else:
            found.append(GREY)
    return "".join(found)


def field(text: str, tag: str) -> str | None:
    """What stands in the first <tag>…</tag> of a text, without space around it; None = no such pair."""
    start = text.find(f"<{tag}>")
    end = text.find(f"</{tag}>", start)
    return None if start < 0 or end < 0 else text[start + len(tag) + 2 : end].strip()


def play(answer: str, texts: Sequence[str], rules: Rules, opening: str = "") -> Game:
    """The game that the player's messages make; what is said after its end does not count.

    A guess is no move where it stands in the thoughts, finished or not; with parity, as in the reference, it is.
    """
    moves: list[Move] = []
    guessed = {opening} if opening else set[str]()
    latest, invalid, valid = "None", 0, 0
    end: End = ""
    for text in texts:
        if end:
            break
        said = field(text if rules.parity else _answer(text), "guess")
        if rules.parity:  # the reference takes an earlier guess where a message has none
            said = latest = latest if said is None else said
        move = _move(said, answer, guessed, rules)
        moves.append(move)
        invalid = invalid + 1 if move.problem else 0
        valid += not move.problem
        guessed.add(move.word)
        if invalid > rules.forgiven:
            end = "invalid"
        elif move.word:
            end = "won" if move.word == answer else "lost" if valid >= rules.guesses else ""
    return Game(answer, rules, tuple(moves), end, opening)


def _answer(text: str) -> str:
    """What a message says after its thoughts. Harmony's markup is left in a message only where no answer follows."""
    return "" if "<|channel|>" in text else without_thinking(text)


def _move(said: str | None, answer: str, guessed: set[str], rules: Rules) -> Move:
    if said is None:
        return Move("", problem="There is no guess between <guess> and </guess>.")
    found = (_SPELT if rules.spelt else _BRACKETS).search(_bracketed(said))
    if found is None:
        problem = "You tried submitting a word in the wrong format. Please make sure to use squared brackets."
        return Move(said, problem=problem)
    written = found[1].replace(" ", "") if rules.spelt else found[1]
    word = written.lower()
    problem = _problem(word, written, guessed, rules)
    return Move(said, problem=problem) if problem else Move(said, word, marks(word, answer))


def _bracketed(said: str) -> str:
    return said if "[" in said or "]" in said else f"[{said}]"


def _problem(word: str, written: str, guessed: set[str], rules: Rules) -> str:
    if len(word) != rules.length:
        return f"Your word must be exactly {rules.length} letters."
    if word in guessed:
        return f"You have already guessed '{word}' before. Please try a different word."
    if rules.parity:
        return "" if _known(word, rules) else f"'{word}' is not an English word."
    # Look-alikes do not pass, not even the Kelvin sign, which is a k once it is made small.
    plain = written.isascii() or not word.isascii()
    return "" if plain and _known(word, rules) else "That is not a word of the game's list."


def _known(word: str, rules: Rules) -> bool:
    return word in rules.allowed if rules.allowed is not None else rules.alphabet.issuperset(word)


def reply_text(game: Game) -> str:
    """What the world says to the last move of a game that goes on."""
    if game.rules.parity:
        return observed(game)
    move = game.moves[-1]
    if move.problem:
        return INVALID if game.rules.spelt else _invalid(move.problem)
    return _feedback(move.word, move.marks, game.rules, game.rules.guesses - len(game.valid))


def opening_text(word: str, answer: str, rules: Rules) -> str:
    """The first guess of a game that has one, as it stands at the end of the prompt."""
    feedback = _feedback(word, marks(word, answer), rules, rules.guesses)
    return f"\n{feedback}" if rules.spelt else f"{GAME}You submitted [{word}].\nFeedback:{feedback}"


def _feedback(word: str, found: str, rules: Rules, left: int) -> str:
    if rules.spelt:
        return f"{spelt(word)}\n{spelt(found)}"
    return f"\n{' '.join(word.upper())}\n{' '.join(found)}\nYou have {left} guesses left."


def spelt(word: str) -> str:
    """A word in capital letters with a space before each."""
    return "".join(f" {letter}" for letter in word.upper())


def _invalid(problem: str) -> str:
    advice = "Please resubmit a valid move and remember to follow the game rules to avoid penalties."
    return f"You attempted an invalid move. Reason: {problem} {advice}"


def observed(game: Game) -> str:
    """The reference's message after the last move: all that follows the last "Feedback:", or everything without one.

    After an invalid guess it repeats the last feedback; after a win it is the feedback to the guess *before*.
    """
    seen, left = opening(game.rules), game.rules.guesses
    last = len(game.moves) - 1
    for number, move in enumerate(game.moves):
        seen += GAME + _bracketed(move.said).replace("[Player]", "").replace("[GAME]", "")
        if move.problem:
            seen += GAME + _invalid(move.problem) if number < last or game.end != "invalid" else ""
        elif move.word != game.answer:
            left -= 1
            seen += f"{GAME}You submitted [{move.word}].\nFeedback:{_feedback(move.word, move.marks, game.rules, left)}"
    return seen.split("Feedback:")[-1]


def opening(rules: Rules) -> str:
    """The rules as the player reads them: TextArena's text (MIT licence)."""
    return (
        f"{GAME}You are Playing Wordle.\nA secret {rules.length}-letter word has been chosen. You have {rules.guesses} "
        "attempts to guess it.\nFor each guess, wrap your word in square brackets (e.g., '[apple]').\n"
        "Feedback for each letter will be given as follows:\n  - G (green): correct letter in the correct position\n"
        "  - Y (yellow): letter exists in the word but in the wrong position\n"
        "  - X (wrong): letter is not in the word\nEnter your guess to begin.\n"
    )
