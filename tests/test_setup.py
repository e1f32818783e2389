"""The version table, the locks made from it, `make setup`, `python -m lib.run doctor`, and what git ignores."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lib import PROJECT_ROOT, doctor

REQUIREMENTS = PROJECT_ROOT / "requirements"


def requirements(name: str) -> list[Requirement]:
    lines = [line.split(" #")[0].strip() for line in (REQUIREMENTS / name).read_text().splitlines()]
    return [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]


def here(name: str) -> list[Requirement]:
    return [line for line in requirements(name) if line.marker is None or line.marker.evaluate()]


def pins(name: str) -> dict[str, str]:
    """Name -> version on this machine, without the name of a build (`+cpu`)."""
    return {canonicalize_name(r.name): next(iter(r.specifier)).version.split("+")[0] for r in here(name)}


# The version table and the locks


def test_both_locks_hold_the_version_table_and_agree_on_it() -> None:
    cpu, cuda = pins("cpu.lock"), pins("cuda.lock")
    for wanted in requirements("versions.in"):
        name = canonicalize_name(wanted.name)
        assert cpu[name] == cuda[name], name
        assert wanted.specifier.contains(cpu[name]), f"{wanted} is not what the locks hold: make lock"


def test_each_lock_holds_what_its_own_list_asks_for() -> None:
    for name in ("cpu", "cuda", "verl"):
        for wanted in here(f"{name}.in"):
            assert wanted.specifier.contains(pins(f"{name}.lock")[canonicalize_name(wanted.name)]), wanted
    assert {"vllm", "triton", "kernels", "liger-kernel", "bitsandbytes"} <= pins("cuda.lock").keys()
    assert {"vllm", "ray", "tensordict", "transferqueue", "hydra-core"} <= pins("verl.lock").keys()


def test_every_line_of_a_lock_names_one_exact_version() -> None:
    for lock in ("cpu.lock", "cuda.lock", "verl.lock"):
        for line in requirements(lock):
            assert [spec.operator for spec in line.specifier] == ["=="], f"{lock}: {line}"


def test_the_installed_lock_is_complete() -> None:
    """Every requirement of every package reached from the table is met by the lock, but for the overrides."""
    acc = "cpu" if sys.platform != "linux" or metadata.version("torch").endswith("+cpu") else "cuda"
    lock = pins(f"{acc}.lock")
    overridden = {canonicalize_name(r.name) for r in requirements("cpu-overrides.txt")} if acc == "cpu" else set()
    unmet: list[str] = []
    seen: set[tuple[str, str]] = set()
    todo = [(r, "the version table") for r in here(f"{acc}.in") + here("versions.in")]
    while todo:
        wanted, by = todo.pop()
        name = canonicalize_name(wanted.name)
        if name in overridden and name not in lock:
            continue
        if name not in lock or not (name in overridden or met(wanted.specifier, lock[name])):
            unmet.append(f"{by} needs {wanted}, {acc}.lock has {lock.get(name, 'none')}")
            continue
        for extra in ("", *sorted(wanted.extras)):
            if (name, extra) not in seen:
                seen.add((name, extra))
                todo += [(r, name) for r in needs(name, extra)]
    assert len({name for name, _ in seen}) > 150
    assert not unmet, "\n".join(unmet)


def met(specifier: SpecifierSet, version: str) -> bool:
    return specifier.contains(version, prereleases=True)


def needs(name: str, extra: str) -> list[Requirement]:
    try:
        lines = [Requirement(line) for line in metadata.requires(name) or []]
    except metadata.PackageNotFoundError:  # in the lock, but not in this environment: doctor's matter, not the lock's
        return []
    return [line for line in lines if line.marker is None or line.marker.evaluate({"extra": extra})]


def test_conda_users_get_the_same_lock() -> None:
    text = (PROJECT_ROOT / "environment.yml").read_text()
    python, _, pip = yaml.safe_load(text)["dependencies"]
    assert "-r requirements/cpu.lock" in pip["pip"] and "-e ." in pip["pip"]
    assert "PIP_NO_DEPS=1 conda env create -f environment.yml" in text
    supported = re.search(r'requires-python = "(.*)"', (PROJECT_ROOT / "pyproject.toml").read_text())
    assert supported and SpecifierSet(supported[1]).contains(python.removeprefix("python=") + ".0")


def test_the_notices_name_every_package_of_the_table() -> None:
    text = (PROJECT_ROOT / "THIRD_PARTY_NOTICES.md").read_text()
    table = [*requirements("versions.in"), *requirements("cpu.in"), *requirements("cuda.in")]
    assert [r.name for r in table if f"| {r.name} |" not in text] == []


# requirements/setup.sh, in a tree of its own with a lock that cannot be installed


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "requirements").mkdir()
    shutil.copy(REQUIREMENTS / "setup.sh", tmp_path / "requirements")
    for lock in ("cpu", "cuda"):
        (tmp_path / f"requirements/{lock}.lock").write_text("no-such-package==0\n")
    return tmp_path


def setup(tree: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "ACCELERATOR", "FLASH_ATTENTION")}
    environment |= {"PYTHON": sys.executable, "PIP_NO_INDEX": "1", **variables}
    command = ["bash", str(tree / "requirements/setup.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def stamp(tree: Path, accelerator: str = "cpu") -> None:
    """What a finished setup leaves behind."""
    files = [tree / f"requirements/{accelerator}.lock", tree / "requirements/setup.sh"]
    content = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    made = f"Python {platform.python_version()}, {accelerator}, in {tree}"
    (tree / ".venv").mkdir()
    (tree / ".venv/setup-stamp").write_text("\n".join([sys.executable, accelerator, made, content, ""]))


def fake_program(folder: Path, name: str, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)
    return folder


def test_an_unknown_accelerator_is_refused(tree: Path) -> None:
    done = setup(tree, ACCELERATOR="tpu")
    assert done.returncode != 0
    assert "ACCELERATOR=tpu is not known. Allowed: cpu, cuda" in done.stderr
    assert not (tree / ".venv").exists()


def test_an_unsupported_python_is_refused_with_the_remedy(tree: Path) -> None:
    folder = fake_program(tree / "bin", "python3.13", '[ "$1" = --version ] && echo Python 3.13.0')
    done = setup(tree, PYTHON=str(folder / "python3.13"))
    assert done.returncode != 0
    assert "cannot be used (Python 3.13.0). Allowed: Python 3.11 or 3.12." in done.stderr
    assert "PYTHON=python3.11 make setup" in done.stderr


def test_a_second_setup_does_nothing_until_the_content_of_the_lock_changes(tree: Path) -> None:
    stamp(tree)
    (tree / "requirements/cpu.lock").touch()
    start = time.monotonic()
    again = setup(tree, PYTHON="", PATH=os.environ["PATH"])
    assert again.returncode == 0 and "ready" in again.stdout, again.stderr
    assert time.monotonic() - start < 1

    (tree / "requirements/cpu.lock").write_text("no-such-package==1\n")
    changed = setup(tree)
    assert changed.returncode != 0 and "installing requirements/cpu.lock" in changed.stdout


def test_a_gpu_takes_the_cuda_lock_and_a_failed_setup_shows_why_and_is_not_taken_for_done(tree: Path) -> None:
    folder = fake_program(tree / "bin", "nvidia-smi", 'echo "GPU 0: NVIDIA H200 (UUID: GPU-0)"')
    done = setup(tree, PATH=f"{folder}:{os.environ['PATH']}")
    assert "installing requirements/cuda.lock" in done.stdout
    assert done.returncode != 0 and "No matching distribution found for no-such-package==0" in done.stderr
    assert "unfinished" in (tree / ".venv/setup-stamp").read_text()


def test_a_second_make_setup_is_quick() -> None:
    made = PROJECT_ROOT / ".venv/setup-stamp"
    lines = made.read_text().splitlines() if made.exists() else []
    if len(lines) < 4 or not lines[2].endswith(f"in {PROJECT_ROOT}"):
        pytest.skip("this .venv was not made by make setup")
    files = [REQUIREMENTS / f"{lines[1]}.lock", REQUIREMENTS / "setup.sh"]
    if hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest() != lines[3]:
        pytest.skip("this .venv is older than its lock: make setup")
    start = time.monotonic()
    done = subprocess.run(["make", "setup"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert "ready" in done.stdout
    assert time.monotonic() - start < 1


# lib/doctor.py


def test_doctor_names_a_version_that_is_not_the_locks(tmp_path: Path) -> None:
    lock = tmp_path / "cpu.lock"
    lock.write_text(f"pydantic==0.0.1\npyyaml=={metadata.version('pyyaml')}\nno-such-package==1.0\n")
    findings = {finding.part: finding for finding in doctor.report(lock=lock)}
    assert findings["pydantic"].found == f"{metadata.version('pydantic')}, cpu.lock says 0.0.1"
    assert findings["no-such-package"].found == "not installed, cpu.lock says 1.0"
    assert findings["pydantic"].missing and findings["pydantic"].remedy == "make setup"
    assert not findings["pyyaml"].missing
    text = doctor.render([findings["pydantic"], findings["pyyaml"]])
    assert "MISSING" in text and "-> make setup" in text and "Required and missing: 1." in text


def test_doctor_runs_before_anything_is_installed_and_says_what_to_do() -> None:
    command = [sys.executable, "-S", "-m", "lib.doctor"]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 1, done.stderr
    assert "not installed for" in done.stdout and "-> make setup" in done.stdout


def test_doctor_shows_the_gpu_that_nvidia_smi_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """case "$1" in
--query-gpu=*) echo "0, NVIDIA H200, 580.65.06, 143771 MiB, 9.0";;
*) echo "| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: 12.4 |";;
esac"""
    monkeypatch.setenv("PATH", str(fake_program(tmp_path / "bin", "nvidia-smi", script)), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "_accelerator", lambda gpus: "cuda")
    findings = {finding.part: finding for finding in doctor.report()}
    assert findings["driver"].found == "580.65.06"
    assert findings["gpu 0"].found == "NVIDIA H200, 143771 MiB, compute capability 9.0"
    assert findings["cuda"].missing and "install an NVIDIA driver for CUDA 13 or newer" in findings["cuda"].remedy


def test_doctor_is_quick_and_leaves_torch_alone() -> None:
    code = "import sys; from lib.doctor import main; main([]); sys.exit('torch' in sys.modules)"
    start = time.monotonic()
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, stdout=subprocess.DEVNULL, check=True)
    assert time.monotonic() - start < 15  # the sandbox tries itself out, which takes 1.5 s of an idle machine


# .gitignore


def test_git_ignores_runs_and_environments_but_not_the_library(tmp_path: Path) -> None:
    shutil.copy(PROJECT_ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    kept = ["lib/__init__.py", "lib/tasks/decisions.py", "outputs/README.md", "configs/decisions.yaml", ".ci/run"]
    ignored = [
        ".venv/bin/python",
        "outputs/demo/result.json",
        "lib/__pycache__/a.pyc",
        "notebooks/.ipynb_checkpoints/a",
    ]
    command = ["git", "-C", str(tmp_path), "check-ignore", *kept, *ignored]
    assert subprocess.run(command, capture_output=True, text=True).stdout.split() == ignored
