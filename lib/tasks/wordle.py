"""Task `wordle`: guess a secret word in several turns, told after each guess which letters are right.

Owns the rows, the prompt and the rewards. Must not know models or trainers. The rules of the game lie in _wordle_game,
the word lists in _wordle_words.

    python -c "from lib.task import load_task; print(load_task('wordle').rows('eval')[0])"

The game is TextArena's Wordle-v0 (https://github.com/LeonGuertler/TextArena, MIT), the prompts and rewards are those of
the `wordle` environment of verifiers (https://github.com/willccbb/verifiers, MIT), of October 2025.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from lib.data import ChosenRows, ListTable, Record, RowsTask, Table, Where
from lib.places import locate
from lib.task import Message, Rollout, Row, Score, Split, TaskError
from lib.tasks import _wordle_words
from lib.tasks._wordle_cheats import cheats_for
from lib.tasks._wordle_demos import careless
from lib.tasks._wordle_game import Rules, opening, opening_text, play, reply_text, spelt
from lib.tasks._wordle_score import counts, figures, format_score, most_partial, reference_figures, spoken, verdicts

LIST = ".txt"
ANY = "any"

_HEAD = (
    "You are a competitive game player. Make sure you read the game instructions carefully, and always follow the "
    "required format.\n\nIn each turn, "
)
_THINK = "think step-by-step inside <think>...</think> tags, then follow the instructions inside"
_NO_THINK = "give only your guess inside"
_TAGS = "<guess>...</guess> tags."

WEIGHTS = {"correct_weight": "solved", "partial_weight": "partial", "turns_weight": "turns", "format_weight": "format"}
"""Field -> the part that it weighs."""


class Wordle(RowsTask, frozen=True):
    """Wordle on the shipped words, or on words of your own: a `.txt` list, or a table with the column `answer`.

    reward = correct_weight x (won) + partial_weight x (share of the last guess: 1 for a green letter, 0.5 for a yellow
    one) + turns_weight x (won / (turns + 1)) + format_weight x (tags as asked for, 0 to 1).
    """

    max_turns: int = Field(default=0, ge=0)
    """Turns of a game, invalid guesses included; 0 = as many as the rules allow."""
    length: int = Field(default=5, ge=2, le=32)
    """Letters of a word."""
    guesses: int = Field(default=6, ge=1)
    """Valid guesses of a game."""
    forgiven: int = Field(default=1, ge=0)
    """Invalid guesses in a row that cost nothing; one more ends the game."""
    answer_size: Literal[10, 20, 35, 40, 50] = 20
    """The shipped words that are answers: the SCOWL sizes up to this one (10 = the most common words); of five letters
    600, 1,365, 3,461, 3,685 or 4,442 words, of other lengths as _wordle_words says."""
    dictionary: str = ""
    """What may be guessed, beside the answers: a `.txt` list; "any" = any letters; "" = the shipped words, or with a
    `path` or `dataset` of your own the answers only."""
    think: bool = True
    """Ask for <think>…</think> before the guess."""
    style: Literal["full", "small"] = "full"
    """small = one line of prompt and guesses spelt as [ C A T ]: for the toy policy, which sees tokens, not letters."""
    openings: int = Field(default=0, ge=0)
    """Rows per answer, each with another first guess already made, which costs none; 0 = one row, and none made. The
    split is by row: a word is the answer of games on both sides."""
    unseen_words: int = Field(default=0, ge=0)
    """Words whose games are left out of training, so that the evaluation's games of them (category `unseen word`) ask
    for a word that never was an answer. It may be guessed in other games."""
    correct_weight: float = Field(default=1.0, ge=0)
    partial_weight: float = Field(default=1.0, ge=0)
    turns_weight: float = Field(default=1.0, ge=0)
    format_weight: float = Field(default=0.2, ge=0)
    parity: bool = False
    """Exactly as the reference: partial credit of the last *feedback* (after a win that of the guess before, 0.1
    after a win at once), 0.2 and 0.1 a letter, solved only by the very text [answer], its own parsing and texts. But
    feedback that a guess forges earns no more than a word of green letters."""
    demonstrations: int = Field(default=0, ge=0)
    """Games per row that a careless player has played: the toy policy's warm start imitates them."""
    demonstration_care: float = Field(default=0.5, ge=0, le=1)
    """The share of those players' guesses that heed the feedback; the others are any words."""

    @model_validator(mode="before")
    @classmethod
    def _derived(cls, values: Any) -> Any:
        """max_turns and reward_range follow from other fields where they are not set."""
        if not isinstance(values, dict):
            return values
        given = {name: info.default for name, info in cls.model_fields.items()} | values
        try:
            best = _best(given)
            turns = int(given["guesses"]) * (int(given["forgiven"]) + 1)
        except (TypeError, ValueError):
            return values  # the fields' own checks say what is wrong
        derived: dict[str, Any] = {} if "reward_range" in values or best <= 0 else {"reward_range": (0.0, best)}
        return {**values, **derived, **({} if values.get("max_turns") or turns < 1 else {"max_turns": turns})}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        best = _best(self.__dict__)
        if best == 0:
            raise ValueError(f"every weight is 0, so nothing is rewarded: set one of {', '.join(WEIGHTS)} above 0.")
        if self.reward_range[0] > 0 or self.reward_range[1] < best - 1e-9:
            raise ValueError(f"reward_range {list(self.reward_range)}: rewards lie from 0 to {best:g}. Leave it out.")
        if self.parity and self.style == "small":
            raise ValueError("parity and style: small exclude each other: the reference knows no spelt guesses.")
        if self.openings and (self.parity or self.dataset or (self.path and not self.path.endswith(LIST))):
            raise ValueError(
                "openings: drawn from a word list, and unknown to the reference: leave out parity or tables."
            )
        if self.unseen_words and not self.openings:
            raise ValueError("unseen_words: the games of one word are on one side anyway where there are no openings.")
        if self.dictionary not in ("", ANY) and not self.dictionary.endswith(LIST):
            raise ValueError(f"dictionary ({self.dictionary}): give a .txt list, one word a line, or {ANY!r}.")
        return self

    # -- rows ---------------------------------------------------------------------------------------------------------

    def rows(self, split: Split) -> Sequence[Row]:
        """The rows of a split; games of unseen words are in the evaluation only."""
        return self._seen if split == "train" and self.unseen_words else super().rows(split)

    @cached_property
    def _seen(self) -> Sequence[Row]:
        rows = super().rows("train")
        return ChosenRows(rows.__getitem__, [at for at, row in enumerate(rows) if row["answer"] not in self._unseen])

    @cached_property
    def _unseen(self) -> frozenset[str]:
        words = sorted(set(self._answers), key=_shuffled)
        if self.unseen_words >= len(words):
            raise TaskError(
                f"task.unseen_words {self.unseen_words}: there are {len(words)} answers. Leave some to train."
            )
        return frozenset(words[: self.unseen_words])

    def tables(self) -> list[Table]:
        """A word list in a shuffled order (the first rows of an alphabetical one are all a's); a table as it is."""
        if self.dataset or (self.path and not self.path.endswith(LIST)):
            return super().tables()
        words = self._listed("path") if self.path else _wordle_words.shipped(self.length, self.answer_size)
        name = Path(self.path).stem if self.path else f"scowl-{self.answer_size}"
        records = [{"id": word, "answer": word} for word in words]
        if self.openings:
            pairs = [(word, first) for word in words for first in _drawn(words, word, self.openings)]
            records = [{"id": f"{word} after {first}", "answer": word, "opening": first} for word, first in pairs]
        return [ListTable(name, sorted(records, key=lambda record: _shuffled(record["id"])))]

    def input_files(self) -> list[Path]:
        """The files of answers and of the dictionary."""
        own = [self._file("path")] if self.path.endswith(LIST) else super().input_files()
        return own + ([self._file("dictionary")] if self.dictionary not in ("", ANY) else [])

    def check_columns(self, columns: Sequence[str], where: Where) -> None:
        if "answer" not in columns:
            have = ", ".join(columns)
            where.report("answer", f"no such column. The table has: {have}. Map it: columns: {{answer: …}}")

    def row(self, record: Record, where: Where) -> Row | None:
        answer = str(record.get("answer") or "").strip().lower()
        if not _wordle_words.is_word(answer):
            where.report("answer", f"{record.get('answer')!r:.60} is no word of letters only")
            return None
        if len(answer) != self.length:
            where.drop(f"the answer has not {self.length} letters (task.length)")
            return None
        first = str(record.get("opening") or "").strip().lower()
        if first and (len(first) != self.length or not _wordle_words.is_word(first) or first == answer or self.parity):
            where.report("opening", f"{first!r:.60} is not another word of {self.length} letters, or parity is set")
            return None
        row: Row = {"id": record["id"], "prompt": self._prompt(answer, first)}
        row |= {"gold": [self._said(answer, "It can be any word.")], "answer": answer}
        row |= {"opening": first} if first else {}
        row |= {"category": f"{'un' * (answer in self._unseen)}seen word"} if self.unseen_words else {}
        games = [self._demonstration(row, f"{record['id']}:{n}") for n in range(self.demonstrations)]
        return row | ({"demonstrations": games} if games else {})

    def _prompt(self, answer: str, first: str) -> list[Message]:
        begun = opening_text(first, answer, self._openly) if first else ""
        if self.style == "small":
            return [{"role": "user", "content": f"Guess the {self.length}-letter word.{begun}"}]
        system = f"{_HEAD}{_THINK if self.think else _NO_THINK} {_TAGS}"
        return [{"role": "system", "content": system}, {"role": "user", "content": opening(self._openly) + begun}]

    def _said(self, word: str, thought: str) -> Message:
        """A guess as the policy is asked to write it."""
        guess = f"<guess>[{f'{spelt(word)} ' if self.style == 'small' else word}]</guess>"
        think = f"<think>\n{thought}\n</think>\n" if self._fields[0] == "think" else ""
        return {"role": "assistant", "content": think + guess}

    def _demonstration(self, row: Row, seed: str) -> list[Message]:
        """One game of the careless player, as messages."""
        care, first = self.demonstration_care, row.get("opening", "")
        said = careless(row["answer"], self._guessable, self.guesses, care, seed, first)
        played = [self._said(word, "Another try.") for word in said]
        told = [self._answered(row, played[: n + 1]) for n in range(len(played) - 1)]
        return [message for pair in zip(played, [*told, []], strict=True) for message in (pair[0], *pair[1])]

    # -- the game -----------------------------------------------------------------------------------------------------

    @property
    def _fields(self) -> tuple[str, ...]:
        return ("think", "guess") if self.think and self.style == "full" else ("guess",)

    @property
    def _openly(self) -> Rules:
        """The rules without the word lists, for the prompt: rows need no dictionary."""
        return Rules(self.length, self.guesses, self.forgiven, None, frozenset(), self.style == "small", self.parity)

    @cached_property
    def _rules(self) -> Rules:
        words = self._answers if self.dictionary == ANY else self._guessable
        alphabet = frozenset("".join(words)) | (_ASCII if all(map(str.isascii, words)) else frozenset())
        return self._openly._replace(allowed=None if self.dictionary == ANY else frozenset(words), alphabet=alphabet)

    @cached_property
    def _guessable(self) -> tuple[str, ...]:
        """Every word that may be guessed, in alphabetical order; with any letters allowed, the answers."""
        more: Sequence[str] = ()
        if self.dictionary not in ("", ANY):
            more = self._listed("dictionary")
        elif not self.dictionary and not self.path and not self.dataset:
            more = _wordle_words.shipped(self.length, _wordle_words.SIZES[-1])
        return tuple(sorted({*self._answers, *more}))

    @cached_property
    def _answers(self) -> tuple[str, ...]:
        """Every row's answer, read from the records: rows are made from these."""
        found = (record.get("answer") for table in self.tables() for record in map(self.renamed, table))
        words = (str(answer or "").strip().lower() for answer in found)
        return tuple(word for word in words if len(word) == self.length and _wordle_words.is_word(word))

    def _listed(self, name: str) -> tuple[str, ...]:
        return _wordle_words.read_words(self._file(name), self.length)

    def _file(self, name: str) -> Path:
        """The list that a field names. Raises TaskError where it is not there."""
        return _wordle_words.there(locate(getattr(self, name)), name)

    def _answered(self, row: Row, messages: Sequence[Message]) -> list[Message]:
        """The world's next message, from the player's own messages and nothing else."""
        texts = [spoken(message) for message in messages if message["role"] == "assistant"]
        game = play(row["answer"], texts, self._rules, row.get("opening", ""))
        return [] if game.end else [{"role": "user", "content": reply_text(game)}]

    async def reply(self, rollout: Rollout) -> list[Message]:
        """The feedback to the last guess; [] where the game is over."""
        return self._answered(rollout.row, rollout.messages[len(rollout.row["prompt"]) :])

    # -- the reward ---------------------------------------------------------------------------------------------------

    async def score(self, rollout: Rollout) -> Score:
        """Weighted sum of the parts `solved`, `partial`, `turns` and `format`.

        More parts: valid (0 = the game was ended by invalid guesses, or cut off), guesses and invalid (their numbers),
        consistent (share of the guesses after the first that heed all feedback). A message that was cut off is no move.
        """
        messages = rollout.messages[len(rollout.row["prompt"]) :]
        texts = [spoken(message) for message in messages if message["role"] == "assistant"]
        half = bool(rollout.turns and rollout.turns[-1].stop == "length")
        cut = half or rollout.stop == "length"  # there may have been no room for a further turn
        moves = texts[:-1] if half and not self.parity else texts
        game = play(rollout.row["answer"], moves, self._rules, rollout.row.get("opening", ""))
        weighed = reference_figures(game, texts) if self.parity else figures(game)
        weighed["format"] = format_score(texts, self._fields)
        reward = sum(getattr(self, weight) * weighed[part] for weight, part in WEIGHTS.items())
        parts = {**weighed, "valid": float(game.end != "invalid" and not cut), **counts(game)}
        end = game.end or ("cut off" if cut else "unfinished")
        return Score(reward=reward, parts=parts, notes={"answer": game.answer, "end": end, "verdicts": verdicts(game)})

    def cheats(self, row: Row) -> dict[str, str]:
        """Answers that speak of the word without guessing it, guess many words at once, or forge the world's turn."""
        other = next((word for word in self._guessable if word != row["answer"]), "")
        wrong = self._said(other, "It can be any word.")["content"] if other else "<guess>[]</guess>"
        right, mistaken = (f"[{spelt(word) if self.style == 'small' else word}]" for word in (row["answer"], other))
        return cheats_for(row["answer"], right, mistaken, wrong, self.parity)


_ASCII = frozenset("abcdefghijklmnopqrstuvwxyz")


def _best(fields: dict[str, Any]) -> float:
    """The highest reward: a win at once earns half of turns_weight."""
    partial = most_partial(int(fields["length"])) if fields["parity"] else 1.0
    highest = {"solved": 1.0, "partial": partial, "turns": 0.5, "format": 1.0}
    return sum(float(fields[weight]) * highest[part] for weight, part in WEIGHTS.items())


def _shuffled(word: str) -> bytes:
    return hashlib.blake2b(word.encode(), digest_size=8).digest()


def _drawn(words: Sequence[str], answer: str, count: int) -> list[str]:
    """Other words to begin a game with, the same ones every time."""
    return sorted((word for word in words if word != answer), key=lambda word: _shuffled(f"{answer} {word}"))[:count]
