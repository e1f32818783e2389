"""Pushing to the Hub, and GGUF through llama.cpp's converters: what is sent, what is called, what is refused."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from finished_run import finished_run
from push_hub import READER, WRITER, PushHub, running_push_hub
from tiny_models import tiny_gpt_oss, tiny_llama

from lib.config import Config, parse_config
from lib.export import Artifact, ExportError, export_run, gguf, push_exported, push_run
from lib.export.card import model_card
from lib.runfolder import Run

RESULT = {"policies": [{"policy": "adapter sampled", "n": 64, "reward": 0.71234, "low": 0.65, "high": 0.77}]}
CARD = "---\nlicense: apache-2.0\nlicense_link: https://example.org/licence\ntags: [x]\n---\nA base.\n"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[PushHub]:
    from huggingface_hub import constants

    # The Hub's other way to upload is a binary protocol of its own.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.delenv("HF_REPO_ID", raising=False)
    with running_push_hub() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def pushing(run: Run, **settings: object) -> Config:
    return parse_config(run.config.as_json() | {"export": {"hub": {"push": True, "repo": "owner/model", **settings}}})


def proven(artifact: Artifact, passed: bool | None = True) -> Artifact:
    """The artifact, with a proof as lib/export/proof.py leaves it."""
    checks = {"weights": {"passed": passed}, "reward": {"passed": None}}
    proof = {"artifact": artifact.kind, "proven": False, "why": "weights: those of the base", "checks": checks}
    (artifact.folder / "proof.json").write_text(json.dumps(proof))
    return artifact


def export_and_push(run: Run, config: Config) -> list[Artifact]:
    artifacts = [proven(one) for one in export_run(run, config)]
    assert push_exported(run, artifacts, config)
    return artifacts


def refusal(run: Run, config: Config) -> str:
    with pytest.raises(ExportError) as caught:
        export_and_push(run, config)
    return str(caught.value)


def test_a_push_makes_a_private_repository_with_every_file_and_a_card_in_one_commit(
    hub: PushHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_llama(tmp_path / "base")
    (base / "README.md").write_text(CARD)
    run = finished_run(tmp_path, base)
    run.finish({"evaluation": RESULT})
    monkeypatch.setenv("HF_REPO_ID", "owner/by-environment")
    _, merged = export_and_push(run, pushing(run, repo=""))
    files = hub.repos["owner/by-environment"]
    assert hub.private["owner/by-environment"]
    assert hub.commits == ["trained: merged"]
    for path in {*merged.folder.iterdir()} - {merged.folder / "proof.json"}:
        assert files[path.name] == path.read_bytes()
    card = files["README.md"].decode()
    header = yaml.safe_load(card.split("---")[1])
    assert (header["license"], header["license_link"]) == ("apache-2.0", "https://example.org/licence")
    assert header["library_name"] == "transformers"
    assert "| adapter sampled | 64 | 0.7123 | 0.6500 to 0.7700 |" in card
    assert "name: decisions" in card
    for content in files.values():
        assert WRITER.encode() not in content
    assert str(tmp_path) not in card
    assert "paths:" not in card


def test_a_second_push_leaves_nothing_of_the_first_behind(hub: PushHub, tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    adapter, _ = export_and_push(run, pushing(run))
    assert "model.safetensors" in hub.repos["owner/model"]
    done = push_run(run, adapter, pushing(run))
    assert done.repo == "owner/model"
    files = hub.repos["owner/model"]
    assert "model.safetensors" not in files
    assert {"adapter_model.safetensors", "README.md", "export.json", ".gitattributes"} <= files.keys()
    assert "library_name: peft" in files["README.md"].decode()
    assert "find out before you use it" in files["README.md"].decode()  # no card of the base


@pytest.mark.parametrize(
    ("token", "repo", "told"),
    [
        ("", "owner/model", "HF_TOKEN: make one with write permission on https://huggingface.co/settings/tokens"),
        (WRITER, "", r"HF_REPO_ID \(given: ''\)"),
        (WRITER, "model", "a repository, owner/name"),
        (
            READER,
            "owner/model",
            r"may not write to owner/model \(403\): .* or set HF_REPO_ID to a repository of your own",
        ),
        ("hf_unknown_token", "owner/model", r"does not know this HF_TOKEN \(401\)"),
    ],
)
def test_without_permission_a_push_says_what_to_do_and_keeps_the_artifact(
    token: str, repo: str, told: str, hub: PushHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    monkeypatch.setenv("HF_TOKEN", token)
    said = refusal(run, pushing(run, repo=repo))
    assert re.search(told, said), said
    assert not token or token not in said
    assert hub.commits == []
    # What can be known before is said before anything is computed.
    assert (run.folder / "export" / "merged").exists() == (repo == "owner/model" and token != "")


def test_a_public_repository_or_somebody_elses_is_not_written_to(hub: PushHub, tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    hub.repos["owner/model"], hub.private["owner/model"] = {".gitattributes": b"", "README.md": b""}, False
    assert "is there and public, and export.hub.private is true" in refusal(run, pushing(run))
    export_and_push(run, pushing(run, private=False))
    assert "model.safetensors" in hub.repos["owner/model"]
    hub.repos["owner/model"] = {"model.safetensors": b"theirs"}
    assert "holds files that no export of this workbench put there" in refusal(run, pushing(run, private=False))
    assert hub.repos["owner/model"] == {"model.safetensors": b"theirs"}


def test_only_what_no_proof_speaks_against_is_pushed(hub: PushHub, tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    _, merged = export_run(run)
    with pytest.raises(ExportError, match="merged is not proven yet"):
        push_run(run, merged, pushing(run))
    with pytest.raises(
        ExportError, match="NOT the policy that was trained, so it is not pushed: weights: those of the"
    ):
        push_run(run, proven(merged, False), pushing(run))
    assert hub.commits == [] and push_exported(run, [merged]) is None
    push_run(run, proven(merged, None), pushing(run))
    assert hub.commits == ["trained: merged"]


def test_a_hub_that_cannot_be_reached_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    _, merged = export_run(run)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ExportError, match=r"did not take the push to owner/model: .*run the same command again"):
        push_run(run, proven(merged), pushing(run))


def test_a_policy_without_a_scored_answer_is_unknown_on_the_card(tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    _, merged = export_run(run)
    nothing = {"policy": "adapter greedy", "n": 0, "reward": None, "low": None, "high": None}
    run.finish({"evaluation": {"policies": [nothing]}})
    assert "| adapter greedy | 0 | unknown | |" in model_card(merged, run, {})


def test_the_card_shows_no_address_and_no_folder_of_the_config(tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    endpoint = {"base_url": "https://models.internal.example:8443/v1", "model": "owner/served", "key": "SOME_KEY"}
    config = parse_config(run.config.as_json() | {"evaluation": {"endpoint": endpoint}})
    _, merged = export_run(run)
    card = model_card(merged, Run(run.folder, config), {})
    assert "owner/served" in card and "name: base" in card
    assert "internal.example" not in card and "base_url" not in card and str(tmp_path) not in card


def test_a_damaged_artifact_is_not_pushed(hub: PushHub, tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    _, merged = export_run(run)
    data = bytearray((merged.folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (merged.folder / "model.safetensors").write_bytes(data)
    assert "is not what was exported" in refusal(run, pushing(run))
    assert hub.repos == {}


# -- GGUF -------------------------------------------------------------------------------------------------------------

STAND_IN = """
import json, os, pathlib, struct, sys
arguments = sys.argv[1:]
target = pathlib.Path(arguments[arguments.index("--outfile") + 1])
here = pathlib.Path(__file__).parent
(here / "called.json").write_text(json.dumps([pathlib.Path(__file__).name, *arguments]))
(here / "environment.json").write_text(json.dumps(dict(os.environ)))
(here / "source.json").write_text((pathlib.Path(arguments[-1]) / SOURCE).read_text())
target.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, TENSORS, 2))
"""


def stand_in(folder: Path, tensors: int = 5) -> Path:
    """A folder with converters that note how they are called and write a header."""
    folder.mkdir()
    for name in (gguf.MODEL, gguf.LORA):
        source = "adapter_config.json" if name == gguf.LORA else "config.json"
        (folder / name).write_text(STAND_IN.replace("TENSORS", str(tensors)).replace("SOURCE", repr(source)))
    return folder


def called(folder: Path) -> list[str]:
    return list(yaml.safe_load((folder / "called.json").read_text()))


def test_the_converter_gets_the_merged_folder_and_the_type(tmp_path: Path) -> None:
    run, folder = finished_run(tmp_path, tiny_llama(tmp_path / "base")), stand_in(tmp_path / "llama.cpp")
    settings = {"artifacts": ["gguf", "merged"], "llama_cpp": str(folder), "gguf_type": "q8_0"}
    merged, made = export_run(run, parse_config(run.config.as_json() | {"export": settings}))
    assert made.kind == "gguf"
    script, *arguments = called(folder)
    assert script == "convert_hf_to_gguf.py"
    assert arguments[2:] == ["--outtype", "q8_0", str(merged.folder)]
    assert (made.folder / "model.gguf").is_file()
    assert made.facts["facts"] == {"gguf_version": 3, "gguf_tensors": 5, "gguf_keys": 2}
    assert made.facts["origin"]["settings"] == {"gguf_type": "q8_0", "from": "merged"}
    assert made.facts["origin"]["source"] == hashlib.sha256((merged.folder / "export.json").read_bytes()).hexdigest()


def test_the_adapters_converter_gets_base_and_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = finished_run(tmp_path, tiny_llama(tmp_path / "base")), stand_in(tmp_path / "llama.cpp")
    monkeypatch.setenv("LLAMA_CPP", str(folder))
    (made,) = export_run(run, parse_config(run.config.as_json() | {"export": {"artifacts": ["gguf-adapter"]}}))
    script, *arguments = called(folder)
    assert script == "convert_lora_to_gguf.py"
    # What llama.cpp writes of `auto` is no adapter, and what training leaves names folders of the machine.
    assert arguments[2:-1] == ["--outtype", "f32", "--base", str(tmp_path / "base")]
    assert json.loads((folder / "source.json").read_text())["base_model_name_or_path"] == "base"
    assert [path.name for path in made.folder.iterdir()] == ["adapter.gguf", "export.json"]


def test_a_converter_sees_no_secret_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = finished_run(tmp_path, tiny_llama(tmp_path / "base")), stand_in(tmp_path / "llama.cpp")
    hidden = {"HF_TOKEN": "hf_abcdefgh", "OPENAI_API_KEY": "sk-abcdefgh", "MY_THING": "abcdefgh-named"}
    hidden |= {"PIP_INDEX_URL": "https://user:pass@index.example/simple", "WORKBENCH_SECRETS": "MY_THING"}
    for name, value in {**hidden, "SOME_SETTING": "stays"}.items():
        monkeypatch.setenv(name, value)
    settings = {"artifacts": ["gguf", "merged"], "llama_cpp": str(folder)}
    export_run(run, parse_config(run.config.as_json() | {"export": settings}))
    seen = json.loads((folder / "environment.json").read_text())
    assert seen["SOME_SETTING"] == "stays" and seen["HF_HUB_OFFLINE"] == "1" and "PATH" in seen
    assert not (hidden.keys() - {"WORKBENCH_SECRETS"}) & seen.keys()
    assert not [value for value in hidden.values() if value != "MY_THING" and value in seen.values()]


def test_an_adapter_that_llama_cpp_would_scale_wrongly_or_cannot_hold_is_refused(tmp_path: Path) -> None:
    folder = stand_in(tmp_path / "llama.cpp")
    settings = {"artifacts": ["gguf-adapter"], "llama_cpp": str(folder)}
    scaled = finished_run(tmp_path / "1", tiny_llama(tmp_path / "base"), export=settings, use_rslora=True)
    assert "sets use_rslora, and a GGUF adapter knows one alpha" in refusal(scaled, scaled.config)
    experts = finished_run(tmp_path / "2", tiny_gpt_oss(tmp_path / "moe"), export=settings, experts=True)
    assert "llama.cpp has no LoRA: export gguf" in refusal(experts, experts.config)


def test_missing_or_failing_converters_are_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"), export={"artifacts": ["gguf", "merged"]})
    assert "git clone https://github.com/ggml-org/llama.cpp" in refusal(run, run.config)
    assert not (run.folder / "export").exists()  # before anything is computed
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    assert "holds no convert_hf_to_gguf.py" in refusal(run, run.config)
    broken = stand_in(tmp_path / "broken")
    (broken / gguf.MODEL).write_text("import sys; sys.exit('pre-tokenizer was not recognized')")
    monkeypatch.setenv("LLAMA_CPP", str(broken))
    told = refusal(run, run.config)
    assert "ended with exit code 1: pre-tokenizer was not recognized" in told and "leave gguf and gguf-adapter" in told
    monkeypatch.setenv("LLAMA_CPP", str(stand_in(tmp_path / "empty", tensors=0)))
    assert "model.gguf holds no tensor" in refusal(run, run.config)
    assert not (run.folder / "export" / "gguf").exists()


def test_a_file_that_is_no_gguf_is_told(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGML" + struct.pack("<IQQ", 3, 1, 1))
    with pytest.raises(ExportError, match="is no GGUF file"):
        gguf.check_gguf(path)
