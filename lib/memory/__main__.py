"""`python -m lib.memory CONFIG`: what training by it takes on a GPU, without one being there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lib import WorkbenchError, models
from lib.config import load_config
from lib.memory.estimate import estimate
from lib.memory.limits import gib, told


def main(argv: Sequence[str]) -> int:
    """`python -m lib.memory CONFIG`: what training takes on a GPU, without one being there; config.json is fetched."""
    parser = argparse.ArgumentParser(
        prog="python -m lib.memory", description="What training will take, by config.json."
    )
    parser.add_argument("config", help="a YAML file, e.g. configs/decisions_gpt_oss.yaml")
    parser.add_argument("--cpu", action="store_true", help="without a GPU")
    options = parser.parse_args(argv)
    try:
        config = load_config(options.config)
        shape = models.load_shape(models.resolve_model(config, []), config.model)
        found = estimate(config, shape, "cpu" if options.cpu else "cuda")
    except WorkbenchError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"peak {gib(found.peak)}: {told(found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
