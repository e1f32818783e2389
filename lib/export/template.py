"""A tokenizer's chat template as an Ollama template: found out by asking it, written anew, and proven on conversations.

Owns what stands around the contents of system, user and assistant messages, and when that cannot be said in Go's
text/template. Must not know Modelfiles or models.

    python -c "from lib.export.template import conversations; print(len(conversations()))"

The Jinja template is rendered with names in the place of contents; what stands between two of them may depend on the
roles of both and on nothing else. What is made of that says the same bytes for every conversation that is tried, and
stops with a reason (an error that Ollama shows) where the tokenizer's own template refuses, and for tool messages.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, NamedTuple

from lib.export.errors import ExportError
from lib.export.gotemplate import GoTemplateError, render
from lib.export.template_writer import ROLES, Shape, write_template
from lib.task import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 5
"""Messages of the conversations that are tried."""

_INSTEAD = "Serve this model with vLLM (python -m lib.run serve), which uses the template as it is"

_NAMES = ("Alfa", "Bravo", "Charlie", "Delta", "Echo")
_CONTENTS = (
    "What is 2 + 2?",
    "Erste Zeile\n\nzweite Zeile: ä, ß, 数, 🙂",
    'A "quoted" {{ .Content }} and {% raw %} in {braces}',
    "<b>tags</b> & 100 % \\n \\u0041 `code` '''",
    "[0]",
    "a\tb  c",
)
"""What is written in the place of the names when the result is tried: nothing in it may be taken for syntax."""


class OllamaTemplate(NamedTuple):
    """What Ollama needs in order to render chats as the tokenizer does."""

    text: str
    stops: tuple[str, ...]
    caveats: tuple[str, ...]
    """Where chats through Ollama differ although the template is right."""


class Prompts:
    """A tokenizer's own rendering of chats up to the answer, as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, leave_out: str = "") -> None:
        """`leave_out`: what Ollama puts at the beginning itself, the begin-of-text token."""
        self.tokenizer, self.leave_out = tokenizer, leave_out

    def text(self, messages: Sequence[Message]) -> str | None:
        """The prompt; None where the template refuses these messages. Raises ExportError."""
        from jinja2 import TemplateError

        try:
            made = str(self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True))
        except TemplateError:
            return None
        if not made.startswith(self.leave_out):
            raise ExportError(
                f"Ollama puts {self.leave_out} before every prompt of this model, and its chat template does not: it "
                f"was trained without. Make the GGUF file anew with add_bos_token false in tokenizer_config.json"
            )
        return made.removeprefix(self.leave_out)


def ollama_template(prompts: Prompts, end_ids: Sequence[int]) -> OllamaTemplate:
    """The template, verified. Raises ExportError with the reason where it cannot be said for Ollama.

    A date in the prompts stays what the tokenizer says now (`load_tokenizer` freezes it to model.date).
    """
    shape = _shape_of(prompts)
    text = write_template(shape)
    differing = differences(text, prompts)
    if differing:
        raise ExportError(
            f"the chat template depends on more than the roles of neighbouring messages, which cannot be said for "
            f"Ollama: {differing[0]}. {_INSTEAD}"
        )
    return OllamaTemplate(text, stop_texts(prompts.tokenizer, end_ids), _caveats(prompts, shape))


def stop_texts(tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]) -> tuple[str, ...]:
    """The end tokens as Ollama's `stop` parameters take them: their texts."""
    texts = tuple(str(tokenizer.convert_ids_to_tokens(index)) for index in sorted(set(end_ids)))
    odd = [text for text in texts if not text.isprintable() or '"' in text or not text]
    if odd:
        raise ExportError(f"the end token {odd[0]!r} cannot be written as a stop parameter of a Modelfile")
    return texts


def differences(template: str, prompts: Prompts, chats: Sequence[Sequence[Message]] = (), limit: int = 3) -> list[str]:
    """Where a template's prompts are not the tokenizer's, in words; [] where they are the same, byte for byte.

    On `chats` ({role, content}, no tools) and on conversations of every shape.
    """
    found: list[str] = []
    for chat in (*chats, *conversations()):
        expected = prompts.text(chat)
        try:
            made: str | None = render(template, chat)
        except GoTemplateError as error:
            if not str(error).startswith("the template stops"):
                return [str(error)]
            made = None
        if made is None and "system" in [message["role"] for message in chat[1:]]:
            continue  # refused with a reason, where the tokenizer's would drop it, or move it
        if made != expected:
            shape = ", ".join(message["role"] for message in chat)
            found.append(f"for [{shape}] it is {_around(made, expected)}")
        if len(found) == limit:
            break
    return found


