"""A policy loaded by Transformers that answers one conversation at a time, and says its text while it is sampled.

Owns sampling for lib/transformers_server.py: which of base and adapter speaks, what of an unfinished answer is certain.
Must not know HTTP, tasks or rows.

    python -c "from lib.speaker import Wish; print(Wish())"
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from threading import Event
from typing import TYPE_CHECKING, Any, Literal

from lib import harmony, models
from lib.config import Config
from lib.engine import Served, tool_parser
from lib.generate import Chat, chat_of
from lib.task import Message, Turn

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_FINAL = "<|channel|>final<|message|>"
_UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are no whole character yet."""


@dataclass(frozen=True)
class Wish:
    """How an answer is sampled."""

    most: int = 1
    """Tokens of the answer."""
    temperature: float = 1.0
    """0 = the most likely token each time."""
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    calls: bool = False
    """Whether it may call tools."""


class Speaker:
    """A loaded model, with an adapter beside it where one is served."""

    def __init__(self, config: Config, served: Served) -> None:
        from transformers import GenerationConfig

        self.served, self._config = served, config
        tokenizer = models.load_tokenizer(served.source, config.model)
        purpose: models.Purpose = "adapter" if served.adapter else "answer"
        self._model = models.load_model(served.source, config.model, purpose=purpose)
        self.chat = chat_of(config, self._model, tokenizer)
        found = tool_parser(config.sampling.vllm, served.source, str(tokenizer.chat_template))
        self._hermes = found == "hermes" and not _reads_itself(tokenizer)
        self._efforts: dict[str, Chat] = {}
        if served.adapter:
            self._model = models.load_adapter(self._model, str(served.adapter))
        self._ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": sorted(self.chat.end_ids)}
        # It samples as it is asked to: no defaults of the model's own.
        self._model.generation_config = GenerationConfig(**self._ends)

    @property
    def names(self) -> list[str]:
        """The ids that it answers to; the first one where none is named."""
        return list(dict.fromkeys([self.served.asked, self.served.name]))

    def chat_of(self, effort: Literal["low", "medium", "high"] | None) -> Chat:
        """The chat that thinks so long; None = as the config says. Templates that know no effort are as they are."""
        known = "reasoning_effort" in str(self.chat.tokenizer.chat_template)
        if effort is None or not known or effort == self._config.model.reasoning_effort:
            return self.chat
        if effort not in self._efforts:
            settings = self._config.model.model_copy(update={"reasoning_effort": effort})
            tokenizer = models.load_tokenizer(self.served.source, settings)
            self._efforts[effort] = Chat(tokenizer, sorted(self.chat.end_ids), self.chat.token_limit)
        return self._efforts[effort]

    def answer(self, name: str, prompt: list[int], wish: Wish, say: Callable[[str], None], gone: Event) -> Turn:
        """Sample an answer to a prompt (ids); `say` hears its certain text meanwhile, `gone` ends it early."""
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        live = LiveText(self.chat, prompt, wish.calls and self._hermes)
        how = GenerationConfig(**self._ends, max_new_tokens=wish.most, **_sampling(wish))
        if wish.seed is not None:
            torch.manual_seed(wish.seed)
        ids = torch.tensor([prompt], device=self._model.device)
        with torch.inference_mode(), self._spoken_by(name):
            output = self._model.generate(  # type: ignore[operator]
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=how,
                streamer=_Streamer(lambda token: say(live.add(token))),
                stopping_criteria=StoppingCriteriaList([lambda *_: gone.is_set()]),
            )
        turn = self.chat.turn(prompt, output[0, len(prompt) :].tolist(), None)
        return turn.model_copy(update={"message": with_calls(turn.message)}) if wish.calls and self._hermes else turn

    def _spoken_by(self, name: str) -> AbstractContextManager[None]:
        if self.served.adapter is None or name == self.served.adapter_name:
            return nullcontext()
        base: AbstractContextManager[None] = self._model.disable_adapter()  # type: ignore[operator]
        return base


def _sampling(wish: Wish) -> Mapping[str, Any]:
    if wish.temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": wish.temperature, "top_p": wish.top_p, "top_k": wish.top_k}


class LiveText:
    """What of an answer's content is certain while it is sampled: what follows may turn out to be a tool call, say."""

    def __init__(self, chat: Chat, prompt: Sequence[int], calls: bool = False) -> None:
        self._tokenizer: PreTrainedTokenizerBase = chat.tokenizer
        self._harmony = harmony.speaks(chat.tokenizer.chat_template)
        self._parsed = calls or _reads_itself(chat.tokenizer)
        asked = str(chat.tokenizer.decode(list(prompt[-8:]))) if self._parsed else ""
        self._thinks = asked.rstrip().endswith("<think>")  # it goes on inside the thoughts that the template opened
        self._ids: list[int] = []
        self._begin = self._end = 0
        self._text = ""
        self.sent = ""

    def add(self, token: int) -> str:
        """The content that this token makes certain: what may be sent now."""
        self._ids.append(token)
        self._text += self._new_text()
        said = self._certain()
        new, self.sent = said[len(self.sent) :], said
        return new

    def _certain(self) -> str:
        if self._harmony:
            said = self._text.partition(_FINAL)[2].partition("<|")[0]
            return said.removesuffix("<")
        if not self._parsed:
            return self._text
        if self._thinks or self._text[:1].isspace():
            return ""
        return self._text.partition("<")[0].rstrip()

    def _new_text(self) -> str:
        """Of the last token; "" while a character is not whole. A token's text depends on the one before it."""
        whole = not self._harmony and not self._parsed
        before = self._tokenizer.decode(self._ids[self._begin : self._end], skip_special_tokens=whole)
        now = str(self._tokenizer.decode(self._ids[self._begin :], skip_special_tokens=whole))
        if now.endswith(_UNFINISHED):
            return ""
        self._begin, self._end = self._end, len(self._ids)
        return now[len(before) :]


def with_calls(message: Message) -> Message:
    """The message with the calls in its text taken out, as Hermes, Qwen 2.5 and 3 write them.

    As it is, where one of them is not whole.
    """
    before, *bodies = str(message.get("content") or "").split("<tool_call>")
    calls = []
    for body in bodies:
        try:
            call, end = json.JSONDecoder().raw_decode(body.lstrip())
            whole = body.lstrip()[end:].lstrip().startswith("</tool_call>")
            calls.append(
                {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            whole = False
        if not whole:
            return message
    return {**message, "content": before, "tool_calls": calls} if calls else message


def _reads_itself(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer tells an answer's parts apart."""
    return any(getattr(tokenizer, name, None) for name in ("response_template", "response_schema"))


def rest_of(message: Message, sent: str) -> str:
    """The content that is still to be sent."""
    content = str(message.get("content") or "")
    if not content.startswith(sent):
        logger.warning("what was streamed is not how the whole answer is read: %r, %r", sent[:80], content[:80])
        return ""
    return content[len(sent) :]


class _Streamer:
    """What `generate` hands its tokens to, the prompt first."""

    def __init__(self, add: Callable[[int], None]) -> None:
        self._add, self._prompt = add, True

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt:
            for token in value.tolist():
                self._add(int(token))
        self._prompt = False

    def end(self) -> None:
        """Nothing is kept back: the caller has the whole answer then."""
