"""The model card: what an artifact is, what it was trained on and how, how well it does, and whose licence holds.

Owns the text. Says nothing that the run does not know, and names no folder of this machine and no secret.

    python -c "from lib.export.card import base_licence; help(base_licence)"
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import yaml

from lib.export.folder import MANIFEST, Artifact
from lib.log import scrub
from lib.runfolder import Run

RELATION = {
    "adapter": "adapter",
    "gguf-adapter": "adapter",
    "merged": "finetune",
    "mxfp4": "quantized",
    "gguf": "quantized",
}
"""The Hub's word for what an artifact is to its base."""

LICENCE_KEYS = ("license", "license_name", "license_link")
NOT_SHOWN = ("paths", "tracker", "cost", "modal", "export")
"""Config sections that say where a run was, and not what it made."""

_ADDRESS = re.compile(
    r"[a-z][a-z0-9+.-]*://\S*|(?:localhost|\d{1,3}(?:\.\d{1,3}){3})(?::\d+)?(?:/\S*)?|[\w.-]+\.[a-z]{2,}:\d+(?:/\S*)?",
    re.IGNORECASE,
)
_WHAT = {
    "adapter": "a LoRA adapter on",
    "gguf-adapter": "a LoRA adapter, as a GGUF file, on",
    "merged": "a model whose LoRA adapter is merged into",
    "mxfp4": "a model whose LoRA adapter is merged into, with its experts in MXFP4,",
    "gguf": "a GGUF file of a model that was trained from",
}


def model_card(artifact: Artifact, run: Run, licence: Mapping[str, str]) -> str:
    """README.md of an artifact's repository, Markdown with the Hub's YAML header. `licence`: see `base_licence`."""
    origin = artifact.facts["origin"]
    parts = [
        f"---\n{yaml.safe_dump(_header(artifact, licence), sort_keys=False)}---\n\n# {run.name}\n",
        f"This is {_WHAT[artifact.kind]} `{origin['base']}`{_at(origin['revision'])}, trained with GRPO"
        f"{_steps(origin['step'])} by the GRPO workbench.\n",
        _data(run),
        _evaluation(run),
        _licence(str(origin["base"]), licence),
        _checks(artifact),
        f"## Config\n\n```yaml\n{_config(run)}```\n",
    ]
    return scrub("\n".join(part for part in parts if part))


def base_licence(folder: Path) -> dict[str, str]:
    """What a model's own card says of its licence; {} where it says nothing."""
    card = folder / "README.md"
    found = re.match(r"---\n(.*?\n)---", card.read_text(encoding="utf-8"), re.DOTALL) if card.is_file() else None
    try:
        header = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:  # somebody else's card: what cannot be read says nothing
        header = None
    if not isinstance(header, dict):
        return {}
    return {key: str(header[key]) for key in LICENCE_KEYS if header.get(key)}


def without_places(value: Any) -> Any:
    """The same without addresses of servers, and with folders of this machine cut down to their own names."""
    if isinstance(value, dict):
        return {key: without_places(one) for key, one in value.items() if not _is_address(one)}
    if isinstance(value, (list, tuple)):
        return [without_places(one) for one in value if not _is_address(one)]
    if isinstance(value, str) and (PurePath(value).is_absolute() or value.startswith("~")):
        return PurePath(value).name
    return value


def _is_address(value: Any) -> bool:
    """Whether a value is a URL, or a host with a port."""
    return isinstance(value, str) and bool(_ADDRESS.fullmatch(value.strip()))


def _header(artifact: Artifact, licence: Mapping[str, str]) -> dict[str, Any]:
    base = str(artifact.facts["origin"]["base"])
    header: dict[str, Any] = dict(licence)
    if "/" in base:
        header |= {"base_model": base, "base_model_relation": RELATION[artifact.kind]}
    library = "peft" if artifact.kind == "adapter" else "gguf" if "gguf" in artifact.kind else "transformers"
    return header | {"library_name": library, "pipeline_tag": "text-generation", "tags": ["grpo", "lora"]}


def _at(revision: str | None) -> str:
    return f" at `{revision}`" if revision else ""


def _steps(step: int | None) -> str:
    return f" for {step} steps" if step else ""


def _data(run: Run) -> str:
    counts = run.outputs("data") or {}
    task = without_places(run.config.task.model_dump(mode="json"))
    source = task.get("dataset") or task.get("path") or "made by the task itself"
    rows = ", ".join(f"{count} rows for {split}" for split, count in counts.items() if isinstance(count, int))
    return f"## Data\n\nTask `{task['name']}`; data: {source}{f'; {rows}' if rows else ''}.\n"


def _evaluation(run: Run) -> str:
    path = run.folder / "result.json"
    result = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}  # JSON is YAML
    policies = (result.get("evaluation") or {}).get("policies") or []
    if not policies:
        return "## Evaluation\n\nThis run was not evaluated on held-out rows.\n"
    lines = ["| policy | rows | mean reward | 95 % interval |", "|---|---|---|---|"]
    for one in policies:
        if one["reward"] is None:  # no answer could be scored, which is no 0
            lines.append(f"| {one['policy']} | {one['n']} | unknown | |")
            continue
        lines.append(f"| {one['policy']} | {one['n']} | {one['reward']:.4f} | {one['low']:.4f} to {one['high']:.4f} |")
    return "## Evaluation\n\nOn held-out rows.\n\n" + "\n".join(lines) + "\n"


def _licence(base: str, licence: Mapping[str, str]) -> str:
    if not licence:
        return (
            f"## Licence\n\nThe card of `{base}` was not there, or names no licence. What holds for it holds for this "
            f"too: find out before you use it.\n"
        )
    named = licence.get("license_name") or licence.get("license", "")
    link = f" ({licence['license_link']})" if "license_link" in licence else ""
    return f"## Licence\n\nThat of the base: {named}{link}.\n"


def _checks(artifact: Artifact) -> str:
    facts = artifact.facts
    lines = [f"`{MANIFEST}` holds the SHA-256 of every file, and of base and adapter."]
    if "packing_error_worst" in facts["facts"]:
        made = facts["facts"]
        lines.append(
            f"Packing {made['packed']} stacks of experts anew moved no weight by more than "
            f"{made['packing_error_worst']:.3f} of its block's scale (the format's bound is 1), and "
            f"{made['packing_error_relative']:.1%} in the root mean square."
        )
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return "## Files\n\n" + " ".join(lines) + f" Made with {versions}.\n"


def _config(run: Run) -> str:
    values = {name: section for name, section in run.config.as_json().items() if name not in NOT_SHOWN}
    return str(yaml.safe_dump(without_places(values), sort_keys=False, allow_unicode=True))
