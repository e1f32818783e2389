"""What verl itself reads from parquet files: a program for verl's environment.

Owns the call of verl's RLHFDataset and collate_fn. Must not know configs or tasks.

    build/verl/bin/python -m lib.verl.dataset outputs/ace/verl/train.parquet --model Qwen/Qwen2-0.5B --limit 512
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import sys
import tempfile
from typing import Any


def read(path: str, tokenizer: Any, limit: int) -> dict[str, Any]:
    """Rows of a file, those whose prompt has at most `limit` tokens, and the keys of a collated batch of them."""
    from omegaconf import OmegaConf
    from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

    settings = {"max_prompt_length": limit, "truncation": "error", "filter_overlong_prompts_workers": 1}
    every, within = (
        RLHFDataset(path, tokenizer, OmegaConf.create({**settings, "filter_overlong_prompts": filtered}))
        for filtered in (False, True)
    )
    batch = collate_fn([every[at] for at in range(min(4, len(every)))])
    prompts = [[dict(message) for message in prompt] for prompt in batch["raw_prompt"]]
    return {"rows": len(every), "within": len(within), "keys": sorted(batch), "prompts": prompts}


def main() -> None:
    """Print, as one line of JSON, what was read of each file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+")
    parser.add_argument("--model", required=True)
    parser.add_argument("--limit", type=int, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as cache, contextlib.redirect_stdout(io.StringIO()):  # verl prints
        os.environ["HF_DATASETS_CACHE"] = cache
        from verl.utils import hf_tokenizer

        tokenizer = hf_tokenizer(options.model)
        found = {path: read(path, tokenizer, options.limit) for path in options.files}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
