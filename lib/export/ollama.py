"""An artifact for Ollama: a folder with a Modelfile that works, or the reason why there can be none.

Owns what Ollama's converters take, and the folder `export/ollama/`. Must not know tasks or trainers.

    python -c "from lib.export.ollama import CONVERTED; print(*CONVERTED)"

Read in ollama/ollama's sources, 0.6 to 0.33: convert/ (which architectures, which keys of config.json), parser/ (which
files of a folder), server/ (templates). What would be created and then fail at load, or answer gibberish, is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lib.config import ArtifactKind
from lib.export.base import ADAPTER, ADAPTER_CONFIG, open_adapter, read_json, without_paths
from lib.export.errors import ExportError
from lib.export.gguf import ADAPTER_FILE, FILE
from lib.export.gguf_header import read_keys
from lib.export.modelfile import Modelfile
from lib.export.template import OllamaTemplate, Prompts, ollama_template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODELFILE = "Modelfile"
BASE, MODEL = "base", "model"

CONVERTED = (
    "LlamaForCausalLM", "Qwen2ForCausalLM", "GptOssForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "Phi3ForCausalLM",
)  # fmt: skip
"""Architectures whose safetensors `ollama create` converts, of those that are trained here. Qwen3 and Mistral are not
among them: they go through llama.cpp's converter."""

ADAPTED = ("LlamaForCausalLM", "Gemma2ForCausalLM")
"""Architectures whose adapters it converts."""

ADAPTED_GGUF = (*ADAPTED, "Qwen2ForCausalLM", "GemmaForCausalLM", "Phi3ForCausalLM")
"""Architectures that have always run on llama.cpp in Ollama. From 0.6 to 0.24 others run on its own engine, where an
adapter fails at load ("loras are not yet implemented")."""

SPLITS = {
    "d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f",  # Llama 3
    "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e",  # Qwen 2
    "00431aed57e696b747435f734d1e3b9b1bfd931a121fb5cac7129e97c181e9ba",  # Qwen 3.5
}
"""SHA-256 of the patterns by which tokenizers split a text, of those that Ollama knows."""


def write_ollama(
    folder: Path,
    kind: ArtifactKind,
    artifact: Path,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    end_ids: Sequence[int],
    name: str,
) -> dict[str, Any]:
    """Write a Modelfile for an artifact, with all that it needs beside it (hard links); facts of it.

    `base`: the folder of the base's files, for adapters. `tokenizer`: the policy's, its date and effort frozen. `name`:
    of the model in Ollama. Raises ExportError with the reason where Ollama could not use it.
    """
    source, adapter, told = _place(folder, kind, artifact, base)
    leave_out = begin_of_text(folder / source, tokenizer)
    template = ollama_template(Prompts(tokenizer, leave_out), end_ids)
    dated = _DATED if _shows_date(folder / source, artifact, base) else ()
    caveats = (*told, *dated, *template.caveats)
    comments = (f"Made of the artifact {kind}. Mind:", *caveats)
    modelfile = Modelfile(f"./{source}", f"./{adapter}" if adapter else "", template.text, template.stops, comments)
    (folder / MODELFILE).write_text(modelfile.text(), encoding="utf-8")
    return {"made_of": kind, "stops": list(template.stops), "caveats": list(caveats), "name": name.lower()}


def commands(folder: Path, facts: Mapping[str, Any]) -> list[str]:
    """What to type where Ollama is installed."""
    name = shlex.quote(str(facts["name"]))
    return [f"ollama create {name} -f {shlex.quote(str(folder / MODELFILE))}", f"ollama run {name}"]


def check_model(folder: Path) -> tuple[str, ...]:
    """Whether Ollama can make a model of a folder of safetensors: caveats, or ExportError with the reason."""
    config = read_json(folder / "config.json")
    kind = _architecture(config)
    if kind not in CONVERTED:
        raise ExportError(
            f"Ollama converts no safetensors of {kind} ({', '.join(CONVERTED)}): add gguf to export.artifacts, which "
            f"llama.cpp converts (export.llama_cpp)"
        )
    if kind == "GptOssForCausalLM" and "quantization_config" not in config:
        raise ExportError(
            "Ollama takes gpt-oss with its experts in MXFP4; of others it makes a file that fails at load: add mxfp4 "
            "(or gguf) to export.artifacts"
        )
    return _check_tokenizer(folder, kind)


