"""Environments of the classic API (`load_environment`, Environment, Rubric): verifiers 0.1.5 to 0.3.1.

Owns what differs between those versions: arguments of `rollout`, where a score lies, how reward functions are listed.
Part of the child process of the task `verifiers`. Must not know transcripts.

    python -m pytest tests/tasks/test_verifiers.py -k classic
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import math
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import Any

from lib.tasks._verifiers_live import Endpoint, RefusedError, plain
from lib.tasks._verifiers_play import Example

_raised: ContextVar[dict[str, str] | None] = ContextVar("raised", default=None)
"""What reward functions raised while one rollout is scored: verifiers itself turns that into 0."""


class Classic:
    """One loaded environment."""

    def __init__(
        self, api: Any, module: ModuleType, request: Mapping[str, Any], facts: dict[str, Any], endpoint: Endpoint
    ):
        self._env = api.load_environment(module.__name__, **request["args"])
        if getattr(self._env, "message_type", "chat") != "chat":
            raise RefusedError("the environment completes plain text (message_type: completion): only chats are played")
        self._client = _client(endpoint)
        self._old = "input" not in inspect.signature(self._env.rollout).parameters
        self._weights = _watch(self._env.rubric)
        self._data = {"train": self._dataset("get_dataset"), "eval": self._dataset("get_eval_dataset")}
        held_out = any(getattr(self._env, name, None) is not None for name in ("eval_dataset", "eval_dataset_source"))
        sizes = {split: 0 if data is None else len(data) for split, data in self._data.items()}
        single = isinstance(self._env, api.SingleTurnEnv)
        self.facts = {**facts, "api": "classic", "single": single, "held_out": held_out, "sizes": sizes}
        self.facts["weights"] = dict(self._weights)

    def _dataset(self, method: str) -> Any:
        try:
            return getattr(self._env, method)()
        except ValueError:  # "dataset is not set": there are environments with held-out data only
            return None

    def examples(self, split: str, start: int, stop: int) -> list[Example]:
        """Rows of get_dataset or get_eval_dataset."""
        data = self._data[split]
        return [] if data is None else [_example(data[index], index) for index in range(start, min(stop, len(data)))]

    async def play(self, row: Mapping[str, Any], model: str) -> Any:
        """The state after the environment's own `rollout`."""
        given = json.loads(json.dumps(row["example"]))
        given["prompt"] = given.get("prompt") or json.loads(json.dumps(row["prompt"]))
        if not self._old:
            return await self._env.rollout(given, self._client, model, {})
        tools, info = getattr(self._env, "oai_tools", None), given.get("info") or {}
        info = json.loads(info) if isinstance(info, str) else info
        # What this version's own loop hands on of a row.
        given = {"prompt": given["prompt"], "answer": given.get("answer", ""), "task": given.get("task", "default")}
        given["info"] = {"oai_tools": tools, **info} if tools else info
        completion, state = await self._env.rollout(client=self._client, model=model, sampling_args={}, **given)
        return {"state": state, "given": given, "completion": completion}

    async def judge(self, played: Any) -> dict[str, Any]:
        """The rubric's verdict, and in `raised` what its reward functions raised, where verifiers puts 0."""
        error = played.get("error")
        if error is not None:
            cause = getattr(error, "__cause__", None)
            told = f"{type(error).__name__}: {error}" + (f" <- {type(cause).__name__}: {cause}" if cause else "")
            return {"reward": None, "notes": {"error": f"the rollout failed in the environment: {told}"}}
        raised: dict[str, str] = {}
        token = _raised.set(raised)
        try:
            reward, metrics = await self._scored(played)
        finally:
            _raised.reset(token)
        parts = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        notes = {"stop": played["stop_condition"]} if played.get("stop_condition") else {}
        if not math.isfinite(reward):
            return {"reward": None, "parts": parts, "notes": {"error": f"the reward is {reward}", **notes}}
        return {"reward": reward, "parts": parts, "notes": notes, "raised": raised}

    async def _scored(self, played: Any) -> tuple[float, dict[str, float]]:
        score = self._env.rubric.score_rollout
        if self._old:
            found = await score(completion=played["completion"], state=played["state"], **played["given"])
            return float(found.reward), {name: float(value) for name, value in found.metrics.items()}
        gate = {"score_sem": contextlib.nullcontext()} if "score_sem" in inspect.signature(score).parameters else {}
        await score(played, **gate)
        metrics = {name: float(value) for name, value in (played["metrics"] or {}).items()}
        cleanup = getattr(self._env.rubric, "cleanup", None)
        if cleanup is not None:
            await cleanup(played)
        return float(played["reward"]), metrics

    async def close(self) -> None:
        """The environment tears down at the exit of the process, as verifiers arranges it."""


