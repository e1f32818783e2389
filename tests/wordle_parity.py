"""Is our Wordle the reference's? Feedback and whole games against TextArena 0.7.4, in an environment of its own.

    python3.11 -m venv /tmp/wordle_parity
    /tmp/wordle_parity/bin/pip install textarena==0.7.4 pydantic==2.14.3 pyyaml numpy
    PYTHONPATH=. /tmp/wordle_parity/bin/python tests/wordle_parity.py

Feedback: every one of `--pairs` random pairs over few letters, so that most have repeated ones. Games: random players
who also break the rules, in the format of the `wordle` environment of verifiers (commit 39f0675) around TextArena's
game; with `parity: true` our messages and all four rewards must be the same, to the letter, but for partial credit
above that of five green letters, which forged feedback earns there. NLTK's corpora cannot be had without the network,
so that both sides get the words of our own list. Exit status 0 = no difference.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
from typing import Any

from lib.task import Rollout, Row, load_task
from lib.tasks import _wordle_words
from lib.tasks._wordle_game import marks
from lib.tasks.wordle import Wordle

VERSION = "0.7.4"


def textarena_game(words: list[str], length: int) -> Any:
    """TextArena's environment with our words for NLTK's, in its default wrappers."""
    import nltk

    class Words:
        @staticmethod
        def words(_: str = "en") -> list[str]:
            return words

    nltk.download = lambda *_, **__: True
    nltk.pos_tag = lambda some: [(word, "NN") for word in some]
    nltk.corpus.words = Words
    from importlib.metadata import version

    import textarena
    from textarena.envs.Wordle.env import WordleEnv
    from textarena.wrappers import ActionFormattingWrapper, LLMObservationWrapper

    if version("textarena") != VERSION:
        raise SystemExit(f"textarena {version('textarena')} is installed: this compares with {VERSION}")
    assert textarena
    game = WordleEnv(word_length=length, num_guesses=6)
    game.word_list = words
    game._check_word = set(words).__contains__  # its own dictionaries hold more words than ours
    return ActionFormattingWrapper(LLMObservationWrapper(game))


def fresh(game: Any, answer: str) -> Any:
    """The game from its beginning, with this answer; the wrapper's memory of the game before is cleared."""
    game.env.full_observations = {}
    game.reset(num_players=1)
    game.state.game_state["secret_word"] = answer
    return game


def differing_feedback(pairs: int, rng: random.Random) -> int:
    """How many of the pairs have other feedback."""
    games = {length: textarena_game(["x" * length], length) for length in (3, 5, 8)}
    wrong = 0
    for number in range(pairs):
        length = (3, 5, 8)[number % 3]
        letters = "abcdefghijklmnopqrstuvwxyz"[: rng.choice((2, 3, 4, 26))]
        answer, guess = ("".join(rng.choices(letters, k=length)) for _ in range(2))
        game = games[length]
        if number < 3:
            game.reset(num_players=1)
        game.state.game_state["secret_word"] = answer
        wrong += "".join(game._evaluate_guess(guess)) != marks(guess, answer)
    return wrong


# -- the environment around the game, in our own words ----------------------------------------------------------------


def parsed(text: str) -> str | None:
    found = re.search(r"<guess>\s*(.*?)\s*</guess>", text, re.DOTALL)
    return found[1].strip() if found else None


def latest(said: list[str]) -> str | None:
    return next((guess for text in reversed(said) if (guess := parsed(text)) is not None), None)


def reference_game(game: Any, answer: str, say: list[str]) -> tuple[list[str], list[str], bool]:
    """(what the player said, what the world answered, whether it ended) when the player says `say` in turn."""
    fresh(game, answer)
    game.get_observation()
    said: list[str] = []
    told: list[str] = []
    for text in say:
        said.append(text)
        done, _ = game.step(str(latest(said)))
        told.append(game.get_observation()[1].split("Feedback:")[-1])
        if done:
            return said, told, True
    return said, told, False


def reference_reward(answer: str, said: list[str], told: list[str], fields: tuple[str, ...]) -> dict[str, float]:
    solved = float(latest(said) == f"[{answer}]")
    lines = told[-1].strip().split("\n")
    partial = 0.2 * lines[1].count("G") + 0.1 * lines[1].count("Y") if len(lines) > 1 else 0.0
    partial = min(partial, 1.0)  # ours ends where five green letters do; theirs has no end, for feedback that is forged
    form = [reference_format(text, fields) for text in said]
    return {"solved": solved, "partial": partial, "turns": solved / (len(said) + 1), "format": sum(form) / len(form)}


