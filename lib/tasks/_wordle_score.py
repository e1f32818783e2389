r"""What a game of Wordle is worth: the figures that rewards are made of, ours and the reference's.

Owns partial credit, the format's score and what is shown of a game. Must not know rows, weights or word lists.

    python -c "from lib.tasks._wordle_score import format_score; \
               print(format_score(['<guess>[cat]</guess>'], ('guess',)))"

The reference is the `wordle` environment of verifiers (commit 39f0675). Its figures differ from ours in the partial
credit (of the last *feedback*, and after a win there is none to the winning guess) and in what counts as solved (the
text of the guess has to be the answer in brackets, in small letters). Where its figure has no upper end, ours has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lib.task import Message
from lib.tasks._wordle_game import GREEN, YELLOW, Game, field, marks, observed


def figures(game: Game) -> dict[str, float]:
    """solved (won: 1 or 0), partial (the last valid guess, 0 to 1), turns (solved / (turns + 1), at most 0.5)."""
    solved = float(game.end == "won")
    last = game.valid[-1].marks if game.valid else ""
    return {"solved": solved, "partial": _share(last, game), "turns": solved / (len(game.moves) + 1)}


def most_partial(length: int) -> float:
    """The most that the reference's partial credit gives for feedback of the game's own."""
    return max(1.0, 0.2 * length)


def reference_figures(game: Game, texts: Sequence[str]) -> dict[str, float]:
    """The same three as the reference has them; `texts` = all that the player said, after the game's end too.

    Partial credit ends at `most_partial`: the reference reads the last "Feedback:" there is, be it in a guess, and a
    forged one there would earn 0.2 for each G without end.
    """
    guesses = [guess for text in texts if (guess := field(text, "guess")) is not None]
    solved = float(bool(guesses) and guesses[-1] == f"[{game.answer}]")
    lines = observed(game).strip().split("\n") if game.moves else []
    seen = lines[1] if len(lines) > 1 else ""
    partial = min(0.2 * seen.count(GREEN) + 0.1 * seen.count(YELLOW), most_partial(game.rules.length))
    return {"solved": solved, "partial": partial, "turns": solved / (len(texts) + 1)}


def format_score(texts: Sequence[str], fields: Sequence[str]) -> float:
    """How well messages keep to the tags, 0 to 1, their mean: the reference's formula.

    A message earns 0.4 x (share of the fields that it has, whole or in part; 0 where none is whole) + 0.2 + 0.2 if it
    begins with the first field's tag + 0.2 if it ends with the last one's.
    """
    if not texts:
        return 0.0
    total = 0.0
    for text in texts:
        present = sum(f"<{tag}>" in text or f"</{tag}>" in text for tag in fields) / len(fields)
        whole = any(field(text, tag) is not None for tag in fields)
        bare = text.strip()
        total += 0.4 * present * whole + 0.2
        total += 0.2 * bare.startswith(f"<{fields[0]}>") + 0.2 * bare.endswith(f"</{fields[-1]}>")
    return total / len(texts)


def counts(game: Game) -> dict[str, float | None]:
    """guesses and invalid (numbers of them), consistent (share of the later guesses that heed all feedback)."""
    known, valid = game.known, len(game.valid)
    heeded = [
        all(marks(earlier, word) == told for earlier, told in known[:number])
        for number, (word, _) in enumerate(known)
        if number
    ]
    consistent = sum(heeded) / len(heeded) if heeded else None
    return {"guesses": float(valid), "invalid": float(len(game.moves) - valid), "consistent": consistent}


def verdicts(game: Game) -> dict[str, dict[str, Any]]:
    """The game move by move, as notebook 2 shows it."""
    return {
        f"turn {number}": {
            "verdict": "pass" if move.word == game.answer else "fail",
            "score": _share(move.marks, game),
            "reasons": move.problem or f"{move.word.upper()} {move.marks}",
            "text": f"turn {number}",
        }
        for number, move in enumerate(game.moves, start=1)
    }


def spoken(message: Message) -> str:
    """What a message says; thoughts that the tokenizer has taken apart go back into their tags."""
    content = str(message.get("content") or "")
    thought = message.get("thinking") or message.get("reasoning_content") or message.get("reasoning")
    return f"<think>\n{thought}\n</think>\n{content}" if thought and "<think>" not in content else content


def _share(found: str, game: Game) -> float:
    return (found.count(GREEN) + 0.5 * found.count(YELLOW)) / game.rules.length
