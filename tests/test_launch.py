"""The caller's side of Modal, as far as it needs no server: plans, files that travel, sweeps, quotes, reports."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lib import PROJECT_ROOT, WorkbenchError
from lib.config import Config, load_config, parse_config
from lib.container import FileFact, Job
from lib.cost import Resources, load_prices
from lib.experiment import Experiment, ExperimentError
from lib.launch import MOST_RUNS, _other_settings, _short, _steps, as_table, combinations, report
from lib.places import travel_name
from lib.quote import make_quote, read_trace
from lib.remote import (
    LARGEST_SHIPPED,
    RemoteError,
    _check_uploaded,
    _named_files,
    _refuse_secrets,
    container_resources,
    is_private,
    make_plan,
    named,
    uploads,
)
from lib.run import UsageError
from lib.runfolder import Run, write_json
from lib.task import load_task

EXPERIMENT = Experiment("nobody", "nothing")
SMOKE = "configs/smoke/decisions.yaml"
VERL = "configs/smoke/verl.yaml"
TABLE = "prompt,q_action_0,q_action_1\nwhich?,0.1,0.9\nor?,0.9,0.1\n"


@pytest.fixture
def inside() -> Iterator[Path]:
    """A folder of the project that git ignores."""
    import shutil

    folder = PROJECT_ROOT / "build" / f"test-{os.getpid()}"
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def planned(path: Path | str, **sections: Any) -> tuple[dict[str, Path], dict[str, FileFact]]:
    """The files that travel for a config whose task reads `path`."""
    config = parse_config({"task": {"name": "decisions", "path": str(path)}, **sections})
    return _named_files(config, load_task("decisions", path=str(path)), [])[:2]


def table(path: Path, size: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(TABLE + "x,0,1\n" * (size // 6 + 1 if size else 0))
    return path


# -- what travels -----------------------------------------------------------------------------------------------------


def test_a_small_file_of_ones_own_travels_with_the_code(tmp_path: Path) -> None:
    path = table(tmp_path / "my data.csv")
    assert planned(path) == ({travel_name(path): path}, {})


def test_two_files_of_one_basename_travel_side_by_side(tmp_path: Path) -> None:
    one, other = table(tmp_path / "a" / "x.csv"), table(tmp_path / "b" / "x.csv")
    shipped, _ = planned(one, evaluation={"prompts": str(other)})
    assert set(shipped.values()) == {one, other} and len(shipped) == 2


def test_what_every_container_has_does_not_travel_twice() -> None:
    assert planned("configs/examples/decisions.csv") == ({}, {})
    assert planned("configs/examples") == ({}, {})


def test_a_run_is_on_the_volume_of_runs_already() -> None:
    config = parse_config({"task": {"name": "decisions"}, "evaluation": {"adapter": "outputs"}})
    assert _named_files(config, load_task("decisions"), [])[:2] == ({}, {})


@pytest.mark.parametrize("text", [".", "..", "/", str(PROJECT_ROOT), "lib/.."])
def test_the_whole_project_does_not_travel(text: str) -> None:
    with pytest.raises(RemoteError, match="that is the whole project, or more"):
        planned(text)


def test_a_link_to_the_whole_project_does_not_travel_either(inside: Path) -> None:
    (inside / "up").symlink_to(PROJECT_ROOT)
    with pytest.raises(RemoteError, match="that is the whole project, or more"):
        planned(inside / "up")


@pytest.mark.parametrize("name", [".env", ".secrets.csv", ".git/config", ".aws/credentials"])
def test_a_hidden_file_does_not_travel_even_where_it_is_named(inside: Path, name: str) -> None:
    with pytest.raises(RemoteError):
        planned(table(inside / name))


def test_a_link_to_a_hidden_file_does_not_travel(inside: Path) -> None:
    table(inside / ".env")
    (inside / "plain.csv").symlink_to(".env")
    with pytest.raises(RemoteError):
        planned(inside / "plain.csv")


def test_a_file_with_a_secrets_value_does_not_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary-0123456789")
    path = table(tmp_path / "a.csv")
    path.write_text(path.read_text() + "sk-canary-0123456789,0,1\n")
    config = parse_config({"task": {"name": "decisions", "path": str(path)}})
    with pytest.raises(ExperimentError) as caught:
        _refuse_secrets(config, [], planned(path)[0])
    assert "sk-canary" not in str(caught.value)


def test_hidden_files_and_caches_are_private_and_others_are_not() -> None:
    private = [".env", "a/.git/config", ".ipynb_checkpoints/a.ipynb", "a/__pycache__/b.pyc", ".hidden/a.csv"]
    assert all(map(is_private, private))
    assert not any(map(is_private, ["a.csv", "a/b.c.d", "my data/ä.csv", "__init__.py", "pycache"]))


def test_a_folder_is_uploaded_file_by_file_without_what_is_hidden(tmp_path: Path) -> None:
    folder = tmp_path / "tables"
    for name in ("a.csv", "deep/b.csv", ".env", ".git/config", "__pycache__/x.csv"):
        table(folder / name, LARGEST_SHIPPED)
    config = parse_config({"task": {"name": "decisions", "path": str(folder)}})
    files = uploads(config, load_task("decisions", path=str(folder)), "no-such-run")
    name = travel_name(folder)
    inner = {f"{name}/a.csv": folder / "a.csv", f"{name}/deep/b.csv": folder / "deep" / "b.csv"}
    assert files == {name: inner}


def test_everything_that_a_plan_asks_to_be_uploaded_is_uploaded(tmp_path: Path) -> None:
    """A large .json is data too: neither `::run` nor `::upload` may leave it to the other."""
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"id": str(i), "prompt": "x" * 100} for i in range(5000)]))
    config = parse_config({"task": {"name": "decisions", "path": str(path)}})
    task = load_task("decisions", path=str(path))
    files = uploads(config, task, "no-such-run")
    if files:
        assert files == {travel_name(path): {travel_name(path): path}}
    else:
        shipped = _named_files(config, task, [])[0]
        assert shipped == {travel_name(path): path}
    assert path.stat().st_size > LARGEST_SHIPPED


def test_a_large_file_does_not_travel_with_the_code_whatever_it_is_called(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(" " * (LARGEST_SHIPPED * 5))
    config = parse_config({"task": {"name": "decisions", "path": str(path)}})
    assert uploads(config, load_task("decisions", path=str(path)), "no-such-run") != {}


def test_uploaded_files_are_compared_by_size_and_hash(tmp_path: Path) -> None:
    path = table(tmp_path / "a.csv")
    fact = FileFact.of(path)
    assert _check_uploaded({"a.csv": fact}, {"a.csv": {"a.csv": path}}, []) == {"a.csv": fact}
    with pytest.raises(RemoteError, match=r"nothing was started(.|\n)*a\.csv: not on the data volume(.|\n)*::upload"):
        _check_uploaded({}, {"a.csv": {"a.csv": path}}, [])
    path.write_text(TABLE.replace("which", "where"))
    with pytest.raises(RemoteError, match="another version of it is on the data volume"):
        _check_uploaded({"a.csv": fact}, {"a.csv": {"a.csv": path}}, [])


# -- what is refused before anything is asked of Modal ----------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No Modal to ask: where a refusal needs none, it comes all the same."""
    monkeypatch.setenv("MODAL_SERVER_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("MODAL_CONFIG_PATH", str(tmp_path / "none.toml"))
    for name in ("MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_secret_in_a_parameter_is_refused(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("OPENAI_API_KEY", "sk-canary-0123456789")
    with pytest.raises(ExperimentError, match="holds the value of a secret") as caught:
        make_plan(EXPERIMENT, "3_grpo_training", SMOKE, ["tracker.project=sk-canary-0123456789"])
    assert "sk-canary" not in str(caught.value)


def test_a_secret_in_the_config_file_is_refused(alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alone.setenv("OPENAI_API_KEY", "sk-canary-0123456789")
    file = tmp_path / "mine.yaml"
    file.write_text((PROJECT_ROOT / SMOKE).read_text() + "tracker: {project: sk-canary-0123456789}\n")
    with pytest.raises(ExperimentError, match="holds the value of a secret") as caught:
        make_plan(EXPERIMENT, "3_grpo_training", str(file), [])
    assert "sk-canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("notebook", "config", "texts", "problem"),
    [
        ("nope", SMOKE, [], "notebook not found: nope"),
        ("../lib/run.py", SMOKE, [], "notebook not found"),
        ("3_grpo_training", "configs/nope.yaml", [], "config not found"),
        ("3_grpo_training", "configs", [], "config not found"),
        ("3_grpo_training", SMOKE, ["run_name=../x"], "run_name '../x' is not usable"),
        ("3_grpo_training", SMOKE, ["run_name=a/b"], "run_name 'a/b' is not usable"),
        ("3_grpo_training", SMOKE, ["modal.gpu=V100"], "unknown GPU 'V100'. Allowed: T4, L4"),
        ("3_grpo_training", SMOKE, ["modal.gpu=[none, T4]"], "name one GPU"),
        ("3_grpo_training", SMOKE, ["modal.packages=[numpy]"], "not pinned: numpy"),
        ("3_grpo_training", SMOKE, ["trainig.steps=2"], "unknown parameter"),
        ("3_grpo_training", SMOKE, ["training.steps"], "write NAME=VALUE"),
        ("3_grpo_training", VERL, ["verl.nodes=2", "modal.gpu=H100:2"], "Set modal.gpu to H100:8, or verl.nodes to 1"),
        ("all", VERL, ["verl.nodes=2", "modal.gpu=H100:8"], "only 3_grpo_training runs on several machines"),
    ],
)
def test_bad_input_is_refused(
    alone: pytest.MonkeyPatch, notebook: str, config: str, texts: list[str], problem: str
) -> None:
    with pytest.raises(WorkbenchError) as caught:
        make_plan(EXPERIMENT, notebook, config, texts)
    assert problem in str(caught.value)


def test_a_price_file_that_is_not_there_or_lacks_the_gpu_is_named_before_anything_starts(
    alone: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    prices = tmp_path / "prices.yaml"
    with pytest.raises(WorkbenchError, match="price file"):
        make_plan(EXPERIMENT, "3_grpo_training", SMOKE, [f"cost.prices={prices}"])
    prices.write_text((PROJECT_ROOT / "configs" / "prices.yaml").read_text().replace("  L4:", "  # L4:"))
    with pytest.raises(WorkbenchError, match="no price for the GPU L4"):
        make_plan(EXPERIMENT, "3_grpo_training", SMOKE, [f"cost.prices={prices}", "modal.gpu=L4"])


# -- names of runs ----------------------------------------------------------------------------------------------------

JOB = Job(
    notebook="all", config="c", parameters=("training.steps=2", "run_name=old"), run="old", gpus=(), cpu=1, memory=1,
    seconds=1, prices="p", lock="", code={}, files={},
)  # fmt: skip


def test_a_job_is_named_once_in_its_parameters_too() -> None:
    job = named(named(JOB, "new"), "newer")
    assert job.run == "newer" and job.parameters == ("training.steps=2", "run_name=newer")


# -- sweeps -----------------------------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_in_order() -> None:
    assert combinations(["a.x=1,2", "b=3,4"]) == [
        ("a.x=1", "b=3"), ("a.x=1", "b=4"), ("a.x=2", "b=3"), ("a.x=2", "b=4"),
    ]  # fmt: skip


def test_a_grid_of_one_value_is_one_run() -> None:
    assert combinations(["a=1e-6"]) == [("a=1e-6",)]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("a=[1,2],[3]", ["a=[1,2]", "a=[3]"]),
        ("a=[[1,2],[3]],[]", ["a=[[1,2],[3]]", "a=[]"]),
        ("a={x: 1, y: 2},{x: 3}", ["a={x: 1, y: 2}", "a={x: 3}"]),
        ('a="x,y",z', ['a="x,y"', "a=z"]),
        ("a=b=c,d", ["a=b=c", "a=d"]),
    ],
)
def test_commas_inside_brackets_and_quotes_belong_to_the_value(text: str, values: list[str]) -> None:
    assert combinations([text]) == [(value,) for value in values]


@pytest.mark.parametrize("grid", [["a"], ["=1"], ["a="], [""], ["a=1,"], ["a=,1"], ["a=1,,2"]])
def test_a_grid_without_a_key_or_with_an_empty_value_is_refused(grid: list[str]) -> None:
    with pytest.raises(UsageError, match="write KEY=VALUE,VALUE"):
        combinations(grid)


@pytest.mark.parametrize("key", ["run_name", "config", "modal.gpu", "modal.timeout", "paths.outputs", "where"])
def test_what_is_one_for_the_whole_sweep_is_no_axis(key: str) -> None:
    with pytest.raises(UsageError, match="is one for the whole sweep"):
        combinations([f"{key}=1,2"])


def test_a_key_twice_in_a_grid_is_refused() -> None:
    with pytest.raises(UsageError):
        combinations(["a=1,2", "a=3"])


def test_a_sweep_has_a_largest_size() -> None:
    eight = ",".join(map(str, range(8)))
    assert len(combinations([f"a={eight}", f"b={eight}"])) == MOST_RUNS == 64
    with pytest.raises(UsageError, match="128 runs; at most 64"):
        combinations([f"a={eight}", f"b={eight}", "c=1,2"])


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("training.learning_rate=1e-6", "learning_rate-1e-6"),
        ("beta=0.1", "beta-0_1"),
        ("model.name=org/My Model", "name-org_My_Model"),
        ("a=[1, 2]", "a-_1_2"),
        ("task.path=../ä.csv", "path-_csv"),
    ],
)
def test_a_members_name_has_the_key_and_the_value(text: str, short: str) -> None:
    assert _short(text) == short


