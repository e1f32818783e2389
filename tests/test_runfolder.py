"""The run folder: what is on disk after every kind of accident, stages, logs, locks, provenance, secrets."""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lib import PROJECT_ROOT, provenance
from lib.config import Config, load_config, parse_config
from lib.log import scrub, start_logging
from lib.runfolder import (
    Run,
    RunError,
    atomic_file,
    default_name,
    exclusive,
    hash_file,
    lock_hash,
    open_run,
    plain,
    read_lines,
    read_run,
    write_json,
)


def config(outputs: Path, **sections: Any) -> Config:
    task = {"name": "decisions", **sections.pop("task", {})}
    return parse_config({"task": task, "paths": {"outputs": str(outputs)}, **sections})


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return open_run("first", config(tmp_path))


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def script(
    code: str, *arguments: object, env: dict[str, str] | None = None, cwd: Path = PROJECT_ROOT
) -> subprocess.CompletedProcess[str]:
    """Another process of this Python; `lib` is the one in `cwd`."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=60, check=False, env=os.environ | (env or {})
    )


# -- whole or not at all ----------------------------------------------------------------------------------------------


def test_a_file_appears_only_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with atomic_file(path) as file:
        file.write("half")
        assert not path.exists()
    assert path.read_text() == "half" and files(tmp_path) == {"x.json"}


def test_a_failing_writer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "x.json") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert files(tmp_path) == set()


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": math.nan})
    with pytest.raises(TypeError):
        write_json(path, {"a": {1, 2}})
    assert json.loads(path.read_text()) == {"a": 1} and files(tmp_path) == {"x.json"}


def test_rows_that_break_off_leave_no_table(run: Run) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"id": "1"}
        raise ValueError("row 2 is broken")

    with pytest.raises(ValueError, match="row 2"):
        run.write_rows("train", rows())
    assert not [name for name in files(run.folder) if name.startswith("rows/")]


def test_a_writer_that_is_killed_leaves_no_file_under_the_name(tmp_path: Path) -> None:
    code = """
        import os, signal, sys
        from pathlib import Path
        from lib.runfolder import atomic_file
        with atomic_file(Path(sys.argv[1])) as file:
            file.write("half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    assert script(code, tmp_path / "x.json").returncode == -signal.SIGKILL
    assert not (tmp_path / "x.json").exists()


def test_written_files_have_the_users_usual_permissions(tmp_path: Path) -> None:
    code = """
        import os, sys
        os.umask(0o027)
        from pathlib import Path
        from lib.runfolder import write_json
        write_json(Path(sys.argv[1]), {})
    """
    assert script(code, tmp_path / "x.json").returncode == 0
    assert (tmp_path / "x.json").stat().st_mode & 0o777 == 0o640  # mkstemp alone would give 0o600


def test_rows_come_back_as_they_went_in(run: Run) -> None:
    rows = [{"id": str(i), "prompt": [{"role": "user", "content": "é\u2028\u0085\n" * i}]} for i in range(5)]
    assert run.write_rows("eval", iter(rows)) == 5
    assert list(run.read_rows("eval")) == rows
    assert run.write_rows("train", []) == 0 and len(run.read_rows("train")) == 0


def test_missing_rows_name_the_notebook_that_makes_them(tmp_path: Path, run: Run) -> None:
    with pytest.raises(
        RunError, match=r"rows/eval\.jsonl is missing: run notebook 1_data_prep with run_name='first' first"
    ):
        run.read_rows("eval")


# -- what the file system refuses -------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system (root)")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_a_sentence_and_leaves_nothing_half_written(small_disk: Path) -> None:
    (small_disk / "run").mkdir()
    run = Run(small_disk / "run", config(small_disk))
    with pytest.raises(
        RunError, match=r"cannot write .*train\.jsonl: the disk is full: free some space and run the same command again"
    ):
        run.write_rows("train", ({"id": str(i), "text": "x" * 1000} for i in range(1000)))
    assert files(small_disk) == set()
    assert run.write_rows("train", [{"id": "1"}]) == 1  # the space is free again


def test_a_full_disk_while_logging_is_a_sentence_and_resume_heals_the_log(small_disk: Path) -> None:
    (small_disk / "run").mkdir()
    run = Run(small_disk / "run", config(small_disk))
    run.append("metrics.jsonl", [{"step": 1}])
    sizes = run.log_sizes()
    with pytest.raises(RunError, match="the disk is full"):
        run.append("metrics.jsonl", [{"step": 2, "text": "x" * 200_000}])
    assert run.metrics() == [{"step": 1}]
    run.cut_logs(sizes)
    run.append("metrics.jsonl", [{"step": 2}])
    assert run.metrics() == [{"step": 1}, {"step": 2}]


def test_a_file_size_limit_is_a_sentence(tmp_path: Path) -> None:
    code = """
        import resource, sys
        from pathlib import Path
        from lib.runfolder import RunError, write_json
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_json(Path(sys.argv[1]), {"x": "y" * 5000})
        except RunError as error:
            print(error)
    """
    done = script(code, tmp_path / "x.json")
    assert files(tmp_path) == set()
    assert "cannot write" in done.stdout, done.stderr


def test_a_folder_without_permission_is_a_sentence() -> None:
    code = """
        import os, sys
        from lib.config import parse_config
        from lib.runfolder import RunError, open_run
        if os.getuid() == 0:
            os.setuid(65534)  # root may write anywhere
        try:
            open_run("first", parse_config({"task": {"name": "decisions"}, "paths": {"outputs": sys.argv[1]}}))
        except RunError as error:
            print(error)
    """
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path: pytest closes its own to other users
        os.chmod(folder, 0o555)
        done = script(code, folder)
    told = (
        f"cannot write {folder}/first: no permission to write there: set paths.outputs to a folder that you may write"
    )
    assert told in done.stdout, done.stderr


@pytest.mark.parametrize("where", ["outputs", "outputs/first", "outputs/first/stages"])
def test_a_file_in_the_way_is_a_sentence(tmp_path: Path, where: str) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("not mine")
    with pytest.raises(RunError, match=r"in the way: move it, or set paths\.outputs to another folder"):
        open_run("first", config(tmp_path / "outputs")).begin("data", ["task"], {})
    assert path.read_text() == "not mine"


def test_a_folder_in_the_way_is_a_sentence(run: Run) -> None:
    (run.folder / "result.json").mkdir()
    with pytest.raises(RunError, match="in the way"):
        run.finish({"x": 1})


def test_an_error_of_the_rows_source_is_not_blamed_on_the_run_folder(run: Run) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield {"id": "1"}
        raise PermissionError(13, "Permission denied", "/data/source.csv")

    with pytest.raises(PermissionError, match=r"/data/source\.csv"):
        run.write_rows("train", rows())


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "A.b_c-1", "7", "x" * 100, "long-run.2"])
def test_a_plain_name_makes_a_run(tmp_path: Path, name: str) -> None:
    assert open_run(name, config(tmp_path)).folder == tmp_path / name


