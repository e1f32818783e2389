"""What leaves a run, and where it goes: keys and defaults of `export`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from lib.config.section import Positive, Section

ArtifactKind = Literal["adapter", "merged", "mxfp4", "gguf", "gguf-adapter", "ollama"]
"""adapter: the LoRA tensors. merged: a whole model. mxfp4: the same with packed experts (gpt-oss). gguf, gguf-adapter:
the merged model, or the adapter, for llama.cpp and Ollama. ollama: a folder with a Modelfile, made of the first of
gguf, mxfp4, merged, gguf-adapter and adapter that is among the artifacts."""


class HubSection(Section):
    """Pushing to the Hugging Face Hub; the token is HF_TOKEN, an environment variable, and never stands in a config."""

    push: bool = False
    artifact: ArtifactKind = "merged"
    """Which of `artifacts` is pushed."""
    repo: str = ""
    """owner/name; "" = the environment variable HF_REPO_ID."""
    private: bool = True
    """Of a repository that is made by the push; one that is there keeps what it is."""


class ExportSection(Section):
    artifacts: Annotated[tuple[ArtifactKind, ...], Field(min_length=1)] = ("adapter", "merged")
    dtype: Literal["bfloat16", "base"] = "bfloat16"
    """Of the merged weights; base = as the base's file stores each. Merging itself is done in the base's type."""
    shard_gb: Positive = 5.0
    """Size of a weights file at most, in GB of 10^9 bytes; a larger tensor has a file of its own."""
    llama_cpp: str = ""
    """The folder of llama.cpp's converters, for gguf; "" = the environment variable LLAMA_CPP."""
    gguf_type: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto"
    """Of the weights in a GGUF file; auto = the converter's choice."""
    hub: HubSection = HubSection()

    @field_validator("artifacts")
    @classmethod
    def _each_once(cls, artifacts: tuple[ArtifactKind, ...]) -> tuple[ArtifactKind, ...]:
        if len(set(artifacts)) < len(artifacts):
            raise ValueError(f"name each artifact once (given: {', '.join(artifacts)})")
        return artifacts

    @model_validator(mode="after")
    def _gguf_has_a_source(self) -> ExportSection:
        if "gguf" in self.artifacts and not {"merged", "mxfp4"} & set(self.artifacts):
            raise ValueError("export.artifacts: gguf is converted from merged, or from mxfp4: add one of them")
        return self

    @model_validator(mode="after")
    def _ollama_has_a_source(self) -> ExportSection:
        if self.artifacts == ("ollama",):
            raise ValueError(
                "export.artifacts: a Modelfile is made of another artifact: add merged (gpt-oss: mxfp4) or gguf"
            )
        if self.hub.artifact == "ollama":
            raise ValueError(
                "export.hub.artifact: an Ollama folder is not pushed; push the artifact that it is made of"
            )
        return self

    @model_validator(mode="after")
    def _pushed_is_made(self) -> ExportSection:
        if self.hub.push and self.hub.artifact not in self.artifacts:
            raise ValueError(
                f"export.hub.artifact {self.hub.artifact} is not made: add it to export.artifacts "
                f"({', '.join(self.artifacts)}), or push one of these"
            )
        return self