def check_adapter(folder: Path, base: Path) -> None:
    """Whether Ollama can put an adapter of PEFT's on its base. Raises ExportError with the reason."""
    kind = _architecture(read_json(base / "config.json"))
    if kind not in ADAPTED:
        raise ExportError(
            f"Ollama converts adapters on {' and '.join(ADAPTED)} only, not on {kind}: make the Modelfile of merged, "
            f"mxfp4 (gpt-oss) or gguf"
        )
    adapter = open_adapter(folder)
    config = adapter.config
    odd = [key for key in _PLAIN if config.get(key) not in (None, False, "none", [], {})]
    if odd or float(config["lora_alpha"]) % 1:
        raise ExportError(
            f"the adapter has {', '.join(odd) or 'an alpha with a fraction'}, which Ollama's converter does not know: "
            f"make the Modelfile of merged or gguf"
        )
    if kind == "LlamaForCausalLM" and any(".q_proj." in name or ".k_proj." in name for name in adapter.tensors):
        raise ExportError(
            "the adapter is on q_proj or k_proj of a Llama. Their weights are reordered for llama.cpp, and Ollama's "
            "converter reorders the wrong factor of such an adapter: it would answer gibberish. Make the Modelfile of "
            "merged, gguf or gguf-adapter"
        )


_PLAIN = ("use_dora", "use_rslora", "lora_bias", "bias", "rank_pattern", "alpha_pattern", "modules_to_save",
          "target_parameters", "trainable_token_indices", "layer_replication")  # fmt: skip


def _place(folder: Path, kind: ArtifactKind, artifact: Path, base: Path) -> tuple[str, str, tuple[str, ...]]:
    """Bring an artifact's files into the folder: the names for FROM and ADAPTER, and caveats."""
    if kind == "gguf":
        _link(artifact / FILE, folder / FILE)
        return FILE, "", _NATIVE
    if kind in ("merged", "mxfp4"):
        told = check_model(artifact)
        _copy_model(artifact, folder / MODEL)
        return MODEL, "", told
    told = check_model(base)
    if kind == "gguf-adapter":
        architecture = _architecture(read_json(base / "config.json"))
        if architecture not in ADAPTED_GGUF:
            raise ExportError(
                f"Ollama runs {architecture} on its own engine from 0.6 to 0.24, where an adapter fails at load: make "
                f"the Modelfile of merged, mxfp4 or gguf"
            )
        _link(artifact / ADAPTER_FILE, folder / ADAPTER_FILE)
        adapter = ADAPTER_FILE
    else:
        check_adapter(artifact, base)
        adapter = "adapter"
        (folder / adapter).mkdir()
        # From 0.14 on `ollama create` sees only files that are named model*.safetensors.
        _link(artifact / ADAPTER, folder / adapter / "model.safetensors")
        _link(artifact / ADAPTER_CONFIG, folder / adapter / ADAPTER_CONFIG)
    _copy_model(base, folder / BASE)
    return BASE, adapter, (*told, "with OLLAMA_NEW_ENGINE set, versions before 0.30 cannot load an adapter")


_NATIVE = (
    "from 0.30 on Ollama uses the chat template inside of the GGUF file where that knows tools; with "
    "OLLAMA_GO_TEMPLATE=1 it is always the Modelfile's",
)


