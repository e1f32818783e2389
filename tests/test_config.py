"""The config tree: every file in configs/, what is refused and how it says so, overrides, paths."""

from __future__ import annotations

import copy
import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from lib import PROJECT_ROOT
from lib.config import SCHEMA, Config, ConfigError, check_key, load_config, parse_config
from lib.places import locate
from lib.runfolder import default_name
from lib.task import load_task

NOT_RUNS = ("prices.yaml", "schedule.yaml", "serve.yaml", "judges.yaml")  # what else lies in configs/
CONFIGS = sorted(path for path in (PROJECT_ROOT / "configs").rglob("*.yaml") if path.name not in NOT_RUNS)
TASK = {"task": {"name": "decisions"}}


def training(**values: Any) -> Config:
    return parse_config({**TASK, "training": values})


def file(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refused(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_config(values)
    return str(caught.value)


# -- the files in configs/ --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(PROJECT_ROOT)))
def test_every_config_loads_and_so_does_its_task(path: Path) -> None:
    config = load_config(path)
    load_task(config.task.name, **config.task.params)


def test_the_resolved_config_is_json_and_loads_to_itself() -> None:
    for path in CONFIGS:
        config = load_config(path)
        assert parse_config(config.as_json()).as_json() == config.as_json()
        assert config.as_json()["schema"] == SCHEMA


def test_a_config_is_frozen() -> None:
    config = parse_config(TASK)
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3  # type: ignore[misc]


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"trainin": {}}, r"^trainin: unknown key\. Did you mean 'training'\?"),
        ({"training": {"lerning_rate": 1.0}}, r"^training\.lerning_rate: unknown key\. Did you mean 'learning_rate'\?"),
        ({"lora": {"rank": 4}}, r"^lora\.rank: unknown key\..* Known: .*\br\b"),
        ({"schema_version": 1}, r"^schema_version: unknown key\. Did you mean 'schema'\?"),
        ({"sampling": {"engine": "sglang"}}, r"^sampling\.engine: .*'hf' or 'vllm' \(given: 'sglang'\)"),
        ({"training": {"steps": 0}}, r"^training\.steps: give a number of steps, or -1 .* \(given: 0\)"),
        ({"training": {"learning_rate": float("nan")}}, r"^training\.learning_rate: "),
        ({"rewards": {"max_unscored": 1.5}}, r"^rewards\.max_unscored: .* less than or equal to 1 \(given: 1\.5\)"),
        ({"schema": 2}, r"^schema: this workbench reads schema 1; update it"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_its_place(values: dict[str, Any], told: str) -> None:
    assert re.search(told, refused({**TASK, **values}), re.MULTILINE)


def test_every_problem_is_named_at_once() -> None:
    text = refused({"trainin": {}, "training": {"batch": 0, "seed": "x"}})
    assert len(text.splitlines()) == 1 + 4
    for key in ("task: Field required", "trainin: ", "training.batch: ", "training.seed: "):
        assert key in text


@pytest.mark.parametrize(
    ("values", "fix"),
    [
        (
            {"training": {"batch": 6, "group_size": 4}},
            r"6 x 1 = 6 is not divisible by group_size 4: set training\.batch to a multiple of 4",
        ),
        ({"training": {"group_size": 1}}, r"training\.group_size: a group needs at least 2 .* \(given: 1\)"),
        ({"training": {"iterations": 2, "save_steps": 3}}, r"save_steps 3 falls inside a generation .* multiple of 2"),
        ({"training": {"steps_per_generation": 4, "save_steps": 6}}, r"save_steps 6 falls inside .* multiple of 4"),
        (
            {"evaluation": {"adapter": "a", "model": "b"}},
            r"evaluation\.adapter and evaluation\.model exclude each other: give one",
        ),
        ({"lora": {"expert_parameters": ["mlp.experts.w"], "dropout": 0.1}}, r"needs lora\.dropout 0"),
    ],
)
def test_an_impossible_combination_says_what_to_change(values: dict[str, Any], fix: str) -> None:
    assert re.search(fix, refused({**TASK, **values}))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "must hold a mapping with at least `task"),
        ("- task", "must hold a mapping"),
        ("task: {name: [", "is not valid YAML"),
        ("training: {steps: 2}", "task: Field required"),
        ("task: [decisions]", "task: "),
    ],
)
def test_a_file_that_is_no_config_says_what_it_must_be(tmp_path: Path, text: str, told: str) -> None:
    path = file(tmp_path, text)
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["configs/decison.yaml", "decison.yaml", "configs", "/nowhere/decison.yaml"])
def test_a_missing_file_names_the_known_ones(name: str) -> None:
    with pytest.raises(ConfigError, match=r"config not found: .* Known: .*configs/decisions\.yaml"):
        load_config(name)


