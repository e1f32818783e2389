"""The README's walk through Modal: secrets, upload, run, preempt, fetch, deploy, a tick; prints what a user sees.

Against the loopback server beside the checkout (../shared/tools/modal_loopback), with the real client:
no account, no bill.

    .venv/bin/python benchmarks/modal_walkthrough.py
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
import urllib.request
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT / "tests"))

from cloud import APP, Cloud, cloud_of, wait_until  # noqa: E402

CONFIG = """\
# The real hourly CO2 series of California, 2022: the file is too large to travel with the code, so it is uploaded.
task: {name: decisions, tau: 1.0, on_invalid: zero, series: series/CISO_2022_hourly.csv}
starter: {steps: 40}
training: {steps: 40, batch: 64, group_size: 8, learning_rate: 2.0e-3, beta: 0.02, save_steps: 10}
sampling: {prompt_limit: 64, completion_limit: 16}
evaluation: {rows: 64}
modal: {gpu: [H100, A100-80GB], timeout: 1, secrets: [openai-secret]}
cost: {budget_usd: 2}
"""

SCHEDULE = """\
entries:
  - {name: nightly, notebook: 4_adapter_evaluation, config: configs/ciso.yaml, cron: "0 6 * * *",
     timezone: Europe/Zurich, gpu: L4, parameters: {"evaluation.runs": [ciso]}}
"""


def main() -> int:
    shared = PROJECT.parent / "shared"
    if not shared.is_dir():
        sys.stderr.write("shared/ is absent: the loopback server lies beside the checkout, not in it\n")
        return 1
    with tempfile.TemporaryDirectory() as folder, cloud_of(shared, Path(folder)) as cloud:
        cloud.write("series/CISO_2022_hourly.csv", (shared / "data/carbon/CISO_2022_hourly.csv").read_text())
        cloud.write("configs/ciso.yaml", CONFIG)
        cloud.write("configs/schedule.yaml", SCHEDULE)
        walk(cloud)
    return 0


def walk(cloud: Cloud) -> None:
    app = "run -m lib.modal_app::"
    show(cloud, "secret create openai-secret OPENAI_API_KEY=sk-...")
    show(cloud, f"{app}upload --config configs/ciso.yaml")
    show(cloud, f"{app}quote --config configs/ciso.yaml --probe 5")
    preempted(cloud, f"{app}run --notebook 3_grpo_training --config configs/ciso.yaml")
    show(cloud, f"{app}checkpoints")
    show(cloud, f"{app}fetch --run ciso")
    show(cloud, "deploy -m lib.modal_app")
    body = json.dumps({"app": APP, "function": "nightly", "timeout": 200}).encode()
    with urllib.request.urlopen(f"{cloud.server.http_url}/control/fire", data=body, timeout=250) as answer:
        say(f"(06:00 comes) nightly: {json.loads(answer.read())['status']}")
    show(cloud, f"{app}checkpoints")
    say(f"secrets found outside their channel: {cloud.core.leaks()}")


def preempted(cloud: Cloud, command: str) -> None:
    """Run a command whose container is preempted in the middle of training."""
    log = cloud.folder / "run.log"
    say(f"$ modal {command}")
    process = cloud.start(sys.executable, "-m", "modal", *shlex.split(command), log=log)
    wait_until(lambda: "step 15/40" in log.read_text(errors="replace"), what="step 15")
    cloud.core.preempt["notebook"] = 0.0
    process.wait(400)
    say(shortened(log.read_text(errors="replace")))


def show(cloud: Cloud, command: str) -> None:
    say(f"$ modal {command}")
    done = cloud.modal(*shlex.split(command))
    say(shortened(done.stdout + done.stderr))
    assert done.returncode == 0, done.stderr


def shortened(text: str) -> str:
    """Without Modal's own progress, and with the middle of long step lists left out."""
    lines = [
        line for line in text.splitlines() if line.strip() and not re.match(r"[✓├└│]|View |\[modal-client\]", line)
    ]
    dull = re.compile(r".*(warm start step|step \d+/\d+ loss)")
    return "\n".join(line for line in lines if not dull.match(line) or re.search(r"step (1|14|15|16|17|40)/40 ", line))


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
