"""A worker's process: serve an engine of these settings to the parent.

Owns nothing. Must not know anything else.

    python -m lib.rollout_worker '{"run": "x", "model": "outputs/x/model"}'
"""

from __future__ import annotations

import logging
import sys

from lib.rollout_worker.settings import EngineSettings, set_environment
from lib.rollout_worker.worker import RolloutWorker
from lib.rpc import serve


def main(text: str) -> None:
    settings = EngineSettings.model_validate_json(text)
    set_environment()
    logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(name)s: %(message)s")
    serve(lambda: RolloutWorker(settings))


if __name__ == "__main__":
    main(sys.argv[1])
