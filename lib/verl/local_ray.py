"""A Ray of the run's own, on this machine: heard on loopback only, and started however busy the machine is.

Owns the ports of Ray's helpers. Must not know verl.

    build/verl/bin/python -c "from lib.verl.local_ray import fix_ports, stay_here; fix_ports(); stay_here()"
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any

LOOPBACK = "127.0.0.1"

_PORTS = ("metrics_agent_port", "metrics_export_port", "dashboard_agent_listen_port", "runtime_env_agent_port")


def fix_ports() -> None:
    """Name the ports of Ray's helpers before it starts: to be called before `ray.init`.

    A raylet gives its helpers 15 s to tell their ports, and dies (ray-project/ray#65983); for ports that are given it
    does not wait.
    """
    from ray._private import parameter

    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.create_server((LOOPBACK, 0))) for _ in _PORTS]
        ports = {name: one.getsockname()[1] for name, one in zip(_PORTS, free, strict=True)}
    plain: Any = parameter.RayParams

    class Params(plain):  # type: ignore[misc]
        def __init__(self, **given: Any) -> None:
            super().__init__(**given | ports)

    parameter.RayParams = Params


def stay_here() -> None:
    """Have Ray listen on loopback only: to be called before `ray.init` with `_node_ip_address=LOOPBACK`.

    Given that address, Ray takes the machine's own in its place, for clusters, and then listens on all of them.
    """
    from ray._private import services

    services.resolve_ip_for_localhost = lambda host: host
