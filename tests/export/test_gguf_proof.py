"""What a GGUF file is proven by without llama.cpp, every seeded fault of one, and what follows for the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import run_cli
from gguf_files import convert, converters, model_file, write_gguf
from tiny_models import tiny_llama
from trained_run import task_of, trained_run

from lib.config import ModelSection
from lib.export import Artifact, ExportError, export_run, gguf
from lib.export import proof as proofs
from lib.export.base import open_checkpoint
from lib.export.checks import Check
from lib.export.folder import artifact_folder
from lib.export.gguf_header import read_gguf, read_values
from lib.export.gguf_weights import compare_model
from lib.export.verdict import Proof, require_proven
from lib.runfolder import Run

KINDS = ["qwen2", "qwen3", "llama"]


class Converted(NamedTuple):
    run: Run
    made: list[Artifact]
    proofs: dict[str, Proof]


@pytest.fixture(scope="module", params=KINDS)
def converted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Converted]:
    """A run with its GGUF files, proven."""
    kind = request.param
    root = tmp_path_factory.mktemp(kind)
    artifacts = ["merged", "gguf", "gguf-adapter", "ollama"]
    run = trained_run(root, kind, export={"artifacts": artifacts, "llama_cpp": str(converters(root / "llama.cpp"))})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "_convert", converted_here)  # a process for each would take seconds to begin
        patch.setattr(proofs, "TOKENS", 4)
        made = export_run(run)
        yield Converted(run, made, {proof.kind: proof for proof in proofs.prove_run(run, made, task_of(run))})


def converted_here(script: Path, arguments: list[str], target: Path, outtype: str) -> None:
    convert(["--outfile", str(target), "--outtype", outtype, *arguments])


def test_a_whole_models_file_is_proven_by_its_header_and_every_value(converted: Converted) -> None:
    assert {kind: converted.proofs[kind].why for kind in ("merged", "gguf", "ollama")} == dict.fromkeys(
        ("merged", "gguf", "ollama"), ""
    )
    proof = converted.proofs["gguf"]
    assert proof.how == "by header and tensors" and not proof.failed
    assert "llama.cpp itself is not asked" in proof.checks[1].said


def test_an_adapters_file_is_compared_and_what_it_cannot_show_is_said(converted: Converted) -> None:
    proof = converted.proofs["gguf-adapter"]
    assert proof.checks[0].passed and "every value is that of the trained adapter" in proof.checks[0].said
    assert not proof.proven and not proof.failed and proof.how == "not proven here"
    assert "those of the base's own GGUF file count" in proof.why


def test_an_adapters_file_names_no_folder_of_this_machine(converted: Converted) -> None:
    made = next(one for one in converted.made if one.kind == "gguf-adapter")
    known = read_gguf(made.folder / "adapter.gguf").keys
    assert known["general.base_model.0.name"] == Path(converted.run.config.model.name).name
    assert [path.name for path in made.folder.iterdir() if path.name.startswith(".")] == []


Contents = tuple[dict[str, Any], dict[str, tuple[str, Any]]]


def a_number(contents: Contents) -> None:
    _, values = contents[1]["blk.1.ffn_up.weight"]
    values[3, 5] += 2**-4


def a_norm(contents: Contents) -> None:
    contents[1]["output_norm.weight"][1][3] += 2**-7


def layers_swapped(contents: Contents) -> None:
    one, other = "blk.0.attn_v.weight", "blk.1.attn_v.weight"
    contents[1][one], contents[1][other] = contents[1][other], contents[1][one]


def a_tensor_lost(contents: Contents) -> None:
    contents[1].pop("blk.1.ffn_norm.weight")


def rows_of_the_other_order(contents: Contents) -> None:
    kind, values = contents[1]["blk.0.attn_q.weight"]
    contents[1]["blk.0.attn_q.weight"] = kind, values.flip(0)


def too_large_for_its_type(contents: Contents) -> None:
    _, values = contents[1]["blk.0.ffn_down.weight"]
    values[0, 0] = float("inf")


def other_rotation(contents: Contents) -> None:
    key = next(key for key in contents[0] if key.endswith("rope.freq_base"))
    contents[0][key] = 5e5


def other_template(contents: Contents) -> None:
    contents[0]["tokenizer.chat_template"] += " "


def no_template(contents: Contents) -> None:
    contents[0].pop("tokenizer.chat_template")


def other_end(contents: Contents) -> None:
    contents[0]["tokenizer.ggml.eos_token_id"] = 7


def words_swapped(contents: Contents) -> None:
    words = contents[0]["tokenizer.ggml.tokens"]
    words[20], words[21] = words[21], words[20]


def a_merge_lost(contents: Contents) -> None:
    contents[0]["tokenizer.ggml.merges"].pop(3)


FAULTS: dict[Callable[[Contents], None], str] = {
    a_number: "weights", a_norm: "weights", layers_swapped: "weights", a_tensor_lost: "weights",
    rows_of_the_other_order: "weights", too_large_for_its_type: "weights", other_rotation: "weights",
    other_template: "prompts", no_template: "prompts", other_end: "prompts", words_swapped: "prompts",
    a_merge_lost: "prompts",
}  # fmt: skip


def session_of(run: Run) -> Any:
    return proofs._Session(run, run.config, proofs.open_trained(run, run.config), task_of(run), [])


@pytest.mark.parametrize("outtype", ["auto", "f16", "f32", "q8_0"])
def test_every_seeded_fault_of_a_file_is_caught_and_no_clean_one_is_accused(
    converted: Converted, outtype: str, tmp_path: Path
) -> None:
    session, folder = session_of(converted.run), artifact_folder(converted.run, "merged")
    made = next(one for one in converted.made if one.kind == "gguf")._replace(folder=tmp_path)
    for fault, question in {(lambda _: None): "", **FAULTS}.items():
        contents = model_file(folder, outtype)
        fault(contents)
        write_gguf(tmp_path / "model.gguf", *contents)
        found = session.prove_gguf(made, [converted.proofs["merged"]])
        assert found.failed == ([question] if question else []), f"{getattr(fault, '__name__', '')}: {found.why}"
        if not question:
            assert found.proven == (outtype != "q8_0"), found.why  # 8 bits are another model: nobody was asked


def test_another_file_beside_a_modelfile_is_caught(converted: Converted, tmp_path: Path) -> None:
    from lib.export.gguf_proof import copy_check

    original = converted.proofs["gguf"].folder / "model.gguf"
    copied = tmp_path / "model.gguf"
    copied.write_bytes(original.read_bytes())
    assert copy_check(copied, converted.proofs["gguf"]).passed
    copied.write_bytes(original.read_bytes()[:-1] + b"\0")
    assert copy_check(copied, converted.proofs["gguf"]).passed is False


def test_a_file_of_what_is_not_proven_is_not_proven(converted: Converted) -> None:
    made = next(one for one in converted.made if one.kind == "gguf")
    found = session_of(converted.run).prove_gguf(made, [])
    assert not found.proven and not found.failed and "made of merged, which is not proven" in found.why


def test_a_file_that_was_cut_off_fails(converted: Converted, tmp_path: Path) -> None:
    made = next(one for one in converted.made if one.kind == "gguf")
    whole = (made.folder / "model.gguf").read_bytes()
    (tmp_path / "model.gguf").write_bytes(whole[:-40])
    with pytest.raises(ExportError, match="damaged GGUF file"):
        session_of(converted.run).prove_gguf(made._replace(folder=tmp_path), [])


def test_llama_3_s_factors_of_the_rotary_frequencies_are_known(tmp_path: Path) -> None:
    import torch

    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    base = tiny_llama(tmp_path / "base", rope_parameters=rope | {"original_max_position_embeddings": 8192})
    keys, tensors = model_file(base)
    # The lowest of 8 frequencies (heads of 16) turns once in 2 pi 5e5^(7/8) tokens, far beyond 8192: divided by 8.
    found = compare_model(write_gguf(tmp_path / "none.gguf", keys, tensors), open_checkpoint(str(base), ModelSection()))
    assert found.wrong == ["rope_freqs.weight is missing"]
    wrong = write_gguf(tmp_path / "ones.gguf", keys, tensors | {"rope_freqs.weight": ("F32", torch.ones(8))})
    found = compare_model(wrong, open_checkpoint(str(base), ModelSection()))
    assert found.wrong == ["rope_freqs.weight has other values than what it was made from"]


def test_eight_bits_are_read_as_llama_cpp_reads_them(tmp_path: Path) -> None:
    import torch

    values = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    path = write_gguf(tmp_path / "x.gguf", {}, {"x": ("Q8_0", values)})
    read = read_values(path, read_gguf(path).tensors["x"], slice(1, 3))
    assert read.shape == (2, 64) and 0 < (read - values[1:3]).abs().max() < values.abs().max() / 127


# -- what follows -----------------------------------------------------------------------------------------------------


def proof_of(kind: str, passed: bool | None, said: str = "why") -> Proof:
    return Proof(kind, Path(), (Check("weights", True, "fine", {}), Check("answers", passed, said, {})))


def test_a_proof_that_failed_is_an_error_by_name_and_what_could_not_be_checked_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    logging.getLogger("lib").propagate = True
    unchecked = proof_of("gguf-adapter", None, "llama.cpp is not asked here")
    require_proven([proof_of("adapter", True), unchecked])
    assert "gguf-adapter could not be proven here: answers: llama.cpp is not asked here" in caplog.text
    with pytest.raises(ExportError, match=r"not the policy that was trained: merged \(answers: 9 nats\)\. Do"):
        require_proven([unchecked, proof_of("merged", False, "9 nats")])


def test_a_run_whose_proof_fails_ends_non_zero_and_says_which_in_its_result(tmp_path: Path) -> None:
    run = trained_run(tmp_path, "qwen3", size=0.003)  # less than bfloat16 can hold
    done = run_cli("5_export_and_serve", str(run.folder / "config.json"), "-p", f"run_name={run.name}")
    assert done.returncode == 1
    assert "not the policy that was trained: merged (" in done.stderr and "lost in" in done.stderr
    told = json.loads((run.folder / "result.json").read_text())["export"]
    assert told["adapter"]["proven"] and told["adapter"]["failed"] == []
    assert not told["merged"]["proven"] and told["merged"]["failed"]
    page = (run.folder / "notebooks" / "5_export_and_serve.ipynb").read_text()
    assert "is NOT the policy that was trained" in page