def conversations(contents: Sequence[str] = _CONTENTS) -> list[list[Message]]:
    """Chats of every order of roles that Ollama can hand to a template, up to LONGEST messages, a user's last."""
    chats = []
    for number, shape in enumerate(_shapes()):
        chosen = [contents[(number + place) % len(contents)] for place in range(len(shape))]
        chats.append([{"role": role, "content": text} for role, text in zip(shape, chosen, strict=True)])
    return chats


def _shapes(late_system: bool = True) -> list[tuple[str, ...]]:
    """Neighbours of one role do not occur: Ollama makes one message of them. `late_system`: later than first, too."""
    return [
        roles
        for length in range(1, LONGEST + 1)
        for roles in product(ROLES, repeat=length)
        if roles[-1] == "user"
        and all(one != other for one, other in pairwise(roles))
        and (late_system or "system" not in roles[1:])
    ]


def _shape_of(prompts: Prompts) -> Shape:
    """What stands between contents, and before the first one. Raises ExportError.

    Many templates drop system messages that come later, or move them: then the result takes them at the beginning only.
    """
    try:
        return _shape(prompts, _shapes())
    except ExportError:
        return _shape(prompts, _shapes(late_system=False))


def _shape(prompts: Prompts, shapes: Sequence[tuple[str, ...]]) -> Shape:
    gaps: dict[tuple[str, str], str] = {}
    starts: dict[str, str] = {}
    for roles in shapes:
        names = _NAMES[: len(roles)]
        text = prompts.text([{"role": role, "content": name} for role, name in zip(roles, names, strict=True)])
        if text is None:
            continue
        parts = _split(text, names)
        if parts is None:
            raise ExportError(
                f"the chat template does not show every message once and in its place (tried: {', '.join(roles)}), "
                f"which cannot be said for Ollama. {_INSTEAD}"
            )
        _agree(starts, roles[0], parts[0], roles)
        for one, other, between in zip(roles, (*roles[1:], ""), parts[1:], strict=True):
            _agree(gaps, (one, other), between, roles)
    if "user" not in starts:
        raise ExportError("the chat template refuses a chat of one user message")
    return Shape(starts, gaps, _opener(prompts.tokenizer, starts["user"]))


def _opener(tokenizer: PreTrainedTokenizerBase, start: str) -> str:
    """The special token that a turn begins with, <|im_start|> say; "" where there is none."""
    tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    text = start.removeprefix(str(tokenizer.bos_token or ""))
    found = re.search("|".join(map(re.escape, tokens)), text) if tokens else None
    return found[0] if found else ""


def _split(text: str, names: Sequence[str]) -> list[str] | None:
    parts = []
    for name in names:
        before, found, text = text.partition(name)
        if not found or name in text:
            return None
        parts.append(before)
    return [*parts, text]


def _agree(known: dict[Any, str], key: Any, value: str, roles: Sequence[str]) -> None:
    if known.setdefault(key, value) != value:
        raise ExportError(
            f"the chat template writes {known[key]!r} in one place and {value!r} in another, between the same roles "
            f"({', '.join(roles)}): it depends on more than them, which cannot be said for Ollama. {_INSTEAD}"
        )


def _caveats(prompts: Prompts, shape: Shape) -> tuple[str, ...]:
    found = []
    if any(_trims(prompts, role) for role in ROLES):
        found.append("the tokenizer's template strips white space around messages, Ollama does not: send them without")
    if prompts.text([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]) is None:
        found.append("the tokenizer's template refuses system messages, and so does this one")
    if "system" in shape.starts and ("assistant", "system") not in shape.gaps:
        found.append("a system message is taken at the beginning only")
    thought = [{"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}, {"role": "user", "content": "u"}]
    shown = prompts.text([{"role": "user", "content": "u"}, *thought])
    if shown is not None and "hm" not in shown:
        found.append("earlier thoughts must not be sent back inside of messages: the tokenizer's template drops them")
    found.append("neighbouring messages of one role reach the model as one; tool messages are refused")
    return tuple(found)


def _trims(prompts: Prompts, role: str) -> bool:
    before = {"system": [], "user": [], "assistant": [{"role": "user", "content": "u"}]}[role]
    after = [] if role == "user" else [{"role": "user", "content": "v"}]
    plain, spaced = (
        prompts.text([*before, {"role": role, "content": content}, *after]) for content in ("Alfa", " Alfa\n")
    )
    return plain is not None and spaced is not None and plain.replace("Alfa", " Alfa\n") != spaced


def _around(made: str | None, expected: str | None) -> str:
    """The first place where two prompts differ, short."""
    if made is None or expected is None:
        return "refused by one and not by the other"
    same = next((at for at, (one, other) in enumerate(zip(made, expected, strict=False)) if one != other), None)
    at = min(len(made), len(expected)) if same is None else same
    return f"{made[max(0, at - 20) : at + 20]!r} and not {expected[max(0, at - 20) : at + 20]!r}"
