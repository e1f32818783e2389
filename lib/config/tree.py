"""The whole tree, and its small sections: task, data, rewards, tracker, cost, Modal's containers, paths."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from lib.config.distributed import DistributedSection, RolesSection
from lib.config.evaluation import EvaluationSection
from lib.config.export import ExportSection
from lib.config.section import Positive, Section
from lib.config.training import LoraSection, ModelSection, SamplingSection, StarterSection, TrainingSection
from lib.config.verl import VerlSection, not_for_verl
from lib.gpu import NONE, parse_gpu
from lib.patience import SCORE_SECONDS, WORLD_SECONDS

SCHEMA = 1


class TaskSection(Section):
    """Which task, and the values of its fields (checked by `load_task`, not here)."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    name: Annotated[str, Field(min_length=1)]
    """A file name in lib/tasks, or the path of your own .py file."""

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataSection(Section):
    write_back: bool = False
    """Also write the converted tables beside their sources."""
    parquet: bool = False
    """Also write the rows as verl reads them (backend verl always does)."""


class RewardsSection(Section):
    max_unscored: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of rollouts that may stay unscored in one step, or one evaluation, before it stops."""
    world_seconds: Positive = WORLD_SECONDS
    """How long the task's world may take to answer; the rollout is then unscored. Counted anew whenever another one of
    the batch was answered, so that a queue that moves holds nobody up."""
    score_seconds: Positive = SCORE_SECONDS
    """The same for a score. A judge's repeats (task.judge.attempts x timeout) and its pauses have to fit."""


class TrackerSection(Section):
    name: Literal["none", "wandb", "trackio"] = "none"
    project: str = "grpo-workbench"
    run: str | None = None
    """None = the run's name."""


class CostSection(Section):
    budget_usd: Positive | None = None
    """Training stops after a checkpoint before the run's bill is over this; None = no limit."""
    prices: str = "configs/prices.yaml"
    """The dated price file."""


class ModalSection(Section):
    """The containers that a run gets on Modal."""

    gpu: str | tuple[str, ...] = "A100-40GB"
    """`H100`, `A100-80GB:4`, `none`; or several, tried in order."""
    cpu: Annotated[float, Field(ge=0.125, le=64)] = 8.0
    """Physical cores."""
    memory: Annotated[float, Field(ge=0.125, le=336)] = 32.0
    """GiB."""
    timeout: Annotated[float, Field(ge=0.005, le=24)] = 4.0
    """Hours that one attempt may take (Modal's limit is 24); the next attempt goes on from the last checkpoint."""
    retries: Annotated[int, Field(ge=0, le=10)] = 3
    """Attempts after the first that ran out of time or crashed; a preempted one does not count."""
    secrets: tuple[str, ...] = ()
    """Names of Modal secrets that the run needs."""
    packages: tuple[str, ...] = ()
    """More packages for the image, pinned: name==version."""
    roles: RolesSection = RolesSection()
    """`backend: distributed`: the containers of the actor and of each worker."""

    @field_validator("gpu")
    @classmethod
    def _gpu(cls, gpu: str | tuple[str, ...]) -> str | tuple[str, ...]:
        requests = (gpu,) if isinstance(gpu, str) else gpu
        parsed = [parse_gpu(text) for text in requests]
        if not parsed or (None in parsed and len(parsed) > 1) or len(set(parsed)) < len(parsed):
            raise ValueError(f"name one GPU, several different ones to try in order, or `{NONE}` alone")
        written = tuple(str(one) if one else NONE for one in parsed)
        return written[0] if len(written) == 1 else written

    @field_validator("packages")
    @classmethod
    def _pinned(cls, packages: tuple[str, ...]) -> tuple[str, ...]:
        pinned = re.compile(r"[A-Za-z0-9._-]+(\[[\w,-]+\])?==[\w.+!-]+")
        loose = [package for package in packages if not pinned.fullmatch(package)]
        if loose:
            raise ValueError(f"not pinned: {', '.join(loose)}. Write name==version: a rebuilt image is then the same")
        return packages

    @property
    def gpus(self) -> tuple[str, ...]:
        """The GPUs to ask for in order; () for none."""
        requests = (self.gpu,) if isinstance(self.gpu, str) else self.gpu
        return () if requests == (NONE,) else requests


