"""Modelfiles that work, and refusals where Ollama would fail at load or answer gibberish."""

from __future__ import annotations

import json
import shlex
import struct
from pathlib import Path
from typing import Any

import pytest
from tiny_models import MAKERS, load, logits, tiny_adapter

from lib.config import ModelSection
from lib.export import ExportError
from lib.export.gguf_header import read_keys
from lib.export.modelfile import Modelfile, read_modelfile
from lib.export.ollama import MODELFILE, commands, converter_config, write_ollama
from lib.models import load_tokenizer


def written(root: Path, kind: str, artifact: Path, base: Path, of: Any = "merged") -> Path:
    """The Ollama folder of an artifact."""
    (root / "ollama").mkdir()
    tokenizer = load_tokenizer(str(base), ModelSection())
    write_ollama(root / "ollama", of, artifact, base, tokenizer, [tokenizer.eos_token_id], "Some-Run")
    return root / "ollama"


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", ["qwen2", "llama", "gemma", "gpt_oss_mxfp4"])
def test_the_folder_holds_what_ollamas_converters_read_and_the_same_model(kind: str, tmp_path: Path) -> None:
    base = MAKERS[kind](tmp_path / "base")
    folder = written(tmp_path, kind, base, base, "mxfp4" if "gpt" in kind else "merged")
    model = folder / read_modelfile((folder / MODELFILE).read_text()).source
    config = json.loads((model / "config.json").read_text())
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] > 0
    assert not (model / "chat_template.jinja").exists()  # every version then uses the Modelfile's
    assert json.loads((model / "tokenizer_config.json").read_text())["add_bos_token"] is False
    assert (model / "model.safetensors").stat().st_ino == (base / "model.safetensors").stat().st_ino
    assert (logits(load(model)) - logits(load(base))).abs().max() == 0


def test_rotary_settings_are_written_where_ollama_reads_them() -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0}
    made = converter_config({"architectures": ["GptOssForCausalLM"], "rope_parameters": yarn, "num_experts_per_tok": 4})
    assert (made["rope_theta"], made["experts_per_token"]) == (150000.0, 4)
    assert made["rope_scaling"] == {"rope_type": "yarn", "type": "yarn", "factor": 32.0}
    kinds = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}}
    made = converter_config({"architectures": ["Gemma3ForCausalLM"], "rope_parameters": kinds})
    assert (made["rope_theta"], made["rope_local_base_freq"]) == (1e6, 1e4)
    old = {"architectures": ["LlamaForCausalLM"], "rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3"}}
    assert converter_config(old) == old


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("qwen3", "converts no safetensors of Qwen3ForCausalLM"), ("gpt_oss", "gpt-oss with its experts in MXFP4")],
)
def test_a_model_that_would_fail_at_load_is_refused(kind: str, reason: str, tmp_path: Path) -> None:
    base = MAKERS[kind](tmp_path / "base")
    with pytest.raises(ExportError, match=reason):
        written(tmp_path, kind, base, base)


