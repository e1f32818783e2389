"""Canaries: fixed prompts by whose log-probabilities a worker proves which weights it serves.

Owns which prompts they are, what the actor's model says about them, and when a worker's answer is a proof. Must not
know how a worker is asked.

    python -c "from lib.sync.proof import compare; from lib.roles import Canary; \
               print(compare(Canary(1, [[5, 6]], [[-1.0]]), [[-1.0002]], tolerance=1e-3))"
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain, cycle, islice
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from lib.roles import Canary, Proof
from lib.sync.errors import SyncError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BLOCK = 32
"""Tokens of a block of the workers' cache where the config does not say: vLLM's CPU backend takes multiples of 32 (its
own choice of 128 is longer than many prompts, which a group then does not share), CUDA multiples of 16."""

SHORT = 6
"""Tokens of a short canary."""

TAIL = 2
"""Tokens at the end of a long canary that a worker answers through its cache of keys and values."""


class Noise(NamedTuple):
    """How far apart two right implementations are, by the type of the weights."""

    tolerance: float
    """The largest |difference| of one token that still proves the weights."""
    usual: float
    """Root mean square of the differences, at most: what a change must stand out from to be told from none."""


NOISE = {"float32": Noise(1e-3, 2e-5), "bfloat16": Noise(0.5, 5e-2), "float16": Noise(0.1, 1e-2)}
"""Seen on a CPU with random weights: float32 at most 3e-5 at 200 million parameters (1e-6 at one million); bfloat16
0.07 and 0.02 root mean square at 50 million (0.005 and 0.002 at 70,000), float16 a tenth of that. 16-bit types round
every activation, so a deep model with sharp answers gets several times that; an adapter merged in such a type also
loses what is smaller than the weights' own last digit."""

STANDS_OUT = 20.0
"""A change whose Euclidean norm is this many times a token's noise is one that a worker must have followed: the noise
then moves the share below by 0.05, and a false alarm is five times that."""

FOLLOWED = (0.75, 1.25)
"""The share of such a change that a worker has to show."""

CACHE_NOISE = 25.0
"""Times the root mean square of the differences at a prompt's other tokens: more than that, at the tokens that are read
through the cache, is no noise. (A kept cache: 300 times and more, clean syncs at most 8.)"""

CACHE_SHARE = 0.1
"""And that much of the tokens' change, or the cache is not what is wrong."""


def make_canaries(prompts: Sequence[Sequence[int]], block: int, longest: int, short: int = 0) -> list[list[int]]:
    """Prompts of token ids, made from real ones: the same for the same arguments.

    The first fills a block of the KV cache and a little (as far as `longest`, the tokens that an engine takes, allows),
    and it begins like a real prompt, so that what a worker has cached of those is under test. Then `short` ones that
    begin anywhere. Actor and workers compute them all at every sync: on a CPU the first alone is a third of its cost.
    """
    pool = [list(prompt) for prompt in prompts if prompt]
    if not pool:
        raise SyncError("canaries are made from real prompts, and there are none")
    random = Random(0)
    flat = list(islice(chain.from_iterable(pool), 100_000))
    wanted = min(block + TAIL + 1, longest - 1)
    places = [random.randrange(max(1, len(flat) - SHORT)) for _ in range(short)]
    first = list(islice(chain(pool[0], cycle(flat)), wanted))
    return [first, *(flat[place : place + min(SHORT, wanted)] for place in places)]


def canary_of(model: PreTrainedModel, version: int, prompts: Sequence[Sequence[int]]) -> Canary:
    """What this model says about the prompts now; dropout is off meanwhile. Prompts of one length go together."""
    import torch

    answers: dict[int, list[float]] = {}
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            for length in sorted({len(prompt) for prompt in prompts}):
                places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
                ids = torch.tensor([list(prompts[place]) for place in places], device=model.device)
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
                values = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
                answers |= zip(places, values.tolist(), strict=True)
    finally:
        model.train(training)
    return Canary(version, [list(prompt) for prompt in prompts], [answers[place] for place in range(len(prompts))])


def compare(
    canary: Canary,
    answered: Sequence[Sequence[float]],
    tolerance: float | None = None,
    before: Canary | None = None,
    dtype: str = "float32",
) -> Proof:
    """Whether a worker's answer proves the canary's weights.

    No token may differ by more than `tolerance` (None = by `dtype`, the type that the worker serves in). A step of a
    small learning rate moves less than that: so where the actor's answer differs from `before`'s (the weights that the
    worker had) by more than noise, the worker's has to have moved with it, prompt by prompt, and apart for the tokens
    that it reads through its cache. Steps that are too small to tell add up: give as `before` the last weights that the
    worker was seen to follow (Proof.followed).
    """
    lengths = [len(row) for row in canary.logprobs]
    if not sum(lengths) or [len(row) for row in answered] != lengths:
        return Proof(canary.version, False, math.inf, "the answer does not have one value for every canary token")
    noise = NOISE[dtype]
    limit = noise.tolerance if tolerance is None else tolerance
    apart = [abs(one - other) for row, served in zip(canary.logprobs, answered, strict=True)
             for one, other in zip(row, served, strict=True)]  # fmt: skip
    if not all(map(math.isfinite, apart)):
        return Proof(canary.version, False, math.inf, "a log-probability is not a number")
    worst = max(apart)
    if worst > limit:
        why = f"log-probabilities differ by up to {worst:.3g}, more than {limit:g}"
        return Proof(canary.version, False, worst, why)
    followed = False
    if before is not None and before.prompts == canary.prompts:
        for share in _shares(canary.logprobs, answered, before.logprobs, noise.usual):
            if not FOLLOWED[0] <= share <= FOLLOWED[1]:
                why = f"it shows {share:.0%} of the change since version {before.version}: old weights, or a mixture"
                return Proof(canary.version, False, worst, why)
            followed = True
        if any(map(_old_cache, canary.logprobs, answered, before.logprobs)):
            why = f"what it reads through its cache is not from these weights, but from version {before.version} or so"
            return Proof(canary.version, False, worst, why)
    return Proof(canary.version, True, worst, followed=followed)


def _shares(
    now: Sequence[Sequence[float]], served: Sequence[Sequence[float]], then: Sequence[Sequence[float]], usual: float
) -> list[float]:
    """How much of the change from `then` to `now` is served, for every part of a canary where that can be told.

    0 = none, 1 = all: the projection of the served change on the real one.
    """
    shares = []
    for rows in zip(now, served, then, strict=True):
        tokens = list(zip(*rows, strict=True))
        for part in (tokens[:-TAIL], tokens[-TAIL:]):
            size = sum((new - old) ** 2 for new, _, old in part)
            if size > (STANDS_OUT * usual) ** 2:
                shares.append(sum((new - old) * (seen - old) for new, seen, old in part) / size)
    return shares


def _old_cache(now: Sequence[float], served: Sequence[float], then: Sequence[float]) -> bool:
    """Whether the tokens that are read through the cache are wrong where the others are right.

    New weights on top of old keys and values may show any share of a change, in any direction. But the tokens before
    tell how much two right implementations differ in this very answer.
    """
    if len(now) <= 2 * TAIL:
        return False
    apart = [new - seen for new, seen in zip(now, served, strict=True)]
    noise = math.hypot(*apart[:-TAIL]) / math.sqrt(len(apart) - TAIL)
    wrong = math.hypot(*apart[-TAIL:])
    change = math.hypot(*(new - old for new, old in zip(now[-TAIL:], then[-TAIL:], strict=True)))
    return wrong > CACHE_SHARE * change and wrong / math.sqrt(TAIL) > CACHE_NOISE * noise
