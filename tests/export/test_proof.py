"""The proof of an artifact: every seeded fault is caught, and no clean artifact is accused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import load
from trained_run import task_of, trained_run

from lib.config import ModelSection
from lib.export import Artifact, export_run, proof
from lib.export.agreement import Heard, agreement, limits_of, listen
from lib.export.base import open_adapter, open_checkpoint
from lib.export.merge import Merge
from lib.export.proof import Proof, prove_run
from lib.runfolder import Run
from lib.show import proofs as show_proofs

KINDS = ["qwen2", "qwen3", "llama", "gemma", "gpt_oss_mxfp4"]


@dataclass
class Exported:
    """A run with its artifacts, and a folder for damaged copies of them."""

    run: Run
    made: dict[str, Artifact]
    root: Path

    @property
    def base(self) -> Path:
        return Path(self.run.config.model.name)

    def copy(self, kind: str, name: str) -> Path:
        folder = self.root / name
        shutil.copytree(self.made[kind].folder, folder)
        return folder


@pytest.fixture(scope="module", params=KINDS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    kind = request.param
    root = tmp_path_factory.mktemp(kind)
    artifacts = ["adapter", "merged", *(["mxfp4"] if "gpt" in kind else []), *(["ollama"] if kind != "qwen3" else [])]
    run = trained_run(root, kind, export={"artifacts": artifacts})
    patch = pytest.MonkeyPatch()
    patch.setattr(proof, "TOKENS", 16)
    yield Exported(run, {one.kind: one for one in export_run(run)}, root / "damaged")
    patch.undo()


# faults ---------------------------------------------------------------------------------------------------------------
def tensors(folder: Path, change: Callable[[dict[str, Any]], None], file: str = "model.safetensors") -> None:
    kept = load_file(folder / file)
    change(kept)
    save_file(kept, folder / file, metadata={"format": "pt"})


def config(folder: Path, file: str, **values: Any) -> None:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | values))


def merged_anew(one: Exported, kind: str, folder: Path, adapter: Path | None) -> None:
    """The weights of another adapter, or of none, in the place of an artifact's."""
    opened = open_adapter(adapter) if adapter else None
    merge = Merge(open_checkpoint(str(one.base), ModelSection()), opened, "mxfp4" if kind == "mxfp4" else "dense")
    merge.write(folder, 10**9)


def merge_skipped(one: Exported, kind: str, folder: Path) -> None:
    merged_anew(one, kind, folder, None)


def wrong_alpha(one: Exported, kind: str, folder: Path, times: float = 2.0) -> None:
    adapter = folder.with_name(f"{folder.name}-alpha")
    shutil.copytree(one.run.folder / "adapter", adapter)
    config(adapter, "adapter_config.json", lora_alpha=8 * times)
    merged_anew(one, kind, folder, adapter)


def layers_swapped(one: Exported, kind: str, folder: Path) -> None:
    """All of one layer's tensors under the names of the other's: two shards mixed up."""

    def swap(kept: dict[str, Any]) -> None:
        for name in [name for name in kept if ".layers.0." in name]:
            other = name.replace(".layers.0.", ".layers.1.")
            kept[name], kept[other] = kept[other], kept[name]

    tensors(folder, swap)


def one_tensor_swapped(one: Exported, kind: str, folder: Path) -> None:
    part = "mlp.experts.down_proj_blocks" if kind == "mxfp4" else "self_attn.k_proj.weight"

    def swap(kept: dict[str, Any]) -> None:
        names = [f"model.layers.{layer}.{part}" for layer in (0, 1)]
        kept[names[0]], kept[names[1]] = kept[names[1]], kept[names[0]]

    tensors(folder, swap)


def one_number_changed(one: Exported, kind: str, folder: Path) -> None:
    """In a tensor that no adapter acts on: by the last digit of 1.0."""

    def nudge(kept: dict[str, Any]) -> None:
        kept["model.norm.weight"][3] += 2**-7

    tensors(folder, nudge)


def wrong_stop(one: Exported, kind: str, folder: Path) -> None:
    config(folder, "generation_config.json", eos_token_id=5)


