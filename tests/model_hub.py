"""A Hugging Face Hub on loopback that holds models, and models that it will not hand out.

with running_models({"acme/tiny": folder}, {"acme/gated": (401, "GatedRepo")}) as url: ...  # HF_ENDPOINT=url
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40


@contextmanager
def running_models(models: Mapping[str, Path], refused: Mapping[str, tuple[int, str]]) -> Iterator[str]:
    """The address of a Hub with these folders. `refused`: a status and the Hub's X-Error-Code; all else is unknown."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(models, refused))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _handler(models: Mapping[str, Path], refused: Mapping[str, tuple[int, str]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].removeprefix("/api/models")
            name = "/".join(path.split("/")[1:3])
            rest = path.removeprefix(f"/{name}")
            if name in models:
                self.serve(models[name], rest)
            elif name in refused and not self.path.startswith("/api/"):  # what a gated model holds, everybody may list
                status, code = refused[name]
                told = "Access is restricted and you are not in the authorized list." if status == 403 else "Restricted"
                self.send(status, b"", {"X-Error-Code": code, "X-Error-Message": told})
            else:
                self.send(404 if name in refused else 401, b"", {"X-Error-Code": "RepoNotFound"})

        def serve(self, folder: Path, rest: str) -> None:
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            name = rest.rpartition("/")[2]
            if rest.startswith("/tree/"):
                listed = [{"type": "file", "path": one, "size": len(files[one]), "oid": "0" * 40} for one in files]
                self.send(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})
            elif rest.startswith("/resolve/") and name in files:
                etag = hashlib.sha1(files[name]).hexdigest()
                self.send(200, files[name], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
            elif rest.startswith("/resolve/"):
                self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            else:
                about = {"id": "acme/x", "sha": COMMIT, "siblings": [{"rfilename": one} for one in files]}
                self.send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

        do_HEAD = do_GET

        def send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Handler