def _copy_model(model: Path, folder: Path) -> None:
    """A model's files as Ollama's converter takes them: weights linked, config and tokenizer in the older form.

    The chat template stays away, so that every version uses the one in the Modelfile.
    """
    folder.mkdir()
    for path in sorted(model.glob("model*.safetensors")):
        _link(path, folder / path.name)
    for name in ("tokenizer.json", "tokenizer.model", "generation_config.json", "model.safetensors.index.json"):
        if (model / name).is_file():
            _link(model / name, folder / name)
    tokenizer = without_paths(read_json(model / "tokenizer_config.json")) | {
        "add_bos_token": False,
        "add_eos_token": False,
    }
    tokenizer.pop("chat_template", None)
    for name, values in (
        ("config.json", converter_config(read_json(model / "config.json"))),
        ("tokenizer_config.json", tokenizer),
    ):
        (folder / name).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def converter_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with the keys that Ollama's converters read: transformers 5 writes the rotary settings elsewhere.

    Without them the base of the rotary embedding would be 0. transformers reads the result as before.
    """
    made = without_paths(config)
    rope = made.get("rope_parameters") or {}
    if "full_attention" in rope:  # Gemma 3: one set a kind of attention
        local = rope.get("sliding_attention") or {}
        made.setdefault("rope_local_base_freq", local.get("rope_theta"))
        rope = rope["full_attention"]
    if "rope_theta" in rope:
        made.setdefault("rope_theta", rope["rope_theta"])
    if rope.get("rope_type", "default") != "default" and not made.get("rope_scaling"):
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        made["rope_scaling"] = scaling | {"type": rope["rope_type"]}
    if _architecture(made) == "GptOssForCausalLM":
        made.setdefault("experts_per_token", made.get("num_experts_per_tok"))
    return made


def _check_tokenizer(folder: Path, architecture: str) -> tuple[str, ...]:
    """Whether Ollama can read the tokenizer; a caveat where it may split texts in another way."""
    if not (folder / "tokenizer.json").is_file():
        raise ExportError(f"{folder.name}/ has no tokenizer.json, which Ollama reads: save its fast tokenizer there")
    fitted = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if fitted["model"].get("byte_fallback"):
        if not (folder / "tokenizer.model").is_file():
            raise ExportError(
                f"{folder.name}/ has a SentencePiece tokenizer and no tokenizer.model, without which Ollama would take "
                f"its vocabulary for another kind's: copy tokenizer.model from the base's repository into the base's "
                f"folder, and export again"
            )
        return ()
    steps = fitted.get("pre_tokenizer") or {}
    patterns = [step["pattern"].get("Regex", "") for step in steps.get("pretokenizers", []) if step["type"] == "Split"]
    if architecture == "GptOssForCausalLM" or hashlib.sha256("".join(patterns).encode()).hexdigest() in SPLITS:
        return ()
    return ("Ollama does not know how this tokenizer splits texts and takes its default: tokens may differ",)


def begin_of_text(source: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The begin-of-text token, where Ollama puts it before a prompt by itself."""
    if source.is_dir() or tokenizer.bos_token is None:
        return ""  # our own tokenizer_config.json says no
    adds = read_keys(source).get("tokenizer.ggml.add_bos_token")
    if adds is None:
        raise ExportError(
            f"{source.name} does not say whether {tokenizer.bos_token} goes before a prompt, and Ollama's versions "
            f"differ: set add_bos_token in the model's tokenizer_config.json, and make the GGUF file anew"
        )
    return str(tokenizer.bos_token) if adds else ""


_DATED = ("the date and the reasoning effort in its prompts are those of training, whatever is asked",)


def _shows_date(*folders: Path) -> bool:
    """Whether a chat template there would print the day's date."""
    names = ("chat_template.jinja", "tokenizer_config.json")
    paths = [folder / name for folder in folders for name in names if (folder / name).is_file()]
    return any("strftime_now" in path.read_text(encoding="utf-8") for path in paths)


def _architecture(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or ["an unnamed architecture"])[0])


def _link(source: Path, target: Path) -> None:
    """A hard link (Ollama refuses links that lead out of a folder), or a copy where the disk is another."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


__all__ = ["ADAPTED", "CONVERTED", "MODELFILE", "OllamaTemplate", "commands", "converter_config", "write_ollama"]
