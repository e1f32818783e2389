"""Tables and the tasks that read them: laziness, splits, and every problem of a table at once."""

from __future__ import annotations

import json
import os
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lib.data import CsvTable, JsonlTable, Record, RowsTask, ScoreFunctionTask, Table, TableErrors, Where, write_csv
from lib.task import Rollout, Row, Score, TaskError, load_task


class Plain(RowsTask, frozen=True):
    """Rows as they stand, for tests."""

    def row(self, record: Record, where: Where) -> Row | None:
        if record.get("prompt") == "drop":
            where.drop("asked for")
            return None
        return {**record, "prompt": [{"role": "user", "content": record["prompt"]}]}


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def jsonl(path: Path, records: list[Any]) -> Path:
    return write(path, "".join(json.dumps(record) + "\n" for record in records))


# -- tables -----------------------------------------------------------------------------------------------------------


def test_csv_cells_may_hold_commas_quotes_and_line_breaks_and_lines_are_counted_through_them(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'a,b\n1,"two\nlines"\n\n2,"say ""hi"", ok"\r\n3,5" pipe\n')
    table = CsvTable(path)
    assert list(table) == [{"a": "1", "b": "two\nlines"}, {"a": "2", "b": 'say "hi", ok'}, {"a": "3", "b": '5" pipe'}]
    assert [table.place(number) for number in range(3)] == ["line 2", "line 5", "line 6"]
    assert table[-1]["a"] == "3" and [record["a"] for record in table[1:]] == ["2", "3"]
    with pytest.raises(IndexError):
        table[3]


def test_a_byte_order_mark_and_other_alphabets_are_read(tmp_path: Path) -> None:
    assert CsvTable(write(tmp_path / "t.csv", "\ufeffprompt,b\nпривет,日本\n".encode()))[0] == {
        "prompt": "привет",
        "b": "日本",
    }
    assert JsonlTable(write(tmp_path / "t.jsonl", '\ufeff{"a": "ü\u2028"}\n'))[0] == {"a": "ü\u2028"}


@pytest.mark.parametrize("table", [CsvTable, JsonlTable])
def test_a_file_that_is_not_utf8_is_refused_with_line_and_byte(tmp_path: Path, table: type[Table]) -> None:
    path = write(tmp_path / "t.txt", "a\nb\ncafé\n".encode("latin-1"))
    with pytest.raises(TaskError, match=r"t\.txt, line 3: not UTF-8 \(byte 7 is 0xe9\)"):
        table(path)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"an empty file \(0 bytes\)"),
        ("a,b,a\n1,2,3\n", r"the column 'a' is there twice"),
        ('a,b\n1,2\n3,"open\n4,5\n', r"line 3: not CSV \(unexpected end of data\)"),
        ('a,b\n"x" y,2\n', r"line 2: not CSV"),
    ],
)
def test_a_broken_csv_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        CsvTable(write(tmp_path / "t.csv", text))


def test_a_broken_record_is_told_with_its_line_when_it_is_read(tmp_path: Path) -> None:
    table = JsonlTable(write(tmp_path / "t.jsonl", '{"a": 1}\n\n[2]\n{"a":\n{"a": NaN}\n'))
    assert table[0] == {"a": 1}
    with pytest.raises(TaskError, match=r"line 3: a list, not a JSON object"):
        table[1]
    with pytest.raises(TaskError, match=r"line 4: not JSON"):
        table[2]
    with pytest.raises(TaskError, match=r"line 5: NaN is not JSON"):
        table[3]
    with pytest.raises(TaskError, match=r"line 2: 1 cells; the header has 2"):
        CsvTable(write(tmp_path / "t.csv", "a,b\n1\n"))[0]


def test_a_missing_file_and_a_file_cut_while_in_use_are_told(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match="cannot be read"):
        CsvTable(tmp_path / "none.csv")
    path = jsonl(tmp_path / "t.jsonl", [{"a": 1}, {"a": 2}])
    table = JsonlTable(path)
    os.truncate(path, 3)
    with pytest.raises(TaskError, match="became shorter while it was in use"):
        table[1]


