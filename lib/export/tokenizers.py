"""The tokenizer that leaves with an artifact: the base's files, once the trained one is known to be the same.

Owns which files these are and what may not differ. Must not know weights.

    python -c "from lib.export.tokenizers import check_same_tokenizer; help(check_same_tokenizer)"
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from lib.export.base import read_json, without_paths
from lib.export.errors import ExportError
from lib.models.errors import explained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG = "tokenizer_config.json"
FILES = (
    "tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
GENERATION = "generation_config.json"
BESIDE = (GENERATION, "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md")
"""What else of the base belongs to a whole model."""


def check_same_tokenizer(base: PreTrainedTokenizerBase, trained: PreTrainedTokenizerBase) -> None:
    """Refuse a policy whose tokenizer is not its base's: other ids mean other words, another template other prompts."""
    ours, theirs = base.get_vocab(), trained.get_vocab()
    if ours != theirs:
        differing = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        told = ", ".join(f"{token!r} {ours.get(token)} and {theirs.get(token)}" for token in differing[:3])
        raise ExportError(
            f"the tokenizer beside the adapter is not the base's: {len(differing)} tokens differ (base and adapter: "
            f"{told}). Tokens that were added need rows of their own in the embeddings, which plain LoRA does not "
            f"train: set model.name to a base with this tokenizer"
        )
    for what in ("chat_template", "eos_token"):
        if getattr(base, what) != getattr(trained, what):
            raise ExportError(
                f"the {what} beside the adapter is not the base's: what is served would be asked otherwise than it was "
                f"trained. Put the right one into both folders, or train again on the base as it is now"
            )


def raw_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer as its files have it: its template is not bound to a date or an effort."""
    from transformers import AutoTokenizer

    with explained(folder.name):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)


def generation_difference(own: Path, its: Path) -> str:
    """Where two models' folders differ in how to sample when a request does not say (vLLM's own default); "" = not."""
    files = [folder / GENERATION for folder in (own, its)]
    known, found = (read_json(file) if file.is_file() else {} for file in files)
    keys = sorted((known.keys() | found.keys()) - {"transformers_version"})
    key = next((key for key in keys if known.get(key) != found.get(key)), None)
    return f"{GENERATION}: {key} is {found.get(key)!r:.80} in place of {known.get(key)!r:.80}" if key else ""


def other_copy(one: Path, other: Path) -> str:
    """The first of the files that Ollama is given as they are whose bytes differ in two folders; "" = none."""
    for name in ("tokenizer.json", "tokenizer.model", GENERATION):
        first, second = ((folder / name).read_bytes() if (folder / name).is_file() else None for folder in (one, other))
        if first != second:
            return name
    return ""


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy a tokenizer's files, without the keys that name places on this machine."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (folder / CONFIG).is_file():
        text = json.dumps(without_paths(read_json(folder / CONFIG)), indent=2, ensure_ascii=False)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def copy_beside(source: Path, folder: Path, code: bool) -> None:
    """Copy generation settings and licence; `code`: the model's own Python files too."""
    names = [*BESIDE, *(path.name for path in source.glob("*.py") if code)]
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
