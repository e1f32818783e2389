"""A Hugging Face Hub on loopback that takes uploads: repositories, large files (LFS), commits, and refusals.

    with running_push_hub() as hub: ...  # hub.url, hub.repos

Tokens: "hf_writer_token" may write to owner/*, "hf_reader_token" may only read; others are not known.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WRITER, READER = "hf_writer_token", "hf_reader_token"
COMMIT = "d" * 40


@dataclass
class PushHub:
    url: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> file -> content."""
    private: dict[str, bool] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    """Their messages."""
    large: dict[str, bytes] = field(default_factory=dict)
    """What was uploaded apart, by its SHA-256."""


@contextmanager
def running_push_hub() -> Iterator[PushHub]:
    hub = PushHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _handler(hub: PushHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            repo = self.path.partition("?")[0].removeprefix("/api/models/").partition("/revision")[0]
            if repo not in hub.repos:
                return self.send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            files = [{"rfilename": name} for name in hub.repos[repo]]
            self.send(200, {"id": repo, "sha": COMMIT, "private": hub.private[repo], "siblings": files})

        def do_PUT(self) -> None:
            data = self.body()
            hub.large[hashlib.sha256(data).hexdigest()] = data
            self.send(200, {})

        def do_POST(self) -> None:
            data, path = self.body(), self.path.partition("?")[0]
            if path == "/api/validate-yaml":
                return self.send(200, {"errors": [], "warnings": []})
            if not self.may_write(path):
                return
            if path == "/api/repos/create":
                self.create(json.loads(data))
            elif "/preupload/" in path:
                modes = [self.mode(file["path"]) for file in json.loads(data)["files"]]
                self.send(200, {"files": modes})
            elif path.endswith("/info/lfs/objects/batch"):
                objects = [self.place(one) for one in json.loads(data)["objects"]]
                self.send(200, {"transfer": "basic", "objects": objects})
            elif "/commit/" in path:
                repo = path.removeprefix("/api/models/").partition("/commit/")[0]
                self.commit(repo, [json.loads(line) for line in data.decode().splitlines()])
            else:
                self.send(404, {})

        def may_write(self, path: str) -> bool:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if token == WRITER:
                return True
            status = 403 if token == READER else 401
            self.send(status, {"error": "You don't have the rights" if status == 403 else "Invalid credentials"})
            return False

        def create(self, asked: dict[str, Any]) -> None:
            repo = f"{asked.get('organization') or 'owner'}/{asked['name']}"
            if repo in hub.repos:
                return self.send(409, {"error": "You already created this model repo", "url": f"{hub.url}/{repo}"})
            hub.repos[repo], hub.private[repo] = {".gitattributes": b""}, asked.get("visibility") == "private"
            self.send(200, {"url": f"{hub.url}/{repo}", "name": repo})

        def mode(self, name: str) -> dict[str, Any]:
            large = name.endswith((".safetensors", ".gguf"))
            return {"path": name, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

        def place(self, one: dict[str, Any]) -> dict[str, Any]:
            return one | {"actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}", "header": {}}}}

        def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
            files = dict(hub.repos[repo])
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.large[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
                else:
                    hub.commits.append(value["summary"])
            hub.repos[repo] = files
            self.send(200, {"commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def send(self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            for name, text in {**(headers or {}), "Content-Type": "application/json"}.items():
                self.send_header(name, text)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler
