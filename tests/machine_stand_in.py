"""What stands for verl's interpreter where a test is about Modal's containers: it listens and joins, without Ray.

As lib/verl/machine.py does, `head` listens until SIGTERM, and `join` waits for a head and ends with it. A manner makes
it fail: exits, deaf (alive, and does not listen), dies (a while after its start), stays (SIGTERM does not end it).
"""

from __future__ import annotations

import sys
from pathlib import Path

_PROGRAM = """#!{python}
import os, signal, socket, sys, time

MANNER = {manner!r}
assert sys.argv[1:3] == ["-m", "lib.verl.machine"], sys.argv
verb, *rest = sys.argv[3:]
signal.signal(signal.SIGTERM, signal.SIG_IGN if MANNER == "stays" else lambda *_: sys.exit(0))
print(verb, "starts with", os.environ["RAY_AUTH_TOKEN"], flush=True)
if MANNER == "exits":
    sys.exit("ValueError: Ray found no address of this machine")
if verb == "head":
    host, port = rest[rest.index("--address") + 1], int(rest[rest.index("--port") + 1])
    with socket.socket() if MANNER == "deaf" else socket.create_server((host, port)) as server:
        server.settimeout(0.5)
        until = time.monotonic() + (2.0 if MANNER == "dies" else 600.0)
        while time.monotonic() < until:
            if MANNER == "deaf":
                time.sleep(0.1)
                continue
            try:
                server.accept()[0].close()
            except TimeoutError:
                pass
    sys.exit("RuntimeError: the head lost its disk")
host, port = rest[0].split(":")
there, until = False, time.monotonic() + 20
while True:
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
        there = True
    except OSError:
        if there:
            sys.exit(0)
        if time.monotonic() > until:
            sys.exit("no Ray head answered")
    time.sleep(0.1)
"""


def write(path: Path, manner: str = "") -> Path:
    """The stand-in as a program at this path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_PROGRAM.format(python=sys.executable, manner=manner))
    path.chmod(0o755)
    return path