def test_a_file_that_is_not_utf8_is_told_in_words(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_bytes("task: {name: decisions} # für später\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(path)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = file(tmp_path, "task: {name: decisions}\ntraining:\n  steps: 3\ntraining:\n  batch: 16\n")
    with pytest.raises(ConfigError, match="training"):
        load_config(path)


def test_anchors_and_merge_keys_are_yaml_like_any_other(tmp_path: Path) -> None:
    text = "task: {name: decisions, warm: &warm {a: 1, b: 2}, hot: {<<: *warm, b: 3}}\n"
    assert load_config(file(tmp_path, text)).task.params["hot"] == {"a": 1, "b": 3}


def test_an_unknown_section_is_refused_even_without_keys(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"trainig: unknown key\. Did you mean 'training'\?"):
        load_config(file(tmp_path, "task: {name: decisions}\ntrainig:\n  # steps: 3\n"))


def test_a_section_without_keys_means_its_defaults(tmp_path: Path) -> None:
    path = file(tmp_path, "task: {name: decisions}\ntraining:\n  # steps: 3\n")
    assert load_config(path, {"training.batch": 16}).training.batch == 16


# -- groups and generations -------------------------------------------------------------------------------------------


def sweep() -> list[dict[str, Any]]:
    names = ("batch", "steps_per_generation", "accumulation", "iterations", "save_steps", "group_size")
    grid = itertools.product(
        (1, 2, 3, 6, 8), (None, 1, 2, 3, 4), (1, 2, 3, 4), (1, 2, 3), (1, 2, 3, 4, 6, 12), (2, 3, 4)
    )
    return [dict(zip(names, values, strict=True)) for values in grid]


def generates_at(config: Config, passes: int) -> bool:
    """TRL's rule (GRPOTrainer._prepare_inputs): pass number `passes` of one process samples anew."""
    t = config.training
    return passes % ((t.steps_per_generation or t.accumulation) * t.iterations) == 0


def test_whatever_is_accepted_satisfies_trls_own_rules() -> None:
    accepted = 0
    for values in sweep():
        try:
            config = training(**values)
        except ConfigError:
            continue
        accepted += 1
        t = config.training
        spg = t.accumulation if t.steps_per_generation is None else t.steps_per_generation  # GRPOConfig.__post_init__
        assert (t.batch * spg) % t.group_size == 0 and t.group_size >= 2
        for save in range(
            1, 5
        ):  # a resumed process starts counting at 0: only then does it sample where the killed one did
            assert generates_at(config, save * t.save_steps * t.accumulation), values
    assert accepted > 500


def test_whatever_satisfies_trls_rules_is_accepted() -> None:
    for values in sweep():
        spg = values["steps_per_generation"] or values["accumulation"]
        good = (values["batch"] * spg) % values["group_size"] == 0
        good &= (values["save_steps"] * values["accumulation"]) % (spg * values["iterations"]) == 0
        if good:
            training(**values)


def advice(values: dict[str, Any], pattern: str) -> int | None:
    """The number that the message says to use multiples of; None where it does not speak of that."""
    try:
        training(**values)
    except ConfigError as error:
        found = re.search(pattern, str(error))
        return int(found[1]) if found else None
    return None


def test_the_advised_batch_is_accepted() -> None:
    for values in sweep():
        multiple = advice(values, r"set training\.batch to a multiple of (\d+)")
        if multiple:
            assert advice({**values, "batch": 5 * multiple}, r"set training\.batch to a multiple of (\d+)") is None, (
                values
            )


def test_the_advised_save_steps_are_accepted() -> None:
    for values in sweep():
        multiple = advice(values, r"Set save_steps to a multiple of (\d+)")
        if multiple:
            assert advice({**values, "save_steps": 5 * multiple}, r"Set save_steps to a multiple of (\d+)") is None, (
                values
            )


# -- overrides --------------------------------------------------------------------------------------------------------


def test_defaults_give_way_to_the_file_and_the_file_to_overrides(tmp_path: Path) -> None:
    path = file(tmp_path, "task: {name: decisions}\ntraining: {steps: 3, batch: 16}\n")
    config = load_config(path, {"training.steps": 5})
    assert (config.training.steps, config.training.batch, config.training.group_size) == (5, 16, 8)


@pytest.mark.parametrize(
    "overrides",
    [
        {"training.steps": 2, "training.batch": 16, "task.tau": 0.5, "backend": "local"},
        {"training": {"steps": 2, "batch": 16}, "task": {"tau": 0.5}},
        {"training": {"steps": 9, "batch": 16}, "training.steps": 2, "task.tau": 0.5},
    ],
)
def test_overrides_may_be_dotted_or_nested_and_leave_the_rest(tmp_path: Path, overrides: dict[str, Any]) -> None:
    path = file(tmp_path, "task: {name: decisions, split_seed: 4}\ntraining: {seed: 7}\n")
    config = load_config(path, overrides)
    assert (config.training.steps, config.training.batch, config.training.seed) == (2, 16, 7)
    assert config.task.params == {"split_seed": 4, "tau": 0.5}


def test_overrides_reach_sections_that_the_file_does_not_have(tmp_path: Path) -> None:
    path = file(tmp_path, "task: {name: decisions}\n")
    assert load_config(path, {"evaluation.rows": 3, "lora": {"r": 2}}).evaluation.rows == 3


def test_an_unknown_override_gets_the_nearest_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"training\.stps: unknown key\. Did you mean 'steps'\?"):
        load_config(file(tmp_path, "task: {name: decisions}\n"), {"training.stps": 2})


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"backend\.name: backend is not a section"):
        load_config(file(tmp_path, "task: {name: decisions}\nbackend: local\n"), {"backend.name": "local"})


