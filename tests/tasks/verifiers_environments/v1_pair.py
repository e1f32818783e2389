"""An environment of the v1 API with two agents."""

import verifiers.v1 as vf
from v1_sums import SumTaskset


class PairTaskset(SumTaskset):
    pass


class PairConfig(vf.EnvConfig):
    asker: vf.AgentConfig = vf.AgentConfig()
    answerer: vf.AgentConfig = vf.AgentConfig()


class PairEnv(vf.Env[PairConfig]):
    async def run(self, task, agents):
        await agents.asker.run(task)
        await agents.answerer.run(task)


__all__ = ["PairEnv", "PairTaskset"]
