"""A taskset of the v1 API for the tests: one turn, two rewards and a metric."""

import itertools
import sys

import verifiers.v1 as vf


class SumData(vf.TaskData):
    answer: str


class SumTask(vf.Task[SumData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=0.8)
    async def right(self, trace) -> float:
        reply = (trace.last_reply or "").strip()
        if reply == "raise":
            raise ConnectionError("the judge does not answer")
        if reply == "exit":
            sys.exit("enough")
        return float(reply == self.data.answer)

    @vf.reward(weight=0.2)
    async def short(self, trace) -> float:
        return float(len(trace.last_reply or "") < 6)

    @vf.metric
    async def length(self, trace) -> float:
        return float(len(trace.last_reply or ""))


class SumConfig(vf.TasksetConfig):
    n: int = 20
    shift: int = 0


class SumTaskset(vf.Taskset[SumTask, SumConfig]):
    def load(self):
        for i in range(self.config.n) if self.config.n else itertools.count():
            data = SumData(
                prompt=f"{i} + {i}?", system_prompt="Only the number.", answer=str(2 * i + self.config.shift)
            )
            yield SumTask(data, self.config.task)


class EndlessTaskset(SumTaskset):
    INFINITE = True


__all__ = ["SumTaskset"]