@pytest.mark.parametrize("name", ["a/b", "../a", "a..b", ".hidden", "-x", "a b", "é", "a\n", "a\x00", "~", "."])
def test_other_names_are_refused_before_anything_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(RunError, match=r"run_name .* is not usable: letters, digits"):
        open_run(name, config(tmp_path / "outputs"))
    assert not (tmp_path / "outputs").exists()


def test_a_name_too_long_for_the_file_system_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        open_run("x" * 300, config(tmp_path))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("configs/decisions.yaml", "decisions"),
        ("configs/smoke/decisions.yaml", "smoke-decisions"),
        (PROJECT_ROOT / "configs" / "smoke" / "decisions.yaml", "smoke-decisions"),
        ("/data/mine.v2.yaml", "mine.v2"),
    ],
)
def test_a_run_is_named_after_its_config(path: str | Path, name: str) -> None:
    assert default_name(path) == name


def test_without_a_name_the_configs_path_names_the_run(tmp_path: Path) -> None:
    assert open_run("", config(tmp_path), default="configs/smoke/decisions.yaml").name == "smoke-decisions"


def test_a_run_without_any_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError):
        open_run("", config(tmp_path))


def test_a_config_of_any_file_name_names_a_usable_run(tmp_path: Path) -> None:
    open_run("", config(tmp_path), default="configs/my réglages (2).yaml")


