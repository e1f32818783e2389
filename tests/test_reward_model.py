"""The reward model: real little classifiers, compared with what transformers says of one text at a time."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lib.judge import JudgeError, JudgeRefused, JudgeSettings
from lib.reward_model import BATCH, RewardModel, _Classifier, open_reward_model
from lib.starter import build_tokenizer

QUESTION = [{"role": "user", "content": "Name a river."}]
ANSWERS = [f"The Rhine, {'a river ' * number}is one." for number in range(40)]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}<|im_end|>{% endfor %}"
LONGEST = 400
"""Tokens."""


def save_classifier(folder: Path, kind: str, outputs: int = 1, template: bool = True) -> Path:
    """A classifier with random weights. Its tokenizer pads with the token that ends every message."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, Qwen2Config, Qwen2ForSequenceClassification

    tokenizer = build_tokenizer([QUESTION[0]["content"], *ANSWERS])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = TEMPLATE if template else None
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 4, "max_position_embeddings": LONGEST, "num_labels": outputs}
    torch.manual_seed(0)
    model: Any
    if kind == "qwen2":
        config = Qwen2Config(**shape, num_key_value_heads=2, pad_token_id=tokenizer.pad_token_id)
        model = Qwen2ForSequenceClassification(config)
        model.score.weight.data.mul_(30)  # so that answers differ
    else:
        model = BertForSequenceClassification(BertConfig(**shape, initializer_range=0.3))  # the default hardly looks
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["qwen2", "bert"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield save_classifier(tmp_path_factory.mktemp("model") / request.param, request.param)


@pytest.fixture(scope="module")
def logits(folder: Path) -> dict[str, float]:
    """What transformers says, one text at a time and without padding."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = None  # the very last token counts, and there is no other way to say so
    found = {}
    for answer in ANSWERS:
        text = tokenizer.apply_chat_template([*QUESTION, {"role": "assistant", "content": answer}], tokenize=False)
        with torch.inference_mode():
            found[answer] = model(torch.tensor([tokenizer(text)["input_ids"]])).logits.item()
    return found


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


async def test_a_score_is_the_sigmoid_of_the_logit_whatever_else_is_in_the_batch(
    folder: Path, logits: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    plain = _Classifier.logits

    def counted(self: _Classifier, batch: Any) -> list[float]:
        sizes.append(len(batch))
        return plain(self, batch)

    monkeypatch.setattr(_Classifier, "logits", counted)
    model = RewardModel(str(folder))
    scores = await asyncio.gather(*(model.score(QUESTION, answer) for answer in ANSWERS))
    assert scores == pytest.approx([sigmoid(logits[answer]) for answer in ANSWERS], abs=1e-4)
    assert max(scores) - min(scores) > 0.05  # they do differ
    assert sum(sizes) == len(ANSWERS) and max(sizes) == BATCH and len(sizes) <= 4


async def test_with_a_reference_it_is_the_preference_for_the_answer(
    folder: Path, logits: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    plain = _Classifier.encode

    def noted(self: _Classifier, messages: list[dict[str, Any]]) -> list[int]:
        texts.append(messages[-1]["content"])
        return plain(self, messages)

    monkeypatch.setattr(_Classifier, "encode", noted)
    model, reference = RewardModel(str(folder)), ANSWERS[7]
    scores = await asyncio.gather(*(model.score(QUESTION, answer, reference) for answer in ANSWERS))
    expected = [sigmoid(logits[answer] - logits[reference]) for answer in ANSWERS]
    assert scores == pytest.approx(expected, abs=1e-4) and scores[7] == pytest.approx(0.5, abs=1e-4)
    assert texts.count(reference) == 2 and len(texts) == len(ANSWERS) + 1  # as an answer, and once as the reference


async def test_a_text_that_is_too_long_fails_alone(folder: Path) -> None:
    model = RewardModel(str(folder))
    ended = await asyncio.gather(
        model.score(QUESTION, ANSWERS[0]), model.score(QUESTION, "x" * 5000), return_exceptions=True
    )
    assert isinstance(ended[0], float)
    assert isinstance(ended[1], JudgeError) and str(ended[1]) == (
        f"judge: longer than the {LONGEST} tokens that the reward model reads"
    )


async def test_scores_are_the_same_on_every_loop(folder: Path) -> None:
    model = RewardModel(str(folder))
    here = await model.score(QUESTION, ANSWERS[3], ANSWERS[1])
    there = await asyncio.to_thread(lambda: asyncio.run(model.score(QUESTION, ANSWERS[3], ANSWERS[1])))
    assert here == pytest.approx(there, abs=1e-6)


async def test_what_cannot_be_used_is_refused_every_time(tmp_path: Path) -> None:
    bad = {
        save_classifier(tmp_path / "two", "bert", outputs=2): "needs a sequence classifier with one output",
        save_classifier(tmp_path / "plain", "bert", template=False): "has no chat template",
        tmp_path / "nothing": "cannot be loaded",
    }
    for path, told in bad.items():
        model = RewardModel(str(path))
        for _ in range(2):
            with pytest.raises(JudgeRefused, match=told):
                await model.score(QUESTION, "The Rhine.")


def test_a_process_has_one_model_for_one_name() -> None:
    settings = JudgeSettings(provider="reward_model", model="some/model")
    assert open_reward_model(settings) is open_reward_model(settings.model_copy(update={"concurrency": 3}))
    assert open_reward_model(settings) is not open_reward_model(settings.model_copy(update={"model": "other"}))
