"""Calls to a child process of one's own: the wire between the orchestrator and the roles on this machine.

Owns the wire (JSON lines over an inherited socket), what each way of failing is called, and that no child outlives its
parent. Must not know what is called: services, models, tasks.

In the child, `serve(make_service)`; in the parent, on its event loop:

    command = [sys.executable, "-m", "lib.rollout_worker", "settings.json"]
    client = await start(Child(name="worker-0", command=command, log=folder / "worker-0.log", deadline=300))
    turns = await client.call("generate", prompts, sampling, deadline=600)      # plain JSON in and out
    await client.close()                                 # service.close(), then the process and its own children end

`start` waits until make_service() has returned, as lib/program.py waits for every program. Calls run side by side: an
`async def` method of the service on the child's loop (it must not block it), a plain one on a thread. Every public
method can be called; `close` is called once, at the end. `progress("...")` in the child is a line in the parent's log.
RpcError.kind is the class of what the service raised, or one of KINDS; after those with `client.lost` set, all pending
calls have failed alike, the child and what it started are killed, and later calls fail at once. What a child writes to
stdout or stderr goes to its log file and never on the wire.

    python -c "import lib.rpc; print(lib.rpc.KINDS)"
"""

from lib.rpc.child import Service, progress, serve
from lib.rpc.client import KINDS, Child, Client, RpcError, start

__all__ = ["KINDS", "Child", "Client", "RpcError", "Service", "progress", "serve", "start"]
