"""What a container does that needs no Modal server: claims, manifests, jobs, file facts, the end of a process."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lib import PROJECT_ROOT
from lib.container import (
    CLAIMS,
    MANIFEST,
    STALE_SECONDS,
    FileFact,
    Job,
    _Attempt,
    _problem,
    busy,
    live_writer,
    parse_manifest,
    read_manifest,
)

JOB: dict[str, Any] = {
    "notebook": "notebooks/3_grpo_training.ipynb",
    "config": "configs/decisions.yaml",
    "parameters": ("training.steps=2",),
    "run": "first",
    "gpus": (),
    "cpu": 1.0,
    "memory": 1.0,
    "seconds": 3600.0,
    "prices": "configs/prices.yaml",
    "lock": "0",
    "code": {"commit": "x", "diff": ""},
    "files": {"a.csv": {"bytes": 3, "sha256": "0"}},
}


# -- claims -----------------------------------------------------------------------------------------------------------


def test_nobody_writes_a_run_without_claims() -> None:
    assert live_writer({}) is None


def test_a_writer_that_was_seen_a_moment_ago_is_there() -> None:
    assert live_writer({"fc-1": {"seen": time.time()}}) == "fc-1"


def test_a_writer_that_was_not_seen_for_long_is_gone() -> None:
    assert live_writer({"fc-1": {"seen": 1000.0}}, now=1000.0 + STALE_SECONDS - 1) == "fc-1"
    assert live_writer({"fc-1": {"seen": 1000.0}}, now=1000.0 + STALE_SECONDS) is None


def test_the_living_one_is_found_among_the_gone() -> None:
    claims = {"fc-1": {"seen": 0.0}, "fc-3": {"seen": 990.0}, "fc-2": {"seen": 100.0}}
    assert live_writer(claims, now=1000.0) == "fc-3"


def test_a_claim_by_a_clock_that_is_a_little_ahead_counts() -> None:
    assert live_writer({"fc-1": {"seen": 1010.0}}, now=1000.0) == "fc-1"


def test_a_claim_by_a_clock_that_is_far_ahead_does_not_block_a_run_for_ever() -> None:
    assert live_writer({"fc-1": {"seen": 1000.0 + 86400}}, now=1000.0) is None


def test_a_busy_run_says_who_and_what_to_do() -> None:
    text = busy("first", "fc-1")
    assert "'first'" in text and "fc-1" in text and "choose another run_name" in text and "60 s" in text


def test_claims_are_no_file_of_a_run() -> None:
    assert "/" not in CLAIMS


# -- files on the data volume -----------------------------------------------------------------------------------------


def test_a_file_has_a_size_and_a_hash(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "b").write_bytes(b"abc")
    (tmp_path / "c").write_bytes(b"abd")
    a, b, c = (FileFact.of(tmp_path / name) for name in "abc")
    assert a == b and a != c and a.bytes == c.bytes == 3


def test_a_missing_a_cut_off_and_a_changed_file_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    fact = FileFact.of(path)
    assert _problem(path, fact, check_hash=True) == ""
    path.write_bytes(b"abd")
    assert "its content differs" in _problem(path, fact, check_hash=True)
    path.write_bytes(b"ab")
    assert _problem(path, fact) == "2 bytes there, 3 here: upload it again"
    path.unlink()
    assert _problem(path, fact).startswith("missing: modal run -m lib.modal_app::upload")
    path.mkdir()
    assert _problem(path, fact).startswith("missing")


def test_a_volume_without_a_manifest_holds_nothing(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) == {}


def test_a_manifest_is_read_as_it_was_written(tmp_path: Path) -> None:
    facts = {"my data/ä.csv": FileFact(bytes=3, sha256="0")}
    (tmp_path / MANIFEST).write_text(json.dumps({name: fact.model_dump() for name, fact in facts.items()}))
    assert read_manifest(tmp_path) == facts == parse_manifest((tmp_path / MANIFEST).read_bytes())


# -- jobs -------------------------------------------------------------------------------------------------------------


def test_a_job_crosses_as_plain_json() -> None:
    job = Job(**JOB)
    crossed = json.loads(json.dumps(job.model_dump(mode="json")))
    assert Job.model_validate(crossed) == job


def test_a_job_with_an_unknown_key_is_refused() -> None:
    with pytest.raises(ValueError, match="extra_forbidden"):
        Job(**JOB, shell="rm")


def test_the_module_that_a_container_imports_is_light_and_does_without_modal() -> None:
    heavy = "('modal', 'torch', 'transformers', 'papermill')"
    code = f"import sys, lib.container; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- a process in a container -----------------------------------------------------------------------------------------


def attempt(folder: Path, **changes: Any) -> _Attempt:
    """An attempt as far as it is when its process runs; made without asking Modal who it is."""
    made = object.__new__(_Attempt)
    made.job, made.folder, made.tail = Job(**JOB | changes), folder, []
    return made


def process(code: str) -> subprocess.Popen[str]:
    started = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert started.stdout is not None and started.stdout.readline() == "ready\n"
    return started


def test_a_process_is_interrupted_and_its_end_awaited(tmp_path: Path) -> None:
    code = (
        "import time\ntry:\n print('ready', flush=True); time.sleep(60)\nexcept KeyboardInterrupt: raise SystemExit(75)"
    )
    started = process(code)
    attempt(tmp_path)._stop(started, 10.0)
    assert started.poll() == 75


def test_a_process_that_does_not_end_is_killed_with_its_children(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print('ready', flush=True)\n"
        "print(child.pid, flush=True); time.sleep(60)"
    )
    started = process(code)
    assert started.stdout is not None
    child = int(started.stdout.readline())
    attempt(tmp_path)._stop(started, 0.5)
    started.wait(5)
    assert started.returncode == -signal.SIGKILL and _is_gone(child)


def test_a_training_gets_the_signal_that_makes_it_save_and_not_the_notebook(tmp_path: Path) -> None:
    (tmp_path / "stages").mkdir()
    lock = tmp_path / "stages" / "training.lock"
    training_code = (
        "import signal, sys, time; from pathlib import Path; from lib.runfolder import exclusive\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        f"with exclusive(Path({str(lock)!r})):\n print('ready', flush=True); time.sleep(60)"
    )
    training = process(training_code)
    # The notebook ends as soon as its training has.
    lives = f"os.path.exists('/proc/{training.pid}/fd/3')"
    notebook = process(f"import os, time; print('ready', flush=True)\nwhile {lives}: time.sleep(.05)")
    attempt(tmp_path)._stop(notebook, 10.0)
    assert training.wait(5) == 75 and notebook.wait(5) == 0


def test_a_process_that_has_ended_already_needs_no_signal(tmp_path: Path) -> None:
    started = process("print('ready', flush=True)")
    started.wait(5)
    attempt(tmp_path)._stop(started, 1.0)
    assert started.returncode == 0


def test_what_a_process_prints_is_shown_scrubbed_and_its_tail_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A_KEY", "canary-0123456789")
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    one = attempt(tmp_path)
    started = process("print('ready', flush=True)\nfor i in range(60): print(i, 'canary-0123456789')")
    one._show(started)
    started.wait(5)
    assert out.getvalue().splitlines() == [f"{i} <A_KEY>" for i in range(60)] and len(one.tail) == 50


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [((), None), (("H100:2",), "H100:2"), (("L4", "T4"), "L4")],
)
def test_a_container_that_cannot_tell_has_the_first_gpu_that_was_asked_for(
    tmp_path: Path, gpus: tuple[str, ...], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # no nvidia-smi
    assert attempt(tmp_path, gpus=gpus)._gpu() == expected


@pytest.mark.parametrize(
    ("shown", "asked", "expected"),
    [
        ("NVIDIA H100 80GB HBM3, 81559 MiB", ("H200", "H100"), "H100"),
        ("NVIDIA L40S, 46068 MiB", ("L4", "L40S"), "L40S"),
        ("NVIDIA L4, 23034 MiB", ("L40S", "L4"), "L4"),
        ("NVIDIA A10G, 23028 MiB", ("A100", "A10"), "A10"),
        ("NVIDIA A100-SXM4-40GB, 40960 MiB", ("A10", "A100"), "A100"),
        ("NVIDIA A100-SXM4-40GB, 40960 MiB", ("A100-80GB", "A100-40GB"), "A100-40GB"),
        ("NVIDIA A100 80GB PCIe, 81920 MiB", ("A100-40GB", "A100-80GB"), "A100-80GB"),
        ("NVIDIA A100-SXM4-80GB, 81920 MiB", ("H100", "A100-80GB:2"), "A100-80GB:2"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition, 97887 MiB", ("B200", "RTX-PRO-6000"), "RTX-PRO-6000"),
        ("Tesla T4, 15360 MiB", ("L4", "T4"), "T4"),
    ],
)
def test_a_container_knows_which_of_several_gpus_it_got(
    tmp_path: Path, shown: str, asked: tuple[str, ...], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "nvidia-smi"
    script.write_text(f"#!/bin/sh\necho '{shown}, 580.1, 9.0'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert attempt(tmp_path, gpus=asked)._gpu() == expected


def _is_gone(pid: int) -> bool:
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            state = re.search(r"\) (\w)", Path(f"/proc/{pid}/stat").read_text())
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state and state[1] == "Z":
            return True
        time.sleep(0.05)
    return False
