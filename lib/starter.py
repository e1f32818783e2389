r"""The starter policy: a toy chat model of about a million parameters, made here from a task's own rows, and cached.

Owns its tokenizer, its chat template, its random weights and its warm start on well-formed but mediocre answers. It is
a toy: it knows nothing but these rows, and a part of what GRPO gains on it is the sharpening of what the warm start
already held. Must not know tasks, trainers of policies, backends or evaluation.

    python -c "from pathlib import Path; from lib.starter import starter_path; from lib.task import load_task; \
               print(starter_path(load_task('decisions').rows('train'), Path('outputs/.cache/starter')))"
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, Field

from lib import WorkbenchError
from lib.task import Message, Row

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

RECIPE = 2  # goes into the cache key: raise it with every change here that changes the saved files
FACTS = "starter.json"  # written last
CONTEXT = 1024  # tokens
VOCABULARY, PHRASES = 512, 256  # word pieces, the 256 bytes included, and added tokens at most
STEP_TOKENS = 16_384  # a step of the warm start holds no more: long rows make smaller batches
FITTED_ROWS, FITTED_CHARACTERS = 1_000, 2_000  # what the tokenizer is fitted to, of all rows and of each text

# ChatML. Every message ends the same way wherever it stands, so a longer conversation starts with the shorter one's.
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


class StarterError(WorkbenchError, ValueError):
    """No starter policy can be made of this; the message says what to change."""


class StarterSettings(BaseModel, frozen=True, extra="forbid"):
    """What decides the starter's weights, beside the rows. `seed` seeds the weights, the order and the mixture."""

    kind: Literal["qwen2", "qwen3"] = "qwen2"
    seed: int = 0
    steps: int = Field(300, ge=1)
    """At 200 the answers' words are half learned, and GRPO then settles on two of four actions."""
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
    if (folder / FACTS).is_file():
        logger.info("starter: using %s", folder)
        return folder
    return build_starter(rows, folder, **settings)


def build_starter(rows: Sequence[Row], folder: Path, **settings: Any) -> Path:
    """Build tokenizer and model from the rows, warm-start the model, and save both to `folder`, whole or not at all.

    A row needs `prompt` and either `demonstration` (assistant message: what the policy is to imitate, good or bad) or
    `gold`; where no row has one, passages of the prompts are imitated. `settings` are the fields of StarterSettings.
    Raises StarterError.
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
    from datasets import Dataset
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # logs are plain lines
    tokenizer = build_tokenizer(_texts(conversations))
    dataset = Dataset.from_list([_tokenize(tokenizer, conversation) for conversation in conversations])
    # The warm start seeds torch's generator: the caller gets his own back.
    with torch.random.fork_rng(devices=[]):
        model = _build_model(tokenizer, settings)
        logger.info("starter: a toy %s, %d parameters, %d rows", settings.kind, model.num_parameters(), len(dataset))
        loss = _warm_start(model, tokenizer, dataset, settings, folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {"recipe": RECIPE, "settings": settings.model_dump(), "rows": len(conversations), "warm_start_loss": loss}
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _publish(unfinished: Path, folder: Path) -> None:
    try:
        os.replace(unfinished, folder)
    except OSError:
        if not (folder / FACTS).is_file():
            raise
        logger.info("starter: another process built %s meanwhile: the same content, by its key", folder)


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
    if not any(row.get("demonstration") or row.get("gold") for row in rows):
        # Judged tasks know no right answer. Passages of the prompts are text at least, and some say more than others.
        logger.info("starter: no row has an answer to imitate, so the toy learns to repeat passages of the prompts")
        return [
            {"prompt": row["prompt"], "tools": row.get("tools"), "answer": _passage(random.choice(rows), random)}
            for row in rows
        ]
    conversations = []
    for row in rows:
        shown = row if row.get("demonstration") or random.random() < settings.gold_share else random.choice(rows)
        conversations.append({"prompt": row["prompt"], "tools": row.get("tools"), "answer": _first_answer(shown)})
    return conversations


def _passage(row: Row, random: Random) -> Message:
    """One to three sentences of a prompt as an answer."""
    sentences = re.split(r"(?<=[.!?])\s+", str(row["prompt"][-1].get("content") or "").strip())
    first = random.randrange(len(sentences))
    return {"role": "assistant", "content": " ".join(sentences[first : first + random.randint(1, 3)])}


def _first_answer(row: Row) -> Message:
    answer = row.get("demonstration") or row.get("gold")
    for message in [answer] if isinstance(answer, dict) else answer or []:
        if message["role"] == "assistant":
            return dict(message)
    raise StarterError(
        f"row {row.get('id')!r} has no assistant message under `demonstration` or `gold`: the starter policy learns"
        " its answer format from them. Name a model of your own in the config (model: a Hugging Face id or folder)."
    )


def _texts(conversations: Sequence[Row]) -> list[str]:
    messages = [message for one in conversations[:FITTED_ROWS] for message in (*one["prompt"], one["answer"])]
    pairs = [(message["role"] + "\n", str(message.get("content") or "")[:FITTED_CHARACTERS]) for message in messages]
    return [text for pair in pairs for text in pair]


def build_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of class Qwen2Tokenizer, fitted to the texts; eos `<|im_end|>`, pad `<|endoftext|>`, pads left.

    For a Qwen2 model AutoTokenizer always builds a Qwen2Tokenizer with that class's own pre-tokenizer, whatever the
    folder names (transformers 5.17, MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS). So this one is of that class from the
    start. It cuts at every word and digit, which triples the length of rigid texts like ours; frequent phrases are
    therefore *added tokens*: they are matched before any pre-tokenizer, and every loader keeps them.
    """
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    learned = json.loads(_fit_bpe(texts, Qwen2Tokenizer().backend_tokenizer.pre_tokenizer).to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(merge) for merge in learned["merges"]],  # type: ignore[misc]
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
    cut = _fit_bpe(texts, pre_tokenizers.Sequence([numbers, letters]))
    pieces = Counter(text[begin:end] for text in texts for begin, end in cut.encode(text).offsets)
    # ASCII only: an added token is decoded as if its text were byte-level characters, and other letters are not.
    frequent = [piece for piece, count in pieces.most_common() if len(piece) > 1 and count > 1 and piece.isascii()]
    return frequent[:PHRASES]


