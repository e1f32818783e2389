"""A run's artifacts: folders that are whole or not there, what they hold, and what is refused before they are begun."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from finished_run import finished_run, finished_whole
from tiny_models import load, logits, tiny_gpt_oss, tiny_llama, tiny_qwen2

from lib import PROJECT_ROOT, models
from lib.config import Config, ConfigError, parse_config
from lib.export import ExportError, check_artifact, export_run
from lib.export import folder as folders
from lib.export.base import Adapter, check_same_base, open_adapter, open_checkpoint
from lib.export.card import without_places
from lib.export.weights import Expected
from lib.runfolder import Run, RunError, hash_file, read_run


def with_export(run: Run, **settings: Any) -> Config:
    return parse_config(run.config.as_json() | {"export": settings})


def refusal(run: Run, config: Config | None = None) -> str:
    with pytest.raises((ExportError, RunError)) as caught:
        export_run(run, config)
    return str(caught.value)


def assert_no_trace(run: Run) -> None:
    """Neither an artifact nor a half of one."""
    assert list((run.folder / "export").glob("*")) == []


# -- what is made -----------------------------------------------------------------------------------------------------


def test_a_run_gets_its_adapter_and_its_merged_model_as_folders_that_load(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    base = tiny_qwen2(tmp_path / "base")
    run = finished_run(tmp_path, base)
    adapter, merged = export_run(run)
    assert (adapter.kind, merged.kind) == ("adapter", "merged")
    assert (adapter.folder, merged.folder) == (run.folder / "export" / "adapter", run.folder / "export" / "merged")
    policy = PeftModel.from_pretrained(load(base), str(run.folder / "adapter"))
    exported = PeftModel.from_pretrained(load(base), str(adapter.folder))
    assert (logits(exported) == logits(policy)).all()
    assert (logits(load(merged.folder)) == logits(policy.merge_and_unload())).all()  # type: ignore[operator]
    ours = AutoTokenizer.from_pretrained(merged.folder)
    theirs = AutoTokenizer.from_pretrained(base)
    assert (ours.get_vocab(), ours.chat_template) == (theirs.get_vocab(), theirs.chat_template)
    assert (merged.folder / "generation_config.json").is_file()
    for one in (adapter, merged):
        assert check_artifact(one.folder) == one
        assert not list(one.folder.glob("*.bin"))


def test_the_manifest_says_what_an_artifact_was_made_from_and_names_no_folder_of_the_machine(tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_qwen2(tmp_path / "base"))
    adapter, merged = export_run(run)
    origin = merged.facts["origin"]
    assert (origin["run"], origin["base"], origin["revision"], origin["step"]) == ("trained", "base", None, 3)
    assert origin["settings"] == {"dtype": "bfloat16", "shard_gb": 5.0}
    assert origin["trained_hash"] == adapter.facts["origin"]["trained_hash"]
    assert merged.facts["facts"] == {"adapted": 14, "changed": 14}
    assert merged.facts["files"]["model.safetensors"]["bytes"] == (merged.folder / "model.safetensors").stat().st_size
    assert set(merged.facts["tensors"]) == set(load_names(merged.folder / "model.safetensors"))
    assert {"torch", "peft", "transformers"} <= merged.facts["versions"].keys()
    for one in (adapter, merged):
        for path in one.folder.iterdir():
            assert str(tmp_path).encode() not in path.read_bytes(), path.name
            assert b"/tmp/" not in path.read_bytes() or path.suffix == ".safetensors", path.name


def load_names(path: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return list(file.keys())


def test_a_whole_trained_model_has_no_adapter_to_export(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    run = finished_whole(tmp_path, base)
    assert "lora.enabled: false" in refusal(run)
    (merged,) = export_run(run, with_export(run, artifacts=["merged"]))
    assert (logits(load(merged.folder)) == logits(load(base))).all()
    assert (merged.facts["origin"]["trained"], merged.facts["origin"]["base"]) == ("model", "base")


def test_gpt_oss_gets_all_its_weights_in_both_forms(tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_gpt_oss(tmp_path / "base", mxfp4=True), experts=True)
    merged, packed = export_run(run, with_export(run, artifacts=["mxfp4", "merged"]))
    assert (merged.kind, packed.kind) == ("merged", "mxfp4")
    assert packed.facts["bytes"] < merged.facts["bytes"]
    assert packed.facts["facts"]["packed"] == 4
    assert (logits(load(packed.folder)) - logits(load(merged.folder))).abs().max() < 3
    ends = json.loads((packed.folder / "generation_config.json").read_text())["eos_token_id"]
    assert len(ends) == 2  # <|return|> and <|call|>


# -- whole or not there -----------------------------------------------------------------------------------------------


def test_an_export_that_is_there_is_not_made_again(tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    first = export_run(run)
    stamps = [path.stat().st_mtime_ns for one in first for path in one.folder.iterdir()]
    assert export_run(read_run(run.folder)) == first
    assert stamps == [path.stat().st_mtime_ns for one in first for path in one.folder.iterdir()]


def test_an_export_of_something_else_is_neither_taken_nor_overwritten(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    run, other = finished_run(tmp_path, base), finished_run(tmp_path, base, "other", r=2)
    for one in (run, other):
        export_run(one)
    assert "settings was {'dtype': 'bfloat16'" in refusal(run, with_export(run, dtype="base"))
    before = hash_file(other.folder / "export" / "merged")
    shutil.rmtree(run.folder / "export" / "merged")
    shutil.copytree(other.folder / "export" / "merged", run.folder / "export" / "merged")
    told = refusal(run)
    assert "trained/export/merged is an export of something else (run was 'other', now 'trained'; trained_hash" in told
    assert "move or delete that folder" in told
    assert hash_file(run.folder / "export" / "merged") == before


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: (folder / "export.json").unlink(), "has no export.json: it is no finished export"),
        (lambda folder: (folder / "export.json").write_text("{}"), "export.json is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing, and"),
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json is 2 bytes, and"),
        (lambda folder: (folder / "pytorch_model.bin").write_text(""), "were not exported and could be loaded"),
    ],
)
def test_half_an_export_is_never_taken_for_a_whole_one(damage: Any, told: str, tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"), export={"artifacts": ["merged"]})
    (merged,) = export_run(run)
    damage(merged.folder)
    assert told in refusal(run)
    with pytest.raises(ExportError, match=told):
        check_artifact(merged.folder)


def test_a_byte_that_changed_is_found(tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"), export={"artifacts": ["merged"]})
    (merged,) = export_run(run)
    path = merged.folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ExportError, match=r"model\.safetensors is not what was exported"):
        check_artifact(merged.folder)


KILLED = """
import os, signal, sys
from lib.export import artifacts
from lib.runfolder import read_run

