"""GGUF files for llama.cpp and Ollama, made by llama.cpp's own converters.

Owns where the converters are looked for, how they are called, and what a result must be. Must not know runs.

    python -c "from lib.export.gguf import converters; print(converters('/path/to/llama.cpp'))"

The converters are scripts of llama.cpp's repository; nothing of them is in this one. They run in this Python, in a
process of their own and without the network.
"""

from __future__ import annotations

import logging
import os
import struct
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from lib.export.adapter import write_clean_adapter
from lib.export.base import Adapter, Checkpoint
from lib.export.errors import ExportError
from lib.log import scrub, without_secrets
from lib.places import locate

logger = logging.getLogger(__name__)

WHERE = "LLAMA_CPP"
"""Environment variable: the folder that holds the converters."""

MODEL, LORA = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
FILE = "model.gguf"
ADAPTER_FILE = "adapter.gguf"

_HOW = (
    "get it with `git clone https://github.com/ggml-org/llama.cpp` and `pip install gguf`, then set export.llama_cpp "
    f"(or the environment variable {WHERE}) to that folder; or leave gguf out of export.artifacts"
)


_HINTS = {
    "No module named 'gguf'": " Install it with `pip install gguf`.",
    "pre-tokenizer was not recognized": (
        " llama.cpp does not know how this model's tokenizer splits texts (a home-made one, as the starter's is): take "
        "a newer llama.cpp, or leave gguf and gguf-adapter out of export.artifacts."
    ),
}
"""What a converter says -> what to do."""


def converters(llama_cpp: str) -> Path:
    """The folder of the converters, "" = where LLAMA_CPP says. Raises ExportError that says how to get them."""
    named = llama_cpp or os.environ.get(WHERE, "")
    if not named:
        raise ExportError(f"a GGUF file needs llama.cpp's converters, and export.llama_cpp is not set: {_HOW}")
    folder = locate(named)
    if not (folder / MODEL).is_file():
        raise ExportError(f"{named} holds no {MODEL}: it is not llama.cpp's folder; {_HOW}")
    return folder


def write_model(model: Path, folder: Path, llama_cpp: str, outtype: str) -> dict[str, int]:
    """Convert a whole model's folder to `folder`/model.gguf; facts of the file. Experts in MXFP4 stay so."""
    _convert(converters(llama_cpp) / MODEL, [str(model)], folder / FILE, outtype)
    return check_gguf(folder / FILE)


def write_adapter(adapter: Adapter, base: Checkpoint, folder: Path, llama_cpp: str, outtype: str) -> dict[str, int]:
    """Convert an adapter to `folder`/adapter.gguf, for `llama-server --lora` or Ollama's ADAPTER; facts of the file."""
    bare = adapter.config.get("target_parameters")
    if bare:
        raise ExportError(
            f"the adapter changes stacked experts or routers ({', '.join(bare)}), for which llama.cpp has no LoRA: "
            f"export gguf, the merged model, in the place of gguf-adapter"
        )
    scaled = [key for key in ("use_rslora", "alpha_pattern", "fan_in_fan_out") if adapter.config.get(key)]
    if scaled:
        raise ExportError(
            f"the adapter sets {scaled[0]}, and a GGUF adapter knows one alpha over each rank: it would be scaled "
            f"wrongly. Export gguf, the merged model, in the place of gguf-adapter"
        )
    script = converters(llama_cpp) / LORA
    if not script.is_file():
        raise ExportError(f"{script.parent} holds {MODEL} and no {LORA}: take both from llama.cpp's repository")
    # An adapter is float32 as a rule, and small; `auto` ends in an error there (llama.cpp of 2026).
    outtype = "f32" if outtype == "auto" else outtype
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        clean = Path(temporary) / "adapter"  # its name stands in the file
        clean.mkdir()
        write_clean_adapter(adapter, base, clean)  # what the training left names folders of this machine
        _convert(script, ["--base", str(base.folder), str(clean)], folder / ADAPTER_FILE, outtype)
    return check_gguf(folder / ADAPTER_FILE)


def check_gguf(path: Path) -> dict[str, int]:
    """Version and counts of a GGUF file's header. Raises ExportError where it is none, or holds no tensor."""
    with path.open("rb") as file:
        head = file.read(24)
    if len(head) < 24 or head[:4] != b"GGUF":
        raise ExportError(f"{path.name} is no GGUF file: the converter ended without writing one")
    version, tensors, keys = struct.unpack("<IQQ", head[4:])
    if not tensors:
        raise ExportError(f"{path.name} holds no tensor: the converter wrote only the vocabulary")
    return {"gguf_version": version, "gguf_tensors": tensors, "gguf_keys": keys}


def _convert(script: Path, arguments: Sequence[str], target: Path, outtype: str) -> None:
    command = [sys.executable, str(script), "--outfile", str(target), "--outtype", outtype, *arguments]
    logger.info("export: %s writes %s", script.name, target.name)
    environment = without_secrets() | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, errors="replace")
    if done.returncode or not target.is_file():
        said = scrub("\n".join((done.stderr or done.stdout).strip().splitlines()[-4:]))
        hint = next((told for sign, told in _HINTS.items() if sign in said), "")
        raise ExportError(f"{script.name} ended with exit code {done.returncode}: {said}{hint}")