def test_a_table_travels_to_other_processes(tmp_path: Path) -> None:
    table = JsonlTable(jsonl(tmp_path / "t.jsonl", [{"n": number} for number in range(100)]))
    assert table[50] == {"n": 50}
    assert pickle.loads(pickle.dumps(table))[51] == {"n": 51}
    child = os.fork()
    if child == 0:
        os._exit(0 if [table[n]["n"] for n in range(100)] == list(range(100)) else 1)
    assert [table[n]["n"] for n in range(100)] == list(range(100))
    assert os.waitpid(child, 0)[1] == 0


def test_a_table_of_200_000_rows_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    with path.open("w") as file:
        file.write("id,prompt\n")
        file.writelines(
            f'{number},"question number {number}, which is long enough to matter in memory"\n'
            for number in range(200_000)
        )
    tracemalloc.start()
    table = CsvTable(path)
    assert table[123_456]["id"] == "123456"
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 4e6 and peak < 8e6 < path.stat().st_size


def test_an_empty_jsonl_file_is_an_empty_table_for_the_run_folder(tmp_path: Path) -> None:
    assert list(JsonlTable(write(tmp_path / "t.jsonl", ""))) == []


def test_json_parquet_and_hub_datasets_give_the_same_rows_as_csv(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"id": f"r{number}", "prompt": f"p{number}"} for number in range(6)]
    write_csv(tmp_path / "a.csv", ["id", "prompt"], [list(record.values()) for record in records])
    jsonl(tmp_path / "a.jsonl", records)
    write(tmp_path / "a.json", json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "a.parquet")
    expected = list(Plain(path=str(tmp_path / "a.csv")).rows("train"))
    assert len(expected) == 5
    for ending in ("jsonl", "json", "parquet"):
        assert list(Plain(path=str(tmp_path / f"a.{ending}")).rows("train")) == expected
    hub = tmp_path / "hub"
    hub.mkdir()
    (tmp_path / "a.csv").rename(hub / "train.csv")
    assert list(Plain(dataset=str(hub)).rows("train")) == expected
    with pytest.raises(TaskError, match="cannot be loaded"):
        Plain(dataset=str(hub), dataset_split="nope").rows("train")


# -- writing ----------------------------------------------------------------------------------------------------------


def test_a_table_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "old")

    def rows() -> Any:
        yield [1, 0.1 + 0.2]
        raise KeyError("broken half way")

    with pytest.raises(KeyError):
        write_csv(path, ["a", "b"], rows())
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["t.csv"]
    write_csv(path, ["a", "b"], [[1, 0.1 + 0.2]])
    assert path.read_text() == "a,b\n1,0.30000000000000004\n"
    with pytest.raises(TaskError, match=r"could not be written \(.*\); nothing was left behind"):
        write_csv(path / "below-a-file" / "t.csv", ["a"], [])


# -- rows and splits --------------------------------------------------------------------------------------------------


def ids(task: RowsTask, split: Any) -> list[str]:
    return [row["id"] for row in task.rows(split)]


def table_of(tmp_path: Path, count: int) -> str:
    return str(jsonl(tmp_path / "t.jsonl", [{"id": f"r{number}", "prompt": f"p{number}"} for number in range(count)]))


def test_the_split_is_exact_disjoint_stable_and_in_the_order_of_the_table(tmp_path: Path) -> None:
    path = table_of(tmp_path, 1000)
    train, held_out = ids(Plain(path=path), "train"), ids(Plain(path=path), "eval")
    assert len(train) == 800 and len(held_out) == 200 and not set(train) & set(held_out)
    assert train == sorted(train, key=lambda name: int(name[1:]))
    assert train == ids(Plain(path=path), "train") != ids(Plain(path=path, split_seed=1), "train")
    assert (len(ids(Plain(path=path, split_ratio=0.0), "eval")), ids(Plain(path=path, split_ratio=1.0), "eval")) == (
        1000,
        [],
    )


def test_a_row_never_changes_sides_when_max_samples_changes(tmp_path: Path) -> None:
    path = table_of(tmp_path, 500)
    small, big = Plain(path=path, max_samples=50), Plain(path=path)
    assert (len(ids(small, "train")), len(ids(small, "eval"))) == (40, 10)
    assert set(ids(small, "train")) <= set(ids(big, "train")) and set(ids(small, "eval")) <= set(ids(big, "eval"))


def test_two_rows_give_one_for_each_side(tmp_path: Path) -> None:
    task = Plain(path=table_of(tmp_path, 2))
    assert len(task.rows("train")) == len(task.rows("eval")) == 1


