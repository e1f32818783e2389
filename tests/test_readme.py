"""The README tells the truth: quoted messages exist, named files exist, its examples work."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from lib import PROJECT_ROOT
from lib.config import check_key, load_config
from lib.preflight import score_one
from lib.task import Rollout, load_task

README = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")


def literals() -> str:
    """Every text in lib/, pieces of f-strings joined as they are written, {} for what is filled in."""
    texts = []
    for path in (PROJECT_ROOT / "lib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values))
    return "\n".join(texts)


def troubleshooting() -> list[list[str]]:
    section = README.split("## When something goes wrong")[1].split("##")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) >= 15
    return rows


@pytest.mark.parametrize("row", troubleshooting(), ids=lambda row: row[0].strip(" `"))
def test_every_quoted_message_exists_in_lib(row: list[str]) -> None:
    assert row[0].strip(" `") in literals()


@pytest.mark.parametrize("row", troubleshooting(), ids=lambda row: row[0].strip(" `"))
def test_every_named_config_key_exists(row: list[str]) -> None:
    for key in re.findall(r"`([^`]+)`", row[2]):
        if key not in ("run_name", "overrides"):
            check_key(key)


def test_every_file_that_the_tree_names_exists() -> None:
    tree = README.split("## The tree")[1].split("A run's folder")[0]
    named = re.findall(r"\b[\w/]+\.(?:py|md)\b|\b\w+/(?=\s|$)", tree)
    missing = [n for n in named if not any((PROJECT_ROOT / p).exists() for p in (n, f"lib/{n}", f"configs/{n}"))]
    assert named and missing == []


def test_the_readme_has_no_unfilled_places() -> None:
    assert not re.findall(r"@[A-Z]+@", README)
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert (PROJECT_ROOT / path).exists(), path


def python_examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.S)


async def test_the_reward_function_of_the_readme_is_a_task(tmp_path: Path) -> None:
    (tmp_path / "my_reward.py").write_text(python_examples()[0])
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "Tell me {i}"}}\n' for i in range(10)))
    (tmp_path / "mine.yaml").write_text(
        f"task: {{name: {tmp_path}/my_reward.py, path: {tmp_path}/prompts.jsonl}}\ntraining: {{steps: 9, batch: 16}}\n"
    )
    config = load_config(tmp_path / "mine.yaml")
    task = load_task(config.task.name, **config.task.params)
    row = task.rows("train")[0]
    assert (await task.score(Rollout.of(row, "One sentence."))).reward == 1.0
    assert (await task.score(Rollout.of(row, "Two. Sentences."))).reward == 0.0


def test_the_class_of_the_readme_is_a_task(tmp_path: Path) -> None:
    (tmp_path / "guess.py").write_text(python_examples()[1])
    task = load_task(str(tmp_path / "guess.py"), highest=5)
    row = task.rows("eval")[0]
    assert row["answer"] == "1" and len(task.rows("train")) == 3
    assert score_one(task, Rollout.of(row, "1")).reward == 1.0
    assert score_one(task, Rollout.of(row, "2")).reward == 0.0


def test_the_judged_config_of_the_readme_is_a_task(tmp_path: Path) -> None:
    from lib.grading import JudgedTask

    example = next(text for text in re.findall(r"```yaml\n(.*?)```", README, re.S) if "name: judged" in text)
    (tmp_path / "tickets.jsonl").write_text(
        "".join(f'{{"prompt": "Ticket {i}", "reference": "Do {i}"}}\n' for i in range(9))
    )
    (tmp_path / "support.yaml").write_text(example.replace("tickets.jsonl", str(tmp_path / "tickets.jsonl")))
    config = load_config(tmp_path / "support.yaml")
    task = load_task(config.task.name, **config.task.params)
    assert isinstance(task, JudgedTask) and task.env_keys() == ["GEMINI_API_KEY"]
    assert {criterion.id for criterion in task.criteria(task.rows("train")[0])} == {"solves", "tone"}