def test_overrides_given_as_text_are_refused_with_papermills_line(tmp_path: Path) -> None:
    path = file(tmp_path, "task: {name: decisions}\n")
    with pytest.raises(
        ConfigError, match=r"not the text '\{training\.steps: 2\}'.*-y 'overrides: \{training\.steps: 2\}'"
    ):
        load_config(path, "{training.steps: 2}")  # type: ignore[arg-type]


def test_overrides_given_as_a_list_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="overrides must be a mapping"):
        load_config(file(tmp_path, "task: {name: decisions}\n"), ["training.steps=2"])  # type: ignore[arg-type]


def test_the_callers_overrides_stay_as_they_were(tmp_path: Path) -> None:
    overrides = {"training": {"steps": 2}, "training.batch": 16}
    before = copy.deepcopy(overrides)
    load_config(file(tmp_path, "task: {name: decisions}\n"), overrides)
    assert overrides == before  # a notebook cell that is run again must see what it was given


# -- values as YAML writes them ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-6", "1.0e-6", "0.000001", "'1e-6'"])
def test_a_small_number_is_a_number_however_yaml_reads_it(tmp_path: Path, text: str) -> None:
    path = file(tmp_path, f"task: {{name: decisions}}\ntraining: {{learning_rate: {text}}}\n")
    assert load_config(path).training.learning_rate == 1e-6
    assert load_config(path, {"training.weight_decay": text.strip("'")}).training.weight_decay == 1e-6


def test_task_fields_pass_unread_for_the_task_to_check(tmp_path: Path) -> None:
    path = file(tmp_path, "task: {name: anything, made_up: [1, {a: null}], 'columns': {prompt: text}}\n")
    assert load_config(path).task.params == {"made_up": [1, {"a": None}], "columns": {"prompt": "text"}}


# -- paths ------------------------------------------------------------------------------------------------------------


def test_relative_paths_do_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "decisions.yaml").write_text("task: {name: another}\n")
    here = load_config("configs/decisions.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/decisions.yaml") == here
    assert locate("outputs") == PROJECT_ROOT / "outputs"
    assert load_task("decisions", path="configs/examples/decisions.csv").rows("train")


def test_absolute_paths_and_the_home_folder_stay_what_they_are() -> None:
    assert locate("/data/x") == Path("/data/x")
    assert locate("~/x") == Path.home() / "x"


