"""What the workbench adds around the work itself: imports, the command line, and notebooks against plain scripts.

Imports: `import lib` and `python -m lib.run --help`, each the median of 7 fresh processes; neither may import torch.

Notebooks: `python -m lib.run NOTEBOOK CONFIG` (papermill, a Jupyter kernel) against a plain `python` process that runs
the same code cells of the same notebook as one script. Both start from the same run folder, in which the notebooks
before are finished, with a warm starter cache, and take turns (N P P N ...). The script draws the same figures to PNG,
because a plain script would save them too; `--no-figures` leaves that out of the script.

Exit status 0 = every figure is within its bar, else 1. On a machine that others use, read `others`: above 0.3 cores a
difference of a second says little.

    python benchmarks/overheads.py                              # 3 pairs of each notebook, about 6 minutes
    python benchmarks/overheads.py --pairs 7 --notebooks 1 2 4
    python benchmarks/overheads.py --pairs 0                    # imports only
"""

from __future__ import annotations

import argparse
import ast
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from machine import Others, shown

from lib import PROJECT_ROOT
from lib.run import CHAIN

CONFIG = "configs/smoke/decisions.yaml"
REPEATS = 7
IMPORT_BAR, HELP_BAR, NOTEBOOK_BAR = 0.15, 0.3, 1.5
"""Seconds."""

HEAD = """\
import IPython.display

def _draw(value, figures={figures}):
    if figures and hasattr(value, "_repr_png_"):
        value._repr_png_()
    return value

class _Handle:
    def update(self, value):
        _draw(value)

def _display(*values, display_id=False, **_):
    for value in values:
        _draw(value)
    return _Handle() if display_id else None

IPython.display.display = _display
"""
"""Goes before a notebook's cells in the plain script: what a cell shows is drawn, and shown nowhere."""


def seconds_of(command: Sequence[str]) -> float:
    """Wall seconds of a process that must succeed."""
    started = time.perf_counter()
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    spent = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return spent