def test_rows_are_read_when_asked_for_and_sliced_lazily(tmp_path: Path) -> None:
    rows = Plain(path=table_of(tmp_path, 100)).rows("train")
    assert [row["id"] for row in rows[2:4]] == [rows[2]["id"], rows[3]["id"]]
    assert rows[0] is not rows[0]


def test_columns_are_renamed_and_a_wrong_name_is_told_with_those_that_exist(tmp_path: Path) -> None:
    path = str(write(tmp_path / "t.csv", "key,question,prompt\na,Why?,old\nb,How?,old\n"))
    row = Plain(path=path, columns={"prompt": "question", "id": "key"}, split_ratio=1).rows("train")[0]
    assert row == {"id": "a", "prompt": [{"role": "user", "content": "Why?"}]}
    swapped = Plain(path=path, columns={"prompt": "key", "key": "prompt", "id": "question"}, split_ratio=1)
    assert swapped.rows("train")[0] == {"id": "Why?", "prompt": [{"role": "user", "content": "a"}], "key": "old"}
    with pytest.raises(TaskError, match=r"quest: no such column.*'prompt'.*The table has: key, question"):
        Plain(path=path, columns={"prompt": "quest"}).rows("train")


def test_a_folder_is_read_by_name_and_lines_become_ids(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write(tmp_path / f"{name}.csv", "prompt\nx\ny\n")
    write(tmp_path / "notes.txt", "not a table")
    write(tmp_path / ".hidden.csv", "prompt\nz\n")
    task = Plain(path=str(tmp_path), split_ratio=1)
    assert ids(task, "train") == ["a:2", "a:3", "b:2", "b:3"]
    assert [path.name for path in task.input_files()] == ["a.csv", "b.csv"]


def test_all_problems_of_all_tables_come_at_once_with_file_line_and_column(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "id,prompt\n1,x\n1,y\n2\n")
    jsonl(tmp_path / "b.jsonl", [{"id": 2, "prompt": "x"}, [1], {"id": 2, "prompt": "x"}])
    with pytest.raises(TaskError) as caught:
        Plain(path=str(tmp_path)).rows("train")
    message = str(caught.value)
    assert "4 problems in the data" in message
    assert "a.csv, line 4: 1 cells; the header has 2" in message
    assert "b.jsonl, line 2: a list, not a JSON object" in message
    assert f"a.csv, line 3, id: '1' is also the id of {tmp_path}/a.csv, line 2" in message
    assert f"b.jsonl, line 3, id: '2' is also the id of {tmp_path}/b.jsonl, line 1" in message


def test_twenty_problems_are_written_out_and_the_rest_is_counted() -> None:
    errors = TableErrors()
    for line in range(50):
        errors.at("t.csv", f"line {line}").report("q", "bad")
    with pytest.raises(TaskError) as caught:
        errors.raise_if_any()
    message = str(caught.value)
    assert message.startswith("50 problems") and message.count("bad") == 20 and "… and 30 more" in message


def test_rows_left_out_on_purpose_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    task = Plain(path=str(write(tmp_path / "t.csv", "prompt\nx\ndrop\ny\ndrop\n")))
    assert len(task.rows("train")) + len(task.rows("eval")) == 2
    assert "2 of 4 rows left out: asked for" in caplog.text
    with pytest.raises(TaskError, match="no rows left"):
        Plain(path=str(write(tmp_path / "u.csv", "prompt\ndrop\n"))).rows("train")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, r"no data: set task\.path"),
        ({"path": "nowhere.csv"}, r"nowhere\.csv does not exist"),
        ({"path": "lib/data.py"}, r"the ending '\.py' is not known"),
        ({"path": "tests/tasks"}, r"holds no table"),
    ],
)
def test_data_that_is_not_there_is_told(params: dict[str, str], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        Plain(**params).rows("train")  # type: ignore[arg-type]


def test_files_without_records_are_refused_together(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "prompt\n")
    write(tmp_path / "b.jsonl", "\n")
    write(tmp_path / "c.json", "[]")
    write(tmp_path / "d.json", '{"a": 1}')
    with pytest.raises(TaskError) as caught:
        Plain(path=str(tmp_path)).rows("train")
    assert str(caught.value).count("an empty file") == 3 and "a list of objects is needed" in str(caught.value)


# -- a user's score function ------------------------------------------------------------------------------------------


def scored(tmp_path: Path, body: str, records: list[Any] | None = None, **params: Any) -> ScoreFunctionTask:
    write(tmp_path / "mine.py", body)
    jsonl(
        tmp_path / "t.jsonl", records or [{"id": "r1", "prompt": "2+2?", "gold": "4", "answer": 4}, {"prompt": "1+1?"}]
    )
    task = load_task(str(tmp_path / "mine.py"), path=str(tmp_path / "t.jsonl"), split_ratio=1, **params)
    assert isinstance(task, ScoreFunctionTask)
    return task


async def test_a_score_function_beside_a_table_is_a_task(tmp_path: Path) -> None:
    task = scored(tmp_path, "def score(text, row):\n    return float(text == str(row.pop('answer', None)))\n")
    row, other = task.rows("train")
    assert row["gold"] == [{"role": "assistant", "content": "4"}] and row["answer"] == 4 and other["id"] == "t:2"
    rollout = Rollout.of(row, *row["gold"])
    assert await task.score(rollout) == await task.score(rollout) == Score(reward=1.0)
    assert (await task.score(Rollout.of(row, "5"))).reward == 0.0


async def test_binding_a_scorer_leaves_the_task_itself_without_one(tmp_path: Path) -> None:
    task = ScoreFunctionTask(path=str(jsonl(tmp_path / "t.jsonl", [{"prompt": "x"}])), split_ratio=1)
    bound = task.bind(lambda text, row: 1.0)
    rollout = Rollout.of(task.rows("train")[0], "y")
    assert (await bound.score(rollout)).reward == 1.0
    with pytest.raises(TaskError, match="no scorer"):
        await task.score(rollout)


async def test_a_score_function_may_be_async_and_give_none_or_a_score(tmp_path: Path) -> None:
    body = (
        "from lib.task import Score\n"
        "async def score(text, row):\n"
        "    return None if not text else Score(reward=0.5, parts={'length': float(len(text))})\n"
    )
    task = scored(tmp_path, body)
    row = task.rows("train")[0]
    assert (await task.score(Rollout.of(row, "abc"))).parts == {"length": 3.0}
    assert (await task.score(Rollout.of(row, ""))).reward is None


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "1.5", "-0.1", "'good'"])
async def test_a_score_that_is_no_reward_is_an_error_naming_the_row(tmp_path: Path, value: str) -> None:
    task = scored(tmp_path, f"def score(text, row):\n    return {value}\n")
    with pytest.raises(TaskError, match=r"score\(\) gave .* for row 'r1'"):
        await task.score(Rollout.of(task.rows("train")[0], "x"))


