"""Chat templates of real models, written anew for Ollama: the same bytes, or a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl

from lib.export import ExportError
from lib.export.gotemplate import GoTemplateError, collate, render
from lib.export.template import Prompts, conversations, differences, ollama_template
from lib.starter import build_tokenizer

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MARKS = ["<|im_start|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>",
         "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|user|>", "<|assistant|>", "<|system|>"]  # fmt: skip

USER = {"role": "user", "content": "u"}
SYSTEM = {"role": "system", "content": "s"}


def prompts(template: str) -> Prompts:
    tokenizer: Any = build_tokenizer(["a text"])
    tokenizer.add_special_tokens({"extra_special_tokens": MARKS, "bos_token": "<bos>"})
    tokenizer.chat_template = template
    return Prompts(tokenizer)


def real(name: str) -> Prompts:
    return prompts((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name",
    [
        "qwen2_5",
        "qwen3",
        "llama3",
        "llama3_1",
        "llama3_2",
        "gemma",
        "gemma3",
        "gptoss",
        "phi3",
        "deepseekv3",
        "cohere2",
    ],
)
def test_the_templates_of_real_models_are_said_for_ollama_byte_for_byte(name: str) -> None:
    own = real(name)
    made = ollama_template(own, [own.tokenizer.eos_token_id])
    chat = [USER, {"role": "assistant", "content": "{{ no }} `\\n` \t 数"}, {"role": "user", "content": '"""}}'}]
    assert render(made.text, chat) == own.text(chat)
    assert differences(made.text, own) == []
    assert made.stops == (str(own.tokenizer.eos_token),)


def test_a_template_of_pictures_is_refused() -> None:
    with pytest.raises(ExportError, match="every message once and in its place"):
        ollama_template(real("idefics3"), [0])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}", "depends on more"),
        ("{% for m in messages if m.role != 'system' %}|{{ m.content }}{% endfor %}", "once and in its place"),
        ("{% for m in messages %}|{{ m.content | upper }}{% endfor %}", "once and in its place"),
        ("{% for m in messages %}|{{ m.content | replace('2', 'two') }}{% endfor %}", "depends on more"),
        ("{{ raise_exception('no') }}", "refuses a chat of one user message"),
    ],
)
def test_what_go_cannot_say_is_refused_with_the_reason(template: str, reason: str) -> None:
    with pytest.raises(ExportError, match=reason):
        ollama_template(prompts(template), [0])


@pytest.mark.parametrize("text", ["{", "{{ x", '"""', "\r", "\u00a0", "\u200b", "-}} ", "'`", "\n\n", "}}"])
def test_texts_that_look_like_syntax_stay_what_they_are(text: str) -> None:
    own = prompts("{% for m in messages %}" + "{{ t }}".join(["", "{{ m.content }}", ""]) + "{% endfor %}{{ t }}")
    own.tokenizer.chat_template = "{% set t = " + repr(text) + " %}" + str(own.tokenizer.chat_template)
    made = ollama_template(own, [own.tokenizer.eos_token_id])
    assert render(made.text, [USER]) == text + "u" + text + text == own.text([USER])


def test_what_the_tokenizer_refuses_is_refused_with_a_reason_and_so_are_tools() -> None:
    strict = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}|{{ m.content }}"
    made = ollama_template(prompts(strict + "{% endfor %}"), [0])
    assert any("refuses system messages" in caveat for caveat in made.caveats)
    for chat in ([SYSTEM, USER], [USER, {"role": "tool", "content": "4"}]):
        with pytest.raises(GoTemplateError, match="the template stops: this chat template knows only these roles"):
            render(made.text, chat)


def test_a_system_message_that_comes_late_is_refused_where_the_tokenizer_moves_it() -> None:
    made = ollama_template(real("gemma3"), [0])
    with pytest.raises(GoTemplateError, match="takes no system message after assistant or user"):
        render(made.text, [USER, SYSTEM, USER])
    assert "a system message is taken at the beginning only" in made.caveats


def test_that_the_tokenizer_strips_messages_is_said() -> None:
    assert any("white space" in caveat for caveat in ollama_template(real("llama3"), [0]).caveats)
    assert not any("white space" in caveat for caveat in ollama_template(real("qwen3"), [0]).caveats)


def test_any_changed_byte_of_a_template_is_found() -> None:
    own = real("qwen2_5")
    text = ollama_template(own, [0]).text
    plain = [
        at for at in range(len(text)) if text[at] == "\n" or text.startswith("<|", at) or text[at : at + 2] == "|>"
    ]
    assert len(plain) > 20
    for at in plain:
        assert differences(text[:at] + "~" + text[at + 1 :], own), text[at - 20 : at + 20]


def test_the_token_that_ollama_writes_itself_is_left_out_of_the_template() -> None:
    own = real("llama3")
    kept, left = (ollama_template(Prompts(own.tokenizer, leave_out), [0]).text for leave_out in ("", "<bos>"))
    assert "<bos>" in kept and "<bos>" not in left and render(kept, [USER]) == "<bos>" + render(left, [USER])
    with pytest.raises(ExportError, match="puts <bos> before every prompt"):
        ollama_template(Prompts(real("qwen3").tokenizer, "<bos>"), [0])


def test_conversations_have_every_order_of_roles_and_a_users_message_last() -> None:
    shapes = {tuple(message["role"] for message in chat) for chat in conversations()}
    assert len(shapes) == len(conversations()) == 31  # 1 + 2 + 4 + 8 + 16 with no role beside itself
    assert all(shape[-1] == "user" for shape in shapes)


def test_neighbours_of_one_role_are_one_message_as_ollama_has_it() -> None:
    assert collate([USER, USER, SYSTEM]) == [{"role": "user", "content": "u\n\nu"}, SYSTEM]
    assert len(collate([{"role": "tool", "content": "1"}] * 2)) == 2


@pytest.mark.parametrize(
    ("template", "made"),
    [
        ("a {{- .System -}} \n b", "asb"),
        ("{{if .System}}x{{else}}y{{end}}", "x"),
        ('{{ if eq .System "a" "s" }}1{{ else if .System }}2{{ end }}', "1"),
        ('{{ $a := "1" }}{{ if .System }}{{ $a := "2" }}{{ $a }}{{ end }}{{ $a }}', "21"),
        ('{{ $a := "1" }}{{ range .Messages }}{{ $a = .Role }}{{ end }}{{ $a }}', "user"),
        ('{{ "\\u0041\\"}}" }}{{ `\\n` }}', 'A"}}\\n'),
        ("{{ range .Messages }}{{ $.System }}{{ .Role }};{{ end }}", "ssystem;suser;"),
    ],
)
def test_the_evaluator_does_what_go_does(template: str, made: str) -> None:
    """`make test-ollama-template` asks Go itself about these and 20,000 others."""
    assert render(template, [SYSTEM, USER]) == made


@pytest.mark.parametrize(
    "template", ["{{ printf .System }}", "{{ .Nothing }}", "{{ if .System }}", "{{ end }}", "{{", "{{ $x }}"]
)
def test_what_the_evaluator_does_not_know_it_refuses(template: str) -> None:
    with pytest.raises(GoTemplateError):
        render(template, [SYSTEM, USER])
