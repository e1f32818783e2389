"""The starter policy: a toy chat model of about a million parameters, made here from a task's own rows, and cached.

Owns its tokenizer, its chat template, its random weights and its warm start on well-formed but mediocre answers, so
that GRPO has something to improve with no download. It is a toy: it knows nothing but these rows, and a part of what
GRPO gains on it is the sharpening of what the warm start already held. Must not know tasks, trainers of policies,
backends or evaluation; any Hugging Face id or folder takes its place.

    python -c "from lib.starter import starter_path; print(starter_path(my_rows, Path('outputs/.starter')))"
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from lib.task import Message, Row

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

RECIPE = 1
"""Goes into the cache key. Raise it with every change here that changes the saved files."""

CONTEXT = 1024  # tokens
VOCABULARY = 512  # word pieces, the 256 bytes included; also how finely the phrases are cut
PHRASES = 256
TEXT_LIMIT = 2_000  # characters
PHRASE_ROWS = 1_000
"""The tokenizer is fitted to the first rows and to the start of each text: more adds time, not tokens."""

# ChatML. Every message ends the same way wherever it stands, so a longer conversation starts with the shorter one's
# rendering; `generation` marks what an assistant wrote, for trainers that mask by it.
CHAT_TEMPLATE = """\
{%- if tools %}{{ '<|im_start|>system\\nTools:' }}
{%- for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}{% set function = call.function or call -%}
{{ '<tool_call>\\n{"name": ' + (function.name | tojson) + ', "arguments": ' }}
{{- function.arguments if function.arguments is string else function.arguments | tojson }}{{ '}\\n</tool_call>' }}
{%- endfor %}{{ '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}
{%- else %}{{ (message.content or '') + '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


class StarterError(ValueError):
    """The rows cannot make a starter policy; the message says what to change."""


class StarterSettings(BaseModel, frozen=True, extra="forbid"):
    """What decides the starter's weights, beside the rows. `seed` seeds the weights, the order and the mixture."""

    kind: Literal["qwen2", "qwen3"] = "qwen2"
    seed: int = 0
    steps: int = Field(300, ge=1)
    """200 leaves the answers' words half learned, and GRPO then settles on two of four actions."""
    batch_size: int = Field(64, ge=1)
    learning_rate: float = Field(2e-3, gt=0)
    max_rows: int = Field(4000, ge=1)
    gold_share: float = Field(0.3, ge=0, le=1)
    """For rows without a demonstration: how many show their own gold answer; the others show another row's."""


def starter_path(rows: Sequence[Row], cache_root: Path, **settings: Any) -> Path:
    """The folder of the starter policy for these rows and settings, built on first use.

    Cached under a key of the rows used, the settings and RECIPE. `settings` are the fields of StarterSettings.
    Raises StarterError, or pydantic's ValidationError for an unknown or impossible setting.
    """
    chosen = StarterSettings(**settings)
    folder = cache_root / f"starter-{_content_key(_used(rows, chosen), chosen)}"
    if _is_built(folder):
        logger.info("starter: using %s", folder)
        return folder
    return build_starter(rows, folder, **settings)


def build_starter(rows: Sequence[Row], folder: Path, **settings: Any) -> Path:
    """Build tokenizer and model from the rows, warm-start the model, and save both to `folder`, whole or not at all.

    A row needs `prompt` and either `demonstration` (assistant message: what the policy is to imitate, good or bad) or
    `gold`. `settings` are the fields of StarterSettings. Raises StarterError.
    """
    chosen = StarterSettings(**settings)
    if folder.exists():
        raise StarterError(f"{folder} exists already: delete it, or name another folder.")
    conversations = _conversations(_used(rows, chosen), chosen)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its final place, so that the rename stays on one file system and a killed build counts for nothing.
    unfinished = Path(tempfile.mkdtemp(prefix=f".unfinished-{folder.name}-", dir=folder.parent))
    try:
        _build_into(unfinished, conversations, chosen)
        unfinished.chmod(0o755)
        _publish(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def _build_into(folder: Path, conversations: Sequence[Row], settings: StarterSettings) -> None:
    import torch
    from transformers.utils import logging as transformers_logging

    began = time.perf_counter()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # logs are plain lines
    tokenizer = build_tokenizer(_texts(conversations))
    # The warm start seeds torch's generator: the caller gets his own back.
    with torch.random.fork_rng(devices=[]):
        model = _build_model(tokenizer, settings)
        millions = model.num_parameters() / 1e6
        logger.info("starter: a toy %s of %.2f M parameters, %d rows", settings.kind, millions, len(conversations))
        loss = _warm_start(model, tokenizer, conversations, settings, folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {"recipe": RECIPE, "settings": settings.model_dump(), "rows": len(conversations), "warm_start_loss": loss}
    (folder / "starter.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    logger.info("starter: built in %.1f s", time.perf_counter() - began)


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        os.replace(unfinished, folder)
    except OSError:
        if not _is_built(folder):
            raise
        # Another process built the same starter meanwhile: same key, same content.
        logger.info("starter: %s was built by another process", folder)


def _is_built(folder: Path) -> bool:
    return (folder / "starter.json").is_file()


def _used(rows: Sequence[Row], settings: StarterSettings) -> list[Row]:
    used = list(islice(rows, settings.max_rows))
    if not used:
        raise StarterError("no rows to make a starter policy from: the task's train split is empty.")
    return used


def _content_key(rows: Sequence[Row], settings: StarterSettings) -> str:
    digest = hashlib.sha256(json.dumps([RECIPE, settings.model_dump()], sort_keys=True).encode())
    for row in rows:
        seen = [row["prompt"], row.get("tools"), row.get("demonstration"), row.get("gold")]
        digest.update(json.dumps(seen, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def _conversations(rows: Sequence[Row], settings: StarterSettings) -> list[Row]:
    """For each row its prompt and the one answer to imitate, under `answer`."""
    random = Random(settings.seed)
    conversations = []
    for row in rows:
        shown = row if row.get("demonstration") or random.random() < settings.gold_share else random.choice(rows)
        answer = _first_answer(shown)
        conversations.append({"prompt": row["prompt"], "tools": row.get("tools"), "answer": answer})
    return conversations


def _first_answer(row: Row) -> Message:
    answer = row.get("demonstration") or row.get("gold")
    messages = [answer] if isinstance(answer, dict) else answer or []
    for message in messages:
        if message["role"] == "assistant":
            return dict(message)
    raise StarterError(
        f"row {row.get('id')!r} has no assistant message under `demonstration` or `gold`: the starter policy learns"
        " its answer format from them. Name a model of your own in the config (model: a Hugging Face id or folder)."
    )


def _texts(conversations: Iterable[Row]) -> list[str]:
    texts = []
    for conversation in islice(conversations, PHRASE_ROWS):
        for message in [*conversation["prompt"], conversation["answer"]]:
            texts += [message["role"] + "\n", str(message.get("content") or "")[:TEXT_LIMIT]]
    return texts


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of class Qwen2Tokenizer, fitted to the texts; eos `<|im_end|>`, pad `<|endoftext|>`, pads left.

    For a Qwen2 model AutoTokenizer always builds a Qwen2Tokenizer, whatever class the folder names
    (transformers 5.17, MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS), with that class's own pre-tokenizer; vLLM, TRL and
    PEFT go through it. So this one is that class from the start. Its pre-tokenizer cuts at each word and digit, which
    triples the length of rigid texts like ours; frequent phrases are therefore *added tokens*, which are matched
    before any pre-tokenizer and which every loader keeps.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    words = _fit_bpe(texts, Qwen2Tokenizer().backend_tokenizer.pre_tokenizer)
    learned = json.loads(words.to_str())["model"]
    merges: Any = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=["<|im_start|>"],
        padding_side="left",
        model_max_length=CONTEXT,
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in _frequent_phrases(texts)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _frequent_phrases(texts: Sequence[str]) -> list[str]:
    """The pieces that a tokenizer without word borders cuts the texts into, the most frequent first."""
    from tokenizers import Regex, pre_tokenizers

    # A number stands alone, so that equal numbers look equal; one in brackets belongs to its phrase.
    numbers = pre_tokenizers.Split(Regex(r" ?\b\d+\b(?!\])"), "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spans = _fit_bpe(texts, pre_tokenizers.Sequence([numbers, letters]))
    pieces = Counter(text[begin:end] for text in texts for begin, end in spans.encode(text).offsets)
    # ASCII only: an added token is decoded as if its text were byte-level characters, and other letters are not.
    frequent = [piece for piece, count in pieces.most_common() if len(piece) > 1 and count > 1 and piece.isascii()]
    return frequent[:PHRASES]


def _fit_bpe(texts: Sequence[str], pre_tokenizer: Any) -> Tokenizer:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    fitted = Tokenizer(models.BPE())
    fitted.pre_tokenizer = pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    fitted.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=alphabet, show_progress=False)
    )
    return fitted


def _build_model(tokenizer: PreTrainedTokenizerFast, settings: StarterSettings) -> PreTrainedModel:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(settings.seed)
    shape: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "vocab_size": len(tokenizer),
    }
    shape |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if settings.kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=32))  # type: ignore[no-untyped-call]
    return Qwen2ForCausalLM(Qwen2Config(**shape))  # type: ignore[no-untyped-call]


def _warm_start(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    conversations: Sequence[Row],
    settings: StarterSettings,
    folder: Path,
) -> float:
    """Train the model on the answers (the prompts carry no loss); returns the mean loss of the last steps (nats)."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, settings.steps // 5),
        adam_beta2=0.98,
        weight_decay=0.01,
        seed=settings.seed,
        logging_steps=max(1, settings.steps // 8),
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
        # A model this small gains nothing from a GPU, and on the CPU its weights are the same everywhere.
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([_tokenize(tokenizer, conversation) for conversation in conversations]),
        processing_class=tokenizer,
        callbacks=[_progress_callback()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return float(losses[-1])


def _tokenize(tokenizer: PreTrainedTokenizerFast, conversation: Row) -> dict[str, list[int]]:
    prompt, tools = conversation["prompt"], conversation["tools"]
    head = tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*prompt, conversation["answer"]], tools=tools, tokenize=False)
    assert isinstance(head, str) and isinstance(whole, str)
    # Head and answer are encoded apart, as they are when the policy is sampled: no token spans the two.
    head_ids, answer_ids = tokenizer(head)["input_ids"], tokenizer(whole[len(head) :].rstrip("\n"))["input_ids"]
    # The end is kept of what is too long: the answer is there.
    ids, labels = [*head_ids, *answer_ids], [-100] * len(head_ids) + answer_ids
    return {"input_ids": ids[-CONTEXT:], "labels": labels[-CONTEXT:]}


def _progress_callback() -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                step = state.global_step
                logger.info("starter: warm start step %d/%d loss %.2f", step, state.max_steps, logs["loss"])

    return Progress()
