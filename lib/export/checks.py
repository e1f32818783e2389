"""What is asked of an artifact, one question each: weights, answers, prompts, reward.

Owns when an answer is good enough, and how it is said. Must not know where the figures come from.

    python -c "from lib.export.checks import CHECKS; print(*CHECKS)"
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.config import ArtifactKind
from lib.export.agreement import SEEN, Agreement, limits_of
from lib.export.modelfile import Modelfile
from lib.export.template import Prompts, conversations, differences, stop_texts
from lib.export.weights import Weights
from lib.generate import Chat
from lib.paired import compare, summarize
from lib.task import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECKS = ("weights", "answers", "prompts", "reward")

_WIDER = "Set export.dtype to base with a float32 base, or serve the adapter beside the base"


class Check(NamedTuple):
    """One question, and the answer."""

    name: str
    """weights, answers, prompts or reward."""
    passed: bool | None
    """None = it could not be looked at, or does not apply."""
    said: str
    figures: Mapping[str, Any]


def not_asked(name: str) -> Check:
    return Check(name, None, "not asked: weights or prompts are wrong already", {})


ALL = 0.995
"""Share of a change from which on it is not said how much it is."""


def weights_check(found: Weights, kind: ArtifactKind) -> Check:
    """Whether an artifact's weights are what was trained."""
    reasons = found.reasons()
    figures: dict[str, Any] = {
        "tensors": found.tensors,
        "adapted": found.adapted,
        "changed": found.changed,
        "wrong": len(found.wrong),
    }
    shares = {"kept": found.plain.share, "kept_packed": found.packed.share}
    figures |= {name: share for name, share in shares.items() if not math.isnan(share)}
    if reasons:
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        return Check("weights", None if found.unchanged else False, f"{reasons[0]}{more}", figures)
    if kind == "adapter" or not found.adapted:
        return Check("weights", True, f"the {found.tensors} trained tensors, with their settings", figures)
    parts = {"kept": found.plain.share, "kept in packed experts": found.packed.share}
    kept = "".join(f", {share:.0%} of the change {what}" for what, share in parts.items() if share < ALL)
    said = f"{found.changed} of {found.adapted} adapted tensors differ from the base, "
    said += f"{found.tensors - found.adapted} others do not"
    return Check("weights", True, said + kept, figures)


def answers_check(found: Agreement, kind: ArtifactKind, weights: Weights) -> Check:
    """Whether an artifact answers as the policy does; `weights` tell a loss in rounding from a fault."""
    limits = limits_of(kind)
    reasons = found.reasons(limits)
    figures = found._asdict()
    if reasons and not found.divergence_base > SEEN and found.divergence <= limits.divergence:
        return Check("answers", None, reasons[0], figures)
    if reasons:
        lost = kind != "adapter" and not weights.reasons() and found.divergence_base > 0
        hint = f" (the weights are what merging gives: it is lost in their rounding. {_WIDER})" if lost else ""
        return Check("answers", False, "; ".join(reasons) + hint, figures)
    said = (
        f"{found.greedy:.1%} of {found.tokens} greedy tokens (base {found.greedy_base:.1%}), KL {found.divergence:.2g} "
        f"(base {found.divergence_base:.2g}), {found.followed:.0%} of the change"
    )
    return Check("answers", True, said, figures)


def prompts_check(policy: Chat, artifact: Chat, chats: Sequence[Sequence[Message]]) -> Check:
    """Whether two chats render the same bytes and ids, and end an answer with the same tokens."""
    figures: dict[str, Any] = {"chats": len(chats) + len(conversations())}
    ends = [stop_texts(one.tokenizer, sorted(one.end_ids)) for one in (policy, artifact)]
    figures["stops"] = list(ends[1])
    if ends[0] != ends[1] or policy.end_ids != artifact.end_ids:
        said = f"answers end with {', '.join(ends[1])} in place of {', '.join(ends[0])}"
        return Check("prompts", False, said, figures)
    known, own = policy.tokenizer.get_vocab(), artifact.tokenizer.get_vocab()
    if known != own:
        moved = sorted(word for word in known.keys() | own.keys() if known.get(word) != own.get(word))
        one = f"{moved[0]!r} {own.get(moved[0])} in place of {known.get(moved[0])}"
        return Check("prompts", False, f"{len(moved)} tokens have other numbers ({one})", figures)
    ours, theirs = Prompts(policy.tokenizer), Prompts(artifact.tokenizer)
    for chat in (*chats, *conversations()):
        expected, made = ours.text(chat), theirs.text(chat)
        if expected != made:
            return Check(
                "prompts", False, f"{len(chat)} messages become {made!r:.120} and not {expected!r:.120}", figures
            )
        if expected is not None and policy.prompt_ids(chat) != artifact.prompt_ids(chat):
            return Check("prompts", False, "the same text becomes other tokens", figures)
    hidden = _hidden_difference(policy.tokenizer, artifact.tokenizer)
    if hidden:
        return Check("prompts", False, f"{hidden}, though the chats that were tried become the same", figures)
    return Check("prompts", True, f"{figures['chats']} chats byte for byte, ends with {', '.join(ends[1])}", figures)


def _hidden_difference(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase) -> str:
    """What no chat may have shown: a template's branch for tools, how other texts are split, or ids shown as text."""
    if ours.chat_template != theirs.chat_template:
        return "its chat template is another one"
    own, its = _steps(ours), _steps(theirs)
    differing = sorted(key for key in own.keys() | its.keys() if own.get(key) != its.get(key))
    return f"its tokenizer has another {differing[0]}" if differing else ""


def _steps(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a fast tokenizer does, by the parts of its file; {} for others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    steps = dict(json.loads(backend.to_str())) if backend is not None else {}
    return {name: step for name, step in steps.items() if name not in ("truncation", "padding")}  # of the last call


def modelfile_check(
    policy: Chat, modelfile: Modelfile, chats: Sequence[Sequence[Message]], leave_out: str = ""
) -> Check:
    """Whether a Modelfile's template and stop parameters are the policy's. `leave_out`: what Ollama writes itself."""
    figures: dict[str, Any] = {"chats": len(chats) + len(conversations()), "stops": list(modelfile.stops)}
    stops = stop_texts(policy.tokenizer, sorted(policy.end_ids))
    if modelfile.stops != stops:
        said = f"answers end with {', '.join(modelfile.stops) or 'nothing'} in place of {', '.join(stops)}"
        return Check("prompts", False, said, figures)
    differing = differences(modelfile.template, Prompts(policy.tokenizer, leave_out), chats)
    if differing:
        return Check("prompts", False, f"its prompts are not the tokenizer's: {differing[0]}", figures)
    return Check("prompts", True, f"{figures['chats']} chats byte for byte, ends with {', '.join(stops)}", figures)


def reward_check(policy: list[dict[str, Any]], artifact: list[dict[str, Any]], lowest: float) -> Check:
    """An artifact's greedy reward on held-out rows, and whether it is clearly less than the policy's on the same."""
    own = summarize("artifact", artifact, lowest)
    gain = compare(policy, artifact)
    figures = {"reward": own.reward, "low": own.low, "high": own.high, "rows": own.n}
    figures |= {"against_policy": gain.mean, "against_low": gain.low, "against_high": gain.high}
    said = f"{own.reward:.3f} [{own.low:.3f}, {own.high:.3f}] on {own.n} rows, "
    said += f"{gain.mean:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] against the policy"
    if not own.n:
        return Check("reward", False, "no answer could be scored", figures)
    return Check("reward", not (gain.clear and gain.mean < 0), said, figures)
