"""A user's own task from an environment of verifiers: `-p task=configs/examples/gsm8k/gsm8k.py`.

Copied to lib/tasks/gsm8k.py it is found by its name: `-p task=gsm8k`. The real problems, from the Hugging Face Hub:
`-p task.args.dataset=openai/gsm8k`. An environment that is installed is named instead: `environment: str = "vf-gsm8k"`.
"""

from lib.task import Row
from lib.tasks.verifiers import VerifiersTask


class Gsm8k(VerifiersTask, frozen=True):
    """Word problems; the right number in the box earns 0.9, and a single box 0.1."""

    environment: str = "configs/examples/gsm8k/vf_gsm8k"
    gold: str = "The answer is \\boxed{{answer}}."

    def cheats(self, row: Row) -> dict[str, str]:
        """Beside those of every environment: many answers at once, and a box that is never closed."""
        many = " ".join(f"\\boxed{{{number}}}" for number in range(100))
        return super().cheats(row) | {"many boxes": many, "an open box": "The answer is \\boxed{"}
