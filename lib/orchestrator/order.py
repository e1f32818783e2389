"""Which rows the generation batches hold: a pure function of the seed and of how many batches were consumed.

Owns the order of the data; it is the one that TRL's sampler gives the local backend. Must not know what a row is.

    python -c "from lib.orchestrator.order import DataOrder; print(DataOrder(range(8), 3, seed=0).batch(2))"
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

_MT_WORDS = 624
"""Of the Mersenne twister's state."""


class DataOrder:
    """Batches of rows without end: every epoch is a new permutation, an incomplete batch at its end is dropped."""

    def __init__(self, rows: Sequence[int], prompts: int, seed: int) -> None:
        """`rows`: numbers of the rows to train on; `prompts`: how many of them a batch holds."""
        if len(rows) < prompts:
            raise ValueError(f"a batch of {prompts} prompts cannot be filled from {len(rows)} rows")
        self._rows, self._prompts, self._seed = rows, prompts, seed
        self._per_epoch = len(rows) // prompts
        self._restart()

    def batch(self, index: int) -> list[int]:
        """The rows of one generation batch, one for every group; quick for batches asked in order."""
        epoch, place = divmod(index, self._per_epoch)
        if epoch not in self._known and epoch < self._drawn:
            self._restart()
        while self._drawn <= epoch:
            self._known[self._drawn] = next(self._permutations)
            self._known.pop(self._drawn - 2, None)  # batches of two epochs at most are open side by side
            self._drawn += 1
        order = self._known[epoch]
        return [self._rows[i] for i in order[place * self._prompts : (place + 1) * self._prompts]]

    def _restart(self) -> None:
        self._permutations = permutations(len(self._rows), self._seed)
        self._known: dict[int, list[int]] = {}
        self._drawn = 0


def permutations(count: int, seed: int) -> Iterator[list[int]]:
    """What successive `torch.randperm(count, generator=...)` give after `manual_seed(seed)`, without torch.

    MT19937 seeded by Knuth's generator (Matsumoto and Nishimura 1998, init_genrand), and a Fisher-Yates shuffle that
    takes the remainder of a 32-bit draw (ATen's randperm_cpu, for fewer than 2^32 / 20 numbers).
    """
    words = [seed & 0xFFFFFFFF]
    for number in range(1, _MT_WORDS):
        words.append((1812433253 * (words[-1] ^ (words[-1] >> 30)) + number) & 0xFFFFFFFF)
    twister = Random()
    twister.setstate((3, (*words, _MT_WORDS), None))
    while True:
        order = list(range(count))
        for place in range(count - 1):
            other = place + twister.getrandbits(32) % (count - place)
            order[place], order[other] = order[other], order[place]
        yield order