def test_messages_become_prompt_and_gold(tmp_path: Path) -> None:
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    records = [{"messages": [*talk, {"role": "assistant", "content": "Hello"}], "category": 3}, {"messages": talk}]
    first, second = scored(tmp_path, "def score(text, row): return 1.0\n", records).rows("train")
    assert first["prompt"] == second["prompt"] == talk and first["category"] == "3"
    assert first["gold"] == [{"role": "assistant", "content": "Hello"}] and "gold" not in second
    assert json.loads(json.dumps(first)) == first and "messages" not in first


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": " "}, r"line 1, prompt: empty"),
        ({"prompt": [{"content": "no role"}]}, r"line 1, prompt"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, r"no message before the assistant's answer"),
        ({"question": "x"}, r"prompt: no such column, nor 'messages'. The table has: question"),
    ],
)
def test_a_row_without_a_prompt_is_told(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        scored(tmp_path, "def score(text, row): return 1.0\n", [record]).rows("train")


def test_values_that_are_not_json_are_told_with_their_column(tmp_path: Path) -> None:
    import datetime

    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([{"prompt": "x", "day": datetime.date(2024, 1, 1)}]), tmp_path / "t.parquet")
    with pytest.raises(TaskError, match=r"record 1, day: cannot be written as JSON"):
        ScoreFunctionTask(path=str(tmp_path / "t.parquet")).rows("train")


def test_an_unknown_field_names_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task\.split_ration: unknown key.*'split_ratio'"):
        scored(tmp_path, "def score(text, row): return 1.0\n", split_ration=0.5)
    with pytest.raises(TaskError, match=r"path .* and dataset .* are both set"):
        scored(tmp_path, "def score(text, row): return 1.0\n", dataset="x/y")
