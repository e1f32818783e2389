"""The endpoint on Modal: keys and defaults of configs/serve.yaml. Which run is served there is no run's own affair."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import Field, field_validator, model_validator

from lib.config.section import Count, Section
from lib.gpu import NONE, parse_gpu


class ServeSection(Section):
    run: str = ""
    """A run on the outputs volume; "" = nothing is served."""
    artifact: str = ""
    """adapter, merged or mxfp4: one of the run's exports."""
    gpu: str = "L4"
    """`H100`, `A100-80GB`: one of them; or `none`, for a toy: Transformers serves it then."""
    idle_seconds: Annotated[int, Field(ge=2, le=3600)] = 300
    """How long a container that nobody asks stays, and is paid for; the next request then waits for a start."""
    containers: Count = 1
    """At most at a time: what asking costs has a limit."""
    concurrency: Annotated[int, Field(ge=1, le=1000)] = 64
    """Requests that one container answers at a time."""
    start_minutes: Annotated[int, Field(ge=1, le=60)] = 20
    """How long a container may take until the model is loaded."""
    public: bool = False
    """true = no token: whoever knows the URL may ask, at your expense."""
    secret: str = "serve-secret"
    """The Modal secret that sets WORKBENCH_SERVE_TOKEN."""

    @field_validator("gpu")
    @classmethod
    def _gpu(cls, gpu: str) -> str:
        asked = parse_gpu(gpu)
        if asked and asked.number > 1:
            raise ValueError(f"{gpu}: the endpoint's vLLM runs on one GPU; name a larger one")
        return str(asked or NONE)

    @field_validator("secret")
    @classmethod
    def _name(cls, secret: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", secret):
            raise ValueError("give the NAME of a Modal secret; a token itself never belongs in a config")
        return secret

    @model_validator(mode="after")
    def _whole(self) -> ServeSection:
        if bool(self.run) != bool(self.artifact):
            missing = "artifact" if self.run else "run"
            raise ValueError(f"{missing} is empty: name both, or neither where nothing is to be served")
        return self
