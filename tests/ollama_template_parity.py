"""Our evaluator of Ollama templates against Go's own text/template, and templates of real models made with it.

make test-ollama-template        (Debian: apt-get install golang-go)
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import trl

from lib import PROJECT_ROOT
from lib.export.errors import ExportError
from lib.export.gotemplate import GoTemplateError, collate, render
from lib.export.template import Prompts, conversations, ollama_template
from lib.starter import build_tokenizer

TOKENS = re.compile(r"<\|[^|<>]+\|>|<[a-z_]+>|<｜[^｜<>]+｜>")
"""What looks like a special token in a chat template."""

PARTS = [
    "text", " ", "\n", "\t", "{", "}", "}}", '"', "`", "-", "{{ .System }}", "{{- .System }}", "{{ .System -}}",
    '{{ "a\\u0041\\n\\"}}" }}', "{{ `raw }} \\n` }}", '{{ $a := "x" }}{{ $a }}',
    "{{ if .System }}A{{ else }}B{{ end }}", '{{ if eq "a" "b" "a" }} yes {{- end }}',
    '{{ if eq .System "[0]" }}s{{ end }}', "{{ range .Messages }}[{{ .Role }}|{{ .Content }}]{{ end }}",
    '{{ $l := "" }}{{ range .Messages }}{{ if eq $l "" "user" }}<{{ $l }}>{{ else if eq .Role "user" }}u{{ else }}o'
    "{{ end }}{{ $l = .Role }}{{ end }}{{ $l }}",
    '{{ $l := "o" }}{{ if eq $l "o" }}{{ $l := "i" }}{{ $l }}{{ end }}{{ $l }}',
    "{{ range $.Messages }}{{ $.System }}{{ end }}", "{{ if .System }}1{{ else if .Messages }}2{{ end }}",
]  # fmt: skip
WRONG = ['{{ index "too short" 99 }}', "{{ nothing }}", "{{ if }}", "{{ end }}", "{{", "{{ $unknown }}", "{{else}}"]
"""What random templates are put together from, right and wrong ones."""


def real_templates() -> list[str]:
    """Of every chat template that TRL brings: what is written for Ollama."""
    found = []
    for path in sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja")):
        tokenizer: Any = build_tokenizer(["a text"])
        source = path.read_text(encoding="utf-8")
        tokens = sorted({*TOKENS.findall(source), "<|im_start|>"})
        tokenizer.add_special_tokens({"extra_special_tokens": tokens, "bos_token": "<s>"})
        tokenizer.chat_template = source
        try:
            found.append(ollama_template(Prompts(tokenizer), [tokenizer.eos_token_id]).text)
        except ExportError as error:
            print(f"  {path.name}: refused: {str(error)[:100]}")
    return found


def cases(count: int) -> list[dict[str, Any]]:
    """Every real template on every shape of chat, and `count` random templates."""
    made = [{"template": text, "messages": chat} for text in real_templates() for chat in conversations()]
    dice = random.Random(0)
    for _ in range(count):
        text = "".join(dice.choices([*PARTS * 4, *WRONG], k=dice.randint(1, 6)))
        made.append({"template": text, "messages": dice.choice(conversations())})
    return made


def ours(case: dict[str, Any]) -> str | None:
    try:
        return render(case["template"], case["messages"])
    except GoTemplateError:
        return None


def theirs(go: str, made: list[dict[str, Any]]) -> list[str | None]:
    asked = [
        {
            "Template": case["template"],
            "System": "\n\n".join(m["content"] for m in case["messages"] if m["role"] == "system"),
            "Messages": [{"Role": m["role"], "Content": m["content"]} for m in collate(case["messages"])],
        }
        for case in made
    ]
    program = PROJECT_ROOT / "tests" / "export" / "gotemplate.go"
    done = subprocess.run(
        [go, "run", str(program)], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    return [None if one["Error"] else one["Text"] for one in json.loads(done.stdout)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="random templates")
    count = parser.parse_args().count
    go = shutil.which("go")
    if go is None:
        print("skipped: Go is not installed (Debian: apt-get install golang-go)")
        return 0
    made = cases(count)
    differing = [(case, one, ours(case)) for case, one in zip(made, theirs(go, made), strict=True) if one != ours(case)]
    for case, one, own in differing[:5]:
        print(f"{case['template']!r}\n  Go:   {one!r}\n  ours: {own!r}")
    refused = sum(ours(case) is None for case in made)
    print(
        f"{len(made)} cases, {len(made) - count} of them of real models' templates: {refused} refused by both, "
        f"{len(differing)} differ"
    )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
