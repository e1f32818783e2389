"""The actor: TRL's trainer in a process of its own, asked for one step after the other.

Owns the trainer's thread and the client's side of it. Must not know tasks, rollouts, or where processes run. Optimizer,
scheduler, clipping, KL, losses and accumulation are TRL's.

    client = await lib.rpc.start(Child(name="actor", command=command(run.folder), log=log))
    actor = RemoteActor(client, config)                             # a lib.roles.ActorRole
    state = await actor.initialize()

    python -m lib.actor outputs/decisions                           # as a child of lib.rpc
"""

from lib.actor.client import RemoteActor, command
from lib.actor.service import Actor

__all__ = ["Actor", "RemoteActor", "command"]
