"""A Hugging Face Hub on loopback that holds one dataset: what `datasets` and `huggingface_hub` ask of the real one.

with running_hub("mercor/ACE", {"README.md": b"...", "ACE-DIY.csv": b"..."}) as url: ...  # HF_ENDPOINT=url
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40


@contextmanager
def running_hub(dataset: str, files: Mapping[str, bytes]) -> Iterator[str]:
    """The address of a Hub with this dataset, in a thread of this process: its users are other processes."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(dataset, files))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def _handler(dataset: str, files: Mapping[str, bytes]) -> type[BaseHTTPRequestHandler]:
    hashes = {name: hashlib.sha1(data).hexdigest() for name, data in files.items()}
    listed = [{"type": "file", "path": name, "size": len(files[name]), "oid": hashes[name]} for name in files]
    about: dict[str, Any] = {"id": dataset, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "likes": 0}
    about["siblings"] = [{"rfilename": name} for name in files]
    answers = {f"/api/datasets/{dataset}{end}": about for end in ("", "/revision/main", f"/revision/{COMMIT}")}
    answers |= {f"/api/datasets/{dataset}/tree/{revision}": listed for revision in ("main", COMMIT)}  # type: ignore[dict-item]

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            name = path.rpartition("/")[2]
            if path.startswith(f"/datasets/{dataset}/resolve/") and name in files:
                self.send(200, files[name], {"ETag": f'"{hashes[name]}"', "X-Repo-Commit": COMMIT})
            elif path in answers:
                self.send(200, json.dumps(answers[path]).encode(), {})
            else:
                self.send(404, b"", {})

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