def imports() -> list[tuple[str, float, float]]:
    """(what, median seconds, bar) of the import and of --help, the bare interpreter's start included."""
    python = sys.executable
    check = "import sys, {0}; sys.exit('{0} imports torch' if 'torch' in sys.modules else 0)"
    seconds_of([python, "-c", check.format("lib")])
    seconds_of([python, "-c", check.format("lib.run")])
    help_check = (
        "import sys, lib.run\ntry: lib.run.main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    seconds_of([python, "-c", help_check])
    measured = []
    for what, command, bar in (
        ("python -c pass", [python, "-c", "pass"], float("inf")),
        ("import lib", [python, "-c", "import lib"], IMPORT_BAR),
        ("python -m lib.run --help", [python, "-m", "lib.run", "--help"], HELP_BAR),
    ):
        load = Others()
        median = statistics.median(seconds_of(command) for _ in range(REPEATS))
        measured.append((what, median, bar))
        limit = "" if bar == float("inf") else f"bar {bar} s"
        print(f"{what:<26} {median:6.3f} s  {limit:<10} others {shown(load.cores())}")
    return measured


def script_of(notebook: Path, values: Mapping[str, object], figures: bool) -> str:
    """The notebook's code cells as a script: parameters set, and the value that ends a cell drawn."""
    parts = [HEAD.format(figures=figures)]
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        tree = ast.parse("".join(cell["source"]))
        if tree.body and isinstance(tree.body[-1], ast.Expr):
            last = tree.body[-1]
            last.value = ast.Call(ast.Name("_draw", ast.Load()), [last.value], [])
        parts.append(ast.unparse(ast.fix_missing_locations(tree)))
        if "parameters" in cell["metadata"].get("tags", []):
            parts += [f"{name} = {value!r}" for name, value in values.items()]
    return "\n".join(parts) + "\n"


class Bench:
    """A folder with one run per measured process, each copied from the run as it is before the notebook."""

    def __init__(self, folder: Path, config: str, figures: bool) -> None:
        self.folder, self.config, self.figures = folder, config, figures
        self.places = {"paths.outputs": str(folder / "outputs"), "paths.cache": str(folder / "cache")}
        self.before: dict[str, Path] = {}
        self.count = 0

    def prepare(self, last: str) -> None:
        """Run the chain once up to `last`, keeping the run folder as it is before each notebook."""
        for stem in CHAIN[: CHAIN.index(last) + 1]:
            self.before[stem] = self.folder / "before" / stem
            run = self.folder / "outputs" / "chain"
            run.mkdir(parents=True, exist_ok=True)
            shutil.copytree(run, self.before[stem])
            if stem == CHAIN[0]:  # nothing is warm yet: make the starter policy's cache
                seconds_of(self.command(stem, "cache"))
            if stem != last:
                seconds_of(self.command(stem, "chain"))

    def command(self, stem: str, name: str) -> list[str]:
        places = [part for key, value in self.places.items() for part in ("-p", f"{key}={value}")]
        return [
            sys.executable,
            "-m",
            "lib.run",
            f"notebooks/{stem}.ipynb",
            self.config,
            "-p",
            f"run_name={name}",
            *places,
        ]

    def fresh(self, stem: str) -> str:
        """The name of a new run that stands before this notebook."""
        self.count += 1
        name = f"run-{self.count}"
        shutil.copytree(self.before[stem], self.folder / "outputs" / name)
        return name

    def notebook(self, stem: str) -> float:
        return seconds_of(self.command(stem, self.fresh(stem)))

    def plain(self, stem: str) -> float:
        values = {"config": self.config, "run_name": self.fresh(stem), "overrides": self.places}
        script = self.folder / f"{values['run_name']}.py"
        notebook = PROJECT_ROOT / "notebooks" / f"{stem}.ipynb"
        script.write_text(script_of(notebook, values, self.figures), encoding="utf-8")
        return seconds_of([sys.executable, "-c", f"import runpy; runpy.run_path({str(script)!r})"])


def notebooks(bench: Bench, stems: Sequence[str], pairs: int) -> list[tuple[str, float, float]]:
    """(what, median difference in seconds, bar) of every notebook."""
    bench.prepare(stems[-1])
    measured = []
    for stem in stems:
        differences, plain_times, load = [], [], Others()
        for number in range(pairs):
            order = (bench.notebook, bench.plain) if number % 2 == 0 else (bench.plain, bench.notebook)
            spent = {side.__name__: side(stem) for side in order}
            differences.append(spent["notebook"] - spent["plain"])
            plain_times.append(spent["plain"])
        median = statistics.median(differences)
        measured.append((stem, median, NOTEBOOK_BAR))
        print(
            f"{stem:<24} plain {statistics.median(plain_times):6.2f} s  notebook {median:+6.2f} s "
            f"({min(differences):+.2f} to {max(differences):+.2f})  bar {NOTEBOOK_BAR} s  others {shown(load.cores())}",
            flush=True,
        )
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--pairs", type=int, default=3, help="of each notebook; 0 = imports only")
    parser.add_argument("--notebooks", type=int, nargs="+", default=[1, 2, 3, 4], choices=[1, 2, 3, 4])
    parser.add_argument("--no-figures", action="store_true", help="the plain script draws none")
    options = parser.parse_args()
    measured = imports()
    if options.pairs:
        stems = [stem for stem in CHAIN if int(stem[0]) in options.notebooks]
        with tempfile.TemporaryDirectory(prefix="overheads-") as name:
            measured += notebooks(Bench(Path(name), options.config, not options.no_figures), stems, options.pairs)
    missed = [f"{what}: {value:.3f} s, bar {bar} s" for what, value, bar in measured if value > bar]
    print(f"verdict: {'FAIL: ' + '; '.join(missed) if missed else 'PASS'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