class PathsSection(Section):
    outputs: str = "outputs"
    cache: str = "outputs/.cache"


class Config(Section):
    schema_version: int = Field(SCHEMA, alias="schema")
    task: TaskSection
    data: DataSection = DataSection()
    backend: Literal["local", "distributed", "verl"] = "local"
    where: Literal["here", "modal"] = "here"
    """modal = notebook 3 trains in a Modal container and this process follows it."""
    model: ModelSection = ModelSection()
    starter: StarterSection = StarterSection()
    lora: LoraSection = LoraSection()
    sampling: SamplingSection = SamplingSection()
    training: TrainingSection = TrainingSection()
    distributed: DistributedSection = DistributedSection()
    verl: VerlSection = VerlSection()
    rewards: RewardsSection = RewardsSection()
    evaluation: EvaluationSection = EvaluationSection()
    export: ExportSection = ExportSection()
    tracker: TrackerSection = TrackerSection()
    cost: CostSection = CostSection()
    modal: ModalSection = ModalSection()
    paths: PathsSection = PathsSection()
    _notes: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What was done to the file's own settings on the way, to be told beside the run."""
        return self._notes

    @field_validator("schema_version")
    @classmethod
    def _schema(cls, version: int) -> int:
        if version != SCHEMA:
            raise ValueError(f"this workbench reads schema {SCHEMA}; update it, or start a new run")
        return version

    @model_validator(mode="after")
    def _adapter_or_model(self) -> Config:
        if self.evaluation.adapter and self.evaluation.model:
            raise ValueError("evaluation.adapter and evaluation.model exclude each other: give one of them")
        if self.model.dtype == "float16" and not self.lora.enabled:
            raise ValueError("full fine-tuning of float16 weights is not stable: set model.dtype to float32 or auto")
        if self.model.quantization == "4bit" and not self.lora.enabled:
            raise ValueError("model.quantization 4bit can only be trained under an adapter: set lora.enabled to true")
        if self.lora.expert_parameters not in ("auto", ()) and self.lora.dropout:
            raise ValueError("lora.expert_parameters needs lora.dropout 0 (PEFT cannot drop out of bare tensors)")
        return self

    @model_validator(mode="after")
    def _roles_fit(self) -> Config:
        if self.backend != "distributed":
            return self
        ours, training = self.distributed, self.training
        window = training.passes_per_generation * training.iterations
        if window % training.accumulation:
            raise ValueError(
                f"backend distributed trains whole generation batches, and one feeds {window} passes "
                f"(steps_per_generation x iterations) while a step takes {training.accumulation}: set "
                f"training.steps_per_generation to a multiple of training.accumulation"
            )
        if ours.sync_method == "lora" and not self.lora.enabled:
            raise ValueError("distributed.sync_method lora needs lora.enabled: set it, or sync_method to reload")
        if ours.max_staleness is not None and ours.max_staleness < self.sync_lag:
            raise ValueError(
                f"distributed.sync_weights_every {ours.sync_weights_every} lets a worker's weights be {self.sync_lag} "
                f"steps old before anything is sampled, and max_staleness is {ours.max_staleness}: no batch could "
                f"ever be trained on. Sync more often, or raise max_staleness to at least {self.sync_lag}"
            )
        return self

    @model_validator(mode="after")
    def _fit_for_verl(self) -> Config:
        if self.backend == "verl":
            problems = list(not_for_verl(self.training, self.lora, self.model, self.sampling))
            if problems:
                raise ValueError("backend verl: " + "; ".join(problems))
        return self

    @property
    def as_served(self) -> Config:
        """This config with vLLM as what samples, whatever `sampling.engine` says: rollout workers are vLLM engines."""
        return self.model_copy(update={"sampling": self.sampling.model_copy(update={"engine": "vllm"})})

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps that one generation batch feeds (backends distributed and verl: a whole number)."""
        return self.training.passes_per_generation * self.training.iterations // self.training.accumulation

    @property
    def sync_lag(self) -> int:
        """Optimizer steps that have been done since the last sync, at most, when sampling begins."""
        steps = self.steps_per_batch
        return (-(-self.distributed.sync_weights_every // steps) - 1) * steps

    def as_json(self) -> dict[str, Any]:
        """The resolved config as plain JSON values, as `config.json` holds it."""
        return self.model_dump(mode="json", by_alias=True)
