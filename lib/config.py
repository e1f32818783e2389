"""The config: one tree, every default once, and checks that say what to change.

Owns names, defaults and impossible combinations. Must not know any implementation.

    python -c "from lib.config import load_config; print(load_config('configs/decisions.yaml').training.learning_rate)"
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lib import PROJECT_ROOT, WorkbenchError
from lib.gpu import NONE, parse_gpu
from lib.places import locate
from lib.task import describe_invalid, nearest

SCHEMA = 1

Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]


class ConfigError(WorkbenchError, ValueError):
    """The config cannot be used as given; the message says what to change."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class TaskSection(Section):
    """Which task, and the values of its fields (checked by `load_task`, not here)."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    name: str
    """A file name in lib/tasks, or the path of your own .py file."""

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataSection(Section):
    write_back: bool = False
    """Also write the converted tables beside their sources."""


class ModelSection(Section):
    name: str = "starter"
    """`starter` (a toy made on this machine), a Hugging Face id, or a folder."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto = float32 on a CPU, bfloat16 on a GPU."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = "auto"
    gradient_checkpointing: bool | None = None
    """None = on where there is a GPU; it costs time and saves nothing on tiny models."""
    liger: bool = False
    trust_remote_code: bool = False


class StarterSection(Section):
    """The embedded toy policy: a small chat model built from the task's own rows (lib/starter.py)."""

    kind: Literal["qwen2", "qwen3"] = "qwen2"
    steps: Count = 300
    seed: int | None = None
    """None = the training seed."""


class LoraSection(Section):
    enabled: bool = True
    """False = full fine-tuning."""
    r: Count = 16
    alpha: Count = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: str | tuple[str, ...] = "all-linear"
    expert_parameters: Literal["auto"] | tuple[str, ...] = "auto"
    """auto = the expert tensors of mixture-of-experts models, which all-linear does not reach; [] = none."""


class SamplingSection(Section):
    """How the policy answers while it is trained."""

    engine: Literal["hf", "vllm"] = "hf"
    prompt_limit: Count = 512
    """Longer prompts (tokens) are dropped and counted."""
    completion_limit: Count = 512
    """Tokens an answer may have; a longer one counts as cut off."""
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0


class TrainingSection(Section):
    steps: int = -1
    """Optimizer steps; -1 = as many as `epochs` needs."""
    epochs: Positive = 1.0
    learning_rate: Positive = 1e-6
    warmup: Annotated[float, Field(ge=0)] = 0.0
    """Steps, or below 1 a share of all steps."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "linear"
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Positive = 1.0
    batch: Count = 8
    """Completions in one forward and backward pass on one device."""
    accumulation: Count = 1
    group_size: int = 8
    """Completions per prompt."""
    steps_per_generation: Count | None = None
    """Passes that one sampling feeds; None = `accumulation`."""
    iterations: Count = 1
    """Optimisation passes over the same samples."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL term."""
    loss_type: Literal["grpo", "dapo", "bnpo", "dr_grpo", "luspo", "cispo"] = "dapo"
    clip_low: Positive = 0.2
    clip_high: Positive | None = None
    """None = the same as clip_low."""
    reward_scaling: Literal["group", "batch", "none"] = "group"
    save_steps: Count = 100
    seed: int = 0
    completions_csv: str | None = None
    """Also write every completion to this CSV (relative to the run folder)."""

    @field_validator("steps")
    @classmethod
    def _steps(cls, steps: int) -> int:
        if steps != -1 and steps < 1:
            raise ValueError("give a number of steps, or -1 for as many as `epochs` needs")
        return steps

    @field_validator("group_size")
    @classmethod
    def _group_size(cls, size: int) -> int:
        if size < 2:
            raise ValueError("a group needs at least 2 completions: with one there is nothing to compare it with")
        return size

    @property
    def passes_per_generation(self) -> int:
        return self.steps_per_generation or self.accumulation

    @model_validator(mode="after")
    def _loss_fits(self) -> TrainingSection:
        if self.loss_type == "cispo" and (self.clip_high is None or self.clip_high < 1):
            raise ValueError(
                "loss_type cispo takes clip_high as an absolute cap of the ratio: set clip_high to about 5"
            )
        return self

    @model_validator(mode="after")
    def _groups_fit(self) -> TrainingSection:
        completions = self.batch * self.passes_per_generation
        if completions % self.group_size:
            raise ValueError(
                f"batch x steps_per_generation = {self.batch} x {self.passes_per_generation} = {completions} is not "
                f"divisible by group_size {self.group_size}: set training.batch to a multiple of {self.group_size}, or "
                f"group_size to a divisor of {completions}"
            )
        window = self.passes_per_generation * self.iterations
        if (self.save_steps * self.accumulation) % window:
            raise ValueError(
                f"save_steps {self.save_steps} falls inside a generation (one sampling feeds {window} passes, one step "
                f"takes {self.accumulation}): a resumed run would differ. Set save_steps to a multiple of "
                f"{window // math.gcd(window, self.accumulation)}"
            )
        return self


