"""Does the toy policy learn to win at Wordle? The chain on configs/wordle3.yaml, and the win rate on held-out games.

Base and adapter (reloaded from disk) play the same games, paired by game. Held out are games, a word after an opening:
the words themselves are answers of training games, too. With --unseen, that many words are the answer of no game that
is trained on, and the verdict is on games of these; with 12 it was FAIL: the toy learns which words are answers, and
how to find these, not Wordle with other words. Exit status 0 = the 95 % interval of the gain in the win rate, sampled
as in training, lies above 0, and the chain took at most 15 minutes of two cores: of wall time, or of CPU time where
other programs kept the machine busy. Finished stages are skipped: a second call only prints.

    python benchmarks/wordle_gain.py
    python benchmarks/wordle_gain.py --unseen 12
"""

from __future__ import annotations

import sys

from gain import options, print_gains, run_chain, verdict

from lib.runfolder import Run


def held_out(run: Run) -> str:
    """What the games of the evaluation share with those of the training."""
    trained, asked = (list(run.read_rows(split)) for split in ("train", "eval"))
    answers, known = {row["answer"] for row in asked}, {row["answer"] for row in trained}
    games = len({row["id"] for row in asked} & {row["id"] for row in trained})
    return (
        f"held out: {len(asked)} games (a word after an opening), of which {games} are in the training; of their "
        f"{len(answers)} words {len(answers & known)} are answers in the training, too"
    )


def main() -> int:
    parser = options(__doc__, "configs/wordle3.yaml", "wordle-gain")
    parser.add_argument("--unseen", type=int, default=0, help="words that are the answer of no game of training")
    chosen = parser.parse_args()
    chosen.name += f"-unseen-{chosen.unseen}" if chosen.unseen else ""
    chain = run_chain(chosen, [f"task.unseen_words={chosen.unseen}"] if chosen.unseen else [])
    print(held_out(chain.run))
    gain = print_gains(chain.run, "win rate", "held-out games")
    if chosen.unseen:
        print_gains(chain.run, "win rate", "of them, of words that are answers in the training", "seen word")
        gain = print_gains(chain.run, "win rate", "of them, of words that are not", "unseen word")
    return verdict(chain, gain)


if __name__ == "__main__":
    sys.exit(main())
