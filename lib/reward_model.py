"""A reward model as a judge: a local sequence classifier with one output that scores a conversation and its answer.

Owns loading and batching. Must not know tasks, rewards, rollouts or criteria.

    python -c "from lib.judge import JudgeSettings; from lib.reward_model import open_reward_model as o; \
               print(o(JudgeSettings(provider='reward_model', model='outputs/reward-model')))"
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import queue
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from lib.judge import JudgeError, JudgeRefused, JudgeSettings
from lib.places import locate

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

BATCH = 16
"""Texts that go through the model together, at most: what waits when it is free, and no more is waited for."""

_Waiting = tuple[list[dict[str, Any]], "Future[float]"]


class RewardModel:
    """One classifier of this process. It is loaded at the first score, and runs in one thread of its own."""

    def __init__(self, model: str) -> None:
        self.model = model
        """A folder, or a Hub id."""
        self._waiting: queue.SimpleQueue[_Waiting] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._references: dict[str, Future[float]] = {}

    async def score(self, conversation: Sequence[Mapping[str, Any]], answer: str, reference: str = "") -> float:
        """sigmoid(logit) of the answer, from 0 to 1.

        With a reference the probability that the answer is preferred to it (Bradley and Terry, 1952):
        sigmoid(logit of the answer - logit of the reference). The last digits depend on what else is in the batch.
        Raises JudgeRefused for a model that cannot be used, and JudgeError for a text that is too long for it.
        """
        asked = self._logit(conversation, answer)
        against = self._reference(conversation, reference) if reference else None
        logit = await asyncio.wrap_future(asked)
        if against is not None:
            logit -= await asyncio.shield(asyncio.wrap_future(against))  # others wait for it too
        return _sigmoid(logit)

    def _reference(self, conversation: Sequence[Mapping[str, Any]], reference: str) -> Future[float]:
        """Scored once: all answers to a question are compared with the same one."""
        key = repr((conversation, reference))
        known = self._references.get(key)
        if known is None or (known.done() and (known.cancelled() or known.exception())):
            known = self._references[key] = self._logit(conversation, reference)
        return known

    def _logit(self, conversation: Sequence[Mapping[str, Any]], answer: str) -> Future[float]:
        future: Future[float] = Future()
        self._waiting.put(([*map(dict, conversation), {"role": "assistant", "content": answer}], future))
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="reward model", daemon=True)
                self._thread.start()
        return future

    def _work(self) -> None:
        classifier: _Classifier | JudgeRefused
        try:
            classifier = _Classifier(self.model)
        except JudgeRefused as error:
            classifier = error
        while True:
            batch = [self._waiting.get()]
            while len(batch) < BATCH and not self._waiting.empty():
                batch.append(self._waiting.get())
            batch = [(messages, future) for messages, future in batch if future.set_running_or_notify_cancel()]
            if isinstance(classifier, JudgeRefused):
                for _, future in batch:
                    future.set_exception(JudgeRefused(str(classifier)))
            elif batch:
                _answer(classifier, batch)


def _answer(classifier: _Classifier, batch: list[_Waiting]) -> None:
    """Resolve every future of the batch, whatever happens to the others."""
    encoded: list[tuple[list[int], Future[float]]] = []
    for messages, future in batch:
        try:
            encoded.append((classifier.encode(messages), future))
        except JudgeError as error:
            future.set_exception(error)
    try:
        logits = classifier.logits([ids for ids, _ in encoded]) if encoded else []
    except RuntimeError as error:  # no memory left, above all
        for _, future in encoded:
            future.set_exception(JudgeError(f"judge: the reward model failed: {type(error).__name__}"))
        logger.warning("the reward model failed on %d texts: %s", len(encoded), error)
        return
    for (_, future), logit in zip(encoded, logits, strict=True):
        if math.isfinite(logit):
            future.set_result(logit)
        else:
            future.set_exception(JudgeError("judge: the reward model gave no finite number"))


class _Classifier:
    """The model and its tokenizer. Raises JudgeRefused where they cannot be used as a reward model."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # logs are plain lines
        folder = locate(model)
        name = str(folder) if folder.is_dir() else model
        try:
            config = AutoConfig.from_pretrained(name)
            architectures = config.architectures or []
            if config.num_labels != 1 or not any(known.endswith("Classification") for known in architectures):
                raise JudgeRefused(
                    f"judge: {model} is no reward model: it needs a sequence classifier with one output "
                    f"(architecture: {', '.join(architectures) or 'none'}, outputs: {config.num_labels})"
                )
            self._tokenizer = AutoTokenizer.from_pretrained(name)
            self._model = AutoModelForSequenceClassification.from_pretrained(name, dtype="auto")
        except (OSError, ValueError) as error:
            raise JudgeRefused(f"judge: the reward model {model} cannot be loaded: {error}") from None
        if not self._tokenizer.chat_template:
            raise JudgeRefused(f"judge: the tokenizer of {model} has no chat template: a reward model brings its own")
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model.to(self._device).eval()
        self._longest = int(getattr(config, "max_position_embeddings", None) or self._tokenizer.model_max_length)
        self._vocabulary = int(config.vocab_size)
        logger.info("reward model %s: %d parameters on %s", model, self._model.num_parameters(), self._device)

    def encode(self, messages: list[dict[str, Any]]) -> list[int]:
        """The conversation as its tokens. Raises JudgeError where the model cannot read it to the end."""
        from jinja2 import TemplateError

        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise JudgeError(f"judge: the reward model's chat template refuses the conversation: {error}") from None
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) > self._longest:
            raise JudgeError(f"judge: longer than the {self._longest} tokens that the reward model reads")
        return ids

    def logits(self, batch: Sequence[Sequence[int]]) -> list[float]:
        import torch

        longest = max(map(len, batch))
        used = {token for ids in batch for token in ids}
        # Decoders score at the last token that is not padding, by its id. Many pad with the end token, and would then
        # overlook that of the answer: so the batch is padded with an id that stands nowhere in it.
        padding = next((token for token in range(self._vocabulary) if token not in used), 0)
        self._model.config.pad_token_id = padding
        rows = [[*ids, *[padding] * (longest - len(ids))] for ids in batch]
        mask = [[1] * len(ids) + [0] * (longest - len(ids)) for ids in batch]
        with torch.inference_mode():
            output = self._model(input_ids=self._tensor(rows), attention_mask=self._tensor(mask))
        return [float(logit) for logit in output.logits.float().squeeze(-1).tolist()]

    def _tensor(self, rows: list[list[int]]) -> torch.Tensor:
        import torch

        return torch.tensor(rows, device=self._device)


def _sigmoid(logit: float) -> float:
    if logit >= 0:
        return 1 / (1 + math.exp(-logit))
    power = math.exp(logit)  # exp(-logit) would overflow
    return power / (1 + power)


_models: dict[tuple[int, str], RewardModel] = {}


def open_reward_model(settings: JudgeSettings) -> RewardModel:
    """The reward model of this process that the settings name."""
    key = os.getpid(), settings.model_id
    return _models.get(key) or _models.setdefault(key, RewardModel(settings.model_id))
