"""A taskset of the v1 API with a tool, which verifiers serves from a process of its own."""

import verifiers.v1 as vf


class AddToolset(vf.Toolset[vf.ToolsetConfig]):
    @vf.tool
    async def add(self, a: int, b: int) -> str:
        """Add two numbers."""
        return str(a + b)


class ToolData(vf.TaskData):
    answer: str


class ToolTask(vf.Task[ToolData, vf.State, vf.TaskConfig]):
    @classmethod
    def toolsets(cls, config):
        return [AddToolset(vf.ToolsetConfig())]

    @vf.reward
    async def right(self, trace) -> float:
        return float(self.data.answer in (trace.last_reply or ""))


class ToolTaskset(vf.Taskset[ToolTask, vf.TasksetConfig]):
    def load(self):
        for i in range(4):
            yield ToolTask(ToolData(prompt=f"What is {i} + 7?", answer=str(i + 7)), self.config.task)


__all__ = ["AddToolset", "ToolTaskset"]

if __name__ == "__main__":
    AddToolset.run()
