"""Whether an artifact answers as the trained policy does: the same tokens under base, adapter on base, and artifact.

Owns these figures, and from where on they are a fault. Must not know files, rows or rewards.

    python -c "from lib.export.agreement import limits_of; print(limits_of('merged'))"

A fault and a loss are told apart by the distance that training went. The artifact's log-probabilities less the base's,
projected on the policy's less the base's, are the share of the change that it follows: 1 for the policy, 0 for the
base, 2 for an alpha of twice the size, about 0 for other weights. Noise (rounding of a type, packing in MXFP4) points
elsewhere in a space of many thousand dimensions and hardly moves that share, however large it is; how large it is, is
said by the KL divergence and by the distance left, in units of the distance that training went.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from lib.config import ArtifactKind

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Limits(NamedTuple):
    """From where on an artifact is not the policy."""

    least: float
    most: float
    """Share of the change that it has to follow."""
    divergence: float
    """KL(policy || artifact) in nats a token, at most; or `part` of KL(policy || base), where that is more."""
    part: float


EXACT = Limits(0.75, 1.25, 0.02, 0.1)
"""Merging rounds each weight once: bfloat16 keeps 8 bits, which moves a deep model's answers by about 0.01 nats (as
lib/sync/proof.py measured for single tokens); an alpha wrong by a quarter is outside of the share."""

LOSSY = Limits(0.5, 1.5, 0.1, 1.0)
"""4 bits a weight move answers by a few hundredths of a nat where the base was packed before and only what training
changed is rounded anew. An artifact that is further from the policy than the base is has lost what was trained."""


class Agreement(NamedTuple):
    """An artifact beside the policy on the same tokens, which the policy chose greedily."""

    tokens: int
    greedy: float
    """Share of tokens that the artifact would choose too."""
    greedy_base: float
    """The same for the base."""
    divergence: float
    """KL(policy || artifact), nats a token."""
    divergence_base: float
    followed: float
    """Share of the change from base to policy; nan where training changed nothing that is seen here."""
    left: float
    """Distance from the policy in units of the base's."""

    def reasons(self, limits: Limits) -> list[str]:
        """Why these are not the policy's answers; [] where they are."""
        if not self.divergence_base > SEEN:
            return [
                f"training changed next to nothing on these prompts (KL to the base {self.divergence_base:.2g} nats a "
                f"token), so that nothing can be proven by answers: look at other prompts, or at the training"
            ]
        found = []
        if not limits.least <= self.followed <= limits.most:
            found.append(f"its answers show {self.followed:.0%} of what training changed")
        most = max(limits.divergence, limits.part * self.divergence_base)
        if not self.divergence <= most:
            found.append(f"its answers are {self.divergence:.3g} nats a token from the policy's, more than {most:.3g}")
        return found


SEEN = 1e-7
"""KL to the base, nats a token: less is the rounding of float32."""


def limits_of(kind: ArtifactKind) -> Limits:
    """By whether making it loses digits on purpose."""
    return EXACT if kind in ("adapter", "merged") else LOSSY


class Heard(NamedTuple):
    """Log-probabilities of every token of the vocabulary at the places of answers: float32 (tokens, vocabulary)."""

    logprobs: torch.Tensor


Spoken = tuple[Sequence[int], Sequence[int]]
"""Ids of a prompt, and of the answer to it."""


def listen(model: PreTrainedModel, spoken: Sequence[Spoken]) -> Heard:
    """What a model says at every place of the answers, one conversation at a time, kept on the CPU."""
    import torch

    rows = []
    with torch.inference_mode():
        for prompt, answer in spoken:
            ids = torch.tensor([[*prompt, *answer]], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
            rows.append(logits.float().log_softmax(-1).cpu())
    return Heard(torch.cat(rows))


def agreement(base: Heard, policy: Heard, artifact: Heard) -> Agreement:
    """The figures; nan, and so no proof, where the artifact says something that is no number."""
    b, a, x = base.logprobs, policy.logprobs, artifact.logprobs
    change, shown = (a - b).double(), (x - b).double()
    size = float(change.square().sum())
    chosen = a.argmax(-1)
    return Agreement(
        tokens=len(a),
        greedy=float((x.argmax(-1) == chosen).float().mean()),
        greedy_base=float((b.argmax(-1) == chosen).float().mean()),
        divergence=_divergence(a, x),
        divergence_base=_divergence(a, b),
        followed=float((change * shown).sum()) / size if size else float("nan"),
        left=float((shown - change).square().sum()) ** 0.5 / size**0.5 if size else float("nan"),
    )


def _divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    """KL(one || other), mean over places; both are log-probabilities (places, vocabulary)."""
    return float((one.exp() * (one - other)).double().sum(-1).mean())
