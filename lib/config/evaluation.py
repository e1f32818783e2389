"""What is evaluated, and whom it is asked: keys and defaults of `evaluation`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from lib.config.section import Count, Positive, Section


class EndpointSection(Section):
    """A model behind an OpenAI-compatible URL; "" = none."""

    base_url: str = ""
    """http://127.0.0.1:8000/v1, say."""
    model: str = ""
    """The id that is sent."""
    key: str = ""
    """The NAME of the environment variable that holds the key; "" = no key."""
    beside_base: bool = False
    """True = compare it with the base of the config, which is loaded here; False = no weights are loaded here."""
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
    quantized: Literal["mxfp4", "4bit"] | None = None
    """Also evaluate the base and the result with the base's weights held so (as model.quantization says), on the same
    rows: what quantization costs. An export in MXFP4 is evaluated by its folder, as `model`."""
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
        if self.quantized and (self.runs or self.endpoint.base_url):
            other = "runs" if self.runs else "endpoint"
            raise ValueError(f"evaluation.quantized and evaluation.{other} exclude each other: give one of them")
        if self.endpoint.base_url and (self.runs or self.adapter or self.model):
            other = "runs" if self.runs else "adapter" if self.adapter else "model"
            raise ValueError(f"evaluation.endpoint and evaluation.{other} exclude each other: give one of them")
        return self