def wrong_end_of_turn(one: Exported, kind: str, folder: Path) -> None:
    config(folder, "tokenizer_config.json", eos_token="<|endoftext|>")


def changed_template(one: Exported, kind: str, folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{{ ' ' }}")


def other_tokens(one: Exported, kind: str, folder: Path) -> None:
    """Two words of the vocabulary have each other's number."""
    fitted = json.loads((folder / "tokenizer.json").read_text())
    words = fitted["model"]["vocab"]
    words["2"], words["3"] = words["3"], words["2"]
    (folder / "tokenizer.json").write_text(json.dumps(fitted))


def experts_renamed(one: Exported, kind: str, folder: Path) -> None:
    """As transformers 5.17 writes a dequantized gpt-oss by default: one tensor for the experts of all layers."""

    def rename(kept: dict[str, Any]) -> None:
        for stem in ("gate_up_proj", "down_proj"):
            names = [name for name in kept if name.endswith(f"experts.{stem}")]
            kept[f"{stem}$"] = kept.pop(names[0])
            for name in names[1:]:
                kept.pop(name)

    tensors(folder, rename)


def experts_made_anew(one: Exported, kind: str, folder: Path) -> None:
    """Random numbers of the same size, as a reload makes of experts that it does not find."""

    def randomize(kept: dict[str, Any]) -> None:
        import torch

        for name in [name for name in kept if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            kept[name] = torch.randn_like(kept[name]) * kept[name].std()

    tensors(folder, randomize)


def only_annotated(one: Exported, kind: str, folder: Path) -> None:
    config(folder, "config.json", quantization_config={"quant_method": "mxfp4"})


def a_block_swapped(one: Exported, kind: str, folder: Path) -> None:
    """Two blocks of 32 weights out of thousands."""

    def swap(kept: dict[str, Any]) -> None:
        blocks = kept["model.layers.1.mlp.experts.gate_up_proj_blocks"]
        blocks[0, 0, 0], blocks[0, 1, 0] = blocks[0, 1, 0].clone(), blocks[0, 0, 0].clone()

    tensors(folder, swap)


def scales_of_another_layer(one: Exported, kind: str, folder: Path) -> None:
    def swap(kept: dict[str, Any]) -> None:
        kept["model.layers.0.mlp.experts.down_proj_scales"] = kept[
            "model.layers.1.mlp.experts.down_proj_scales"
        ].clone()

    tensors(folder, swap)


def adapter_of_another_alpha(one: Exported, kind: str, folder: Path) -> None:
    config(folder, "adapter_config.json", lora_alpha=16)


def adapter_without_a_layer(one: Exported, kind: str, folder: Path) -> None:
    def zero(kept: dict[str, Any]) -> None:
        kept[sorted(name for name in kept if "lora_B" in name)[0]].zero_()

    tensors(folder, zero, "adapter_model.safetensors")


def modelfile_of_another_template(one: Exported, kind: str, folder: Path) -> None:
    text = (folder / "Modelfile").read_text()
    (folder / "Modelfile").write_text(text.replace("{{ .Content }}", "{{ .Content }} "))


def modelfile_without_a_stop(one: Exported, kind: str, folder: Path) -> None:
    lines = (folder / "Modelfile").read_text().splitlines()
    (folder / "Modelfile").write_text("\n".join(line for line in lines if not line.startswith("PARAMETER")))


def modelfile_of_the_base(one: Exported, kind: str, folder: Path) -> None:
    model = folder / "model" / "model.safetensors"
    model.unlink()  # it is a link to the artifact's
    merged_anew(one, one.made["ollama"].facts["facts"]["made_of"], folder / "model", None)


def template_changed_for_tools(one: Exported, kind: str, folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{%- if tools %}{{ tools | length }}{%- endif %}")


def other_sampling(one: Exported, kind: str, folder: Path) -> None:
    """What vLLM would take where a request does not say."""
    config(folder, "generation_config.json", do_sample=True, temperature=0.1, repetition_penalty=1.3)


def no_sampling(one: Exported, kind: str, folder: Path) -> None:
    (folder / "generation_config.json").unlink()


def token_made_special(one: Exported, kind: str, folder: Path) -> None:
    """The same ids, and a word that vanishes from every answer."""
    fitted = json.loads((folder / "tokenizer.json").read_text())
    fitted["added_tokens"][-1]["special"] = not fitted["added_tokens"][-1]["special"]
    (folder / "tokenizer.json").write_text(json.dumps(fitted))


def other_dtype(one: Exported, kind: str, folder: Path) -> None:
    config(folder, "config.json", dtype="float16")


def adapter_of_another_base(one: Exported, kind: str, folder: Path) -> None:
    config(folder, "adapter_config.json", base_model_name_or_path="somebody/else")


def tokenizer_for_ollama_changed(one: Exported, kind: str, folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    text = path.read_text()
    path.unlink()  # it may be a link to the artifact's
    path.write_text(text + " ")


def other_config(one: Exported, kind: str, folder: Path) -> None:
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    config(folder, "config.json", rope_parameters=rope | {"rope_theta": 5e5})


WHOLE = {
    merge_skipped: "weights", wrong_alpha: "weights", layers_swapped: "weights", one_tensor_swapped: "weights",
    one_number_changed: "weights", wrong_stop: "prompts", wrong_end_of_turn: "prompts", changed_template: "prompts",
    other_tokens: "prompts", other_config: "weights",
    template_changed_for_tools: "prompts", other_sampling: "prompts", no_sampling: "prompts",
    token_made_special: "prompts", other_dtype: "weights",
}  # fmt: skip
EXPERTS = {experts_renamed: "weights", experts_made_anew: "weights", only_annotated: "weights"}
USUAL = {merge_skipped: "weights", wrong_alpha: "weights", layers_swapped: "weights", wrong_stop: "prompts"}
"""Enough for every other architecture."""
PACKED = {a_block_swapped: "weights", scales_of_another_layer: "weights"}
ADAPTER = {adapter_of_another_alpha: "weights", adapter_without_a_layer: "weights", changed_template: "prompts"}
ADAPTER |= {adapter_of_another_base: "weights"}
OLLAMA = {
    modelfile_of_another_template: "prompts",
    modelfile_without_a_stop: "prompts",
    modelfile_of_the_base: "weights",
    tokenizer_for_ollama_changed: "prompts",
}


def faults_of(one: Exported) -> list[tuple[str, Any, str]]:
    """(artifact, fault, the question that has to catch it)."""
    faults = {"merged": WHOLE if one.base.name == "base-qwen2" else USUAL, "adapter": ADAPTER}
    if "mxfp4" in one.made:
        faults |= {"merged": USUAL | EXPERTS, "mxfp4": USUAL | PACKED}
    if "ollama" in one.made:
        faults["ollama"] = OLLAMA
    return [(kind, fault, question) for kind, some in faults.items() for fault, question in some.items()]


# tests ----------------------------------------------------------------------------------------------------------------
def test_every_seeded_fault_is_caught_and_nothing_clean_is_accused(exported: Exported) -> None:
    seeded = []
    for kind, fault, question in faults_of(exported):
        folder = exported.copy(kind, f"{kind}-{fault.__name__}")
        fault(exported, kind, folder)
        seeded.append((Artifact(exported.made[kind].kind, folder, exported.made[kind].facts), fault, question))
    clean = list(exported.made.values())
    found = prove_run(exported.run, [*clean, *(one for one, _, _ in seeded)], task_of(exported.run))
    assert [proof.why for proof in found[: len(clean)]] == [""] * len(clean)
    assert all(proof.proven for proof in found[: len(clean)])
    missed = [
        f"{one.kind} {fault.__name__}: {proof.why or 'proven'}"
        for proof, (one, fault, question) in zip(found[len(clean) :], seeded, strict=True)
        if proof.proven or not _failed(proof, question)
    ]
    assert not missed


def _failed(proof: Proof, question: str) -> bool:
    return any(check.name == question and check.passed is False for check in proof.checks)


def test_the_proof_stands_beside_the_artifact_and_in_a_table(exported: Exported, capsys: Any) -> None:
    records = [json.loads((one.folder / "proof.json").read_text()) for one in exported.made.values()]
    assert [record["proven"] for record in records] == [True] * len(records)
    merged = next(record for record in records if record["artifact"] == "merged")
    answers = merged["checks"]["answers"]["figures"]
    assert answers["divergence"] < 0.5 * answers["divergence_base"] and 0.9 < answers["followed"] < 1.1
    reward = merged["checks"]["reward"]["figures"]
    assert reward["low"] <= reward["reward"] <= reward["high"] and reward["rows"] > 1
    show_proofs(records)


@pytest.mark.parametrize("kind", ["merged", "mxfp4"])
def test_answers_alone_tell_faults_from_losses(exported: Exported, kind: str) -> None:
    """Without looking at weights: what a server behind a URL could be asked."""
    if kind not in exported.made:
        return  # only gpt-oss is packed
    heard = _heard(exported, kind)
    limits = limits_of(exported.made[kind].kind)
    for name, speech in heard.items():
        reasons = agreement(heard["base"], heard["policy"], speech).reasons(limits)
        assert bool(reasons) == (name not in ("policy", kind)), f"{name}: {reasons}"


def _heard(one: Exported, kind: str) -> dict[str, Heard]:
    import torch
    from peft import PeftModel

    spoken = [(list(range(20, 40)), list(range(40, 80))), (list(range(60, 90)), list(range(5, 45)))]
    base = load(one.base, dtype=torch.float32)
    heard = {"base": listen(base, spoken)}
    heard["policy"] = listen(PeftModel.from_pretrained(base, str(one.run.folder / "adapter")).eval(), spoken)
    heard[kind] = listen(load(one.made[kind].folder, dtype=torch.float32), spoken)
    for fault in (wrong_alpha, layers_swapped):
        folder = one.root / f"{kind}-{fault.__name__}"
        if not folder.is_dir():
            fault(one, kind, one.copy(kind, folder.name))
        heard[fault.__name__] = listen(load(folder, dtype=torch.float32), spoken)
    return heard


def test_a_change_that_bfloat16_cannot_hold_is_said_and_not_taken_for_proven(tmp_path: Path) -> None:
    run = trained_run(tmp_path, "qwen3", size=0.003)
    found = {proof.kind: proof for proof in prove_run(run, export_run(run), task_of(run))}
    assert found["adapter"].proven, found["adapter"].why
    assert not found["merged"].proven and "lost in" in found["merged"].why


def test_a_run_that_trained_all_weights_is_proven_against_what_it_trained(tmp_path: Path) -> None:
    run = trained_run(tmp_path, "qwen2", whole=True, export={"artifacts": ["merged", "ollama"]})
    made = export_run(run)
    base = Artifact("merged", tmp_path / "base-qwen2", {})
    found = prove_run(run, [*made, base], task_of(run))
    assert [proof.proven for proof in found] == [True, True, False], [proof.why for proof in found]
    assert "is not the original" in found[2].why


def test_a_policy_that_is_asked_in_mxfp4_is_proven_unpacked(tmp_path: Path) -> None:
    run = trained_run(tmp_path, "gpt_oss_mxfp4", export={"artifacts": ["merged"]})
    kept = run.config.model.model_copy(update={"quantization": "mxfp4"})
    (found,) = prove_run(run, export_run(run), task_of(run), run.config.model_copy(update={"model": kept}))
    assert found.proven, found.why


def test_an_adapter_that_changes_nothing_proves_nothing(tmp_path: Path) -> None:
    run = trained_run(tmp_path, "qwen2", size=0.0)
    found = prove_run(run, export_run(run), task_of(run))
    assert not any(proof.proven for proof in found)
    assert "no tensor differs from the base" in found[1].why
    assert [proof.failed for proof in found] == [[], []]  # nothing is wrong: there is nothing to tell it by