class RewardsSection(Section):
    max_unscored: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of rollouts that may stay unscored in one step, or one evaluation, before it stops."""


class EndpointSection(Section):
    """A model behind an OpenAI-compatible URL; "" = none."""

    base_url: str = ""
    """http://127.0.0.1:8000/v1, say."""
    model: str = ""
    """The id that is sent."""
    key: str = ""
    """The NAME of the environment variable that holds the key; "" = no key."""
    beside_base: bool = True
    """False = evaluate this model alone: no weights are loaded here."""
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 16
    """Requests in flight at most."""
    timeout: Positive = 120.0
    """Seconds for one request."""
    attempts: Count = 5
    """HTTP requests for one answer at most."""
    max_tokens: Count | None = None
    """Of one answer, thinking included; None = sampling.completion_limit."""

    @field_validator("base_url")
    @classmethod
    def _whole_url(cls, base_url: str) -> str:
        parts = urlsplit(base_url)
        if base_url and (parts.scheme not in ("http", "https") or not parts.hostname or "@" in parts.netloc):
            raise ValueError("give an address like http://127.0.0.1:8000/v1, without a name or password in it")
        return base_url.rstrip("/")

    @model_validator(mode="after")  # of the whole, so that what stands under `key` is never shown
    def _consistent(self) -> EndpointSection:
        if self.key and not re.fullmatch(r"[A-Z][A-Z0-9_]*", self.key):
            raise ValueError(
                "evaluation.endpoint.key: give the NAME of the environment variable that holds the key (capitals, "
                "digits and _), OPENAI_API_KEY say; a key itself never belongs in a config"
            )
        if bool(self.base_url) != bool(self.model):
            missing = "model" if self.base_url else "base_url"
            raise ValueError(f"evaluation.endpoint.{missing} is needed too: base_url and model go together")
        return self


class EvaluationSection(Section):
    rows: Annotated[int, Field(ge=0)] = 512
    """Held-out rows to use; 0 = all."""
    samples: Count = 1
    """Answers per row when sampling."""
    temperature: Positive = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    greedy: bool = True
    """Also compare the most likely answers."""
    checkpoints: bool = True
    """Also evaluate every checkpoint of the run."""
    batch: Count = 256
    seed: int = 0
    adapter: str | None = None
    """Evaluate this adapter (folder or Hub id) instead of the run's own."""
    model: str | None = None
    """Evaluate this whole model (folder or Hub id) instead of the run's own."""
    prompts: str | None = None
    """Take the rows from this JSONL file of rows instead of the run's held-out ones."""
    runs: tuple[str, ...] = ()
    """Names of runs under paths.outputs, members of a sweep say: compare their results instead of this run's own."""

    endpoint: EndpointSection = EndpointSection()
    """Evaluate the model behind this URL instead of the run's own."""

    @field_validator("runs", mode="before")
    @classmethod
    def _is_a_list(cls, runs: Any) -> Any:
        if isinstance(runs, str):
            raise ValueError(f"give a list of run names: [{runs}]")
        return runs

    @field_validator("runs")
    @classmethod
    def _told_apart(cls, runs: tuple[str, ...]) -> tuple[str, ...]:
        if "base" in runs:
            raise ValueError("a run named 'base' cannot be told from the base policy: copy its folder to another name")
        twice = sorted({name for name in runs if runs.count(name) > 1})
        if twice:
            raise ValueError(f"named twice: {', '.join(twice)}. Name every run once")
        return runs

    @model_validator(mode="after")
    def _runs_or_weights(self) -> EvaluationSection:
        if self.runs and (self.adapter or self.model):
            other = "adapter" if self.adapter else "model"
            raise ValueError(f"evaluation.runs and evaluation.{other} exclude each other: give one of them")
        if self.endpoint.base_url and (self.runs or self.adapter or self.model):
            other = "runs" if self.runs else "adapter" if self.adapter else "model"
            raise ValueError(f"evaluation.endpoint and evaluation.{other} exclude each other: give one of them")
        return self


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
    backend: Literal["local"] = "local"
    where: Literal["here", "modal"] = "here"
    """modal = notebook 3 trains in a Modal container and this process follows it."""
    model: ModelSection = ModelSection()
    starter: StarterSection = StarterSection()
    lora: LoraSection = LoraSection()
    sampling: SamplingSection = SamplingSection()
    training: TrainingSection = TrainingSection()
    rewards: RewardsSection = RewardsSection()
    evaluation: EvaluationSection = EvaluationSection()
    tracker: TrackerSection = TrackerSection()
    cost: CostSection = CostSection()
    modal: ModalSection = ModalSection()
    paths: PathsSection = PathsSection()

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
        if self.lora.expert_parameters not in ("auto", ()) and self.lora.dropout:
            raise ValueError("lora.expert_parameters needs lora.dropout 0 (PEFT cannot drop out of bare tensors)")
        return self

    def as_json(self) -> dict[str, Any]:
        """The resolved config as plain JSON values, as `config.json` holds it."""
        return self.model_dump(mode="json", by_alias=True)


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """defaults < YAML file < overrides (`{"training.steps": 2}` or nested). Raises ConfigError."""
    if overrides is not None and not isinstance(overrides, Mapping):
        raise ConfigError(
            f"overrides must be a mapping, not {'the text ' * isinstance(overrides, str)}{overrides!r}. "
            f"With plain papermill: "
            f"-y 'overrides: {{training.steps: 2}}'"
        )
    values = _read_yaml(locate(path))
    for key, value in (overrides or {}).items():
        _set(values, str(key).split("."), copy.deepcopy(value))
    return parse_config(values, where=str(path))


