"""The guard in front of a served model, around an app that says what reached it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from lib.front import DEFAULTS, LARGEST, PUBLIC, TOKEN, Front, FrontError, front_environment

SECRET = "a-token-of-the-tests-51c2"


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body that reached it."""
    if scope["type"] == "http":
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        assert int(length) == len(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})


def ask(front: Front, path: str, body: bytes = b"", *headers: tuple[str, str], kind: str = "http") -> tuple[int, bytes]:
    """(status, or the code that a websocket was closed with; body)."""
    sent: list[dict[str, Any]] = []
    half = len(body) // 2
    blocks = [{"body": body[:half], "more_body": True}, {"body": body[half:], "more_body": False}]

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", **blocks.pop(0)}

    async def send(message: Any) -> None:
        sent.append(message)

    written = [(name.encode(), value.encode()) for name, value in headers]
    length = [(b"content-length", str(len(body)).encode())]
    scope = {"type": kind, "method": "POST", "path": path, "headers": [*written, *length]}
    asyncio.run(front(scope, receive, send))
    return sent[0].get("status", sent[0].get("code")), b"".join(message.get("body", b"") for message in sent)


@pytest.fixture
def front(monkeypatch: pytest.MonkeyPatch) -> Front:
    for name, value in front_environment(SECRET, {"model": "mine", "reasoning_effort": "low"}).items():
        monkeypatch.setenv(name, value)
    return Front(echo)


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_token_opens(front: Front, scheme: str) -> None:
    assert ask(front, "/v1/models", b"", ("authorization", f"{scheme} {SECRET}"))[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        (), (("authorization", ""),), (("authorization", SECRET),), (("authorization", f"Basic {SECRET}"),),
        (("authorization", "Bearer "),), (("authorization", f"Bearer {SECRET}x"),),
        (("authorization", f"Bearer {SECRET[:-1]}"),), (("authorization", f"Bearer {SECRET.upper()}"),),
        (("authorization", f"Bearer {SECRET}"), ("authorization", "Bearer other")), (("x-api-key", SECRET),),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/invocations", "/", "//health", "/health/", "/health/../v1"])
def test_nothing_else_does_on_any_path(front: Front, headers: tuple[tuple[str, str], ...], path: str) -> None:
    status, body = ask(front, path, b"{}", *headers)
    assert status == 401 and json.loads(body)["error"]["code"] == "invalid_api_key"


def test_whether_it_is_up_is_no_secret_and_a_websocket_is_closed(front: Front) -> None:
    assert ask(front, "/health")[0] == 200
    assert ask(front, "/v1/realtime", kind="websocket")[0] == 1008


@pytest.mark.parametrize(
    ("sent", "reached"),
    [
        ({"messages": []}, {"messages": [], "model": "mine", "reasoning_effort": "low"}),
        ({"model": ""}, {"model": "mine", "reasoning_effort": "low"}),
        ({"model": None, "reasoning_effort": "high"}, {"model": "mine", "reasoning_effort": "high"}),
        ({"model": "other", "ä": "ö\ud800"}, {"model": "other", "ä": "ö\ud800", "reasoning_effort": "low"}),
        ([1], [1]),
    ],
)
def test_what_a_request_leaves_out_is_filled_in(front: Front, sent: Any, reached: Any) -> None:
    key = ("authorization", f"Bearer {SECRET}")
    assert json.loads(ask(front, "/v1/chat/completions", json.dumps(sent).encode(), key)[1]) == reached


def test_what_is_no_json_reaches_the_server_as_it_is_and_what_is_too_long_does_not(front: Front) -> None:
    key = ("authorization", f"Bearer {SECRET}")
    for body in (b"", b"{", b"\xff\xfe", b"[" * 100_000):
        assert ask(front, "/v1/chat/completions", body, key) == (200, body)
    assert ask(front, "/v1/chat/completions", b" " * (LARGEST + 1), key)[0] == 413


@pytest.mark.parametrize("token", ["", "short", "with a space in the middle", "ä" * 20])
def test_it_does_not_start_without_a_good_token_unless_it_is_public(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(TOKEN, token)
    monkeypatch.setenv(DEFAULTS, "")
    for public in ("", "0", "true"):
        monkeypatch.setenv(PUBLIC, public)
        with pytest.raises(FrontError, match=f"{TOKEN}: at least 16 ASCII"):
            Front(echo)
    monkeypatch.setenv(PUBLIC, "1")
    assert ask(Front(echo), "/v1/models")[0] == 200