artifacts.publish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
artifacts.export_run(read_run(sys.argv[1]))
"""


def test_an_export_that_is_killed_leaves_nothing_that_looks_like_one_and_the_next_is_whole(tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"), export={"artifacts": ["merged"]})
    command = [sys.executable, "-c", KILLED, str(run.folder)]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = run.folder / "export" / ".merged.partial"
    assert (left / "model.safetensors").is_file()
    assert not (left / "export.json").exists()
    assert not (run.folder / "export" / "merged").exists()
    (merged,) = export_run(run)
    assert check_artifact(merged.folder) == merged
    assert not left.exists()


# -- bad input --------------------------------------------------------------------------------------------------------


def test_a_run_without_a_result_is_told_to_train_first(tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    shutil.rmtree(run.folder / "adapter")
    assert "run notebook 3_grpo_training with run_name=trained first" in refusal(run)


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    path = run.folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "/somewhere/else/llama"}))
    assert "the adapter was trained on llama, and this run's base is base: set model.name" in refusal(run)
    assert_no_trace(run)


@pytest.mark.parametrize(
    ("recorded", "source", "fits"),
    [("one/model", "one/model", True), ("one/model", "two/model", False), ("/there/model", "/elsewhere/model", True)],
)
def test_folders_are_known_by_their_name_and_hub_models_by_their_owner_too(
    recorded: str, source: str, fits: bool, tmp_path: Path
) -> None:
    adapter = Adapter(tmp_path, {"base_model_name_or_path": recorded}, {})
    with nullcontext() if fits else pytest.raises(ExportError, match="was trained on one/model"):
        check_same_base(adapter, source)


def test_one_rule_says_to_export_and_to_whoever_loads_whether_a_base_is_the_adapters(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    run = finished_run(tmp_path, base)
    adapter = run.folder / "adapter"

    def fits(source: Path) -> list[bool]:
        found = []
        for use in (lambda: check_same_base(open_adapter(adapter), str(source)), lambda: models.load_adapter(
            load(source), str(adapter))):  # fmt: skip
            try:
                use()
                found.append(True)
            except (ExportError, models.ModelError) as error:
                assert "was trained on" in str(error)
                found.append(False)
        return found

    moved = shutil.copytree(base, tmp_path / "elsewhere" / "renamed")
    other = tiny_llama(tmp_path / "other" / "base", seed=1)
    assert fits(base) == fits(moved) == [True, True]  # its weights are those that the run recorded
    assert fits(other) == [False, False]  # its name is, and its weights are not
    (run.folder / "stages" / "training.json").unlink()
    assert fits(moved) == [False, False]  # nothing is known but names now
    assert fits(shutil.copytree(base, tmp_path / "elsewhere" / "base")) == [True, True]


def test_a_base_that_changed_since_the_training_is_refused(tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base")
    tiny_llama(tmp_path / "base", seed=1)
    assert "is not what the adapter was trained on: its files changed since" in refusal(run)


def test_another_tokenizer_beside_the_adapter_is_refused(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    whole = AutoTokenizer.from_pretrained(run.folder / "adapter")
    template, end = whole.chat_template, whole.eos_token
    whole.chat_template = template.replace("user", "User") + " "
    whole.save_pretrained(run.folder / "adapter")
    assert "the chat_template beside the adapter is not the base's" in refusal(run)
    whole.chat_template, whole.eos_token = template, "<|pad|>"
    whole.save_pretrained(run.folder / "adapter")
    assert "the eos_token beside the adapter" in refusal(run)
    whole.eos_token = end
    whole.add_tokens(["<action>"])
    whole.save_pretrained(run.folder / "adapter")
    assert "1 tokens differ (base and adapter: '<action>' None and" in refusal(run)
    assert_no_trace(run)


def test_a_full_disk_and_too_little_memory_are_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"), export={"artifacts": ["merged"]})
    usage = shutil.disk_usage(tmp_path)._replace(free=2**26)
    with monkeypatch.context() as patched:
        patched.setattr(folders.shutil, "disk_usage", lambda _: usage)
        told = refusal(run)
    assert "the artifact merged needs 0.06" in told
    assert "set paths.outputs to another disk, or leave merged out of export.artifacts" in told
    with monkeypatch.context() as patched:
        patched.setattr(folders, "main_memory", lambda: 2**20)
        assert "0.00 GB are free: close what else runs" in refusal(run)
    assert_no_trace(run)


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    (run.folder / "export").write_text("a file in the way")
    assert "a file is in the way" in refusal(run)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"artifacts": []}, "at least 1 item"),
        ({"artifacts": ["merged", "merged"]}, "name each artifact once"),
        ({"artifacts": ["onnx"]}, "'adapter', 'merged', 'mxfp4', 'gguf', 'gguf-adapter'"),
        ({"artifacts": ["gguf"]}, "gguf is converted from merged, or from mxfp4: add one of them"),
        ({"hub": {"push": True, "artifact": "mxfp4"}}, "export.hub.artifact mxfp4 is not made"),
        ({"shard_gb": 0}, "greater than 0"),
        ({"hub": {"private": "perhaps"}}, "export.hub.private"),
    ],
)
def test_a_config_that_cannot_be_is_refused_with_the_key(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_config({"task": {"name": "decisions"}, "export": settings})


def test_folders_of_the_machine_are_cut_out_of_a_config() -> None:
    values = {"path": "/data/prices.csv", "list": ["~/x", "configs/a.yaml"], "deep": {"n": 3, "model": "owner/a-2.5"}}
    known = {"path": "prices.csv", "list": ["x", "configs/a.yaml"], "deep": {"n": 3, "model": "owner/a-2.5"}}
    assert without_places(values) == known


@pytest.mark.parametrize(
    "address",
    ["http://a/b", "postgres://db/x", "localhost:8000", "127.0.0.1", "10.0.0.7:80/v1", "judge.example:84/v1"],
)
def test_addresses_of_servers_are_left_out_of_a_config(address: str) -> None:
    values = {"judge": {"base_url": address, "model": "m"}, "several": [address, "judged by http://a, as it says"]}
    assert without_places(values) == {"judge": {"model": "m"}, "several": ["judged by http://a, as it says"]}


def test_paths_are_left_out_of_a_config_within_a_config(tmp_path: Path) -> None:
    base = tiny_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    nested = {"depth": 2, "_name_or_path": "/home/somebody/text", "parts": [{"_name_or_path": "/home/somebody/part"}]}
    (base / "config.json").write_text(json.dumps(config | {"some_config": nested}))
    run = finished_run(tmp_path, base)
    *_, merged, ollama = export_run(run, with_export(run, artifacts=["merged", "ollama"]))
    written = json.loads((merged.folder / "config.json").read_text())
    assert written["some_config"] == {"depth": 2, "parts": [{}]}
    for folder in (merged.folder, ollama.folder):
        assert not [path for path in folder.rglob("*.json") if "somebody" in path.read_text()]
    opened = [open_checkpoint(str(folder), run.config.model) for folder in (base, merged.folder)]
    assert Expected(opened[0], open_adapter(run.folder / "adapter")).compare(opened[1]).reasons() == []


def test_what_was_made_of_an_artifact_is_not_taken_once_that_is_another(tmp_path: Path) -> None:
    run = finished_run(tmp_path, tiny_llama(tmp_path / "base"))
    both = ["merged", "ollama"]
    merged, ollama = export_run(run, with_export(run, artifacts=both))
    shutil.rmtree(merged.folder)
    assert export_run(run, with_export(run, artifacts=both)) == [merged, ollama]  # the same again
    shutil.rmtree(merged.folder)
    told = refusal(run, with_export(run, artifacts=both, dtype="base", shard_gb=0.0001))
    assert "export/ollama is an export of something else (source was '" in told
    shutil.rmtree(ollama.folder)
    assert len(export_run(run, with_export(run, artifacts=both, dtype="base", shard_gb=0.0001))) == 2
