"""The actor says what training will take before it loads anything, as the local backend does."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import tiny_qwen2

from lib.actor import Actor
from lib.config import parse_config
from lib.memory import limits
from lib.roles import ActorError
from lib.runfolder import open_run


def test_an_actor_on_a_machine_that_is_too_small_says_so_before_it_loads_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = {"outputs": str(tmp_path / "outputs"), "cache": str(tmp_path / "cache")}
    base = tiny_qwen2(tmp_path / "base")
    values = {"task": {"name": "decisions"}, "backend": "distributed", "model": {"name": str(base)}, "paths": paths}
    run = open_run("small", parse_config(values))
    run.write_rows("train", [{"id": "0", "prompt": [{"role": "user", "content": "2 + 2?"}]}])
    monkeypatch.setattr(limits, "machine", lambda: limits.Machine(2**20, "cpu"))
    monkeypatch.setattr("lib.models.load_model", lambda *_, **__: pytest.fail("it loads the model first"))
    with pytest.raises(ActorError, match=r"training needs .* and 0\.00 GiB of .* are free"):
        Actor(str(run.folder)).initialize()
