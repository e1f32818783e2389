"""The proof that an artifact is the policy that was trained: its weights, its answers, its prompts, its reward.

Owns what is asked of each artifact. Must not know tasks, trainers, or how an artifact was made.

    python -c "from lib.export.proof import prove_run; help(prove_run)"

(a) weights: base plus adapter and nothing else, by lib/export/weights.py. (b) answers: greedy agreement and KL to the
adapter on its base, which PEFT computes, by lib/export/agreement.py. (c) prompts: the bytes and ids of chats, and the
tokens that end an answer. (d) reward on held-out rows, with its interval, paired with the policy's own. A GGUF file is
read, and never asked: lib/export/gguf_proof.py. An artifact is proven where every one holds (lib/export/verdict.py).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lib import models
from lib.answering import answer_rows
from lib.config import ArtifactKind, Config
from lib.evaluate import held_out_rows
from lib.export.agreement import Heard, Spoken, agreement, listen
from lib.export.artifacts import Trained, open_trained
from lib.export.base import open_adapter, open_checkpoint
from lib.export.checks import (
    Check,
    answers_check,
    modelfile_check,
    not_asked,
    prompts_check,
    reward_check,
    weights_check,
)
from lib.export.errors import ExportError
from lib.export.folder import PROOF, Artifact, artifact_folder
from lib.export.gguf import ADAPTER_FILE, FILE
from lib.export.gguf_proof import adapter_checks, copy_check, model_checks
from lib.export.modelfile import Modelfile, read_modelfile
from lib.export.ollama import MODELFILE, begin_of_text, converter_config
from lib.export.tokenizers import generation_difference, other_copy, raw_tokenizer
from lib.export.verdict import Proof
from lib.export.weights import Expected, Weights, compare_adapters
from lib.generate import Chat, batched, chat_of, local_sample, unloaded_chat, within_limit
from lib.patience import Patience
from lib.runfolder import Run, write_json
from lib.task import Message, Row, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

PROMPTS, TOKENS = 8, 32
"""Held-out prompts, and tokens of the answers to them, by which answers are compared: 256 places. Of a vocabulary of
200,000 the log-probabilities of one model are 0.2 GB."""


class Speech(NamedTuple):
    """What a model says to the held-out prompts."""

    heard: Heard
    records: list[dict[str, Any]]
    """Its greedy answers to the held-out rows, scored."""


class Reference(NamedTuple):
    """The policy itself: adapter on base, or the trained model."""

    base: Heard
    policy: Speech
    spoken: list[Spoken]
    chat: Chat


def prove_run(run: Run, artifacts: Sequence[Artifact], task: Task, config: Config | None = None) -> list[Proof]:
    """Prove every artifact of a run, and write `proof.json` into its folder.

    Base and policy are loaded first, then each artifact alone. `config.evaluation.rows` limits the held-out rows.
    Raises ExportError where run or base cannot be used.
    """
    config = config or run.config
    trained = open_trained(run, config)
    rows = held_out_rows(config, run)
    session = _Session(run, config, trained, task, rows)
    reference, speeches = session.listen([one for one in artifacts if one.kind == "adapter"])
    proofs: list[Proof] = []
    for artifact in artifacts:
        proof = _proof(session, artifact, reference, speeches, proofs)
        write_json(artifact.folder / PROOF, proof.record())
        state = "proven" if proof.proven else "NOT the policy: " if proof.failed else "not proven here: "
        logger.info("export: %s is %s%s", artifact.kind, state, proof.why)
        proofs.append(proof)
    return proofs


def _proof(
    session: _Session,
    artifact: Artifact,
    reference: Reference,
    speeches: Mapping[Path, Speech],
    before: Sequence[Proof],
) -> Proof:
    try:
        if artifact.kind in ("gguf", "gguf-adapter"):
            return session.prove_gguf(artifact, before)
        if artifact.kind == "ollama":
            made_of = artifact.facts["facts"]["made_of"]
            return session.prove_ollama(artifact, next((proof for proof in before if proof.kind == made_of), None))
        return session.prove(artifact, reference, speeches.get(artifact.folder))
    except (ExportError, models.ModelError) as error:
        return Proof(artifact.kind, artifact.folder, (Check("weights", False, str(error), {}),))


class _Session:
    """What all artifacts of a run are held against."""

    def __init__(self, run: Run, config: Config, trained: Trained, task: Task, rows: Sequence[Row]) -> None:
        # Weights kept in MXFP4 carry no adapter of experts, and those in 4 bits are not what an adapter is merged into.
        if config.model.quantization in ("mxfp4", "4bit"):
            config = config.model_copy(update={"model": config.model.model_copy(update={"quantization": "auto"})})
        self.run, self.config, self.trained, self.task = run, config, trained, task
        source = models.resolve_model(config, run.read_rows("train") if config.model.name == models.STARTER else [])
        self.source, self.result = source, run.folder / ("adapter" if trained.adapter else "model")
        self.chat = unloaded_chat(config, source if trained.adapter else str(self.result))
        self.rows = [rows[at] for at in within_limit(rows, self.chat, config.sampling.prompt_limit)]

    # models -----------------------------------------------------------------------------------------------------------
    def listen(self, adapters: Sequence[Artifact]) -> tuple[Reference, dict[Path, Speech]]:
        """Base and policy, and exported adapters on the same base."""
        prompts = [self.chat.prompt_ids(row["prompt"], row.get("tools")) for row in self.rows[:PROMPTS]]
        base = models.load_model(self.source, self.config.model, purpose="adapter")
        if not self.trained.adapter:
            return self._listen_to_whole(base, prompts), {}
        model: Any = models.load_adapter(base, str(self.result))
        chat = chat_of(self.config, model, self.chat.tokenizer)
        spoken = self._greedy(model, chat, prompts)
        with model.disable_adapter():
            heard = listen(model, spoken)
        reference = Reference(heard, self._speech(model, chat, spoken), spoken, chat)
        speeches = {}
        for number, artifact in enumerate(filter(self._is_right, adapters)):
            model.load_adapter(str(artifact.folder), f"exported{number}")
            model.set_adapter(f"exported{number}")
            speeches[artifact.folder] = self._speech(model.eval(), chat, spoken)
        _free(model)
        return reference, speeches

    def _listen_to_whole(self, base: PreTrainedModel, prompts: list[list[int]]) -> Reference:
        """Where all weights were trained: the base is heard on what the trained model says."""
        policy = models.load_model(str(self.result), self.config.model)
        chat = chat_of(self.config, policy, self.chat.tokenizer)
        spoken = self._greedy(policy, chat, prompts)
        reference = Reference(listen(base, spoken), self._speech(policy, chat, spoken), spoken, chat)
        _free(base)
        _free(policy)
        return reference

    def _greedy(self, model: PreTrainedModel, chat: Chat, prompts: list[list[int]]) -> list[Spoken]:
        """Prompts with the policy's own greedy answers, TOKENS at most."""
        answers, _ = local_sample(model, chat, self.config.evaluation, TOKENS, greedy=True)(prompts)
        return list(zip(prompts, answers, strict=True))

    def _speech(self, model: PreTrainedModel, chat: Chat, spoken: Sequence[Spoken]) -> Speech:
        heard = listen(model, spoken)
        config = self.config
        sample = local_sample(model, chat, config.evaluation, config.sampling.completion_limit, greedy=True)
        patience = Patience(config.rewards.world_seconds, config.rewards.score_seconds)
        limit = config.rewards.max_unscored
        records = answer_rows(self.task, self.rows, batched(chat, sample), 1, limit, "export proof", patience)
        return Speech(heard, records)

    # artifacts --------------------------------------------------------------------------------------------------------
    def prove(self, artifact: Artifact, reference: Reference, speech: Speech | None = None) -> Proof:
        """All checks of one artifact; a whole model is loaded only where its weights and prompts are right."""
        found = self._weights(artifact)
        weights, prompts = weights_check(found, artifact.kind), self._prompts(artifact)
        if weights.passed and prompts.passed and artifact.kind != "adapter":
            speech = self._load(artifact, reference)
        if speech is None:
            checks = (weights, not_asked("answers"), prompts, not_asked("reward"))
        else:
            answers = agreement(reference.base, reference.policy.heard, speech.heard)
            reward = reward_check(reference.policy.records, speech.records, self.task.reward_range[0])
            checks = (weights, answers_check(answers, artifact.kind, found), prompts, reward)
        return Proof(artifact.kind, artifact.folder, checks)

    def prove_gguf(self, artifact: Artifact, before: Sequence[Proof]) -> Proof:
        """What its header and tensors say; `before`: the proof of the artifact that it was made of is among them."""
        if artifact.kind == "gguf-adapter":
            if self.trained.adapter is None:
                raise ExportError("the run trained all weights: there is no adapter to compare with")
            checks = adapter_checks(artifact.folder / ADAPTER_FILE, self.trained.adapter, self.trained.weights)
            return Proof(artifact.kind, artifact.folder, checks)
        made_of: ArtifactKind = artifact.facts["origin"]["settings"]["from"]
        source = open_checkpoint(str(artifact_folder(self.run, made_of)), self.config.model)
        tokenizer = raw_tokenizer(source.folder, self.config.model.trust_remote_code)
        is_proven = any(proof.kind == made_of and proof.proven for proof in before)
        checks = model_checks(artifact.folder / FILE, source, self.chat, tokenizer, made_of, is_proven)
        return Proof(artifact.kind, artifact.folder, checks)

    def prove_ollama(self, artifact: Artifact, source: Proof | None) -> Proof:
        """The Modelfile and what it points to; `source`: the proof of the artifact that it was made of."""
        modelfile = read_modelfile((artifact.folder / MODELFILE).read_text(encoding="utf-8"))
        model = artifact.folder / modelfile.source
        if model.is_file() or modelfile.adapter.endswith(".gguf"):
            weights = copy_check(artifact.folder / (modelfile.adapter or modelfile.source), source)
        else:
            weights = weights_check(self._ollama_weights(artifact.folder, modelfile), artifact.kind)
        chat = self.chat
        prompts = modelfile_check(chat, modelfile, self._chats(), begin_of_text(model, chat.tokenizer))
        other = other_copy(model, self.trained.tokenizer) if model.is_dir() else ""
        if other:
            prompts = Check("prompts", False, f"its {other} is not the policy's", prompts.figures)
        made_of = str(artifact.facts["facts"]["made_of"])
        if source is None or not source.proven:
            state = (
                "was not proven here" if source is None else "is not the policy" if source.failed else "is not proven"
            )
            passed = False if source and source.failed else None
            answers = Check("answers", passed, f"it is made of {made_of}, which {state}", {})
        else:
            answers = Check("answers", True, f"those of {made_of}, proven above; Ollama itself is not asked", {})
        return Proof(artifact.kind, artifact.folder, (weights, answers, prompts))

    def _load(self, artifact: Artifact, reference: Reference) -> Speech:
        model = models.load_model(str(artifact.folder), self.config.model)
        tokenizer = models.load_tokenizer(str(artifact.folder), self.config.model)
        speech = self._speech(model, chat_of(self.config, model, tokenizer), reference.spoken)
        _free(model)
        return speech

    def _weights(self, artifact: Artifact) -> Weights:
        if artifact.kind != "adapter":
            there = open_checkpoint(str(artifact.folder), self.config.model)
            found = self._merged.compare(there)
            if artifact.kind == "mxfp4" and not there.is_packed:
                found.wrong.append("its config.json does not say that it is in MXFP4")
            return found
        if self.trained.adapter is None:
            raise ExportError("the run trained all weights: there is no adapter to compare with")
        opened = open_adapter(artifact.folder)
        found = compare_adapters(self.trained.adapter, opened)
        named = tuple(opened.config.get(key) for key in ("base_model_name_or_path", "revision"))
        if named != (self.trained.base, self.trained.revision):
            found.wrong.append(f"it names the base {named[0]} ({named[1]}) in place of {self.trained.base}")
        return found

    @cached_property
    def _merged(self) -> Expected:
        return Expected(self.trained.weights, self.trained.adapter, self.config.model.trust_remote_code)

    def _is_right(self, adapter: Artifact) -> bool:
        try:
            return not self._weights(adapter).reasons()
        except ExportError:  # said where it is proven
            return False

    def _ollama_weights(self, folder: Path, modelfile: Modelfile) -> Weights:
        there = open_checkpoint(str(folder / modelfile.source), self.config.model)
        config = converter_config(self.trained.weights.config)
        if not modelfile.adapter or self.trained.adapter is None:
            return self._merged.compare(there, config)
        found = Expected(self.trained.weights, None, self.config.model.trust_remote_code).compare(there, config)
        adapter = compare_adapters(self.trained.adapter, open_adapter(folder / modelfile.adapter, "model.safetensors"))
        return adapter if adapter.wrong else found

    def _prompts(self, artifact: Artifact) -> Check:
        """Its chats, and what its files say for themselves about the end of an answer: vLLM goes by these."""
        if artifact.kind != "adapter":
            said = generation_difference(self.trained.weights.folder, artifact.folder)
            if said:
                return Check("prompts", False, said, {})
        return prompts_check(self.chat, self._chat(artifact), self._chats())

    def _chat(self, artifact: Artifact) -> Chat:
        """As who serves the artifact would render and end it."""
        if artifact.kind != "adapter":
            return unloaded_chat(self.config, str(artifact.folder))
        theirs = models.load_tokenizer(str(artifact.folder), self.config.model)
        return Chat(theirs, sorted(self.chat.end_ids - {self.chat.tokenizer.eos_token_id} | {theirs.eos_token_id}))

    def _chats(self) -> list[list[Message]]:
        """Prompts of held-out rows, those without tools: templates for Ollama know none."""
        return [row["prompt"] for row in self.rows[: 8 * PROMPTS] if not row.get("tools")]


def _free(model: Any) -> None:
    """Give a model's memory back now: what refers to it in circles would hold it until the next collection."""
    import torch

    for parameter in model.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
