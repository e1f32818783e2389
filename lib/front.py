"""The guard in front of a served model: nobody without the token, and an answer where no model is named.

Owns both rules for whatever speaks ASGI: vLLM loads Front by `--middleware`, the server of Transformers wraps itself
in it. vLLM's own check looks at /v1 only: its /invocations would answer anybody. Must not know what is behind it.

    WORKBENCH_SERVE_PUBLIC=1 python -c "from lib.front import Front; print(Front(None))"
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from lib import WorkbenchError

TOKEN = "WORKBENCH_SERVE_TOKEN"
"""Environment variable: the bearer token that every request must carry."""
PUBLIC = "WORKBENCH_SERVE_PUBLIC"
"""Environment variable: 1 = anybody may ask, no token is looked at."""
DEFAULTS = "WORKBENCH_SERVE_DEFAULTS"
"""Environment variable: what a request says where it says nothing itself, as JSON: `model`, the id that answers."""

SHORTEST = 16
"""Characters of a token: a shorter one can be guessed."""
LARGEST = 16 * 2**20
"""Bytes of a request: more is no conversation."""
OPEN = ("/health",)
"""Paths that say nothing but whether the server is up."""

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class FrontError(WorkbenchError, ValueError):
    """The server must not start as it is configured; the message says what to change."""


def check_token(token: str, where: str = TOKEN) -> str:
    """The token, where it is one. Raises FrontError."""
    if len(token) < SHORTEST or not token.isascii() or any(letter.isspace() for letter in token):
        raise FrontError(
            f"{where}: at least {SHORTEST} ASCII characters without spaces (it has {len(token)} characters). "
            f'`python -c "import secrets; print(secrets.token_urlsafe(32))"` makes one'
        )
    return token


def front_environment(token: str | None, defaults: Mapping[str, Any]) -> dict[str, str]:
    """What a server's process needs for Front; token None = public."""
    return {TOKEN: token or "", PUBLIC: "0" if token else "1", DEFAULTS: json.dumps(defaults)}


class Front:
    """ASGI middleware. Where it finds neither a token nor the word that none is wanted, it raises FrontError."""

    def __init__(self, app: Any) -> None:
        self._app: App = app
        self._defaults: dict[str, Any] = json.loads(os.environ.get(DEFAULTS) or "{}")
        public = os.environ.get(PUBLIC) == "1"
        self._digest = None if public else _digest(check_token(os.environ.get(TOKEN, "")).encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        if scope["path"] not in OPEN and not self._knows(scope):
            if scope["type"] == "websocket":
                return await send({"type": "websocket.close", "code": 1008})
            return await refuse(send, 401, "the request carries no valid token: send Authorization: Bearer TOKEN")
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"].startswith("/v1/"):
            return await self._posted(scope, receive, send)
        await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        if self._digest is None:
            return True
        given = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
        scheme, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
        # Digests are compared, so that neither time nor length tells anything about the token.
        return hmac.compare_digest(_digest(token.strip()), self._digest) and scheme.lower() == b"bearer"

    async def _posted(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await _read(receive)
        if body is None:
            return await refuse(send, 413, f"a request has {LARGEST:,} bytes at most")
        whole = self._with_defaults(body)
        headers = [one for one in scope["headers"] if one[0].lower() not in (b"content-length", b"transfer-encoding")]
        scope = {**scope, "headers": [*headers, (b"content-length", str(len(whole)).encode())]}
        given = False

        async def again() -> Message:
            nonlocal given
            if given:
                return await receive()  # that the client has gone
            given = True
            return {"type": "http.request", "body": whole, "more_body": False}

        await self._app(scope, again, send)

    def _with_defaults(self, body: bytes) -> bytes:
        try:
            request = json.loads(body) if self._defaults else None
        except (ValueError, RecursionError):  # the server says what is wrong with it
            return body
        if not isinstance(request, dict):
            return body
        missing = {name: value for name, value in self._defaults.items() if request.get(name) in (None, "")}
        return json.dumps(request | missing).encode() if missing else body


async def refuse(send: Send, status: int, message: str, code: str | None = None) -> None:
    """Answer with an error in OpenAI's form."""
    body = json.dumps(error(status, message, code)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error(status: int, message: str, code: str | None = None, param: str | None = None) -> Mapping[str, Any]:
    """OpenAI's error object for an HTTP status."""
    kinds = {401: ("authentication_error", "invalid_api_key"), 404: ("not_found_error", "model_not_found")}
    kind, usual = kinds.get(status, ("server_error" if status >= 500 else "invalid_request_error", None))
    return {"error": {"message": message, "type": kind, "param": param, "code": code or usual}}


async def _read(receive: Receive) -> bytes | None:
    """The whole body; None where it is too long, or where the client has gone."""
    blocks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        blocks.append(message.get("body", b""))
        size += len(blocks[-1])
        if size > LARGEST:
            return None
        if not message.get("more_body"):
            return b"".join(blocks)


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
