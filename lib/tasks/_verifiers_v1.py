"""Tasksets of the v1 API (Taskset, Task, Env): verifiers 0.3 and later.

Owns the environment's config with one seat, the chat loop that plays it in this process (v1 would start a program for
every rollout), and where rewards lie. Part of the child process of the task `verifiers`. Must not know transcripts.

    python -m pytest tests/tasks/test_verifiers.py -k v1
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from types import ModuleType
from typing import Any

from lib.tasks._verifiers_live import Endpoint, RefusedError, plain
from lib.tasks._verifiers_play import Example

HARNESS = "workbench_verifiers_harness"
"""The module under whose name verifiers finds the chat loop."""
NO_KEY = "WORKBENCH_VERIFIERS_NO_KEY"
"""The environment variable with the endpoint's key: never set, it needs none."""


class V1:
    """One taskset with its environment, serving."""

    @classmethod
    async def start(
        cls, module: ModuleType, request: Mapping[str, Any], facts: dict[str, Any], endpoint: Endpoint
    ) -> V1:
        """Load it and bring up what its rollouts share. Raises RefusedError."""
        made = cls()
        try:
            loaders: Any = importlib.import_module("verifiers.v1.utils.loaders")
            agents: Any = importlib.import_module("verifiers.v1.agent")
        except ModuleNotFoundError:
            raise RefusedError(
                f"the v1 API of verifiers {facts['version']} is an early one: install verifiers 0.3.1 or later"
            ) from None
        sys.modules[HARNESS] = _harness_module()
        taskset = {"id": module.__name__, **request["args"]}
        seats = list(agents.agent_config_fields(loaders.resolve_env_config({"taskset": taskset})))
        if len(seats) != 1:
            raise RefusedError(f"the environment has several agents ({', '.join(seats)}): the workbench trains one")
        seat = {"harness": {"id": HARNESS}, "runtime": {"type": "subprocess"}}
        made._env = loaders.load_environment(loaders.resolve_env_config({"taskset": taskset, seats[0]: seat}))
        made._tasks, made._stream = [], iter(made._env.taskset)
        rows = request["rows"]
        if made._env.taskset.INFINITE and not rows:
            raise RefusedError("the taskset never ends: set task.max_rows to the number of rows to use")
        size = len(made._read(rows or None))
        made._stack = AsyncExitStack()
        await made._stack.enter_async_context(made._env.serving())
        made._context = _context(endpoint.url)
        made.facts = {**facts, "api": "v1", "single": False, "held_out": False, "sizes": {"train": size, "eval": 0}}
        made.facts["weights"] = made._weights()
        return made

    facts: dict[str, Any]
    _env: Any
    _tasks: list[Any]
    _stream: Iterator[Any]
    _stack: AsyncExitStack
    _context: Any

    def _read(self, count: int | None) -> list[Any]:
        """The first tasks of the stream, or all."""
        missing = None if count is None else max(0, count - len(self._tasks))
        self._tasks += itertools.islice(self._stream, missing)
        return self._tasks

    def _weights(self) -> dict[str, float]:
        rewards = [*self._tasks[0].hooks("reward"), *self._tasks[0].plugged_judges()] if self._tasks else []
        named = [(getattr(one, "__name__", None) or one.reward_name, one) for one in rewards]
        return {name: float(getattr(one, "_vf_weight", 1.0)) for name, one in named}

    def examples(self, split: str, start: int, stop: int) -> list[Example]:
        """Rows in the order of the taskset; there are no others than those of "train"."""
        chosen = enumerate(self._tasks[start:stop], start) if split == "train" else ()
        return [self._example(index, task) for index, task in chosen]

    def _example(self, index: int, task: Any) -> Example:
        answer = task.data.model_dump(mode="json").get("answer")
        return Example(_prompt(task.data), {"index": index, "hash": task.hash}, answer)

    async def play(self, row: Mapping[str, Any], model: str) -> Any:
        """The episode of a row."""
        import dataclasses

        index = row["example"]["index"]
        task = self._read(index + 1)[index]
        if task.hash != row["example"]["hash"]:
            raise RefusedError(f"row {index} of the taskset is not the one that was prepared: did its data change?")
        return await self._env.run_episode(task, dataclasses.replace(self._context, model=model))

    async def judge(self, played: Any) -> dict[str, Any]:
        """The rewards on the episode's one trace; an error anywhere makes it unscored."""
        errors = [*played.errors, *(error for trace in played.traces for error in trace.errors)]
        if errors or len(played.traces) != 1:
            told = "; ".join(f"{error.type}: {error.message}" for error in errors)
            return {"reward": None, "parts": {}, "notes": {"error": told or f"{len(played.traces)} traces, not one"}}
        trace = played.traces[0]
        rewards = {name: None if one is None else one.score for name, one in trace.rewards.items()}
        parts = {name: value if _finite(value) else None for name, value in {**trace.metrics, **rewards}.items()}
        if not rewards or None in rewards.values() or not math.isfinite(trace.reward):
            return {"reward": None, "parts": parts, "notes": {"error": f"the environment gave no reward: {rewards}"}}
        notes = {"stop": trace.stop_condition} if trace.stop_condition else {}
        return {"reward": float(trace.reward), "parts": parts, "notes": notes}

    async def close(self) -> None:
        """Tear down what the rollouts shared."""
        await self._stack.aclose()


