"""Rows as verl's parquet: what is written, what is refused, and what verl's own dataset reads of it."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import run_cli
from tiny_models import tiny_qwen2

from lib.config import load_config
from lib.prepare import open_chat, prepare
from lib.runfolder import Run, open_run
from lib.task import Task, load_task
from lib.verl.environment import VerlMissingError, interpreter
from lib.verl.exporting import read_through_verl, tables_for_verl, write
from lib.verl.parquet import FILES, ParquetError, check_parquet, write_parquet
from lib.verl.reward import read_order

MESSAGE = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
GOOD: dict[str, Any] = {
    "data_source": "mine",
    "prompt": [{"role": "user", "content": "2 + 2?"}],
    "reward_model": {"style": "rule", "ground_truth": '"4"'},
    "extra_info": {"split": "train", "index": 0},
}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_qwen2(tmp_path_factory.mktemp("policy")))


def prepared(folder: Path, config: str, policy: str, **overrides: Any) -> tuple[Task, Run]:
    """A run with its rows, in a folder of its own."""
    overrides = {"paths.outputs": str(folder), "model.name": policy, **overrides}
    settings = load_config(config, overrides)
    task = load_task(settings.task.name, **settings.task.params)
    run = open_run("run", settings)
    prepare(task, run)
    return task, run


def records(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pyarrow.parquet.read_table(path).to_pylist()
    return found


def refused(folder: Path, *tables: list[dict[str, Any]] | pyarrow.Table) -> str:
    paths = []
    for number, table in enumerate(tables):
        paths.append(folder / f"{number}.parquet")
        whole = table if isinstance(table, pyarrow.Table) else pyarrow.Table.from_pylist(table)
        pyarrow.parquet.write_table(whole, paths[-1])
    with pytest.raises(ParquetError) as caught:
        check_parquet(paths)
    return str(caught.value)


# -- what is written ---------------------------------------------------------------------------------------------------


def test_ace_is_written_as_sixty_and_twenty_rows_that_hold_all_that_scoring_needs(
    shared: Path, tmp_path: Path, policy: str
) -> None:
    task, run = prepared(tmp_path, "configs/smoke/ace.yaml", policy, **{"task.path": str(shared / "data" / "ace")})
    written = write_parquet(task, run)
    assert written.rows == {"train": 60, "eval": 20} and written.loop_rows == 0
    train = pyarrow.parquet.read_table(written.folder / "train.parquet")
    assert train.schema.field("prompt").type == pyarrow.list_(MESSAGE)
    assert train.schema == pyarrow.parquet.read_table(written.folder / "test.parquet").schema
    rows = list(run.read_rows("train"))
    for number, (record, row) in enumerate(zip(train.to_pylist(), rows, strict=True)):
        assert record["prompt"] == row["prompt"] and record["ability"] == row["category"]
        assert record["data_source"] == "grpo-workbench/ace" and record["reward_model"]["style"] == "model"
        assert json.loads(record["reward_model"]["ground_truth"]) == row
        extra = {"split": "train", "index": number, "id": row["id"], "agent_loop": False}
        assert record["extra_info"] == extra
    assert Counter(row["category"] for row in rows) == dict.fromkeys(("DIY", "Food", "Gaming", "Shopping"), 15)
    order = read_order(written.folder / "reward.json")
    assert load_task(order.task, **order.params) == task
    assert (order.run, order.unscored_limit) == (str(run.folder), 0.05)
    assert [path.name for path in sorted(written.folder.iterdir())] == ["reward.json", "test.parquet", "train.parquet"]


def test_the_command_takes_domains_and_the_ratio_and_verl_reads_the_files_back(
    shared: Path, tmp_path: Path, policy: str, verl_python: str
) -> None:
    folder = tmp_path / "for verl"
    chosen = ["--path", str(shared / "data" / "ace"), "--domains", "DIY,Food", "--split_ratio", "0.8"]
    places = ["-p", f"paths.outputs={tmp_path}", "-p", f"model.name={policy}", "-p", f"verl.python={verl_python}"]
    done = run_cli(
        "export-verl", "configs/ace.yaml", *chosen, *places, "-p", "sampling.prompt_limit=400", "--out", str(folder)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    train, test = (records(folder / name) for name in FILES.values())
    assert (len(train), len(test)) == (32, 8)
    assert {record["ability"] for record in (*train, *test)} == {"DIY", "Food"}
    assert {record["extra_info"]["split"] for record in test} == {"eval"}
    over = [int(count) for count in re.findall(r"\.parquet: \d+ rows \((\d+) over 400 tokens\)", done.stdout)]
    assert sum(over) > 0, "some of ACE's prompts are that long"
    told = f"verl's RLHFDataset reads them; within the limit: {32 - over[0]}, {8 - over[1]}"
    assert done.stdout.splitlines()[-1] == told
    read = read_through_verl(verl_python, [str(folder / "train.parquet")], policy, 400)[str(folder / "train.parquet")]
    assert read["prompts"] == [record["prompt"] for record in train[:4]]
    assert {"raw_prompt", "reward_model", "extra_info", "data_source", "index"} <= set(read["keys"])


def test_a_wrong_domain_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    done = run_cli("export-verl", "configs/smoke/ace.yaml", "--domains", "DYI", "-p", f"paths.outputs={tmp_path}")
    assert done.returncode == 2 and "task.domains: configs/examples/ace has no domain 'DYI'" in done.stderr
    assert not list(tmp_path.rglob("*.parquet"))


def test_rows_with_tools_are_marked_for_the_agent_loop_and_keep_them_in_their_row(tmp_path: Path, policy: str) -> None:
    task, run = prepared(tmp_path, "configs/functions.yaml", policy, **{"task.prompting": "tools"})
    written = write_parquet(task, run)
    assert written.loop_rows == sum(written.rows.values()) > 0
    record, row = records(written.folder / "train.parquet")[0], run.read_rows("train")[0]
    assert record["extra_info"]["agent_loop"] and record["reward_model"]["style"] == "rule"
    assert json.loads(record["reward_model"]["ground_truth"])["tools"] == row["tools"]


def test_only_the_rows_that_are_kept_are_trained_on_under_their_own_numbers(tmp_path: Path, policy: str) -> None:
    task, run = prepared(tmp_path, "configs/smoke/decisions.yaml", policy)
    written = write_parquet(task, run, kept=[3, 5])
    rows = records(written.folder / FILES["train"])
    assert [row["extra_info"]["index"] for row in rows] == [3, 5] and written.rows["train"] == 2
    assert rows[0]["extra_info"]["id"] == run.read_rows("train")[3]["id"]
    assert written.rows["eval"] == len(run.read_rows("eval"))


def test_notebook_one_writes_them_where_the_config_asks_and_not_otherwise(tmp_path: Path, policy: str) -> None:
    small = {"task.generate_rows": 40, "sampling.prompt_limit": 256}
    task, run = prepared(tmp_path / "a", "configs/smoke/decisions.yaml", policy, **small)
    assert tables_for_verl(run.config, task, open_chat(run.config, run), run) == []
    assert not (run.folder / "verl").exists()
    task, run = prepared(tmp_path / "b", "configs/smoke/decisions.yaml", policy, **small, **{"data.parquet": True})
    tables = tables_for_verl(run.config, task, open_chat(run.config, run), run)
    assert [Path(table["file"]).name for table in tables] == ["train.parquet", "test.parquet"]
    assert [table["rows"] for table in tables] == [len(run.read_rows(split)) for split in FILES]


def test_prompts_over_the_limit_are_counted_with_the_policys_tokenizer(tmp_path: Path, policy: str) -> None:
    small = {"task.generate_rows": 40}
    task, run = prepared(tmp_path / "a", "configs/smoke/decisions.yaml", policy, **small)
    chat = open_chat(run.config, run)
    lengths = sorted(len(chat.prompt_ids(row["prompt"])) for split in FILES for row in run.read_rows(split))
    limit = lengths[len(lengths) // 2]
    task, run = prepared(
        tmp_path / "b", "configs/smoke/decisions.yaml", policy, **small, **{"sampling.prompt_limit": limit}
    )
    tables = write(task, run, chat)
    over = sum(length > limit for length in lengths)
    assert sum(table.overlong or 0 for table in tables) == over > 0
    assert f"{over} prompts over sampling.prompt_limit {limit} are left out" in (run.folder / "log.txt").read_text()
    task, run = prepared(
        tmp_path / "c", "configs/smoke/decisions.yaml", policy, **small, **{"sampling.prompt_limit": 1}
    )
    with pytest.raises(ParquetError, match=r"all \d+ training prompts are longer than sampling\.prompt_limit 1"):
        write(task, run, chat)


def test_a_split_without_rows_is_refused(tmp_path: Path, policy: str) -> None:
    task, run = prepared(tmp_path, "configs/smoke/ace.yaml", policy, **{"task.split_ratio": 1})
    with pytest.raises(ParquetError, match=r"the eval split has no rows, and verl needs a file of both"):
        write_parquet(task, run)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_sound_files_of_a_users_own_pass(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([GOOD]), tmp_path / "a.parquet")
    check_parquet([tmp_path / "a.parquet"])


def test_a_prompt_that_is_a_text_is_refused_with_what_to_write(tmp_path: Path) -> None:
    told = refused(tmp_path, [GOOD | {"prompt": json.dumps(GOOD["prompt"])}])
    assert "0.parquet: prompt has to be list<struct<role: string, content: string>>, and is a text" in told
    assert "write the list itself, not json.dumps of it" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompt": [{"role": "user", "text": "x"}]}, "prompt has to be list<struct<role: string, content: string>>"),
        ({"prompt": []}, "prompt has to be list<struct"),
        ({"reward_model": "4"}, "reward_model has to be struct<style: string, ground_truth: string>, and is string"),
        ({"reward_model": {"ground_truth": 4}}, "reward_model has to be struct<style: string, ground_truth: string>"),
        ({"reward_model": {"ground_truth": "four"}}, "row 0: reward_model.ground_truth is no JSON ('four')"),
        ({"extra_info": "{}"}, "extra_info has to be a struct, the same in every row, and is string"),
        (
            {"prompt": [{"role": "user", "content": None}, {"role": "a", "content": "b"}]},
            "row 0: prompt has no messages",
        ),
    ],
)
def test_what_verl_would_misread_or_refuse_late_is_refused_with_its_place(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    assert f"0.parquet: {told}" in refused(tmp_path, [GOOD | changes])


def test_missing_columns_empty_files_and_other_files_are_all_told_at_once(tmp_path: Path) -> None:
    no_prompt = {name: value for name, value in GOOD.items() if name != "prompt"}
    (tmp_path / "text.parquet").write_text("a,b\n1,2\n")
    empty = pyarrow.Table.from_pylist([GOOD]).slice(0, 0)
    told = refused(tmp_path, [no_prompt], empty)
    assert "0.parquet: no column 'prompt'; there are: data_source, reward_model, extra_info" in told
    assert "1.parquet: no rows: check task.split_ratio and max_samples" in told
    with pytest.raises(ParquetError, match=r"text\.parquet: not a parquet file"):
        check_parquet([tmp_path / "text.parquet"])


def test_extra_info_that_differs_between_files_or_rows_is_refused(tmp_path: Path) -> None:
    other = GOOD | {"extra_info": {"split": "test", "level": "easy"}}
    told = refused(tmp_path, [GOOD], [other])
    assert "extra_info differs: 0.parquet has struct<split: string, index: int64>; 1.parquet has struct<" in told
    told = refused(tmp_path, [GOOD, other])
    assert "extra_info.index is there in 1 of 2 rows only" in told and "extra_info.level" in told


def test_many_broken_rows_are_counted_not_listed(tmp_path: Path) -> None:
    told = refused(tmp_path, [GOOD | {"reward_model": {"style": "rule", "ground_truth": "x"}}] * 30)
    assert told.count("is no JSON") == 5 and "and 25 more such rows" in told


# -- where verl is -----------------------------------------------------------------------------------------------------


def test_without_verls_environment_the_message_says_how_to_make_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.verl.environment.PLACE", tmp_path)
    with pytest.raises(VerlMissingError, match=r"^verl's environment is not made \(make verl\)"):
        interpreter()
    with pytest.raises(VerlMissingError, match=r"^verl\.python: there is no interpreter /nowhere/python"):
        interpreter("/nowhere/python")
    python = shutil.which("python3")
    assert python and interpreter(python) == python
