"""Published weights: what is in a version, when it counts, what is refused, and when a canary is a proof."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_policy import tiny, train, with_adapter

from lib.roles import Canary, Method, Release
from lib.sync import SyncError, canary_of, check, compare, folders, make_canaries, publish, read_tensors, versions
from lib.sync.manifest import read_manifest

RUN = "a-run"
PROMPTS = [[5, 9, 13, 40, 41, 42, 7] * 4, [8, 3, 77, 101]]


def released(model: Any, weights: Path, version: int = 1, method: Method = "reload", **settings: Any) -> Release:
    return publish(model, weights, version=version, step=version, method=method, run=RUN, **settings)


def state_of(model: Any) -> dict[str, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, Any], other: dict[str, Any], apart: float = 0.0) -> bool:
    names = one.keys() == other.keys()
    return names and all(bool(((one[name].double() - other[name].double()).abs() <= apart).all()) for name in one)


def manifest_of(release: Release) -> dict[str, Any]:
    return dict(json.loads((Path(release.folder) / "sync_manifest.json").read_text()))


# what is published ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("adapter", [True, False])
def test_published_weights_are_the_merged_ones_and_the_live_model_is_not_touched(
    tmp_path: Path, tied: bool, adapter: bool
) -> None:
    from safetensors.torch import load_file

    model = with_adapter(tiny(tied)) if adapter else tiny(tied)
    before = state_of(model)
    release = released(model, tmp_path / "weights")
    assert same(before, state_of(model))
    published = load_file(Path(release.folder) / "model.safetensors")
    merged = model.merge_and_unload() if adapter else model
    assert "lm_head.weight" in published
    assert same(published, state_of(merged), apart=1e-6)


def test_adapters_on_experts_embeddings_and_two_at_once_are_merged_as_peft_merges_them(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from lib.sync.merge import merged_pieces, merged_state

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 1, "num_experts": 4, "head_dim": 16}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64, "num_experts_per_tok": 2}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, intermediate_size=32))
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = with_adapter(model, target_modules=["q_proj", "embed_tokens"], target_parameters=parameters)
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.base_model.set_adapter(["default", "other"])
    before = state_of(adapted)
    merged = merged_state(adapted)
    names = {piece.name for piece in merged_pieces(adapted)}
    assert same(before, state_of(adapted))
    assert same(merged, state_of(adapted.merge_and_unload()), apart=1e-6)
    # A checkpoint holds every expert's matrices by themselves.
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in names and not any("gate_up" in name for name in names)


@pytest.mark.parametrize("method", ["reload", "volume", "checkpoint"])
def test_a_published_folder_loads_as_a_model_that_says_the_same(tmp_path: Path, method: Method) -> None:
    from transformers import AutoModelForCausalLM

    model = with_adapter(tiny())
    folder = released(model, tmp_path / "weights", method=method).folder
    here = canary_of(model, 1, PROMPTS)
    there = canary_of(AutoModelForCausalLM.from_pretrained(folder), 1, PROMPTS)
    assert compare(here, there.logprobs, tolerance=1e-5).holds


def test_an_adapter_is_published_as_peft_reads_it(tmp_path: Path) -> None:
    from peft import PeftModel

    model = with_adapter(tiny())
    folder = released(model, tmp_path / "weights", method="lora").folder
    again = PeftModel.from_pretrained(tiny(), folder).eval()
    assert compare(canary_of(model, 1, PROMPTS), canary_of(again, 1, PROMPTS).logprobs, tolerance=1e-6).holds


def test_weights_can_be_published_in_the_type_that_a_worker_serves(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    model = tiny()
    release = released(model, tmp_path / "weights", dtype=torch.bfloat16)
    published = load_file(Path(release.folder) / "model.safetensors")
    assert {tensor.dtype for tensor in published.values()} == {torch.bfloat16}
    assert same(published, {name: tensor.bfloat16() for name, tensor in model.state_dict().items()})
    assert {record["dtype"] for record in manifest_of(release)["tensors"].values()} == {"BF16"}


def test_the_manifest_says_what_the_folder_holds(tmp_path: Path) -> None:
    model = tiny()
    release = released(model, tmp_path / "weights", version=7)
    manifest = manifest_of(release)
    assert {key: manifest[key] for key in ("run", "version", "step", "method")} == {
        "run": RUN, "version": 7, "step": 7, "method": "reload",
    }  # fmt: skip
    record = manifest["tensors"]["model.layers.1.mlp.down_proj.weight"]
    assert record["shape"] == [64, 128] and record["dtype"] == "F32" and len(record["hash"]) == 32
    assert manifest["files"].keys() == {"config.json"} and manifest["seconds"] > 0
    again = released(model, tmp_path / "again", version=7)
    assert manifest_of(again)["hash"] == manifest["hash"]
    train(model, 1e-7)
    assert manifest_of(released(model, tmp_path / "moved", version=7))["hash"] != manifest["hash"]


def test_tensors_are_read_from_the_file_as_they_were_written(tmp_path: Path) -> None:
    import torch

    from lib.sync.tensors import Piece, write_tensors

    tensors = {
        "odd": torch.arange(3, dtype=torch.uint8),
        "after": torch.randn(2, 3, dtype=torch.bfloat16),
        "wide": torch.randn(5, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "one": torch.tensor(3.5),
    }
    pieces = [
        Piece(name, tuple(tensor.shape), str(tensor.dtype)[6:], lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"what was there before is longer" * 100)
    write_tensors(path, pieces)
    read = {name: tensor.clone() for name, tensor in read_tensors(path)}
    assert same(read, tensors) and {name: t.dtype for name, t in read.items()} == {
        n: t.dtype for n, t in tensors.items()
    }
    from safetensors.torch import load_file

    assert same(load_file(path), tensors)


# versions -------------------------------------------------------------------------------------------------------------
def test_the_newest_two_steps_stay_and_an_older_ones_file_is_written_over(tmp_path: Path) -> None:
    model, weights = tiny(), tmp_path / "weights"
    inodes = []
    for version in range(1, 6):
        train(model)
        folder = Path(released(model, weights, version).folder)
        inodes.append((folder / "model.safetensors").stat().st_ino)
        assert [path.name for path in versions(weights)] == [f"v-{n}" for n in range(max(1, version - 1), version + 1)]
        for left in versions(weights):
            number = int(left.name[2:])
            check(Release(number, number, "reload", str(left), read_manifest(left).hash), RUN)
    assert inodes[2:] == inodes[:3]


def test_what_workers_need_by_several_methods_stays_for_two_steps_and_a_repetition_does_not(tmp_path: Path) -> None:
    model, weights = with_adapter(tiny()), tmp_path / "weights"
    methods: list[Method] = ["lora", "reload", "checkpoint"]
    for step in range(1, 4):
        train(model)
        of_step = [
            publish(model, weights, version=3 * step + number, step=step, method=method, run=RUN)
            for number, method in enumerate(methods)
        ]
        for release in of_step:
            check(release, RUN)
        first = max(3, 3 * (step - 1))
        assert [path.name for path in versions(weights)] == [f"v-{n}" for n in range(first, 3 * step + 3)]
    again = publish(model, weights, version=12, step=3, method="reload", run=RUN)  # a run that was killed goes on
    check(again, RUN)
    assert [path.name for path in versions(weights)] == [f"v-{n}" for n in (6, 7, 8, 9, 11, 12)]


def test_a_publication_that_was_cut_short_is_no_version_and_is_cleared_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, weights = tiny(), tmp_path / "weights"
    released(model, weights, 1)

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folders, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            released(model, weights, 2)
    assert [path.name for path in versions(weights)] == ["v-1"]
    released(model, weights, 2)
    assert sorted(path.name for path in weights.iterdir()) == ["v-1", "v-2"]


def test_a_run_that_goes_on_from_an_earlier_step_replaces_what_came_after_it(tmp_path: Path) -> None:
    model, weights = tiny(), tmp_path / "weights"
    for version in (3, 4):
        released(model, weights, version)
    train(model)
    release = released(model, weights, 3)
    assert [path.name for path in versions(weights)] == ["v-3"]
    check(release, RUN)


def test_a_version_that_is_pruned_while_it_goes_to_the_disk_is_no_error(tmp_path: Path) -> None:
    release = released(tiny(), tmp_path / "weights")
    shutil.rmtree(release.folder)
    folders.flush(Path(release.folder))


# what is refused ------------------------------------------------------------------------------------------------------
def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "sync_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def flip_a_byte(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1000, 2)
        byte = file.read(1)
        file.seek(-1000, 2)
        file.write(bytes([byte[0] ^ 1]))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")


def swap_two_tensors(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1)]
    tensors |= {names[0]: tensors[names[1]], names[1]: tensors[names[0]]}
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "sync_manifest.json").unlink(), "has no sync_manifest.json"),
        (lambda folder: edit_manifest(folder, run="another"), "was changed"),
        (lambda folder: edit_manifest(folder, tensors={}), "was changed"),
        (lambda folder: (folder / "sync_manifest.json").write_text("{"), "is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (edit_config, "config.json is not what was published"),
        (lambda folder: (folder / "more.safetensors").write_bytes(b"x"), "not published: more.safetensors"),
        (flip_a_byte, "the hash differs: lm_head.weight"),
        (cut, "is cut off"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), "is cut off"),
        (drop_a_tensor, r"tensors missing: \['model.norm.weight'\]"),
        (swap_two_tensors, r"the hash differs: model.layers.0.mlp.up_proj.weight, model.layers.1"),
        (shutil.rmtree, "has no sync_manifest.json"),
    ],
)
def test_weights_that_are_not_what_was_published_are_refused(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    release = released(tiny(), tmp_path / "weights")
    check(release, RUN)
    damage(Path(release.folder))
    with pytest.raises(SyncError, match=message):
        check(release, RUN)


def test_weights_of_another_run_version_or_kind_are_refused(tmp_path: Path) -> None:
    release = released(with_adapter(tiny()), tmp_path / "weights")
    with pytest.raises(SyncError, match="of the run 'a-run', and this worker serves 'other'"):
        check(release, "other")
    with pytest.raises(SyncError, match="holds version 1 of step 1, and version 2"):
        check(release._replace(version=2), RUN)
    with pytest.raises(SyncError, match="was published for reload; lora loads lora"):
        check(release._replace(method="lora"), RUN)
    assert check(release._replace(method="volume"), RUN).version == 1


def test_weights_that_another_process_published_under_the_same_number_are_refused(tmp_path: Path) -> None:
    release = released(tiny(), tmp_path / "weights")
    shutil.rmtree(release.folder)
    other = tiny()
    train(other)
    assert released(other, tmp_path / "weights").folder == release.folder
    with pytest.raises(SyncError, match="other weights than version 1 was published with"):
        check(release, RUN)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "another kind than plain LoRA"),
        ({"target_modules": ["lm_head"]}, "ties its head to its embeddings"),
        ({"target_modules": ["embed_tokens"]}, "ties its head to its embeddings"),
    ],
)
def test_adapters_that_cannot_be_merged_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    model = with_adapter(tiny(), **settings)
    for method in ("reload", "checkpoint"):
        with pytest.raises(SyncError, match=message):
            released(model, tmp_path / "weights", method=method)  # type: ignore[arg-type]


def test_publishing_refuses_an_adapter_where_there_is_none_and_one_that_is_merged_already(tmp_path: Path) -> None:
    with pytest.raises(SyncError, match="needs a model with an adapter"):
        released(tiny(), tmp_path / "weights", method="lora")
    model = with_adapter(tiny())
    model.merge_adapter()
    with pytest.raises(SyncError, match="merged into the live model"):
        released(model, tmp_path / "weights")


# canaries -------------------------------------------------------------------------------------------------------------
def test_canaries_are_always_the_same_and_the_first_fills_a_block_and_begins_like_a_real_prompt() -> None:
    real = [[number * 100 + place for place in range(30)] for number in range(1, 6)]
    canaries = make_canaries(real, block=32, longest=512, short=3)
    assert canaries == make_canaries(real, block=32, longest=512, short=3) and len(canaries) == 4
    assert len(canaries[0]) == 35 and canaries[0][:30] == real[0]
    assert {token for canary in canaries for token in canary} <= {token for prompt in real for token in prompt}
    assert all(2 <= len(canary) <= 6 for canary in canaries[1:])
    assert max(map(len, make_canaries(real, block=32, longest=20))) == 19
    assert len(make_canaries([[4, 5]], block=16, longest=512)[0]) == 19
    with pytest.raises(SyncError, match="real prompts"):
        make_canaries([[]], block=32, longest=512)


def test_a_canary_is_what_the_model_says_without_dropout_and_leaves_it_as_it_was() -> None:
    import torch

    model = with_adapter(tiny(), lora_dropout=0.5).train()
    canary = canary_of(model, 3, PROMPTS)
    assert model.training and canary.version == 3 and canary.prompts == PROMPTS
    model.eval()
    for prompt, values in zip(PROMPTS, canary.logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert values == pytest.approx([logits[i, token].item() for i, token in enumerate(prompt[1:])], abs=1e-5)


def canary(*rows: list[float], version: int = 1) -> Canary:
    return Canary(version, [list(range(len(row) + 1)) for row in rows], list(rows))


NOW = canary([-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], [-1.5, -2.5])


@pytest.mark.parametrize(
    ("answered", "holds", "worst"),
    [
        ([[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], [-1.5, -2.5]], True, 0.0),
        ([[-1.0, -2.0009, -3.0, -4.0, -5.0, -6.0], [-1.5, -2.5]], True, 9e-4),
        ([[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], [-1.5, -2.502]], False, 2e-3),
        ([[-1.0, -2.0, -3.0, -4.0, -5.0, -6.0]], False, math.inf),
        ([[-1.0, -2.0, -3.0, -4.0, -5.0], [-1.5, -2.5]], False, math.inf),
        ([[-1.0, -2.0, -3.0, -4.0, -5.0, math.nan], [-1.5, -2.5]], False, math.inf),
        ([[-1.0, -2.0, -3.0, -4.0, -5.0, -math.inf], [-1.5, -2.5]], False, math.inf),
        ([], False, math.inf),
    ],
)
def test_a_proof_needs_every_token_within_the_tolerance(answered: list[list[float]], holds: bool, worst: float) -> None:
    proof = compare(NOW, answered)
    assert (proof.holds, proof.version, bool(proof.why)) == (holds, 1, not holds)
    assert proof.worst == pytest.approx(worst, abs=1e-9)


def test_nothing_is_proven_by_no_tokens() -> None:
    assert not compare(canary(), []).holds and not compare(canary([]), [[]]).holds


def moved(by: float, share: float = 1.0, tail: float | None = None) -> list[list[float]]:
    """NOW from weights that moved every token by `by`, of which a worker shows a share (in the last tokens `tail`)."""
    rows = []
    for row in NOW.logprobs:
        shares = [share] * len(row[:-2]) + [share if tail is None else tail] * len(row[-2:])
        rows.append([value - by + by * part for value, part in zip(row, shares, strict=True)])
    return rows


@pytest.mark.parametrize(
    ("by", "answered", "holds"),
    [
        (5e-4, moved(5e-4), True),
        (5e-4, moved(5e-4, share=0.0), False),
        (5e-4, moved(5e-4, share=1.0, tail=0.5), False),
        (5e-4, moved(5e-4, share=2.0), False),
        (5e-4, moved(5e-4, share=0.9), True),
        (1e-5, moved(1e-5, share=0.0), True),
    ],
)
def test_a_change_below_the_tolerance_must_be_followed_where_it_stands_out_from_noise(
    by: float, answered: list[list[float]], holds: bool
) -> None:
    before = Canary(0, NOW.prompts, [[value - by for value in row] for row in NOW.logprobs])
    assert compare(NOW, answered).holds
    proof = compare(NOW, answered, before=before)
    assert proof.holds == holds and ("change since version 0" in proof.why) == (not holds)
