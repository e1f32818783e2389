"""Paths of a config: where they are here, under which names they travel, where a container finds them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib import PROJECT_ROOT
from lib.places import DATA, OUTPUTS, input_name, locate, travel_name


@pytest.fixture
def container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folders of a container: data/ and outputs/ under the returned one."""
    for variable, name in ((DATA, "data"), (OUTPUTS, "outputs")):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    return tmp_path


# -- here -------------------------------------------------------------------------------------------------------------


def test_relative_paths_count_from_the_project_wherever_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    assert locate("configs") == PROJECT_ROOT / "configs"
    assert locate(Path("nowhere/a.csv")) == PROJECT_ROOT / "nowhere" / "a.csv"


def test_absolute_paths_and_the_home_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate(tmp_path / "a") == tmp_path / "a"
    assert locate("~/a.csv") == tmp_path / "a.csv"


# -- travel names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    ["configs/x.yaml", "./configs/x.yaml", "configs//x.yaml", "configs/a/../x.yaml", f"{PROJECT_ROOT}/configs/x.yaml"],
)
def test_a_file_of_the_project_keeps_its_name(text: str) -> None:
    assert travel_name(text) == "configs/x.yaml"


@pytest.mark.parametrize(
    "text", ["../a/data.csv", "/elsewhere/a/data.csv", "~/a/data.csv", f"{PROJECT_ROOT}/../a/data.csv"]
)
def test_a_file_from_outside_gets_a_name_that_stays_inside(text: str) -> None:
    name = Path(travel_name(text))
    assert not name.is_absolute() and ".." not in name.parts
    assert name.parts[0] == "outside" and name.name == "data.csv" and len(name.parts) == 3


def test_the_same_name_in_two_folders_does_not_clash() -> None:
    assert len({travel_name(f"../{folder}/data.csv") for folder in ("a", "b", "a/b", "a b", "ä")}) == 5


def test_a_sibling_whose_name_begins_like_the_project_is_outside() -> None:
    assert travel_name(f"{PROJECT_ROOT}-copy/a.csv").startswith("outside/")


def test_one_spelling_or_another_of_a_path_outside_is_one_name() -> None:
    assert travel_name("../a/./b/../data.csv") == travel_name("../a/data.csv")


# -- in a container ---------------------------------------------------------------------------------------------------


def test_an_uploaded_file_is_found_under_its_travel_name(container: Path) -> None:
    for text in ("../tables/a.csv", "/elsewhere/a.csv", "my data/ä.csv"):
        place = container / "data" / travel_name(text)
        place.parent.mkdir(parents=True)
        place.write_text("x")
        assert locate(text) == place


def test_a_run_is_found_among_the_volumes_runs(container: Path) -> None:
    place = container / "outputs" / "first" / "adapter"
    place.mkdir(parents=True)
    assert locate("outputs/first/adapter") == place
    assert locate(PROJECT_ROOT / "outputs" / "first" / "adapter") == place


def test_what_is_nowhere_keeps_the_name_that_the_user_gave(container: Path) -> None:
    assert locate("nowhere/a.csv") == PROJECT_ROOT / "nowhere" / "a.csv"
    assert locate("/nowhere/a.csv") == Path("/nowhere/a.csv")


def test_a_file_that_came_with_the_code_goes_before_the_volume(container: Path) -> None:
    place = container / "data" / "configs" / "decisions.yaml"
    place.parent.mkdir(parents=True)
    place.write_text("an old one")
    assert locate("configs/decisions.yaml") == PROJECT_ROOT / "configs" / "decisions.yaml"


# -- names of inputs --------------------------------------------------------------------------------------------------


def test_an_input_has_one_name_here_and_in_a_container(container: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("my/a.csv", "../elsewhere/a.csv", "/elsewhere/a.csv"):
        there = input_name(container / "data" / travel_name(text))
        with monkeypatch.context() as here:
            here.delenv(DATA)
            assert input_name(locate(text)) == there


def test_two_inputs_with_one_basename_have_two_names() -> None:
    assert input_name(PROJECT_ROOT / "a" / "x.csv") != input_name(PROJECT_ROOT / "b" / "x.csv")
