"""Does the toy policy learn to call functions? The chain on configs/functions_toy.yaml, and exact calls on unseen rows.

Base and adapter (reloaded from disk) answer the same requests, paired by request; an answer counts where its call has
the official verdict "right". Held out are wordings: what a request can ask for (cities, rooms, people) is known from
training. Exit status 0 = the 95 % interval of the gain in exact calls, sampled as in training, lies above 0, and the
chain took at most 15 minutes of two cores: of wall time, or of CPU time where other programs kept the machine busy.
Finished stages are skipped: a second call only prints.

    python benchmarks/functions_gain.py
"""

from __future__ import annotations

import json
import sys

from gain import options, print_gains, run_chain, verdict

from lib.runfolder import Run


def held_out(run: Run) -> str:
    """What the requests of the evaluation share with those of the training."""
    trained, asked = (list(run.read_rows(split)) for split in ("train", "eval"))
    texts = {row["prompt"][-1]["content"] for row in trained}
    calls = {json.dumps(row["ground_truth"]) for row in trained}
    same = sum(row["prompt"][-1]["content"] in texts for row in asked)
    known = sum(json.dumps(row["ground_truth"]) in calls for row in asked)
    return (
        f"held out: {len(asked)} requests, of which {same} are in the training word for word; the calls of {known} are "
        "right for others there"
    )


def main() -> int:
    chosen = options(__doc__, "configs/functions_toy.yaml", "functions-gain").parse_args()
    chain = run_chain(chosen)
    print(held_out(chain.run))
    return verdict(chain, print_gains(chain.run, "exact calls", "held-out requests"))


if __name__ == "__main__":
    sys.exit(main())
