"""Harmony, gpt-oss's chat format: prompts that are the same wherever they are rendered, and answers taken apart.

Owns the frozen chat template (date, reasoning effort) and the channels of an answer. The format is openai-harmony's;
templates are the tokenizers' own. vLLM renders requests for gpt-oss by that library instead of the template: the same
text, but for two line ends after developer instructions without tools, where VLLM_SYSTEM_START_DATE is the date and the
request carries the effort. Must not know models, tasks or who renders.

    python -c "from lib.harmony import message_of; print(message_of('<|channel|>final<|message|>[2]<|return|>'))"
"""

from __future__ import annotations

import datetime
import json
import re
from typing import Any

from lib.task import Message

END_TOKENS = ("<|return|>", "<|call|>")
"""What ends an answer (200002 and 200012 in gpt-oss's vocabulary): <|end|> only ends one of its messages."""

_TODAY = re.compile(r"strftime_now\(\s*(?P<quote>[\"'])(?P<form>.*?)(?P=quote)\s*\)")
_EFFORT = re.compile(r"\breasoning_effort\b")
_DEFAULT_EFFORT = re.compile(
    r"^\{%- if reasoning_effort is not defined %\}\{%- set reasoning_effort = \"\w+\" %\}\{%- endif %\}"
)
_MESSAGE = re.compile(
    r"<\|channel\|>(?P<channel>\w+)(?P<header>(?:(?!<\|(?:message|end|return|call|start)\|>).)*)<\|message\|>"
    r"(?P<text>.*?)<\|(?:end|return|call)\|>",
    re.DOTALL,
)


class EffortError(ValueError):
    """The chat template knows no reasoning effort."""


def speaks(template: Any) -> bool:
    """Whether a chat template is Harmony's."""
    return "<|channel|>" in str(template)


def frozen(template: Any, date: datetime.date, effort: str | None) -> Any:
    """The chat template with a fixed date in place of today's, and its own default of the reasoning effort replaced.

    `date` is shown in the template's own form; `effort`: None = the template's default. A request that names
    an effort is still obeyed. Freezing twice is freezing once, with the last effort. `template`: a text, or several by
    name. Raises EffortError.
    """
    if isinstance(template, dict):
        return {name: frozen(one, date, effort) for name, one in template.items()}
    text = _TODAY.sub(lambda found: json.dumps(date.strftime(found["form"])), str(template))
    text = _DEFAULT_EFFORT.sub("", text) if effort else text
    if effort and not _EFFORT.search(text):
        raise EffortError(f"model.reasoning_effort {effort}: its chat template knows no reasoning effort: leave it out")
    if effort:
        default = f'{{%- set reasoning_effort = "{effort}" %}}'
        text = f"{{%- if reasoning_effort is not defined %}}{default}{{%- endif %}}{text}"
    return text


def message_of(text: str) -> Message:
    """A gpt-oss answer with its channels taken apart: content = final, thinking = analysis (joined by blank lines).

    Without a finished final channel the markup stays in the content, so that no scorer mistakes thoughts for an answer.
    """
    channels: dict[str, list[str]] = {}
    for found in _MESSAGE.finditer(text):
        if " to=" not in found["header"]:  # a call of a tool is nobody's answer, whatever its channel
            channels.setdefault(found["channel"], []).append(found["text"])
    if "final" not in channels:
        return {"role": "assistant", "content": text}
    message = {"role": "assistant", "content": channels["final"][-1]}
    return message | ({"thinking": "\n\n".join(channels["analysis"])} if "analysis" in channels else {})