def parse_config(values: Mapping[str, Any], where: str = "config") -> Config:
    """A config from plain values, with every problem named at once."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where} cannot be used:\n{describe_invalid(error, Config)}") from None


def check_key(key: str) -> None:
    """Refuse a dotted key that the config does not have, before a kernel starts. Task fields pass: load_task checks."""
    model: type[BaseModel] = Config
    for part in key.split("."):
        if model is TaskSection:
            return
        known = {field.alias or name: field for name, field in model.model_fields.items()}
        if part not in known:
            everywhere = {key.rsplit(".", 1)[-1]: key for key in known_keys()}
            hint = f" Did you mean {everywhere[key]!r}?" if key in everywhere else nearest(part, list(known))
            raise ConfigError(f"unknown parameter {key!r}.{hint}")
        inner = known[part].annotation
        model = inner if isinstance(inner, type) and issubclass(inner, BaseModel) else BaseModel


def known_keys() -> list[str]:
    """Every config key by its dotted name, task fields apart."""
    return _leaves(Config)


def _leaves(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section) and inner is not TaskSection:
            keys += _leaves(inner, f"{prefix}{name}.")
        else:
            keys.append(prefix + (field.alias or name))
    return keys


HOW_ASKED = frozenset(f"evaluation.endpoint.{name}" for name in ("key", "concurrency", "timeout", "attempts"))
"""Keys that decide how long a stage takes and never its result: they may change between its attempts."""

_MERGE = "tag:yaml.org,2002:merge"


class UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key given twice, where PyYAML would keep the last one without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)} is given twice, line {node.start_mark.line + 1} and after")
        return dict(super().construct_mapping(node, deep=deep))


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        known = sorted(str(p.relative_to(PROJECT_ROOT)) for p in (PROJECT_ROOT / "configs").rglob("*.yaml"))
        raise ConfigError(f"config not found: {path}.{nearest(path.name, known)}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeys)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 (byte {error.start}): save it as UTF-8") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping with at least `task: {{name: ...}}`")
    # A section whose keys are all commented out reads as nothing: it means its defaults.
    return {key: value for key, value in values.items() if value is not None or key not in Config.model_fields}


def _set(values: dict[str, Any], parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"{'.'.join(parts)}: {part} is not a section")
        values = inner
    if isinstance(value, Mapping) and isinstance(values.get(parts[-1]), dict):
        for key, item in value.items():
            _set(values, [parts[-1], str(key)], item)
    else:
        values[parts[-1]] = value