# -- reports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "word"), [(0, "done"), (75, "stopped"), (1, "failed"), (2, "failed"), (-9, "failed")]
)
def test_a_report_says_how_a_job_ended_and_what_it_cost(
    status: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report({"run": "x", "status": status, "usd": 0.12345, "message": "because"}) == status
    said = capsys.readouterr().out
    assert (f"run x: {word}" in said and "$0.1235" in said) or "$0.1234" in said
    assert ("because" in said) == (word == "failed")


# -- quotes -----------------------------------------------------------------------------------------------------------


def measured(folder: Path, config: Config, steps: int) -> Path:
    run = Run(folder, config)
    write_json(run.path("config.json"), config.as_json())
    records = [{"step": i + 1, "time": 10.0 * (i + 1), "step_time": 9.0, "epoch": (i + 1) / 100} for i in range(steps)]
    run.append("metrics.jsonl", records)
    return folder


def test_the_steps_of_a_quote_are_those_of_the_config(tmp_path: Path) -> None:
    config = load_config(SMOKE, {"training.steps": 17})
    assert _steps(config, measured(tmp_path, config, 5)) == 17


def test_epochs_are_counted_by_how_far_a_step_went(tmp_path: Path) -> None:
    config = load_config(SMOKE, {"training.steps": -1, "training.epochs": 3})
    assert _steps(config, measured(tmp_path, config, 5)) == 300


def test_what_changes_a_steps_time_is_noted(tmp_path: Path) -> None:
    folder = measured(tmp_path, load_config(SMOKE), 3)
    other = load_config(SMOKE, {"training.batch": 32, "sampling.completion_limit": 99, "training.learning_rate": 1e-9})
    notes = _other_settings(other, folder)
    assert len(notes) == 2 and any("training.batch 16, this one 32" in note for note in notes)
    assert _other_settings(load_config(SMOKE), folder) == []


def test_a_quote_counts_every_machine_and_notes_that_others_were_measured(tmp_path: Path) -> None:
    one, two = (load_config(VERL, {"modal.gpu": ["H100:8", "A100:8"], "verl.nodes": nodes}) for nodes in (1, 2))
    trace = read_trace(measured(tmp_path, one, 20))
    quotes = [make_quote(trace, 100, container_resources(config), load_prices()) for config in (one, two)]
    assert quotes[1].usd == pytest.approx(2 * quotes[0].usd) and quotes[1].hours == quotes[0].hours
    assert _other_settings(two, tmp_path) == ["the measured run had verl.nodes 1, this one 2"]


def test_a_table_has_every_role_the_total_and_what_the_budget_says(tmp_path: Path) -> None:
    folder = measured(tmp_path, load_config(SMOKE), 20)
    wanted = [Resources(gpu="T4", cpu=1, memory_gb=1, where="modal")]
    quote = make_quote(read_trace(folder), 100, wanted, load_prices(), interruptions_per_day=1.0)
    assert any(line.startswith("total") for line in as_table(quote, None, []))
    assert "is enough" in "\n".join(as_table(quote, 1e6, []))
    small = as_table(quote, 1e-6, ["a note"])
    assert "may not be enough" in "\n".join(small) and small[-1] == "note: a note"