# -- a run and its config ---------------------------------------------------------------------------------------------


def test_a_run_is_read_back_with_its_config(tmp_path: Path, run: Run) -> None:
    again = read_run(run.folder)
    assert (again.name, again.config) == ("first", run.config)
    with pytest.raises(RunError, match=r"is not a run folder: it has no config\.json"):
        read_run(tmp_path)


def test_a_newer_schema_is_refused_by_every_door(run: Run) -> None:
    path = run.folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    for door in (lambda: open_run("first", run.config), lambda: read_run(run.folder)):
        with pytest.raises(RunError, match="has schema 2, this workbench reads 1: update the workbench"):
            door()
    assert json.loads(path.read_text())["schema"] == 2


@pytest.mark.parametrize("schema", [{"schema": 0}, {}])
def test_an_older_schema_is_refused_with_what_to_do(run: Run, schema: dict[str, int]) -> None:
    path = run.folder / "config.json"
    path.write_text(json.dumps({"task": {"name": "decisions"}} | schema))
    for door in (lambda: open_run("first", run.config), lambda: read_run(run.folder)):
        with pytest.raises(RunError, match="has schema 0, this workbench reads 1: start a new run from its config"):
            door()


def test_a_damaged_config_is_told_in_words(run: Run) -> None:
    (run.folder / "config.json").write_text('{"schema": 1, ')
    with pytest.raises(RunError, match=r"config\.json"):
        read_run(run.folder)


# -- stages -----------------------------------------------------------------------------------------------------------


def test_a_stage_begins_ends_and_is_skipped_from_then_on(run: Run) -> None:
    assert run.begin("data", ["task"], {"table.csv": "abc"}) is None
    assert run.outputs("data") is None and not run.stages()["data"]["finished"]
    assert run.begin("data", ["task"], {"table.csv": "abc"}) is None  # begun, not finished: it goes on
    assert run.end("data", {"train": 5}) == {"train": 5}
    again = open_run("first", run.config)
    assert again.begin("data", ["task"], {"table.csv": "abc"}) == {"train": 5} == again.outputs("data")


def test_forgetting_a_stage_forgets_what_it_made_and_going_on_keeps_it(run: Run) -> None:
    products, resumable = ("checkpoints", "metrics.jsonl"), ("checkpoints/step-*",)
    assert run.begin("training", ["task"], {}, products, resumable) is None
    made = [run.path("checkpoints", "step-2", "x"), run.path("metrics.jsonl"), run.path("rows", "train.jsonl")]
    for path in made:
        path.write_text("1\n")
    assert run.begin("training", ["task"], {}, products, resumable) is None
    assert all(path.is_file() for path in made)  # begun before: it goes on from there
    (run.folder / "stages" / "training.json").unlink()  # what the refusal tells a user to do
    assert run.begin("training", ["task"], {}, products, resumable) is None
    assert [path.exists() for path in made] == [False, False, True]


def test_a_stage_that_failed_before_it_made_anything_takes_other_settings(tmp_path: Path, run: Run) -> None:
    assert run.begin("data", ["task"], {"table.csv": "broken"}) is None
    mended = open_run("first", config(tmp_path, task={"name": "decisions", "tau": 2.0}))
    assert mended.begin("data", ["task"], {"table.csv": "mended"}) is None


def test_a_stage_that_was_not_begun_cannot_end(run: Run) -> None:
    with pytest.raises(AssertionError):
        run.end("data", {})


def test_a_judges_budget_may_be_raised_in_a_run_but_not_its_model_changed(tmp_path: Path) -> None:
    def judged_by(**judge: Any) -> Run:
        return open_run("judged", config(tmp_path, task={"name": "judged", "judge": {"model": "a", **judge}}))

    judged_by(budget_usd=1.0).begin("data", ("task",), {})
    judged_by(budget_usd=1.0).end("data", {"train": 3})
    raised = judged_by(budget_usd=5.0, concurrency=8, timeout=9.0)
    raised.check_config()
    assert raised.begin("data", ("task",), {}) == {"train": 3}
    with pytest.raises(RunError, match=r"task\.judge\.model was 'a', now 'b'"):
        judged_by(model="b").begin("data", ("task",), {})


