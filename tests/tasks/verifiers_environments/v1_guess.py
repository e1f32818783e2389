"""A game of several turns in the v1 API: the environment is the user, and opens the conversation where `opens`."""

import verifiers.v1 as vf


class GuessData(vf.TaskData):
    answer: int


class GuessTask(vf.Task[GuessData, vf.State, vf.TaskConfig]):
    pass


class GuessEnvConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class GuessEnv(vf.Env[GuessEnvConfig]):
    async def run(self, task, agents):
        won = 0.0
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn(None if task.data.prompt else "Guess my number.")
            while not segment.terminated:
                guess = segment.last_reply
                if guess == str(task.data.answer):
                    won = 1.0
                    break
                hint = "no number" if not guess.isdigit() else "higher" if int(guess) < task.data.answer else "lower"
                segment = await interaction.turn(hint)
        interaction.trace.record_reward("won", won, 1.0)


class GuessConfig(vf.TasksetConfig):
    opens: bool = False


class GuessTaskset(vf.Taskset[GuessTask, GuessConfig]):
    def load(self):
        for i in range(10):
            prompt = None if self.config.opens else "Guess my number, 0 to 9."
            yield GuessTask(GuessData(prompt=prompt, answer=i), self.config.task)


__all__ = ["GuessEnv", "GuessTaskset"]
