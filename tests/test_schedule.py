"""configs/schedule.yaml: what an entry may say, and what is refused before anything is deployed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lib import PROJECT_ROOT
from lib.run import check
from lib.schedule import FILE, Entry, ScheduleError, read_schedule

ENTRY = {
    "name": "nightly", "notebook": "4_adapter_evaluation", "config": "configs/decisions.yaml", "cron": "0 6 * * *",
}  # fmt: skip


def written(folder: Path, *entries: dict[str, Any]) -> Path:
    file = folder / "schedule.yaml"
    file.write_text(yaml.safe_dump({"entries": list(entries)}), encoding="utf-8")
    return file


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(ScheduleError) as caught:
        read_schedule(written(folder, ENTRY | changes))
    return str(caught.value)


def test_the_committed_schedule_has_nothing_to_deploy() -> None:
    with pytest.raises(ScheduleError, match="there is nothing to deploy"):
        read_schedule(FILE)


def test_the_commented_example_of_the_committed_schedule_can_be_used(tmp_path: Path) -> None:
    lines = FILE.read_text(encoding="utf-8").splitlines()
    begin = lines.index("# entries:")
    (tmp_path / "schedule.yaml").write_text("\n".join(line.removeprefix("# ") for line in lines[begin:]))
    (entry,) = read_schedule(tmp_path / "schedule.yaml")
    assert check(entry.notebook, entry.config, entry.texts()).config.modal.gpus == (entry.gpu,)


def test_an_entry_has_defaults(tmp_path: Path) -> None:
    (entry,) = read_schedule(written(tmp_path, ENTRY))
    assert (entry.timezone, entry.gpu, entry.parameters, entry.texts()) == ("UTC", None, {}, [])


@pytest.mark.parametrize("text", ["", "[]", "entries:", "entries: 3", "entries: {a: 1}", "other: []", "a: b: c", "\t"])
def test_a_file_that_is_no_schedule_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "schedule.yaml"
    file.write_text(text)
    with pytest.raises(ScheduleError, match=r"schedule\.yaml cannot be (used|read)"):
        read_schedule(file)


def test_a_file_that_is_not_text_or_not_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_bytes(b"entries: []\xff")
    with pytest.raises(ScheduleError, match="cannot be read"):
        read_schedule(tmp_path / "x.yaml")
    with pytest.raises(ScheduleError, match="is missing"):
        read_schedule(tmp_path / "y.yaml")


@pytest.mark.parametrize("key", ["name", "notebook", "config", "cron"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(ScheduleError, match=rf"entries\.0\.{key}: Field required"):
        read_schedule(written(tmp_path, {k: v for k, v in ENTRY.items() if k != key}))


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    assert "entries.0.timezon: unknown key" in refusal(tmp_path, timezon="UTC")


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, ENTRY)
    file.write_text(file.read_text() + "  cron: 0 7 * * *\n")
    with pytest.raises(ScheduleError, match="twice"):
        read_schedule(file)


@pytest.mark.parametrize(
    "name", ["", "a b", "1st", "a/b", "..", "a.b", "ä", "-a", "a" * 61, "a\n"]
)  # fmt: skip
def test_a_name_that_cannot_be_a_function_is_refused(tmp_path: Path, name: str) -> None:
    assert "begin with a letter" in refusal(tmp_path, name=name)


def test_the_longest_name_and_its_date_are_still_a_runs_name(tmp_path: Path) -> None:
    from lib.runfolder import check_name

    (entry,) = read_schedule(written(tmp_path, ENTRY | {"name": "a" * 60}))
    check_name(f"{entry.name}-2026-01-01-0600")


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScheduleError, match="two entries are called nightly"):
        read_schedule(written(tmp_path, ENTRY, ENTRY | {"cron": "0 7 * * *"}))


@pytest.mark.parametrize(
    "cron", ["0 6 * * *", "*/5 * * * *", "0-30/10 8,12,20-22 1 1-6 1-5", "0 0 29 2 0", "59 23 31 12 7"]
)  # fmt: skip
def test_a_cron_of_five_fields_is_taken(tmp_path: Path, cron: str) -> None:
    assert read_schedule(written(tmp_path, ENTRY | {"cron": cron}))[0].cron == cron


@pytest.mark.parametrize("cron", ["", "* * * *", "0 6 * * * *", "@daily", "every day", "0 6 * *"])
def test_another_cron_is_refused(tmp_path: Path, cron: str) -> None:
    assert "write five fields" in refusal(tmp_path, cron=cron)


@pytest.mark.parametrize(
    "cron",
    ["60 6 * * *", "0 24 * * *", "0 6 0 * *", "0 6 32 * *", "0 6 * 13 *", "0 6 * * 8", "*/0 * * * *", "a * * * *"],
)
def test_a_cron_that_never_comes_is_refused(tmp_path: Path, cron: str) -> None:
    assert "cron" in refusal(tmp_path, cron=cron)


@pytest.mark.parametrize("zone", ["UTC", "Europe/Zurich", "America/Argentina/Buenos_Aires", "Asia/Kathmandu"])
def test_a_time_zone_has_its_usual_name(tmp_path: Path, zone: str) -> None:
    assert read_schedule(written(tmp_path, ENTRY | {"timezone": zone}))[0].timezone == zone


@pytest.mark.parametrize(
    "zone", ["", "Zurich", "Europe/Zürich", "../etc/passwd", "/etc/localtime", "Europe", "a" * 300]
)
def test_an_unknown_time_zone_is_refused(tmp_path: Path, zone: str) -> None:
    assert "no such time zone" in refusal(tmp_path, timezone=zone)


def test_parameters_mean_on_the_command_line_what_they_mean_in_the_file() -> None:
    parameters = {
        "training.steps": 2,
        "training.learning_rate": 1e-6,
        "evaluation.runs": ["a", "b"],
        "evaluation.greedy": False,
        "evaluation.model": None,
        "tracker.project": "007",
        "tracker.run": "true",
        "task.columns": {"prompt": "question"},
    }
    from lib.run import parse_parameters

    entry = Entry(**ENTRY, gpu="L4", parameters=parameters)
    read = {name: value.value for name, value in parse_parameters(entry.texts()).items()}
    assert read == parameters | {"modal.gpu": "L4"}


def test_spaces_in_a_cron_do_not_matter(tmp_path: Path) -> None:
    assert read_schedule(written(tmp_path, ENTRY | {"cron": " 0 6  * * *\n"}))[0].cron == "0 6 * * *"


def test_the_run_is_named_by_the_clock() -> None:
    with pytest.raises(ScheduleError, match="leave it out"):
        Entry(**ENTRY, parameters={"run_name": "mine"}).texts()


def test_a_gpu_wins_over_the_same_key_among_the_parameters() -> None:
    assert Entry(**ENTRY, gpu="L4", parameters={"modal.gpu": "H100"}).texts() == ["modal.gpu=L4"]


def test_the_schedule_is_the_committed_file() -> None:
    assert FILE == PROJECT_ROOT / "configs" / "schedule.yaml" and FILE.is_file()
