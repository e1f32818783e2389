"""Who runs what: `.env` and the shell, names that cannot clash, secrets that stay out of parameters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib import PROJECT_ROOT
from lib.config import parse_config
from lib.experiment import (
    KEYS,
    MOUNTS,
    OPTIONAL,
    Experiment,
    ExperimentError,
    read_experiment,
    refuse_secrets,
    secret_names,
)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """The environment without our names, and as it was afterwards: reading `.env` writes into it."""
    kept = dict(os.environ)
    for name in ("EXPERIMENTER", "EXPERIMENT_NAME", *KEYS.values()):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(kept)


def written(folder: Path, text: str) -> Path:
    file = folder / ".env"
    file.write_text(text, encoding="utf-8")
    return file


# -- .env and the shell -----------------------------------------------------------------------------------------------


def test_the_example_names_what_is_read() -> None:
    text = (PROJECT_ROOT / ".env.example").read_text()
    assert all(f"{name}=" in text for name in ("EXPERIMENTER", "EXPERIMENT_NAME", *KEYS.values()))


def test_the_example_as_it_is_committed_names_the_missing_name(tmp_path: Path) -> None:
    file = written(tmp_path, (PROJECT_ROOT / ".env.example").read_text())
    with pytest.raises(ExperimentError, match=r"EXPERIMENTER is not set: \.env does not set it"):
        read_experiment(file)


def test_env_is_read(tmp_path: Path) -> None:
    file = written(tmp_path, "# mine\nexport EXPERIMENTER=ada\nEXPERIMENT_NAME='warm-up'\n")
    assert read_experiment(file) == Experiment("ada", "warm-up")


def test_the_experiment_is_called_default_where_it_has_no_name(tmp_path: Path) -> None:
    assert read_experiment(written(tmp_path, "EXPERIMENTER=ada")).name == "default"
    assert read_experiment(written(tmp_path, "EXPERIMENTER=ada\nEXPERIMENT_NAME=\n")).name == "default"


def test_the_shell_wins_over_env(tmp_path: Path) -> None:
    os.environ["EXPERIMENTER"] = "grace"
    assert read_experiment(written(tmp_path, "EXPERIMENTER=ada\nEXPERIMENT_NAME=x\n")) == Experiment("grace", "x")


@pytest.mark.parametrize("text", ["", "EXPERIMENTER=", "EXPERIMENTER", "# EXPERIMENTER=ada", "EXPERIMENTER=''"])
def test_an_env_without_a_name_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ExperimentError, match=r"EXPERIMENTER is not set: \.env does not set it\. Copy \.env\.example"):
        read_experiment(written(tmp_path, text))


def test_a_missing_env_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError, match=r"EXPERIMENTER is not set: \.env is missing\. Copy \.env\.example"):
        read_experiment(tmp_path / ".env")


def test_a_name_in_the_shell_needs_no_env(tmp_path: Path) -> None:
    os.environ["EXPERIMENTER"] = "ada"
    assert read_experiment(tmp_path / ".env") == Experiment("ada", "default")


def test_what_env_holds_is_in_the_environment_afterwards_so_that_it_is_scrubbed(tmp_path: Path) -> None:
    read_experiment(written(tmp_path, "EXPERIMENTER=ada\nOPENAI_API_KEY=sk-of-the-file\n"))
    assert os.environ["OPENAI_API_KEY"] == "sk-of-the-file"
    with pytest.raises(ExperimentError):
        refuse_secrets({"it": "tracker.project=sk-of-the-file"})


def test_an_empty_value_in_env_does_not_hide_the_shells(tmp_path: Path) -> None:
    os.environ["OPENAI_API_KEY"] = "sk-of-the-shell"
    read_experiment(written(tmp_path, "EXPERIMENTER=ada\nOPENAI_API_KEY=\n"))
    assert os.environ["OPENAI_API_KEY"] == "sk-of-the-shell"


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a-b", "a b", "../a", "a/b", "ä", ".a", "_a", "a.b", "a\nb"])
def test_an_experimenter_that_cannot_be_part_of_a_name_is_refused(tmp_path: Path, name: str) -> None:
    os.environ["EXPERIMENTER"] = name
    with pytest.raises(ExperimentError, match=r"EXPERIMENTER=.*: letters, digits and '_' only"):
        read_experiment(tmp_path / ".env")


@pytest.mark.parametrize("name", ["a b", "../a", "a/b", "ä", ".a", "-a", "a\n"])
def test_an_experiment_that_cannot_be_part_of_a_name_is_refused(tmp_path: Path, name: str) -> None:
    os.environ |= {"EXPERIMENTER": "ada", "EXPERIMENT_NAME": name}
    with pytest.raises(ExperimentError, match=r"EXPERIMENT_NAME=.*: letters, digits, '\.', '_' and '-' only"):
        read_experiment(tmp_path / ".env")


def test_no_two_experiments_share_a_volume_or_an_app() -> None:
    pairs = [Experiment(*pair) for pair in (("a", "b-c"), ("a", "b"), ("a_b", "c"), ("a", "b_c"), ("A", "b"))]
    names = [name for one in pairs for name in (one.app, *one.volumes.values())]
    assert len(set(names)) == len(names)


def test_no_app_is_called_like_the_app_of_a_sweep() -> None:
    sweeps = {Experiment(one, name).sweep_app("123456") for one in ("ada", "sweep") for name in ("x", "123456-ada-x")}
    apps = {Experiment(one, name).app for one in ("ada", "sweep") for name in ("x", "123456-ada-x", "sweep")}
    assert len(sweeps) == 4 and not sweeps & apps


def test_volumes_have_a_kind_a_person_and_an_experiment() -> None:
    volumes = Experiment("ada", "warm-up").volumes
    assert volumes == {mount: f"grpo-workbench-{kind}-ada-warm-up" for mount, kind in MOUNTS.items()}


def test_the_longest_names_still_fit_modals_64_characters(tmp_path: Path) -> None:
    os.environ |= {"EXPERIMENTER": "a" * 20, "EXPERIMENT_NAME": "b" * 15}
    longest = read_experiment(tmp_path / ".env")
    assert max(map(len, longest.volumes.values())) <= 64 and len(longest.sweep_app("123456")) <= 64
    os.environ["EXPERIMENT_NAME"] = "b" * 16
    with pytest.raises(ExperimentError, match="too long together: at most 35"):
        read_experiment(tmp_path / ".env")


# -- secrets ----------------------------------------------------------------------------------------------------------


def test_a_plain_run_needs_no_secret() -> None:
    assert secret_names(parse_config({"task": {"name": "decisions"}})) == []


def test_secrets_are_those_of_the_config_the_tracker_and_the_model_each_once() -> None:
    values = {
        "task": {"name": "decisions"},
        "modal": {"secrets": ["openai-secret", "wandb-secret", "mine"]},
        "tracker": {"name": "wandb"},
        "model": {"name": "org/model"},
    }
    assert secret_names(parse_config(values)) == ["openai-secret", "wandb-secret", "mine", "huggingface-secret"]


def test_an_endpoint_brings_the_secret_of_its_key() -> None:
    endpoint = {"base_url": "https://example.org/v1", "model": "m"}
    for key, name in (("OPENAI_API_KEY", "openai-secret"), ("THEIR_KEY", "their-key")):
        values = {"task": {"name": "decisions"}, "evaluation": {"endpoint": {**endpoint, "key": key}}}
        assert secret_names(parse_config(values)) == [name]


def test_optional_secrets_are_known_ones() -> None:
    assert set(OPTIONAL) <= set(KEYS)


def test_a_parameter_with_a_secret_is_refused_without_showing_it() -> None:
    os.environ["OPENAI_API_KEY"] = "sk-canary-123456"
    with pytest.raises(ExperimentError) as caught:
        refuse_secrets({"steps": "training.steps=2", "note": "task.note=with sk-canary-123456 inside"})
    assert "sk-canary-123456" not in str(caught.value) and "note holds the value" in str(caught.value)
    assert "modal.secrets" in str(caught.value)


def test_a_parameter_without_a_secret_passes() -> None:
    os.environ["OPENAI_API_KEY"] = "sk-canary-123456"
    refuse_secrets({"steps": "training.steps=2", "note": "task.note=OPENAI_API_KEY"})
