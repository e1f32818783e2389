"""Makers of Generate: what turns a model into something that answers messages.

Owns sampling within a conversation's room for tokens, turn after turn. Must not know tasks or trainers.

    python -c "from lib.generate import scripted; print(scripted('hello'))"
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import cycle
from typing import TYPE_CHECKING, Any

from lib import WorkbenchError, harmony, models
from lib.calls import sendable
from lib.config import Config, EvaluationSection
from lib.rollout import BatchGenerate, Request
from lib.room import token_limit, within_room
from lib.task import Generate, Message, Row, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Sample = Callable[[list[list[int]]], tuple[list[list[int]], list[list[float]] | None]]
"""Prompts as ids -> (answers as ids with their end token, log-probabilities of the sampled tokens or None)."""


class TemplateError(WorkbenchError, ValueError):
    """The chat template does not keep earlier turns as they were sampled; the message says what to use instead."""

    def __init__(self) -> None:
        super().__init__(
            "the chat template rewrites earlier turns, or their end token, when a message is added, so the sampled "
            "tokens cannot be kept. Use a template whose longer conversations begin with the shorter ones: "
            "trl.chat_template_utils.get_training_chat_template(tokenizer) makes one for many models that drop their "
            "thinking (save the tokenizer with it, and name that folder in model.name); or a task of one turn."
        )


class Chat:
    """A tokenizer's chat template: messages to ids and back, with earlier turns kept as sampled."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int] = (), token_limit: int | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.end_ids = frozenset(end_ids) or frozenset({tokenizer.eos_token_id})
        self.token_limit = token_limit
        """Tokens of a whole conversation, prompt and all turns (lib.room.token_limit); None = no limit."""
        # A group repeats its prompt, so rendering is remembered; keys are JSON because messages are dicts.
        self._rendered = lru_cache(maxsize=1024)(self._render)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None) -> list[int]:
        """The ids that the policy answers to, generation prompt included."""
        return list(self._rendered(json.dumps(list(messages)), json.dumps(list(tools or []))))

    def text(
        self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None = None, answer: bool = True
    ) -> str:
        """The rendered conversation; `answer` adds the generation prompt."""
        return str(
            self.tokenizer.apply_chat_template(
                list(messages), tools=list(tools or []) or None, add_generation_prompt=answer, tokenize=False
            )
        )

    def room(self, ids: Sequence[int]) -> int:
        """Tokens that may follow these before the conversation is as long as it may be."""
        return sys.maxsize if self.token_limit is None else max(0, self.token_limit - len(ids))

    def continued_ids(self, request: Request) -> list[int]:
        """Ids of a later turn: the earlier ids as sampled, then only the new messages rendered and appended.

        Raises TemplateError where the chat template rewrites history.
        """
        previous, own = request.previous, request.said_at
        if previous is None or previous.prompt_ids is None or previous.output_ids is None:
            return self.prompt_ids(request.messages, request.tools)
        asked = self.text(request.messages[:own], request.tools)
        before = self.text(request.messages[: own + 1], request.tools, answer=False)
        after = self.text(request.messages, request.tools)
        end = self._end_of_turn(before, after, len(asked), str(previous.message.get("content") or "").strip())
        if not end or not before.startswith(asked):
            raise TemplateError
        # What the template puts after the end token (a newline, say) was not sampled, so it opens the suffix. The
        # policy may have ended with another of its end tokens than the template writes: what was sampled stays.
        tokens = self.tokenizer.encode(after[end:], add_special_tokens=False)
        return [*previous.prompt_ids, *previous.output_ids, *tokens]

    def _end_of_turn(self, before: str, after: str, start: int, said: str) -> int:
        """Where the turn that begins at `start` ends in both texts, end token included; 0 where they do not agree.

        What a template writes after it only while nothing follows (Phi-3: its <|endoftext|>) may be gone in `after`.
        """
        ends = [str(self.tokenizer.decode([token])) for token in self.end_ids]
        same = len(before)
        if not after.startswith(before):
            same = next((i for i, (one, other) in enumerate(zip(before, after, strict=False)) if one != other), 0)
            place = before.find(said, start, same)
            start = place + len(said) if place >= 0 else same  # an end token that is spelt out in the answer is none
        end = max((at + len(text) for text in ends if (at := before.rfind(text, start, same)) >= 0), default=0)
        lost = before[end:] if same < len(before) else ""
        for text in ends:
            lost = lost.replace(text, "")
        return 0 if lost.strip() else end

    def turn(self, prompt: list[int], output: list[int], logprobs: list[float] | None) -> Turn:
        """A Turn from sampled ids: content, and thinking or tool calls where the tokenizer can tell them apart."""
        return Turn(
            message=self.message(prompt, output),
            prompt_ids=tuple(prompt),
            output_ids=tuple(output),
            logprobs=None if logprobs is None else tuple(logprobs),
            stop="stop" if output and output[-1] in self.end_ids else "length",
        )

    def message(self, prompt: list[int], output: list[int]) -> Message:
        """The assistant message in sampled ids: what the final answer is, apart from thinking and tool calls.

        It can be written as JSON in UTF-8, whatever a tool call's arguments spell out (half a surrogate pair, NaN).
        """
        if harmony.speaks(self.tokenizer.chat_template):
            return harmony.message_of(str(self.tokenizer.decode(output)))
        if getattr(self.tokenizer, "response_template", None) or getattr(self.tokenizer, "response_schema", None):
            from trl.chat_template_utils import parse_response

            message: Message = sendable(dict(parse_response(self.tokenizer, output, prefix=prompt)))
            return message
        return {"role": "assistant", "content": self.tokenizer.decode(output, skip_special_tokens=True)}

    def _render(self, messages: str, tools: str) -> tuple[int, ...]:
        ids = self.tokenizer.apply_chat_template(
            json.loads(messages), tools=json.loads(tools) or None, add_generation_prompt=True, return_dict=False
        )
        return tuple(ids)


