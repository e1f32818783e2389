"""Who may import whom (DESIGN, section 3), and that nothing heavy is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from lib import PROJECT_ROOT

LIB = PROJECT_ROOT / "lib"

# Low to high: a file imports, at module level, only from lines above its own; what shares a line does not know each
# other. Names of files that are still to come do no harm; a file that stands nowhere fails. One place differs from
# DESIGN's table: generate stands above rollout, because a BatchGenerate answers rollout's Requests.
ORDER = """
    __init__
    places   doctor   extract   patience   roles   front   layered
    gpu
    task
    config   log   tables   ledger   cost
    quote   keeper   wire   room   harmony
    provenance   data   sandbox   calls   program
    judge   rpc
    runfolder   grading   reward_model
    tasks
    rollout
    models   starter   trainer   paired
    generate   endpoint   memory
    answering   tools   client
    evaluate   prepare
    meter   attacks
    preflight
    show
    sync   hosts   training
    verl
    engine   relay
    speaker
    chat_request
    transformers_server
    actor   rollout_worker
    orchestrator   processes
    backends
    export   executed   check
    serving
    run   gang
    container   experiment   command   modal_call
    remote
    schedule   launch   follow   modal_roles   modal_hosts
    modal_serve
    modal_app
"""

# What a file must never import, wherever in the file the import stands ("must not know").
FORBIDDEN = {
    "task": ["models", "backends", "runfolder", "trainer", "rollout", "tasks"],
    "tables": ["data", "tasks"],
    "ledger": ["task", "tasks", "trainer", "rollout"],
    "grading": ["tasks", "rollout", "trainer", "models", "config"],
    "reward_model": ["task", "tasks", "rollout", "trainer"],
    "attacks": ["trainer", "backends", "tasks"],
    "meter": ["trainer", "backends", "tasks"],
    "calls": ["task", "tasks", "rollout", "trainer", "config"],
    "endpoint": ["tasks", "trainer", "backends"],
    "answering": ["tasks", "trainer", "backends", "models"],
    "judge": ["task", "tasks", "rollout", "trainer"],
    "sandbox": ["task", "tasks", "rollout", "trainer"],
    "rollout": ["tasks", "trainer", "backends", "config", "runfolder"],
    "models": ["tasks", "rollout", "backends"],
    "memory": ["tasks", "rollout", "trainer", "backends"],
    "harmony": ["tasks", "models", "generate"],
    "generate": ["tasks", "trainer", "backends"],
    "starter": ["tasks", "trainer", "backends", "evaluate"],
    "paired": ["models", "runfolder", "tasks"],
    "evaluate": ["trainer", "backends", "tasks"],
    "preflight": ["trainer", "backends", "tasks"],
    "prepare": ["trainer", "backends", "tasks"],
    "show": ["runfolder", "backends", "trainer", "tasks"],
    "trainer": ["tasks", "runfolder", "backends", "config"],
    "training": ["tasks", "backends", "show"],
    "actor": ["tasks"],
    "rpc": ["roles", "task", "tasks", "config", "models", "trainer"],
    "rollout_worker": ["tasks", "trainer", "backends", "orchestrator"],
    "sync": ["tasks", "trainer", "backends", "rpc"],
    "hosts": ["tasks"],
    "orchestrator": ["tasks", "backends", "models", "actor", "rollout_worker", "show"],
    "engine": ["tasks", "trainer", "backends", "evaluate"],
    "serving": ["tasks", "trainer", "backends", "evaluate"],
    "front": ["task", "tasks", "config", "models", "engine"],
    "relay": ["task", "tasks", "config", "models", "engine"],
    "speaker": ["tasks", "trainer", "backends", "evaluate", "serving"],
    "transformers_server": ["tasks", "trainer", "backends", "evaluate", "runfolder"],
    "modal_serve": ["tasks", "trainer", "backends", "evaluate", "modal_app"],
    "gang": ["tasks", "trainer", "backends", "config", "runfolder", "container"],
    "backends": ["tasks", "run", "show"],
    "export": ["trainer", "backends", "tasks"],
    "tasks": ["config", "runfolder", "models", "rollout", "backends", "trainer", "run"],
}

# Slow to import, or not there in every environment: imported inside functions,
HEAVY = {
    "torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "datasets", "huggingface_hub", "vllm", "ray",
    "verl", "modal", "verifiers", "openai", "numpy", "pandas", "pyarrow", "scipy", "matplotlib", "IPython",
    "ipywidgets", "papermill",
}  # fmt: skip
# except where a file's whole purpose is that framework, and whoever needs it imports that file inside a function.
ALLOWED = {
    "modal_app.py": {"modal"},
    "modal_roles.py": {"modal"},
    "tasks/_thermal_store.py": {"numpy"},
    "verl/agent_loop.py": {"verl"},
    "verl/machines.py": {"ray"},
    "verl/platform.py": {"torch", "verl"},
    "verl/trainer.py": {"torch", "verl"},
}

FILES = sorted(path for path in LIB.rglob("*.py"))


def room(path: Path) -> str:
    """lib/task.py -> task, lib/tasks/x.py -> tasks, lib/__init__.py -> __init__."""
    parts = path.relative_to(LIB).with_suffix("").parts
    return parts[0]


def level(name: str) -> int:
    for number, line in enumerate(ORDER.strip().splitlines()):
        if name in line.split():
            return number
    raise AssertionError(f"lib/{name} has no place in ORDER: put it on the lowest line that its imports allow")


def imports(path: Path, everywhere: bool) -> set[str]:
    """Full names imported by a file: at module level as it runs, or anywhere. `if TYPE_CHECKING` never runs."""
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path}: relative imports hide what is imported"
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            elif everywhere or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def rooms_imported(path: Path, everywhere: bool = False) -> set[str]:
    """Rooms of lib that a file imports from; `from lib import NAME` is a room where there is such a file."""
    rooms = set()
    for name in imports(path, everywhere):
        head, *rest = name.split(".")
        if head == "lib":
            known = rest and ((LIB / f"{rest[0]}.py").is_file() or (LIB / rest[0]).is_dir())
            rooms.add(rest[0] if known else "__init__")
    return rooms


def shown(path: Path) -> str:
    return path.relative_to(PROJECT_ROOT).as_posix()


def test_the_walker_sees_what_runs_and_only_that(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        "from __future__ import annotations\nimport os, json as j\nfrom lib.task import Row\n"
        "from lib import PROJECT_ROOT, models\n"
        "if TYPE_CHECKING:\n    import torch\ntry:\n    import yaml\nexcept ImportError:\n    pass\n"
        "class A:\n    import csv\n    def f(self):\n        import trl\nasync def g():\n    from vllm import LLM\n"
    )
    names = {"__future__.annotations", "os", "json", "lib.task.Row", "lib.PROJECT_ROOT", "lib.models", "yaml", "csv"}
    assert imports(path, everywhere=False) == names
    assert imports(path, everywhere=True) == names | {"trl", "vllm.LLM"}
    assert rooms_imported(path) == {"task", "__init__", "models"}


def test_no_room_stands_twice_in_the_order() -> None:
    names = ORDER.split()
    assert len(names) == len(set(names))


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_a_file_imports_only_from_rooms_below_its_own(path: Path) -> None:
    own = room(path)
    above = {name for name in rooms_imported(path) if name != own and level(name) >= level(own)}
    assert not above, f"{shown(path)} imports {sorted(above)} at module level, which stand on its own line or higher"


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_a_file_does_not_know_what_it_must_not_know(path: Path) -> None:
    known = rooms_imported(path, everywhere=True) & set(FORBIDDEN.get(room(path), []))
    assert not known, f"{shown(path)} imports {sorted(known)}"


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_nothing_heavy_is_imported_at_module_level(path: Path) -> None:
    heads = {name.split(".")[0] for name in imports(path, everywhere=False)}
    assert not heads & HEAVY - ALLOWED.get(path.relative_to(LIB).as_posix(), set())


@pytest.mark.parametrize("folder", ["tasks", "backends"])
def test_tasks_and_backends_do_not_know_each_other(folder: str) -> None:
    """Neighbours in one folder share nothing but files whose names begin with an underscore."""
    for path in (LIB / folder).glob("*.py"):
        known = {
            name.split(".")[2]
            for name in imports(path, everywhere=True)
            if name.startswith(f"lib.{folder}.") and name.count(".") >= 2
        }
        neighbours = {name for name in known if (LIB / folder / f"{name}.py").is_file() and not name.startswith("_")}
        assert not neighbours - {path.stem}, f"{shown(path)} imports {sorted(neighbours)}"


@pytest.mark.parametrize(
    "path", [path for path in FILES if room(path) in ("rollout", "trainer", "generate", "backends")], ids=shown
)
def test_no_name_of_a_task_stands_in_the_code_that_plays_and_trains_them_all(path: Path) -> None:
    tasks = {path.stem for path in (LIB / "tasks").glob("[!_]*.py")}
    texts = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    assert not tasks & texts


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_import_lib_needs_the_standard_library_only() -> None:
    done = python(
        "import sys; sys.path.insert(0, '.'); import lib, lib.doctor, lib.ledger, lib.run; print(lib.__file__)",
        "-S",
        "-I",
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(LIB / "__init__.py")


def test_importing_every_module_imports_nothing_heavy() -> None:
    light = [path for path in FILES if path.relative_to(LIB).as_posix() not in ALLOWED]
    names = [".".join(path.relative_to(PROJECT_ROOT).with_suffix("").parts).removesuffix(".__init__") for path in light]
    code = f"import importlib, sys\nfor name in {names}: importlib.import_module(name)\n"
    code += f"print(sorted({HEAVY} & {{name.split('.')[0] for name in sys.modules}}))"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_telemetry_is_off_before_any_library_can_read_it() -> None:
    switches = ["HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS"]
    code = f"import os\nfor name in {switches}: os.environ.pop(name, None)\n"
    code += f"import lib; print(*(os.environ[name] for name in {switches}))"
    assert python(code).stdout.split() == ["1", "1", "1"]
