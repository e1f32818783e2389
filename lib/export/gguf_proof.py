"""What can be proven of a GGUF file without llama.cpp: its tensors, its tokens, its template, its stop tokens.

Owns the answers to the questions of a proof (lib/export/checks.py) for these files. llama.cpp itself is not asked: how
it splits texts, and how it computes, is not looked at. Must not know how a file was made.

    python -c "from lib.export.gguf_proof import ENDS; print(*sorted(ENDS))"
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.export.base import Adapter, Checkpoint
from lib.export.checks import Check, not_asked
from lib.export.gguf import ADAPTER_FILE, FILE
from lib.export.gguf_header import read_keys
from lib.export.gguf_weights import Found, compare_adapter, compare_model
from lib.export.verdict import Proof
from lib.generate import Chat
from lib.runfolder import hash_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>", "</s>",
    "<|eom_id|>", "<EOT>", "<|end_of_text|>", "<eos>",
})  # fmt: skip
"""Tokens by whose texts llama.cpp knows that an answer ends, beside those that a file names (src/llama-vocab.cpp)."""

_NAMED = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))


def model_checks(
    path: Path, source: Checkpoint, chat: Chat, tokenizer: PreTrainedTokenizerBase, made_of: str, is_proven: bool
) -> tuple[Check, ...]:
    """All checks of a whole model's file. `source`: the folder that it was converted from, the artifact `made_of`, and
    whether that is proven; `tokenizer`: that folder's, as its files have it; `chat`: the policy's.

    Raises ExportError where the file cannot be read.
    """
    weights = _weights(compare_model(path, source), made_of)
    prompts = _prompts(path, source, chat, tokenizer)
    return (weights, _asked("answers", weights, prompts, made_of, is_proven), prompts,
            _asked("reward", weights, prompts, made_of, is_proven))  # fmt: skip


def adapter_checks(path: Path, adapter: Adapter, base: Checkpoint) -> tuple[Check, ...]:
    """All checks of an adapter's file. Raises ExportError where it cannot be read."""
    told = "an adapter's file holds no tokens and no template: those of the base's own GGUF file count"
    asked = [Check(name, None, "llama.cpp is not asked here", {}) for name in ("answers", "reward")]
    weights = _weights(compare_adapter(path, adapter, base), "the trained adapter")
    return (weights, asked[0], Check("prompts", None, told, {}), asked[1])


def copy_check(file: Path, source: Proof | None) -> Check:
    """The weights of a GGUF file beside a Modelfile: those of the artifact that it was made of, if it is that file.

    `source`: that artifact's proof, None where there is none.
    """
    if source is None:
        return Check("weights", None, "the GGUF file that it was made of was not proven here", {})
    original = source.folder / (ADAPTER_FILE if source.kind == "gguf-adapter" else FILE)
    if not file.samefile(original) and hash_file(file) != hash_file(original):
        return Check("weights", False, f"its {file.name} is not that of {source.kind}", {})
    known = next(check for check in source.checks if check.name == "weights")
    return known._replace(said=f"the file of {source.kind}: {known.said}")


def _weights(found: Found, made_of: str) -> Check:
    types = ", ".join(sorted(found.types))
    figures = {"tensors": found.tensors, "types": sorted(found.types), "wrong": len(found.wrong), "exact": found.exact}
    if found.wrong:
        more = f" (and {len(found.wrong) - 1} more)" if len(found.wrong) > 1 else ""
        return Check("weights", False, f"{found.wrong[0]}{more}", figures)
    if found.unread:
        return Check("weights", None, found.unread, figures)
    held = "every value is that of" if found.exact else "every value is within the rounding of Q8_0 of"
    return Check("weights", True, f"{found.tensors} tensors ({types}), {held} {made_of}", figures)


def _asked(name: str, weights: Check, prompts: Check, made_of: str, is_proven: bool) -> Check:
    """What its answers and their reward follow from, as nobody is asked here."""
    if weights.passed is False or prompts.passed is False:
        return not_asked(name)
    if not is_proven:
        return Check(name, None, f"it is made of {made_of}, which is not proven", {})
    if not weights.passed or not prompts.passed:
        return Check(name, None, "llama.cpp is not asked here, and weights or prompts are not known to be the same", {})
    if not weights.figures["exact"]:
        return Check(name, None, "its weights are rounded to 8 bits, and llama.cpp is not asked here", {})
    return Check(name, True, f"those of {made_of}, proven above: the same weights (llama.cpp itself is not asked)", {})