def _context(url: str) -> Any:
    clients: Any = importlib.import_module("verifiers.v1.clients")
    config = clients.EvalClientConfig(base_url=url, api_key_var=NO_KEY)
    return clients.ModelContext(model="policy", client=config)


def _prompt(data: Any) -> list[dict[str, Any]] | None:
    """What the chat loop sends first; None = the environment opens the conversation."""
    if data.prompt is None:
        return None
    first = [{"role": "user", "content": data.prompt}] if isinstance(data.prompt, str) else _wire(data.prompt)
    system = [{"role": "system", "content": data.system_prompt}] if data.system_prompt else []
    return [plain(message) for message in [*system, *first]]


def _wire(messages: Any) -> list[dict[str, Any]]:
    chat: Any = importlib.import_module("verifiers.v1.dialects.chat")
    return [chat.message_to_wire(message) for message in messages]


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _harness_module() -> ModuleType:
    """A module with the chat loop as verifiers wants one: a Harness that calls the model and the task's tools."""
    harness: Any = importlib.import_module("verifiers.v1.harness")
    configs: Any = importlib.import_module("verifiers.v1.configs.harness")
    runtimes: Any = importlib.import_module("verifiers.v1.runtimes")
    client: list[Any] = []

    class ChatConfig(configs.HarnessConfig):  # type: ignore[misc]  # verifiers is not in the workbench's interpreter
        pass

    class Chat(harness.Harness[ChatConfig]):  # type: ignore[misc]  # as above
        APPENDS_SYSTEM_PROMPT = SUPPORTS_MCP = SUPPORTS_RESUME = True
        EXECUTES_CODE = NEEDS_CONTAINER = False

        async def launch(
            self,
            ctx: Any,
            trace: Any,
            runtime: Any,
            endpoint: str,
            secret: str,
            mcp_urls: dict[str, str],
            data: Any,
            tool_interception_url: str | None = None,
        ) -> Any:
            import httpx

            if not client:
                # Every waiting rollout holds a connection; none is kept, for verifiers' servers come and go.
                limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
                client.append(httpx.AsyncClient(timeout=None, limits=limits, verify=False, trust_env=False))
            body = {"model": ctx.model, "messages": _prompt(data) or []}
            async with AsyncExitStack() as stack:
                tools, call = await _tools(mcp_urls, self.config.tool_timeout, stack)
                if tools:
                    body["tools"] = tools
                await _chat(client[0], f"{endpoint}/chat/completions", secret, body, call)
            return runtimes.ProgramResult(exit_code=0, stdout="", stderr="")

    module = ModuleType(HARNESS)
    Chat.__module__ = ChatConfig.__module__ = HARNESS
    vars(module).update(Chat=Chat, ChatConfig=ChatConfig, __all__=["Chat"])
    return module


async def _chat(client: Any, url: str, secret: str, body: dict[str, Any], call: Any) -> None:
    """Ask for turns, and carry out their calls, until a turn has none or the context ends (400)."""
    while True:
        answered = await client.post(url, json=body, headers={"Authorization": f"Bearer {secret}"})
        if answered.status_code == 400:
            return
        answered.raise_for_status()
        message = answered.json()["choices"][0]["message"]
        body["messages"].append(plain(message))
        if not message.get("tool_calls"):
            return
        for one in message["tool_calls"]:
            said = await call(one["function"]["name"], one["function"]["arguments"])
            body["messages"].append({"role": "tool", "tool_call_id": one["id"], "content": said})


async def _tools(urls: dict[str, str], seconds: float, stack: AsyncExitStack) -> tuple[list[Any], Any]:
    """The tools of a rollout's servers, and what calls one; an error of a tool is what the model is told."""
    if not urls:
        return [], None
    try:
        mcp: Any = importlib.import_module("verifiers.v1.harnesses.utils.mcp")
    except ModuleNotFoundError:
        raise RefusedError("tools of a v1 taskset need verifiers 0.4 or later") from None
    config = {"mcpServers": {name: {"url": url, "timeout": seconds} for name, url in urls.items()}}
    tools, dispatch, servers = await mcp.connect_mcp(config, stack, set())

    async def call(name: str, arguments: str) -> str:
        try:
            found = await mcp.call_mcp(servers, dispatch, name, json.loads(arguments or "{}"))
        except Exception as error:  # as the loops that verifiers ships: the model is told
            return f"error: {error}"
        return plain({"role": "tool", "content": found})["content"]  # type: ignore[no-any-return]

    return tools, call