def reference_format(text: str, fields: tuple[str, ...]) -> float:
    whole = [re.search(rf"<{tag}>\s*(.*?)\s*</{tag}>", text, re.DOTALL) is not None for tag in fields]
    seen = [one or f"<{tag}>" in text or f"</{tag}>" in text for one, tag in zip(whole, fields, strict=True)]
    total = 0.4 * sum(seen) / len(fields) if any(whole) else 0.0
    bare = text.strip()
    return total + 0.2 + 0.2 * bare.startswith(f"<{fields[0]}>") + 0.2 * bare.endswith(f"</{fields[-1]}>")


# -- players ----------------------------------------------------------------------------------------------------------


def talk(rng: random.Random, words: list[str], answer: str) -> str:
    """One message of a player who mostly plays and sometimes does not."""
    word = rng.choice([answer, *rng.choices(words, k=6), *rng.choices(words[:4], k=3)])
    odd = ("zzzzz", "abc", "", "?????", "as there", "[Player]", "12345", "crane]", "[two] [words]", "none", "Kings")
    odd += ("Feedback:\nx\nG Y G X G", f"Feedback:\n{word}\n" + "G" * rng.choice((5, 50)), "Feedback:")
    guess = rng.choice([f"[{word}]"] * 8 + [word, word.upper(), f"[{word.upper()}]", f" [ {word} ]\n", *odd])
    form = rng.choice(["<guess>{}</guess>"] * 6 + ["<guess>{}", "{}", "<guess>{}</guess> or <guess>[other]</guess>"])
    thought = rng.choice(["<think>\nhm\n</think>\n"] * 4 + ["", "<think>hm", "well, "])
    return thought + form.format(guess) + rng.choice(["", "", "\n", " done"])


def our_game(task: Wordle, row: Row, say: list[str]) -> tuple[Rollout, list[str], bool]:
    """The same as `reference_game` on our side; the world's last message, which ends a game unseen, is left out."""
    messages: list[Any] = []
    told: list[str] = []
    for text in say:
        messages.append({"role": "assistant", "content": text})
        answer = asyncio.run(task.reply(Rollout.of(row, *messages)))
        if not answer:
            return Rollout.of(row, *messages), told, True
        told.append(answer[0]["content"])
        messages += answer
    return Rollout.of(row, *messages), told, False


def differing_games(games: int, think: bool, rng: random.Random) -> list[str]:
    """What is not the same in random games, in words."""
    task = load_task("wordle", parity=True, think=think)
    assert isinstance(task, Wordle)
    fields = ("think", "guess") if think else ("guess",)
    words = list(_wordle_words.shipped(5, _wordle_words.SIZES[-1]))
    theirs = textarena_game(words, 5)
    wrong: list[str] = []
    rows = list(task.rows("train"))
    opening = fresh(theirs, "crane").get_observation()[1]
    if opening != rows[0]["prompt"][1]["content"]:
        wrong.append("the opening")
    for _ in range(games):
        row = rng.choice(rows)
        say = [talk(rng, words, row["answer"]) for _ in range(14)]
        said, told, ended = reference_game(theirs, row["answer"], say)
        rollout, ours, over = our_game(task, row, say)
        if over != ended or ours != told[: len(ours)] or len(rollout.turns) != len(said):
            wrong.append(f"messages of {row['answer']}: {said} -> {told}, ours {ours}")
            continue
        parts = asyncio.run(task.score(rollout)).parts
        expected = reference_reward(row["answer"], said, told, fields)
        if any(abs(float(parts[name] or 0) - value) > 1e-9 for name, value in expected.items()):
            wrong.append(f"rewards of {row['answer']}: {said} -> {expected}, ours {parts}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--games", type=int, default=2_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    pairs = differing_feedback(options.pairs, rng)
    games = [text for think in (True, False) for text in differing_games(options.games, think, rng)]
    for text in games[:5]:
        print(text)
    print(f"feedback: {pairs} of {options.pairs} pairs differ; games: {len(games)} of {2 * options.games} differ")
    return 1 if pairs or games else 0


if __name__ == "__main__":
    sys.exit(main())
