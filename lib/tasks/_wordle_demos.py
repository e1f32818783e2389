"""Games of a careless player: what a toy policy imitates before it is trained.

Owns how that player chooses. Must not know the format of messages, rows or rewards.

    python -c "from lib.tasks._wordle_demos import careless; print(careless('cat', ('bat', 'cat', 'tar'), 4, 0.5, 'a'))"
"""

from __future__ import annotations

from functools import lru_cache
from random import Random

from lib.tasks._wordle_game import marks


@lru_cache(maxsize=16_384)  # rows are made again whenever they are read, and these take a millisecond
def careless(
    answer: str, words: tuple[str, ...], guesses: int, care: float, seed: str, opening: str = ""
) -> tuple[str, ...]:
    """The guesses of one game. A guess heeds all feedback so far with probability `care`, else it is any word.

    `opening` is a guess that was made before: its feedback counts, and it is not among those returned. No word is
    guessed twice. The player draws evenly from `words` and does not know which of them are answers.
    """
    random = Random(seed)
    said = [opening] if opening else []
    fitting, heeded, most = words, 0, guesses + len(said)
    while len(said) < most and (not said or said[-1] != answer):
        pool = words
        if random.random() < care:
            for word in said[heeded:]:
                told = marks(word, answer)
                fitting = tuple(other for other in fitting if marks(word, other) == told)
            pool, heeded = fitting or words, len(said)
        choice = random.choice(pool)
        while choice in said and len(said) < len(words):
            choice = random.choice(words if set(pool) <= set(said) else pool)
        if choice in said:
            break
        said.append(choice)
    return tuple(said[bool(opening) :])
