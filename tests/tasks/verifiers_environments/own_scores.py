"""What verifiers itself gives to scripted answers: {kind: {question: [reward, metrics]}} of its own `generate`.

Knows nothing of the workbench. `python own_scores.py < {kind: {question: [first answer, ...], ...}}`; an answer that is
an object is a tool call {name, arguments}.
"""

import asyncio
import json
import sys

import httpx
import vf_sums
from openai import AsyncOpenAI

SCRIPTS = json.load(sys.stdin)


def answer(request: httpx.Request) -> httpx.Response:
    asked = json.loads(request.content)
    messages = asked["messages"]
    question = next(message["content"] for message in messages if message["role"] == "user")
    turn = sum(message["role"] == "assistant" for message in messages)
    said = SCRIPTS[asked["model"]][question][turn]
    message = {"role": "assistant", "content": said}
    if isinstance(said, dict):
        call = {"id": f"call-{turn}", "type": "function", "function": said}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}
    return httpx.Response(200, json=body)


async def scores(kind):
    environment = vf_sums.load_environment(kind)
    http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    client = AsyncOpenAI(base_url="http://policy/v1", api_key="none", http_client=http, max_retries=0)
    rows = environment.get_dataset()
    rows = rows.select([index for index, row in enumerate(rows) if row["question"] in SCRIPTS[kind]])
    if vf_sums.OLD:
        found = await environment.a_generate(rows, client=client, model=kind)
        metrics = [{name: values[index] for name, values in found.metrics.items()} for index in range(len(rows))]
        return dict(zip(rows["question"], map(list, zip(found.reward, metrics, strict=True)), strict=True))
    try:
        from verifiers.clients import OpenAIChatCompletionsClient

        client = OpenAIChatCompletionsClient(client)
    except ImportError:
        pass  # before 0.1.10
    found = await environment.generate(rows.to_list(), client=client, model=kind, independent_scoring=True)
    names = dict(zip(rows["example_id"], rows["question"], strict=True))
    outputs = found.get("outputs") or found["state"]
    return {names[one["example_id"]]: [one["reward"], one["metrics"]] for one in outputs}


if __name__ == "__main__":
    result = {kind: asyncio.run(scores(kind)) for kind in SCRIPTS}
    sys.stdout.write("\nRESULT " + json.dumps(result) + "\n")
