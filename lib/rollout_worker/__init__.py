"""The rollout worker: vLLM in a process of its own, asked for turns, given weights, made to prove them.

Owns the engine, its queue of calls, and the client's side of them. Must not know tasks or where processes run.

    client = await lib.rpc.start(
        Child(name="worker-0", command=command(settings), environment=environment(), log=log, advice=ADVICE)
    )
    worker = RemoteWorker(client)                                   # a lib.roles.Worker

    python -m lib.rollout_worker '{"run": "x", "model": "outputs/x/model"}'     # as a child of lib.rpc
"""

from lib.rollout_worker.client import RemoteWorker
from lib.rollout_worker.settings import EngineSettings, command, environment
from lib.rollout_worker.worker import RolloutWorker

__all__ = ["EngineSettings", "RemoteWorker", "RolloutWorker", "command", "environment"]