def test_another_config_is_refused_with_the_key_and_both_values(tmp_path: Path, run: Run) -> None:
    run.begin("training", ["task", "training"], {})
    run.end("training", {})
    changed = config(tmp_path, training={"learning_rate": 1e-5}, task={"tau": 2.0})
    with pytest.raises(RunError) as caught:
        open_run("first", changed)
    text = str(caught.value)
    assert "run 'first' has finished its stage 'training' with other settings" in text
    assert "training.learning_rate was 1e-06, now 1e-05" in text
    assert "task.tau was None, now 2.0" in text
    assert "Choose another run_name, or delete" in text and "stages/training.json" in text
    assert read_run(run.folder).config == run.config  # nothing of the old run was overwritten


def test_another_input_is_refused_by_its_name(run: Run) -> None:
    run.begin("training", ["training"], {"rows/train.jsonl": "aaa"}, resumable=("checkpoints/step-*",))
    run.path("checkpoints", "step-2", "logs.json").write_text("{}")
    with pytest.raises(
        RunError, match=r"has begun its stage 'training'.*inputs\.rows/train\.jsonl was 'aaa', now 'bbb'"
    ):
        run.begin("training", ["training"], {"rows/train.jsonl": "bbb"})


def test_another_lock_is_refused_when_the_stage_is_asked_for(run: Run) -> None:
    run.begin("data", ["task"], {})
    run.end("data", {})
    path = run.folder / "stages" / "data.json"
    record = json.loads(path.read_text())
    record["key"]["lock"] = "0123456789abcdef"
    path.write_text(json.dumps(record))
    open_run("first", run.config)  # looking at an old run is allowed
    with pytest.raises(RunError, match=rf"lock was '0123456789abcdef', now '{lock_hash()}'"):
        run.begin("data", ["task"], {})


def test_sections_that_no_stage_used_may_change(tmp_path: Path, run: Run) -> None:
    run.begin("data", ["task"], {})
    run.end("data", {})
    changed = config(tmp_path, evaluation={"rows": 3})
    assert open_run("first", changed).begin("data", ["task"], {}) == {}
    assert read_run(run.folder).config.evaluation.rows == 3


def test_a_stage_whose_file_is_deleted_is_done_again(tmp_path: Path, run: Run) -> None:
    run.begin("data", ["task"], {})
    run.end("data", {"train": 5})
    (run.folder / "stages" / "data.json").unlink()
    changed = open_run("first", config(tmp_path, task={"tau": 2.0}))
    assert changed.begin("data", ["task"], {}) is None


def test_task_fields_of_every_json_kind_are_the_same_config_again(tmp_path: Path) -> None:
    fields = {"a": 1, "b": 0.1, "c": None, "d": [1, {"x": "é"}], "e": {"1": True}, "f": ""}
    run = open_run("kinds", config(tmp_path, task=fields))
    run.begin("data", ["task"], {})
    assert read_run(run.folder).begin("data", ["task"], {}) is None
    assert open_run("kinds", config(tmp_path, task={"f": "", "e": {1: True}, **fields})).name == "kinds"


def test_results_of_several_notebooks_add_up_and_hold_no_nan(run: Run) -> None:
    run.finish({"rows": {"train": 5}})
    run.finish({"evaluation": {"gain": math.nan, "low": [math.inf, 1.0]}})
    assert json.loads((run.folder / "result.json").read_text()) == {
        "schema": 1, "run": "first", "rows": {"train": 5}, "evaluation": {"gain": None, "low": [None, 1.0]},
    }  # fmt: skip


def test_plain_reaches_into_everything() -> None:
    value = {"a": math.nan, "b": [1.5, (-math.inf, {"c": math.inf})], "d": "nan", "e": 7, "f": None, "g": True}
    assert plain(value) == {"a": None, "b": [1.5, [None, {"c": None}]], "d": "nan", "e": 7, "f": None, "g": True}


# -- logs -------------------------------------------------------------------------------------------------------------


def log(run: Run, *steps: int, text: str = "") -> None:
    run.append("rollouts.jsonl", [{"step": step, "text": text} for step in steps])