@pytest.mark.parametrize(
    ("kind", "settings", "reason"),
    [
        ("qwen2", {}, "converts adapters on LlamaForCausalLM and Gemma2ForCausalLM only"),
        ("gpt_oss_mxfp4", {}, "converts adapters on LlamaForCausalLM and Gemma2ForCausalLM only"),
        ("llama", {}, "reorders the wrong factor"),
        ("llama", {"target_modules": ["v_proj"], "use_rslora": True}, "use_rslora"),
    ],
)
def test_an_adapter_that_would_fail_or_answer_gibberish_is_refused(
    kind: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    base = MAKERS[kind](tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter", **settings)
    with pytest.raises(ExportError, match=reason):
        written(tmp_path, kind, adapter, base, "adapter")


def test_an_adapter_that_ollama_takes_stands_beside_its_base(tmp_path: Path) -> None:
    base = MAKERS["llama"](tmp_path / "base")
    adapter = tiny_adapter(base, tmp_path / "adapter", target_modules=["v_proj", "o_proj", "down_proj"])
    folder = written(tmp_path, "llama", adapter, base, "adapter")
    modelfile = read_modelfile((folder / MODELFILE).read_text())
    assert (modelfile.source, modelfile.adapter) == ("./base", "./adapter")
    # `ollama create` looks for model*.safetensors, and for the config beside it.
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == ["adapter_config.json", "model.safetensors"]


def test_a_sentencepiece_tokenizer_without_its_model_is_refused(tmp_path: Path) -> None:
    base = MAKERS["gemma"](tmp_path / "base")
    path = base / "tokenizer.json"
    fitted = json.loads(path.read_text())
    fitted["model"]["byte_fallback"] = True
    path.write_text(json.dumps(fitted))
    with pytest.raises(ExportError, match=r"no tokenizer\.model"):
        written(tmp_path, "gemma", base, base)


def gguf(path: Path, **keys: Any) -> Path:
    """A GGUF file of keys alone, version 3."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def value(one: Any) -> bytes:
        if isinstance(one, bool):
            return struct.pack("<I?", 7, one)
        if isinstance(one, int):
            return struct.pack("<II", 4, one)
        if isinstance(one, list):
            return struct.pack("<IIQ", 9, 8, len(one)) + b"".join(map(text, one))
        return struct.pack("<I", 8) + text(one)

    body = b"".join(text(name.replace("__", ".")) + value(one) for name, one in keys.items())
    path.write_bytes(struct.pack("<4sIQQ", b"GGUF", 3, 0, len(keys)) + body)
    return path


def test_a_gguf_file_says_whether_ollama_writes_the_begin_of_text(tmp_path: Path) -> None:
    base = MAKERS["llama"](tmp_path / "base")
    artifact = tmp_path / "gguf"
    artifact.mkdir()
    gguf(artifact / "model.gguf", general__architecture="llama", tokenizer__ggml__add_bos_token=True)
    folder = written(tmp_path, "llama", artifact, base, "gguf")
    modelfile = read_modelfile((folder / MODELFILE).read_text())
    assert modelfile.source == "./model.gguf" and "<|begin_of_text|>" not in modelfile.template
    gguf(artifact / "model.gguf", general__architecture="llama")
    (tmp_path / "again").mkdir()
    with pytest.raises(ExportError, match=r"does not say whether <\|begin_of_text\|>"):
        written(tmp_path / "again", "llama", artifact, base, "gguf")


def test_keys_of_a_gguf_file_are_read_and_damage_is_said(tmp_path: Path) -> None:
    path = gguf(tmp_path / "x.gguf", a__b="text ä", count=7, yes=True, list=["one", "two"])
    assert read_keys(path) == {"a.b": "text ä", "count": 7, "yes": True, "list": ["one", "two"]}
    whole = path.read_bytes()
    for cut in (3, 10, 30, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ExportError, match="GGUF"):
            read_keys(path)


@pytest.mark.parametrize("text", ["a\nb", '"x"', "tab\there", " spaces ", 'ends with "', "# no comment", "{{ x }}\n"])
def test_a_modelfile_is_read_as_it_was_written(text: str) -> None:
    modelfile = Modelfile("./a folder/model", "./x.gguf", text, ("<|im_end|>", "a b"), ("a comment",))
    assert read_modelfile(modelfile.text()) == modelfile._replace(comments=())


@pytest.mark.parametrize("text", ["a\u00a0b", "\x07", 'x"""\nFROM y'])
def test_a_text_that_ollama_would_read_as_another_is_refused(text: str) -> None:
    with pytest.raises(ExportError):
        Modelfile("./model", template=text).text()


@pytest.mark.parametrize(
    "text", ["FROM a\nFROM b", "TEMPLATE x", "FROM a\nSYSTEM be nice", 'FROM a\nTEMPLATE """x', "x"]
)
def test_other_modelfiles_are_not_understood(text: str) -> None:
    with pytest.raises(ExportError):
        read_modelfile(text)


def test_what_to_type_names_the_file_and_the_model(tmp_path: Path) -> None:
    create, run = commands(tmp_path, {"name": "some-run"})
    assert create == f"ollama create some-run -f {tmp_path / 'Modelfile'}" and run == "ollama run some-run"
    create, _ = commands(tmp_path / "a folder; rm", {"name": "some-run"})
    assert shlex.split(create) == ["ollama", "create", "some-run", "-f", str(tmp_path / "a folder; rm" / "Modelfile")]