def _prompts(path: Path, source: Checkpoint, chat: Chat, tokenizer: PreTrainedTokenizerBase) -> Check:
    keys = read_keys(path)
    wrong = _template_difference(keys, tokenizer) or _end_difference(keys, chat, tokenizer)
    figures: dict[str, Any] = {"tokens": len(keys.get("tokenizer.ggml.tokens", ())), "pre": _pre(keys)}
    kind = keys.get("tokenizer.ggml.model")
    if not wrong and kind == "gpt2":
        wrong = _token_difference(keys, tokenizer, source)
    if wrong:
        return Check("prompts", False, wrong, figures)
    if kind != "gpt2":
        return Check("prompts", None, f"its tokens are of the kind {kind}, which is not compared here", figures)
    ends = ", ".join(str(tokenizer.convert_ids_to_tokens(end)) for end in sorted(chat.end_ids))
    said = f"the template byte for byte, {figures['tokens']} tokens, ends with {ends}"
    return Check("prompts", True, f"{said}; llama.cpp splits texts as its {figures['pre']!r}", figures)


def _template_difference(keys: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> str:
    theirs = keys.get("tokenizer.chat_template")
    if theirs == tokenizer.chat_template:
        return ""
    return "it has no chat template" if theirs is None else "its chat template is another one"


def _end_difference(keys: Mapping[str, Any], chat: Chat, tokenizer: PreTrainedTokenizerBase) -> str:
    """Where the tokens that begin a text or end an answer are others."""
    for name, ours in (("eos", tokenizer.eos_token_id), ("bos", tokenizer.bos_token_id)):
        theirs = keys.get(f"tokenizer.ggml.{name}_token_id")
        if ours is not None and theirs is not None and theirs != ours:
            return f"{name}_token_id is {theirs} in place of {ours}"
    if keys.get("tokenizer.ggml.eos_token_id") is None:
        return "it names no token that ends an answer"
    if tokenizer.bos_token_id is None and keys.get("tokenizer.ggml.add_bos_token"):
        return "it puts a token before every prompt, and the tokenizer puts none"
    named = {keys[name] for name in _NAMED if name in keys}
    lost = [str(tokenizer.convert_ids_to_tokens(end)) for end in sorted(chat.end_ids - named)]
    lost = [token for token in lost if token not in ENDS]
    return f"llama.cpp would not end an answer at {', '.join(lost)}" if lost else ""


def _token_difference(keys: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, source: Checkpoint) -> str:
    """Where ids mean other tokens, or bytes are joined by other rules."""
    theirs, vocabulary, added = (
        keys.get("tokenizer.ggml.tokens", []),
        tokenizer.get_vocab(),
        tokenizer.get_added_vocab(),
    )
    size = int(source.config.get("vocab_size") or len(vocabulary))
    if len(theirs) != size:
        return f"it has {len(theirs)} tokens in place of {size}"
    for token, number in vocabulary.items():
        its = theirs[number]
        if its != token and not (token in added and its == _as_written(tokenizer, token)):
            return f"token {number} is {its!r} in place of {token!r}"
    merges = keys.get("tokenizer.ggml.merges")
    ours = _merges(source.folder)
    if merges is not None and ours is not None and merges != ours:
        return f"its {len(merges)} merges of tokens are not the tokenizer's {len(ours)}"
    return ""


def _as_written(tokenizer: PreTrainedTokenizerBase, token: str) -> str:
    """An added token as llama.cpp's converter writes it: encoded and decoded."""
    return str(tokenizer.decode(tokenizer.encode(token, add_special_tokens=False)))


def _merges(folder: Path) -> list[str] | None:
    """The tokenizer's merges as llama.cpp writes them; None where a part has a space, which it writes otherwise."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    pairs = json.loads(path.read_text(encoding="utf-8"))["model"].get("merges")
    if pairs is None:
        return None
    split = [pair.split(" ") if isinstance(pair, str) else pair for pair in pairs]
    return None if any(" " in part for pair in split for part in pair) else [" ".join(pair) for pair in split]


def _pre(keys: Mapping[str, Any]) -> str:
    return str(keys.get("tokenizer.ggml.pre", "default"))