def test_logs_are_cut_back_to_a_checkpoint(run: Run) -> None:
    log(run, 1, 2)
    run.append("metrics.jsonl", [{"step": 1}])
    sizes = run.log_sizes()
    log(run, 3, 4)
    run.append("metrics.jsonl", [{"step": 2}])
    run.cut_logs(sizes)
    assert [record["step"] for record in run.rollouts()] == [1, 2] and run.metrics() == [{"step": 1}]
    run.cut_logs({})
    assert run.rollouts() == run.metrics() == []


def test_cutting_logs_that_are_not_there_is_nothing(run: Run) -> None:
    run.cut_logs({})
    assert run.log_sizes() == {"rollouts.jsonl": 0, "metrics.jsonl": 0}


def test_a_log_shorter_than_its_checkpoint_is_refused(run: Run) -> None:
    log(run, 1)
    with pytest.raises(
        RunError, match=r"rollouts\.jsonl is shorter than its checkpoint says: it was changed by hand; start a new run"
    ):
        run.cut_logs({"rollouts.jsonl": 10_000})
    assert len(run.rollouts()) == 1


def test_a_last_line_cut_off_by_a_kill_is_left_out(run: Run) -> None:
    log(run, 1, 2)
    with (run.folder / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 3, "te')
    assert [record["step"] for record in run.rollouts()] == [1, 2]
    assert [record["step"] for record in read_lines(run.folder / "rollouts.jsonl")] == [1, 2]


def test_the_newest_rollouts_are_read_from_the_end(run: Run) -> None:
    log(run, *range(1000), text="y" * 50)
    assert [record["step"] for record in run.rollouts(last=3)] == [997, 998, 999]
    assert len(run.rollouts(last=5000)) == len(run.rollouts()) == 1000
    assert Run(run.folder / "nothing", run.config).rollouts(last=3) == []


def test_the_newest_rollouts_may_be_long(run: Run) -> None:
    log(run, 1, 2, 3, 4, text="y" * 20_000)
    assert [record["step"] for record in run.rollouts(last=2)] == [3, 4]


def test_the_newest_rollouts_may_hold_unicode_line_separators(run: Run) -> None:
    log(run, 1, 2, text="a\u2028b\u2029c\u0085d")
    assert [record["step"] for record in run.rollouts(last=2)] == [1, 2]


def test_the_newest_rollouts_are_whole_while_training_writes(run: Run) -> None:
    log(run, 1, 2)
    with (run.folder / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 3, "te')
    assert [record["step"] for record in run.rollouts(last=2)] == [1, 2]


# -- one writer at a time ---------------------------------------------------------------------------------------------

HOLD = """
    import sys, time
    from pathlib import Path
    from lib.runfolder import exclusive
    with exclusive(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds tmp_path/lock."""
    command = [sys.executable, "-c", textwrap.dedent(HOLD), str(tmp_path / "lock")]
    process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    message = f"process {holder.pid} is training this run: wait for it, stop it, or choose another run_name"
    with pytest.raises(RunError, match=message), exclusive(tmp_path / "lock", wait=0.3):
        pass


def test_a_lock_whose_holder_was_killed_is_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    with exclusive(tmp_path / "lock", wait=0):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_a_waiting_process_gets_the_lock_when_it_is_free(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    started = time.monotonic()
    holder.send_signal(signal.SIGTERM)
    with exclusive(tmp_path / "lock", wait=10):
        assert time.monotonic() - started < 5


# -- hashes -----------------------------------------------------------------------------------------------------------


def test_a_hash_follows_contents_names_and_depth(tmp_path: Path) -> None:
    folders = []
    for i, (name, text) in enumerate([("a.csv", "1"), ("a.csv", "2"), ("b.csv", "1"), ("sub/a.csv", "1")]):
        path = tmp_path / str(i) / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        folders.append(tmp_path / str(i))
    assert len({hash_file(folder) for folder in folders}) == 4
    shutil.copytree(folders[0], tmp_path / "copy")
    assert hash_file(tmp_path / "copy") == hash_file(folders[0])
    assert hash_file(folders[0] / "a.csv") != hash_file(folders[1] / "a.csv")


def test_a_hash_knows_where_a_name_ends(tmp_path: Path) -> None:
    for folder, name, text in (("x", "a", "bc"), ("y", "ab", "c")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text(text)
    assert hash_file(tmp_path / "x") != hash_file(tmp_path / "y")


# -- provenance -------------------------------------------------------------------------------------------------------


def test_provenance_names_code_versions_hardware_and_seed(tmp_path: Path) -> None:
    run = open_run("first", config(tmp_path, training={"seed": 7}))
    found = json.loads((run.folder / "provenance.json").read_text())
    assert found["schema"] == 1 and found["seed"] == 7 and found["lock"] == lock_hash()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    assert found["code"]["commit"] == (commit or "not a git checkout")
    assert found["packages"]["torch"].startswith("2.") and found["packages"]["trl"] == "1.16.0"
    assert (
        found["hardware"]["cpus"] >= 1
        and found["hardware"]["memory"] > 1e8
        and isinstance(found["hardware"]["gpus"], list)
    )


def test_provenance_is_of_the_runs_beginning_and_a_change_of_code_is_warned_about(tmp_path: Path, run: Run) -> None:
    path = run.folder / "provenance.json"
    first = json.loads(path.read_text())
    first["code"]["commit"] = "0000000"
    path.write_text(json.dumps(first))
    open_run("first", run.config)
    assert json.loads(path.read_text()) == first
    assert "the code changed since this run was made (0000000 then," in (run.folder / "log.txt").read_text()
    first["code"] |= {"commit": provenance.collect(lock="", seed=0)["code"]["commit"], "diff": "of another day"}
    path.write_text(json.dumps(first))
    open_run("first", run.config)
    assert "both times, with other changes on top" in (run.folder / "log.txt").read_text()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A git checkout of its own, with a copy of lib and one config."""
    root = tmp_path / "checkout"
    shutil.copytree(PROJECT_ROOT / "lib", root / "lib", ignore=shutil.ignore_patterns("__pycache__"))
    (root / "configs").mkdir()
    (root / "configs" / "mine.yaml").write_text("task: {name: decisions}\n")
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first")
    return root


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


COLLECT = "import json; from lib.provenance import collect; print(json.dumps(collect(lock='', seed=0)['code']))"


def collected(root: Path, **env: str) -> dict[str, str]:
    done = script(COLLECT, cwd=root, env=env)
    assert done.returncode == 0, done.stderr
    code: dict[str, str] = json.loads(done.stdout)
    return code


def test_provenance_holds_the_commit_and_the_uncommitted_change(checkout: Path) -> None:
    assert collected(checkout) == {"commit": git(checkout, "rev-parse", "HEAD"), "diff": ""}
    (checkout / "configs" / "mine.yaml").write_text("task: {name: decisions, tau: 2}\n")
    assert "+task: {name: decisions, tau: 2}" in collected(checkout)["diff"]


def test_provenance_without_git_says_so(checkout: Path) -> None:
    shutil.rmtree(checkout / ".git")
    assert collected(checkout) == {"commit": "not a git checkout", "diff": ""}


def test_secrets_in_the_diff_are_scrubbed(checkout: Path) -> None:
    (checkout / "configs" / "mine.yaml").write_text("task: {name: decisions} # sk-verysecret1\n")
    diff = collected(checkout, MY_API_KEY="sk-verysecret1")["diff"]
    assert "sk-verysecret1" not in diff and "<MY_API_KEY>" in diff


def test_a_secret_at_the_cut_of_a_long_diff_is_scrubbed(checkout: Path) -> None:
    secret = "sk-" + "0123456789" * 20
    path = checkout / "configs" / "mine.yaml"
    path.write_text("x")
    room = 200_000 - len(git(checkout, "diff", "HEAD"))
    path.write_text("x" * (room - 100) + secret + "x" * 5000)  # the cut falls about into the middle of the secret
    diff = collected(checkout, MY_API_KEY=secret)["diff"]
    assert diff.endswith("[cut]")
    assert secret[:40] not in diff


def test_a_changed_file_that_is_not_utf8_does_not_stop_a_run(checkout: Path) -> None:
    (checkout / "configs" / "mine.yaml").write_bytes("# für später\n".encode("latin-1"))
    collected(checkout)


@pytest.mark.parametrize(
    "kind", ["a name that is not ASCII", "a name with spaces and quotes", "nested checkout", "dangling link"]
)
def test_no_new_file_stops_a_run(checkout: Path, kind: str) -> None:
    folder = checkout / "configs"
    if kind.startswith("a name"):
        (folder / ("für später.yaml" if "ASCII" in kind else 'my "own".yaml')).write_text("mine: 1\n")
    elif kind == "nested checkout":
        (folder / "theirs").mkdir()
        git(folder / "theirs", "init", "-q")
        (folder / "theirs" / "x.yaml").write_text("x: 1\n")
        git(folder / "theirs", "add", "-A")
        git(folder / "theirs", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "first")
    else:
        (folder / "gone.yaml").symlink_to("nowhere.yaml")
    diff = collected(checkout)["diff"]
    assert not kind.startswith("a name") or "mine: 1" in diff


def test_provenance_holds_a_new_task_file(checkout: Path) -> None:
    (checkout / "lib" / "tasks" / "mine.py").write_text("# my reward\n")
    assert "my reward" in collected(checkout)["diff"] or "mine.py" in json.dumps(collected(checkout))


# -- secrets and log lines --------------------------------------------------------------------------------------------


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """The workbench's logger, without our handlers afterwards."""
    yield logging.getLogger("lib.test")
    root = logging.getLogger("lib")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()


def test_secrets_are_scrubbed_from_log_and_terminal(
    tmp_path: Path, logger: logging.Logger, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("HF_TOKEN", "MODAL_TOKEN_SECRET", "db_password", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, f"value-of-{name}")
    start_logging(tmp_path / "log.txt")
    logger.info("tokens: %s", [f"value-of-{name}" for name in ("HF_TOKEN", "MODAL_TOKEN_SECRET", "db_password")])
    try:
        raise RuntimeError("401 for value-of-OPENAI_API_KEY")
    except RuntimeError:
        logger.exception("judge failed")
    for text in ((tmp_path / "log.txt").read_text(), capsys.readouterr().out):
        assert "value-of-" not in text
        assert all(f"<{name}>" in text for name in ("HF_TOKEN", "MODAL_TOKEN_SECRET", "db_password", "OPENAI_API_KEY"))


def test_short_values_and_other_variables_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", "1")
    monkeypatch.setenv("OTHER_TOKEN", "")
    monkeypatch.setenv("KEYBOARD", "qwertyuiop")
    assert scrub("1 qwertyuiop") == "1 qwertyuiop"


def test_a_secret_that_begins_with_another_is_scrubbed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefgh-and-more")
    assert "and-more" not in scrub("abcdefgh-and-more")


def test_opening_another_run_moves_the_log(tmp_path: Path, logger: logging.Logger) -> None:
    open_run("one", config(tmp_path))
    open_run("two", config(tmp_path))
    logger.info("only here")
    assert "only here" in (tmp_path / "two" / "log.txt").read_text()
    assert "only here" not in (tmp_path / "one" / "log.txt").read_text()
    assert len(logging.getLogger("lib").handlers) == 2


def test_log_lines_follow_a_replaced_standard_output(
    tmp_path: Path, logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    start_logging(tmp_path / "log.txt")
    with capsys.disabled():
        pass  # pytest puts another stdout in place, as a notebook kernel does
    logger.info("to whoever listens now")
    assert "to whoever listens now" in capsys.readouterr().out


def test_a_section_that_came_later_has_its_defaults_in_an_older_key(tmp_path: Path) -> None:
    config = load_config("configs/smoke/decisions.yaml", {"paths.outputs": str(tmp_path)})
    run = open_run("old", config)
    run.begin("training", ["task", "training"], {})
    run.end("training", {"path": "adapter"})
    assert run.begin("training", ["task", "training", "distributed"], {}) == {"path": "adapter"}
    again = open_run(
        "old", load_config("configs/smoke/decisions.yaml", {"paths.outputs": str(tmp_path), "distributed.workers": 5})
    )
    assert again.begin("training", ["task", "training", "distributed"], {}) == {"path": "adapter"}
    with pytest.raises(RunError, match=r"distributed\.overlap was 1, now 3"):
        other = load_config("configs/smoke/decisions.yaml", {"paths.outputs": str(tmp_path), "distributed.overlap": 3})
        open_run("old", other).begin("training", ["task", "training", "distributed"], {})
