"""Files between the machines of a Ray cluster, in verl's environment: what the driver of a training does with them.

    build/verl/bin/python tests/verl_machines_program.py HOST:PORT RUN_FOLDER

Makes a folder, sends it to the other machine, has it changed there, and brings it back. Prints a line of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray

from lib.verl import local_ray, machines
from lib.verl.errors import VerlError
from lib.verl.machines import Machines, listing


def change(folder: str) -> list[str]:
    """On the other machine: one file more, as its part of a checkpoint; what was there before."""
    (Path(folder) / "deep" / "rank_1.pt").write_bytes(b"1" * 11)
    return [part.name for part in listing(folder)]


def main(address: str, run: Path) -> dict[str, Any]:
    local_ray.stay_here()
    ray.init(address=address, _node_ip_address=local_ray.LOOPBACK, log_to_driver=False)
    machines.wait_for(2, "GPU", 1)
    machines._PATIENCE, machines._CHUNK = 0.0, 7
    try:
        machines.wait_for(3, "GPU", 1)
        refused = ""
    except VerlError as error:
        refused = str(error)
    over = Machines(run, "GPU")
    source = run / "source"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "rank_0.pt").write_bytes(bytes(range(50)))  # several chunks, and a rest
    (source / "empty").touch()
    sent = over.send(source, "checkpoints/step")
    there = ray.get(machines._on(over.apart[0], change).remote(str(sent)))
    brought = run / "brought"
    over.bring("checkpoints/step", brought)
    left = ray.get(machines._on(over.apart[0], listing).remote(str(over.staging)))
    return {
        "staged": over.staged,
        "apart": len(over.apart),
        "refused": refused,
        "there": there,
        "brought": {part.name: (brought / part.name).read_bytes().hex() for part in listing(str(brought))},
        "left": [part.name for part in left],
        "source": [part.name for part in listing(str(source))],
    }


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
