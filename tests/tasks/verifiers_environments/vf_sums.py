"""Environments of the classic API for the tests, by `kind`: those that behave, and those that do not.

They run on verifiers 0.1.5 to 0.3.1, which differ in what `env_response` returns and in what messages are.
"""

import asyncio
import os
import random
import sys
import time

import verifiers as vf
from datasets import Dataset

OLD = vf.__version__.startswith("0.1.5")
SETUP_RETURNS = vf.__version__.startswith(("0.1.5", "0.1.9"))


def load_environment(kind="single", n=20, held_out=0):
    print("printed by the environment")
    os.write(1, b"and written to descriptor 1\n")
    return KINDS[kind](dataset=sums(n), eval_dataset=sums(held_out, start=1000) if held_out else None)


def sums(n, start=0):
    numbers = range(start, start + n)
    return Dataset.from_list(
        [{"question": f"{i} + {i}?", "answer": str(2 * i), "info": {"number": i}} for i in numbers]
    )


def text_of(message):
    return (message["content"] if isinstance(message, dict) else message.content) or ""


# -- one turn ---------------------------------------------------------------------------------------------------------


def right(completion, answer, **_):
    return float(text_of(completion[-1]).strip() == answer)


def short(completion, **_):
    return float(len(text_of(completion[-1])) < 6)


def single(**data):
    """`short` breaks on demand."""

    def breaking(completion, **_):
        text = text_of(completion[-1])
        if text == "die":
            os._exit(7)
        if text == "block":
            time.sleep(60)
        if text == "exit":
            sys.exit("enough")
        if text == "nan":
            return float("nan")
        if text == "raise":
            raise ZeroDivisionError("no such number")
        return short(completion)

    async def judged(completion, **_):
        if text_of(completion[-1]) == "judge":
            raise ConnectionError("the judge does not answer")
        return 1.0

    def measured(completion, **_):
        return {}["length"] if text_of(completion[-1]) == "metric" else 1.0

    def key(**_):
        return float("MY_JUDGE_KEY" in os.environ)

    def token(**_):
        return float("HF_TOKEN" in os.environ)

    functions = [right, breaking, judged, measured, key, token]
    rubric = vf.Rubric(funcs=functions, weights=[0.5, 0.25, 0.25, 0.0, 0.0, 0.0])
    return vf.SingleTurnEnv(**data, system_prompt="Only the number.", rubric=rubric)


# -- several turns ----------------------------------------------------------------------------------------------------


class Game(vf.MultiTurnEnv):
    """Guess the number; the state counts the guesses. Some guesses are none."""

    async def setup_state(self, state, **_):
        state["guesses"] = 0
        return state if SETUP_RETURNS else None

    async def env_response(self, messages, state, **_):
        state["guesses"] += 1
        said = await self.said(text_of(messages[-1]).strip(), state["answer"], state["guesses"])
        answer = [{"role": "user", "content": said}]
        return (answer, state) if OLD else answer

    async def said(self, guess, answer, count):
        if guess == "exit":
            sys.exit("enough")
        if guess == "raise":
            raise ValueError("I broke")
        if guess == "gone":
            raise vf.Error("the sandbox is gone")
        if guess == "sleep":
            await asyncio.sleep(60)
        if guess == "slow":
            await asyncio.sleep(0.5)
        if guess == "dice":
            return f"you rolled {random.SystemRandom().random()}"
        hint = "no number" if not guess.isdigit() else "higher" if int(guess) < int(answer) else "lower"
        return f"{hint}, {count}"

    if OLD:

        async def is_completed(self, messages, state, **_):
            said = messages[-1]["role"] == "assistant"
            done = said and messages[-1]["content"].strip() == state["answer"]
            return done or await super().is_completed(messages, state)

    else:

        @vf.stop
        async def guessed(self, state):
            turns = state["trajectory"]
            return bool(turns) and text_of(turns[-1]["completion"][-1]).strip() == state["answer"]


def few(state, **_):
    return 1.0 / (1 + state["guesses"])


def truncated(state, **_):
    reasons = [response.choices[0].finish_reason for response in state["responses"]] if OLD else []
    return float("length" in reasons or bool(state.get("is_truncated")))


def game(kind=Game, **data):
    rubric = vf.Rubric(funcs=[right, few, truncated], weights=[0.5, 0.5, 0.0])
    return kind(**data, rubric=rubric, max_turns=6)


class Prompts(Game):
    """Tells the policy something that stands in no data set."""

    async def setup_state(self, state, **_):
        await super().setup_state(state)
        digits = {"role": "user", "content": f"the number has {len(state['answer'])} digits"}
        state["prompt"] = [*state["prompt"], digits]
        return state if SETUP_RETURNS else None


class Forgets(Game):
    """Shows the policy the last hint only."""

    async def get_prompt_messages(self, state):
        found = await super().get_prompt_messages(state)
        return found if len(found) < 3 else found[-1:]


def lookup(number: int) -> str:
    """Look up the double of a number.

    Args:
        number: the number
    """
    if number > 50:
        raise ValueError("too large")
    return str(2 * number)


def tools(**data):
    return vf.ToolEnv(**data, tools=[lookup], rubric=vf.Rubric(funcs=[right]), max_turns=4)


# -- none -------------------------------------------------------------------------------------------------------------


def group(**data):
    def best(completions: list, **_) -> list:
        return [1.0 for _ in completions]

    return vf.SingleTurnEnv(**data, rubric=vf.Rubric(funcs=[right, best]))


def picture(**_):
    shown = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": shown}], "answer": "1"}])
    return vf.SingleTurnEnv(dataset=rows, rubric=vf.Rubric(funcs=[right]))


def no_reward(**data):
    return vf.SingleTurnEnv(**data, rubric=vf.Rubric())


def broken(**_):
    raise RuntimeError("no licence for this environment")


KINDS = {
    "single": single,
    "game": game,
    "prompts": lambda **data: game(Prompts, **data),
    "forgets": lambda **data: game(Forgets, **data),
    "tools": tools,
    "group": group,
    "picture": picture,
    "no_reward": no_reward,
    "broken": broken,
}