def _client(endpoint: Endpoint) -> Any:
    """An OpenAI client of the version's own kind whose requests reach the endpoint without a connection."""
    openai: Any = importlib.import_module("openai")
    bases = [base for base in openai.DefaultAsyncHttpxClient.__mro__ if base.__name__ == "AsyncClient"]
    http: Any = importlib.import_module(bases[0].__module__.partition(".")[0])  # httpx, or httpx2 from openai 3 on

    async def answer(request: Any) -> Any:
        status, reply = await endpoint.answer(request.method, request.url.path, await request.aread())
        return http.Response(status, json=reply)

    direct = http.AsyncClient(transport=http.MockTransport(answer), timeout=None)
    client = openai.AsyncOpenAI(base_url=endpoint.url, api_key="none", http_client=direct, max_retries=0, timeout=None)
    try:
        clients: Any = importlib.import_module("verifiers.clients")
    except ModuleNotFoundError:  # until 0.1.9 environments take the client itself
        return client
    return clients.OpenAIChatCompletionsClient(client)


def _example(record: Mapping[str, Any], index: int) -> Example:
    data = {name: value for name, value in record.items() if value is not None}
    prompt = data.get("prompt")
    if not isinstance(prompt, list):
        raise RefusedError(f"row {index}: the prompt is no list of chat messages, but {type(prompt).__name__}")
    for name, value in data.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise RefusedError(f"row {index}: column {name!r} cannot be carried as JSON ({error})") from None
    messages = [plain(message) for message in prompt]
    if messages == prompt:
        del data["prompt"]
    info = data.get("info")
    named = [data.get("task"), info.get("env_id") if isinstance(info, Mapping) else None]  # of a group of environments
    category = next((name for name in named if isinstance(name, str) and name != "default"), "")
    return Example(messages, data, data.get("answer"), category)


# -- reward functions -------------------------------------------------------------------------------------------------


def _watch(rubric: Any) -> dict[str, float]:
    """Note what reward functions raise from now on; returns their weights by name.

    Raises RefusedError for rewards of groups, and where there are none.
    """
    weights: dict[str, float] = {}
    for one in _rubrics(rubric):
        functions: list[Callable[..., Any]] = one.funcs if hasattr(one, "funcs") else one.reward_funcs
        numbers: list[float] = one.weights if hasattr(one, "weights") else one.reward_weights
        for place, function in enumerate(functions):
            name = getattr(function, "__name__", repr(function))
            if hasattr(one, "_is_group_func") and one._is_group_func(function):
                raise RefusedError(
                    f"the reward function {name} scores a group of answers together: the workbench scores each answer "
                    f"by itself"
                )
            weights[name] = weights.get(name, 0.0) + float(numbers[place])
            functions[place] = _watched(function, name)
    if not any(weights.values()):
        raise RefusedError("the environment has no reward function with a weight: there is nothing to learn from")
    return weights


def _rubrics(rubric: Any) -> Iterator[Any]:
    """A rubric and those inside it: of groups of rubrics, and of groups of environments."""
    inner = [*getattr(rubric, "rubrics", ()), *(env.rubric for env in getattr(rubric, "env_map", {}).values())]
    yield rubric
    for one in inner:
        yield from _rubrics(one)


def _watched(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function itself to every look, but what it raises is noted."""

    def note(error: Exception) -> None:
        raised = _raised.get()
        if raised is not None:
            raised[name] = f"{type(error).__name__}: {error}"[:500]

    async def awaited(result: Awaitable[Any]) -> Any:
        try:
            return await result
        except Exception as error:  # noted, and passed on: the boundary is the rubric's
            note(error)
            raise

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
        except Exception as error:  # as above
            note(error)
            raise
        return awaited(result) if inspect.isawaitable(result) else result

    return watched
