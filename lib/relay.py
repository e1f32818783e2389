"""An ASGI app that hands every request to a server on this machine's loopback, and its answer back as it comes.

Owns the way in between, so that the server itself never listens beyond its container. Must not know what is asked.

    python -c "from lib.relay import Relay; print(Relay(8000, print))"
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING

from lib.front import Message, Receive, Scope, Send, refuse
from lib.hosts import LOOPBACK

if TYPE_CHECKING:
    import aiohttp

_OF_ONE_HOP = {
    b"connection",
    b"keep-alive",
    b"transfer-encoding",
    b"content-length",
    b"te",
    b"trailer",
    b"upgrade",
    b"host",
}
"""Headers that are about one connection (RFC 9110, 7.6.1)."""


class Relay:
    """`on_lost` is called when the server cannot be reached: it has ended."""

    def __init__(self, port: int, on_lost: Callable[[], Awaitable[None]]) -> None:
        self._url, self._on_lost = f"http://{LOOPBACK}:{port}", on_lost
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        import aiohttp

        if scope["type"] == "lifespan":
            return await self._live(receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        if not scope["path"].startswith("/"):  # behind the port it would be read as another host
            return await refuse(send, 400, "the request's path does not begin with /")
        if self._session is None:  # it belongs to the loop that asks first
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False)
        try:
            await self._hand_on(self._session, scope, receive, send)
        except aiohttp.ClientConnectorError:
            await self._on_lost()
            await refuse(send, 503, "the model's server has ended; the next request starts another one")

    async def _hand_on(self, session: aiohttp.ClientSession, scope: Scope, receive: Receive, send: Send) -> None:
        query = f"?{scope['query_string'].decode()}" if scope["query_string"] else ""
        headers = [(name.decode(), value.decode("latin-1")) for name, value in _handed(scope["headers"])]
        body = _body(receive) if scope["method"] not in ("GET", "HEAD", "OPTIONS") else None
        url = self._url + scope["path"] + query
        async with session.request(scope["method"], url, headers=headers, data=body, allow_redirects=False) as answer:
            await send({"type": "http.response.start", "status": answer.status, "headers": _handed(answer.raw_headers)})
            async for block in answer.content.iter_any():
                await send({"type": "http.response.body", "body": block, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            what = (await receive())["type"]
            if what == "lifespan.shutdown" and self._session is not None:
                await self._session.close()
            await send({"type": f"{what}.complete"})
            if what == "lifespan.shutdown":
                return


def _handed(headers: list[tuple[bytes, bytes]] | tuple[tuple[bytes, bytes], ...]) -> list[tuple[bytes, bytes]]:
    return [(name, value) for name, value in headers if name.lower() not in _OF_ONE_HOP]


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionError("the caller has gone")
        yield message.get("body", b"")
        if not message.get("more_body"):
            return
