"""The ledger of a run in a container: on its own disk, whole on the volume, merged when it is fetched."""

from __future__ import annotations

import itertools
import os
import sqlite3
from pathlib import Path

import pytest
from cloud import Cloud
from runners import CONFIG

from lib.container import _Attempt
from lib.ledger import NAME, Entry, Ledger, LedgerError, Verdict, hash_text

TASK = '''
"""Decisions, with every verdict kept in the run's ledger."""

from lib.ledger import Entry, Verdict, hash_text, open_ledger, verdict_key
from lib.task import Rollout, Score
from lib.tasks.decisions import Decisions


class Kept(Decisions, frozen=True):
    ledger: str = ""

    async def score(self, rollout: Rollout) -> Score:
        score = await super().score(rollout)
        verdict = Verdict("pass", 1.0) if score.parts["best"] else Verdict("fail", 0.0)
        key = verdict_key("kept-1", str(rollout.row["id"]), "nobody", "1", hash_text(rollout.text))
        row = str(rollout.row["id"])
        open_ledger(self.ledger).put([Entry(key, verdict, "kept", row, "best", "nobody", "1", hash_text(rollout.text))])
        return score
'''

ELSEWHERE = "mine/shared.sqlite"


def entry(key: str, score: float = 1.0) -> Entry:
    return Entry(key, Verdict("pass" if score else "fail", score), "t", "r", "c", "j", "1", hash_text(""))


def keys(path: Path) -> set[str]:
    """The keys in a ledger's file alone: what lies beside it does not count, and nothing is put there."""
    connection = sqlite3.connect(f"file:{path}?immutable=1", uri=True)
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        return {key for (key,) in connection.execute("SELECT key FROM verdicts")}
    finally:
        connection.close()


# -- through Modal ----------------------------------------------------------------------------------------------------


def run(cloud: Cloud, notebook: str) -> Path:
    texts = ["run_name=kept", f"task.ledger={ELSEWHERE}", "training.steps=2", "evaluation.rows=8", "starter.steps=5"]
    done = cloud.call(
        *["run", "--notebook", notebook, "--config", "mine/kept.yaml", "--gpu", "none"],
        *[part for text in texts for part in ("-p", text)],
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return cloud.run_folder("kept")


@pytest.fixture(scope="module")
def trained(cloud: Cloud) -> Path:
    """A run in a container whose task keeps verdicts; its folder on the volume."""
    cloud.write("mine/kept.py", TASK)
    cloud.write("mine/kept.yaml", CONFIG.format(task="mine/kept.py"))
    with_one_more(cloud.write(ELSEWHERE, ""), entry("known elsewhere"))
    return run(cloud, "3_grpo_training")


def test_the_ledger_of_a_container_is_on_the_volume_as_one_whole_file(trained: Path, cloud: Cloud) -> None:
    lines = (trained / "rollouts.jsonl").read_text().splitlines()
    assert 0 < len(keys(trained / NAME)) <= len(lines)
    assert [path.name for path in trained.iterdir() if NAME in path.name] == [NAME]
    assert f"{ELSEWHERE} is not used" in (trained / "log.txt").read_text()


def test_a_ledger_that_the_config_names_does_not_travel(trained: Path, cloud: Cloud) -> None:
    mounted = cloud.definition("notebook")["mounted_files"]
    assert "/root/mine/kept.py" in mounted and f"/root/{ELSEWHERE}" not in mounted
    assert "known elsewhere" not in keys(trained / NAME)


def test_the_next_container_goes_on_with_it(trained: Path, cloud: Cloud) -> None:
    before = keys(trained / NAME)
    with_one_more(trained / NAME, entry("put there by hand"))
    after = keys(run(cloud, "4_adapter_evaluation") / NAME)
    assert after > before | {"put there by hand"}


def with_one_more(path: Path, new: Entry) -> None:
    ledger = Ledger(path)
    ledger.put([new])
    ledger.close()


def test_fetch_merges_the_ledger_into_the_one_here(trained: Path, cloud: Cloud) -> None:
    there = keys(trained / NAME)
    one = min(there)
    here = cloud.folder / "outputs" / "kept"
    here.mkdir(parents=True)
    ledger = Ledger(here / NAME)  # stays open, as in a notebook
    ledger.put([entry(one, 0.0)._replace(criterion="known here first"), entry("known here only")])
    for _ in range(2):
        done = cloud.call("fetch", "--run", "kept")
        assert done.returncode == 0, done.stdout + done.stderr
        assert {row["key"] for row in ledger.rows()} == {*there, "known here only"}
    assert ledger.get(one) == Verdict("fail", 0.0)
    assert not [path.name for path in here.iterdir() if path.name.endswith(".partial")]


def test_a_damaged_ledger_does_not_keep_the_other_files_from_coming(trained: Path, cloud: Cloud) -> None:
    whole = (trained / NAME).read_bytes()
    (trained / NAME).write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    try:
        done = cloud.call("fetch", "--run", "kept", "--to", "again")
    finally:
        (trained / NAME).write_bytes(whole)
    assert done.returncode == 2 and "cannot be read as a ledger" in done.stderr
    here = cloud.folder / "outputs" / "again"
    assert (here / "rollouts.jsonl").read_bytes() == (trained / "rollouts.jsonl").read_bytes()


# -- without Modal ----------------------------------------------------------------------------------------------------


@pytest.fixture
def attempt(tmp_path: Path) -> _Attempt:
    """An attempt as far as its ledger goes; made without asking Modal who it is."""
    made = object.__new__(_Attempt)
    made.folder, made.ledger, made.kept = tmp_path / "volume", tmp_path / "disk" / NAME, []
    made.folder.mkdir()
    made.ledger.parent.mkdir()
    return made


def test_a_run_without_verdicts_has_no_ledger(attempt: _Attempt) -> None:
    attempt._restore_ledger()
    attempt._keep_ledger()
    assert os.listdir(attempt.folder) == os.listdir(attempt.ledger.parent) == []


def test_the_ledger_is_copied_when_it_changed_and_only_then(attempt: _Attempt) -> None:
    ledger, copy = Ledger(attempt.ledger), attempt.folder / NAME
    seen = [0]
    for i in range(3):
        ledger.put([entry(str(i))])
        attempt._keep_ledger()
        seen.append(copy.stat().st_ino)
        assert keys(copy) == {str(n) for n in range(i + 1)}
        attempt._keep_ledger()
        assert copy.stat().st_ino == seen[-1]
    assert all(before != after for before, after in itertools.pairwise(seen))


def test_a_copy_that_fails_is_told_and_made_the_next_time(attempt: _Attempt, caplog: pytest.LogCaptureFixture) -> None:
    Ledger(attempt.ledger).put([entry("k")])
    (attempt.folder / NAME).mkdir()  # in the way
    attempt._keep_ledger()
    assert "was not copied to the volume" in caplog.text
    (attempt.folder / NAME).rmdir()
    attempt._keep_ledger()
    assert keys(attempt.folder / NAME) == {"k"}


def test_a_damaged_ledger_on_the_volume_is_refused_and_left_as_it_is(attempt: _Attempt) -> None:
    (attempt.folder / NAME).write_bytes(b"SQLite format 3\0" + b"\xff" * 4096)
    with pytest.raises(LedgerError, match="move it away, or restore a copy"):
        attempt._restore_ledger()
    attempt._keep_ledger()
    assert (attempt.folder / NAME).read_bytes() == b"SQLite format 3\0" + b"\xff" * 4096