# -- check_key --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key",
    [
        "training",
        "training.steps",
        "task",
        "task.anything.at.all",
        "model.overrides.functions.name",
        "schema",
        "backend",
    ],
)
def test_a_known_key_passes(key: str) -> None:
    check_key(key)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("trainig.steps", "unknown parameter 'trainig.steps'. Did you mean 'training'?"),
        ("training.stps", "unknown parameter 'training.stps'. Did you mean 'steps'?"),
        ("training.steps.first", "unknown parameter 'training.steps.first'."),
        ("schema_version", "unknown parameter 'schema_version'. Did you mean 'schema'?"),
        ("", "unknown parameter ''."),
    ],
)
def test_an_unknown_key_gets_the_nearest_one(key: str, told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        check_key(key)


def test_a_key_without_its_section_is_found_in_the_tree() -> None:
    with pytest.raises(ConfigError) as caught:
        check_key("learning_rate")
    assert "training.learning_rate" in str(caught.value)


# -- another task -----------------------------------------------------------------------------------------------------

GENERAL = """
task: {name: decisions, tau: 0.5}
model:
  name: one
  revision: abc
  trust_remote_code: true
  overrides: {functions: three, wordle: {name: two, revision: def, trust_remote_code: true}, mine: four}
"""


@pytest.mark.parametrize("given", [{"task": "wordle"}, {"task.name": "wordle"}, {"task": {"name": "wordle"}}])
def test_a_swapped_task_drops_the_fields_of_the_old_one_and_notes_it(tmp_path: Path, given: dict[str, Any]) -> None:
    path = file(tmp_path, GENERAL)
    config = load_config(path, {"task.length": 3, **given})
    assert config.task.name == "wordle" and config.task.params == {"length": 3}
    assert config.notes[0] == "task wordle instead of decisions: dropped its fields tau"
    assert load_config(path, {"task": "decisions"}).task.params == {"tau": 0.5}


def test_a_task_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"task\.name"):
        load_config(file(tmp_path, GENERAL), {"task": ""})


@pytest.mark.parametrize("task", ["coding", "functions", "wordle"])
def test_any_config_takes_any_task(task: str) -> None:
    for path in CONFIGS:
        config = load_config(path, {"task": task})
        load_task(config.task.name, **config.task.params)
        assert parse_config(config.as_json()).as_json() == config.as_json()


def test_the_model_goes_with_the_task_and_what_is_given_by_hand_is_stronger(tmp_path: Path) -> None:
    path = file(tmp_path, GENERAL)

    def model(**overrides: Any) -> tuple[str, str | None, bool]:
        config = load_config(path, {key.replace("__", "."): value for key, value in overrides.items()})
        assert config.model.overrides == {}  # a run's config holds what it runs with
        return config.model.name, config.model.revision, config.model.trust_remote_code

    assert model() == ("one", "abc", True)
    # Another name is another repository: the old one's revision, and the trust in its code, stay behind.
    assert model(task="functions") == ("three", None, False)
    assert model(task="wordle") == ("two", "def", True)
    assert model(task="their/mine.py") == ("four", None, False)
    assert model(task="wordle", model__name="by hand") == ("by hand", None, False)
    assert model(task="wordle", model={"name": "by hand", "revision": "r"}) == ("by hand", "r", False)
    assert model(task="wordle", model__revision="r") == ("two", "r", True)
    assert model(task="coding", model__overrides__coding="five") == ("five", None, False)
    assert model(model__name="one") == ("one", "abc", True)


def test_a_model_that_came_with_the_task_is_noted(tmp_path: Path) -> None:
    notes = load_config(file(tmp_path, GENERAL), {"task": "functions"}).notes
    assert notes[1] == "model.overrides: {'name': 'three'} for the task functions"
    assert load_config(file(tmp_path, GENERAL)).notes == ()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ("{wordle: {nme: two}}", r"wordle\.nme: unknown key\. Did you mean 'name'\?"),
        ("{wordle: {overrides: {}}}", r"wordle\.overrides: unknown key"),
        ("{wordle: 3}", r"model\.overrides"),
        ("wordle", r"model\.overrides"),
    ],
)
def test_models_by_task_are_checked_whichever_task_runs(tmp_path: Path, overrides: str, told: str) -> None:
    path = file(tmp_path, f"task: decisions\nmodel: {{overrides: {overrides}}}\n")
    for task in ("decisions", "wordle"):
        with pytest.raises(ConfigError, match=told):
            load_config(path, {"task": task})


def test_a_task_may_be_given_by_its_name_alone(tmp_path: Path) -> None:
    config = load_config(file(tmp_path, "task: coding\n"), {"task.path": "rows.jsonl"})
    assert config.task.name == "coding" and config.task.params == {"path": "rows.jsonl"}


def test_a_run_of_a_swapped_task_has_a_name_of_its_own() -> None:
    assert default_name("configs/decisions.yaml", "decisions") == "decisions"
    assert default_name("configs/decisions.yaml", "wordle") == "decisions-wordle"
    assert default_name("configs/general.yaml", "their/gsm8k.py") == "general-gsm8k"
    assert default_name("configs/no_such.yaml", "wordle") == "no_such"