def check_turns(chat: Chat, row: Row) -> None:
    """Answer a row twice, with and without thinking, before anything is trained. Raises TemplateError."""
    for text in ("An answer.", "<think>\nA thought.\n</think>\n\nAn answer."):
        output = [*chat.tokenizer.encode(text, add_special_tokens=False), min(chat.end_ids)]
        messages, tools = list(row["prompt"]), row.get("tools")
        request = Request(messages, tools, None, 0)
        for _ in range(2):
            turn = chat.turn(chat.continued_ids(request), output, None)
            said_at = len(messages)
            messages = [*messages, turn.message, {"role": "user", "content": "Go on."}]
            request = Request(messages, tools, turn, said_at)
        chat.continued_ids(request)


def within_limit(rows: Sequence[Row], chat: Chat, limit: int) -> list[int]:
    """Indices of the rows whose prompt has at most `limit` tokens: one filter for inspection, training, evaluation.

    And room for an answer, where the chat has a limit for whole conversations.
    """
    most = limit if chat.token_limit is None else min(limit, chat.token_limit - 1)
    lengths = [len(chat.prompt_ids(row["prompt"], row.get("tools"))) for row in rows]
    without_room = sum(most < length <= limit for length in lengths)
    if without_room:
        logger.warning(
            "%d prompts are within sampling.prompt_limit (%d), but have no room for an answer: a whole conversation "
            "may have %d tokens (sampling.vllm.max_length with that engine, else what the model allows)",
            without_room,
            limit,
            chat.token_limit,
        )
    return [i for i, length in enumerate(lengths) if length <= most]


def batched(chat: Chat, sample: Sample) -> BatchGenerate:
    """A policy for lockstep rollouts: one call of `sample` per batch of requests.

    No conversation gets longer than `chat.token_limit`: an answer is cut off there, and one that would begin there is
    None, which ends its rollout.
    """

    def generate(requests: list[Request]) -> list[Turn | None]:
        prompts = [chat.continued_ids(request) for request in requests]
        turns: list[Turn | None] = [None] * len(prompts)
        asked = [i for i, prompt in enumerate(prompts) if chat.room(prompt)]
        outputs, logprobs = sample([prompts[i] for i in asked]) if asked else ([], None)
        for place, (i, output) in enumerate(zip(asked, outputs, strict=True)):
            room = chat.room(prompts[i])
            turns[i] = chat.turn(prompts[i], output[:room], logprobs[place][:room] if logprobs else None)
        return turns

    return generate


def local_sample(
    model: PreTrainedModel, chat: Chat, settings: EvaluationSection, completion_limit: int, greedy: bool
) -> Sample:
    """Sampling from a loaded Hugging Face model, left-padded, in batches of `settings.batch`."""
    import torch
    from transformers import GenerationConfig

    pad = chat.tokenizer.pad_token_id
    # What a model ships as its defaults (a repetition penalty, say) would change what is measured: training has none.
    model.generation_config = GenerationConfig(pad_token_id=pad, eos_token_id=sorted(chat.end_ids))
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if not greedy:
        how = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}

    @torch.inference_mode()
    def ask(prompts: list[list[int]], most: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
        output = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=most,
            pad_token_id=pad,
            eos_token_id=sorted(chat.end_ids),
            **how,
        )
        return [_until_end(row, chat.end_ids) for row in output[:, width:].tolist()]

    sample = within_room(ask, completion_limit, chat.room, chat.end_ids)

    def in_batches(prompts: list[list[int]]) -> tuple[list[list[int]], None]:
        outputs: list[list[int]] = []
        for start in range(0, len(prompts), settings.batch):
            outputs += sample(prompts[start : start + settings.batch])[0]
        return outputs, None

    return in_batches


def scripted(*replies: str | Message) -> Generate:
    """A policy that says the given replies in turn, over and over: for tests and checks by hand."""
    script: Iterator[str | Message] = cycle(replies)

    async def generate(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Turn:
        reply = next(script)
        return Turn(message={"role": "assistant", "content": reply} if isinstance(reply, str) else reply)

    return generate


def chat_of(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Chat:
    """The chat of a loaded policy, with its end tokens and its room for tokens."""
    return Chat(tokenizer, end_ids(model, tokenizer), token_limit(config.sampling, model.config))


def unloaded_chat(config: Config, source: str) -> Chat:
    """The chat of a policy whose weights are not needed: for prompts, their lengths, and what the template does."""
    from transformers import GenerationConfig

    tokenizer = models.load_tokenizer(source, config.model)
    revision = config.model.revision if source == config.model.name else None
    shape = models.load_shape(source, config.model)
    try:
        known = GenerationConfig.from_pretrained(source, revision=revision or "main").eos_token_id
    except OSError:  # a model without that file, whose end tokens are in its config
        known = getattr(shape.get_text_config(), "eos_token_id", None)
    return Chat(tokenizer, _with_own_end(known, tokenizer), token_limit(config.sampling, shape))


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends an answer: the model's own, and the tokenizer's."""
    config = model.generation_config
    return _with_own_end(config.eos_token_id if config is not None else None, tokenizer)


def _with_own_end(known: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    listed = known if isinstance(known, list) else [known] if known is not None else []
    if harmony.speaks(tokenizer.chat_template):  # a copy without generation_config.json would talk on after a call
        own = tokenizer.get_vocab()
        listed = [*listed, *(own[token] for token in harmony.END_TOKENS if token in own)]
    return sorted({*listed, tokenizer.eos_token_id})


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    for index, token in enumerate(ids):
        if token in ends:
            return ids[: index + 1]
    return ids
