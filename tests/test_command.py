"""Modal's command line as lib/modal_app.py reads it, before Modal does."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from lib import PROJECT_ROOT
from lib.command import PARSERS, Command, read_command, settings
from lib.run import parse_parameters

RUN = "--notebook 3_grpo_training --config configs/decisions.yaml"


def read(text: str) -> Command:
    command = read_command(shlex.split(text))
    assert command is not None
    return command


def given(text: str) -> dict[str, object]:
    """The -p values of a `run`, as YAML reads them."""
    return {
        k: v.value
        for k, v in parse_parameters(settings(read(f"modal run -m lib.modal_app::run {text}").options)).items()
    }


# -- which command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [
        "modal run -m lib.modal_app::run",
        "/venv/bin/modal run -m lib.modal_app::run",
        "/venv/lib/modal/__main__.py run --detach -m lib.modal_app::run",
        "modal run lib/modal_app.py::run",
        "modal run ./lib/modal_app.py::run",
        "modal run /home/ada/my project/lib/modal_app.py::run".replace("my project", "'my project'"),
        "modal run -m lib.modal_app::app.run",
        "modal run -q --env main -m lib.modal_app::run",
        "modal run --name run -m lib.modal_app::run",
    ],
)
def test_every_way_to_name_an_entry_point_is_read(start: str) -> None:
    command = read(f"{start} {RUN}")
    assert (command.verb, command.entry, command.options.notebook) == ("run", "run", "3_grpo_training")


@pytest.mark.parametrize(
    "text", ["deploy -m lib.modal_app", "deploy lib/modal_app.py", "deploy --name run -m lib.modal_app"]
)
def test_a_deploy_is_read(text: str) -> None:
    assert (read(f"modal {text}").verb, read(f"modal {text}").entry) == ("deploy", "")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "python",
        "pytest tests",
        "pytest run lib/modal_app.py",
        "modal run -m lib.modal_app",
        "modal run -m lib.modal_app::nothing",
        "modal run -m other.modal_app::run",
        "modal run -m lib.modal_app2::run",
        "modal shell -m lib.modal_app::run",
        "python -m lib.run 3_grpo_training configs/decisions.yaml",
    ],
)
def test_what_is_none_of_ours_is_left_alone(text: str) -> None:
    assert read_command(shlex.split(text)) is None


def test_words_after_the_entry_point_are_its_own() -> None:
    command = read("modal run -m lib.modal_app::run --notebook deploy --config run")
    assert (command.verb, command.options.notebook, command.options.config) == ("run", "deploy", "run")


@pytest.mark.parametrize("flag", ["-d", "--detach"])
def test_detach_is_seen_before_the_entry_point(flag: str) -> None:
    assert read(f"modal run {flag} -m lib.modal_app::run {RUN}").detach
    assert not read(f"modal run -m lib.modal_app::run {RUN}").detach


@pytest.mark.parametrize("flag", ["-dq", "-qd"])
def test_detach_is_seen_among_joined_flags(flag: str) -> None:
    assert read(f"modal run {flag} -m lib.modal_app::run {RUN}").detach


def test_detach_after_the_entry_point_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(f"modal run -m lib.modal_app::run --detach {RUN}")
    assert ended.value.code == 2 and "unrecognized arguments: --detach" in capsys.readouterr().err


@pytest.mark.parametrize("entry", sorted(PARSERS))
def test_every_entry_point_has_help_under_its_own_name(entry: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(f"modal run -m lib.modal_app::{entry} --help")
    assert ended.value.code == 0 and f"modal run -m lib.modal_app::{entry}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("run", "--notebook, --config"),
        ("run --notebook 3_grpo_training", "--config"),
        ("run --note x --config y", "--notebook"),
        ("sweep --config y", "--grid"),
        ("upload", "--config"),
        ("fetch", "--run"),
        ("quote --config y --run a --probe 2", "not allowed with"),
        ("quote --config y --probe two", "a number of steps, at least 1"),
        ("checkpoints --run x", "unrecognized arguments: --run x"),
        ("run --notebook x --config y -p", "expected one argument"),
    ],
)
def test_a_wrong_command_line_says_what_is_missing(text: str, problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read(f"modal run -m lib.modal_app::{text}")
    assert ended.value.code == 2 and problem in capsys.readouterr().err


@pytest.mark.parametrize("steps", ["0", "-3"])
def test_a_probe_of_no_steps_is_refused(steps: str) -> None:
    with pytest.raises(SystemExit):
        read(f"modal run -m lib.modal_app::quote --config y --probe={steps}")


# -- settings ---------------------------------------------------------------------------------------------------------


def test_flags_for_the_container_become_config_keys() -> None:
    values = given(f"{RUN} --gpu H100 --cpu 4 --memory 16 --timeout 0.5 --retries 0")
    assert values == {
        "modal.gpu": "H100", "modal.cpu": 4, "modal.memory": 16, "modal.timeout": 0.5, "modal.retries": 0,
    }  # fmt: skip


def test_flags_that_were_not_given_leave_the_config_alone() -> None:
    assert given(RUN) == {}


@pytest.mark.parametrize(
    ("text", "gpu"),
    [
        ("A100-80GB:2", "A100-80GB:2"),
        ("none", "none"),
        ("H100,A100-80GB", ["H100", "A100-80GB"]),
        ("a10g:2,H100", ["a10g:2", "H100"]),
        ("'H100, L4'", ["H100", "L4"]),
    ],
)
def test_several_gpus_are_a_list_in_order(text: str, gpu: object) -> None:
    assert given(f"{RUN} --gpu {text}") == {"modal.gpu": gpu}


def test_an_empty_gpu_is_not_passed_over() -> None:
    assert settings(read(f"modal run -m lib.modal_app::run {RUN} --gpu ''").options) == ["modal.gpu="]


def test_a_flag_wins_over_the_same_key_after_p() -> None:
    assert given(f"{RUN} --gpu H100 -p modal.gpu=L4") == {"modal.gpu": "H100"}


def test_parameters_stay_as_they_were_typed_and_in_order() -> None:
    text = f"{RUN} -p run_name=07 -p 'overrides={{training.steps: 2}}' -p training.learning_rate=1e-6"
    texts = ["run_name=07", "overrides={training.steps: 2}", "training.learning_rate=1e-6"]
    assert settings(read(f"modal run -m lib.modal_app::run {text}").options) == texts


def test_a_grid_takes_several_keys_and_stops_at_the_next_option() -> None:
    command = read(
        "modal run -m lib.modal_app::sweep --grid training.beta=0,0.1 training.seed=1,2 --config c -p run_name=x"
    )
    assert command.options.grid == ["training.beta=0,0.1", "training.seed=1,2"]
    assert (command.options.config, command.options.parameters) == ("c", ["run_name=x"])
    assert command.options.notebook == "3_grpo_training"


def test_grids_given_one_by_one_are_all_kept() -> None:
    command = read("modal run -m lib.modal_app::sweep --grid a=1,2 --grid b=3,4 --config c")
    assert command.options.grid == ["a=1,2", "b=3,4"]


def test_reading_a_command_imports_neither_modal_nor_the_config() -> None:
    code = "import sys, lib.command; print([m for m in ('modal', 'yaml', 'pydantic', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