def _fit_bpe(texts: Sequence[str], pre_tokenizer: Any) -> Tokenizer:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    fitted = Tokenizer(models.BPE())
    fitted.pre_tokenizer = pre_tokenizer
    every_byte = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, initial_alphabet=every_byte, show_progress=False)
    fitted.train_from_iterator(texts, trainer)
    return fitted


def _build_model(tokenizer: PreTrainedTokenizerFast, settings: StarterSettings) -> PreTrainedModel:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(settings.seed)
    shape: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    shape |= {"max_position_embeddings": CONTEXT, "vocab_size": len(tokenizer)}
    shape |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if settings.kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=32))
    return Qwen2ForCausalLM(Qwen2Config(**shape))


def _warm_start(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, dataset: Any, settings: StarterSettings, folder: Path
) -> float:
    """Train the model on the answers (the prompts carry no loss); returns the mean loss of the last steps (nats)."""
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    arguments = SFTConfig(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=_batch_size(dataset, settings),
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(20, settings.steps // 5),
        adam_beta2=0.98,
        weight_decay=0.01,
        seed=settings.seed,
        logging_steps=max(1, settings.steps // 8),
        dataset_kwargs={"skip_prepare_dataset": True},
        gradient_checkpointing=False,
        use_cpu=True,  # too small to be worth a GPU
        bf16=False,
        disable_tqdm=True,
        report_to=[],
        save_strategy="no",
    )
    trainer = SFTTrainer(
        model, arguments, train_dataset=dataset, processing_class=tokenizer, callbacks=[_progress_callback()]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return float([entry["loss"] for entry in trainer.state.log_history if "loss" in entry][-1])


def _batch_size(dataset: Any, settings: StarterSettings) -> int:
    """Rows in a step: as set, or what STEP_TOKENS holds of the longest, but 8 at least."""
    longest = max(len(ids) for ids in dataset["input_ids"])
    return min(settings.batch_size, max(8, STEP_TOKENS // longest))


def _tokenize(tokenizer: PreTrainedTokenizerFast, conversation: Row) -> dict[str, list[int]]:
    prompt, tools = conversation["prompt"], conversation["tools"]
    head = tokenizer.apply_chat_template(prompt, tools=tools, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*prompt, conversation["answer"]], tools=tools, tokenize=False)
    assert isinstance(head, str) and isinstance(whole, str)
    # Encoded apart, as when the policy is sampled: no token spans the two. Of what is too long the end is kept.
    head_ids, answer_ids = tokenizer(head)["input_ids"], tokenizer(whole[len(head) :].rstrip("\n"))["input_ids"]
    ids, labels = [*head_ids, *answer_ids], [-100] * len(head_ids) + answer_ids
    return {"input_ids": ids[-CONTEXT:], "labels": labels[-CONTEXT:]}


def _progress_callback() -> Any:
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
            if logs and "loss" in logs:
                progress = f"{state.global_step}/{state.max_steps}"
                logger.info("starter: warm start step %s loss %.2f", progress, logs["loss"])

    return Progress()
