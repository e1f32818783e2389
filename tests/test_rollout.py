"""The rollout loop: lockstep batches, what breaks on the way, and rollouts as tokens."""

from __future__ import annotations

import asyncio
import json
import math
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from lib import PROJECT_ROOT
from lib.backends.local import to_batch
from lib.generate import Chat, batched, scripted
from lib.patience import Patience
from lib.rollout import (
    OutOfRoomError,
    Request,
    Scored,
    UnscoredLimitError,
    attempt,
    background_loop,
    check_unscored,
    collect,
    play_each,
    run_rollout,
    submit,
    to_tokens,
)
from lib.starter import build_tokenizer
from lib.task import Message, Rollout, Row, Score, Task, Turn
from lib.trainer import Batch

Jitter = Callable[[], float]


class World(Task, frozen=True):
    """Plays row["turns"] turns and gives row["earns"]; a text there is raised, a number given, the rest is returned."""

    max_turns: int = 5
    seed: int | None = None

    async def reply(self, rollout: Rollout) -> list[Message]:
        await self._wait(rollout)
        row, played = rollout.row, len(rollout.turns)
        if row.get("breaks_after") == played:
            raise ConnectionError("the world is gone")
        return [{"role": "user", "content": f"and {played}?"}] if played < row.get("turns", 1) else []

    async def score(self, rollout: Rollout) -> Score:
        await self._wait(rollout)
        earns = rollout.row.get("earns", 0.5)
        if isinstance(earns, str):
            raise TimeoutError(earns)
        return Score(reward=earns) if isinstance(earns, float) else earns

    async def _wait(self, rollout: Rollout) -> None:
        pause = rollout.row.get("pause", 0.0)
        if self.seed is not None:
            pause = random.Random(f"{self.seed} {rollout.row['id']} {len(rollout.turns)}").uniform(0, 0.02)
        await asyncio.sleep(pause)


class Policy:
    """Answers at once, with token ids that continue the conversation, and remembers who asked."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()

    def __call__(self, requests: list[Request]) -> list[Turn]:
        self.batches.append([str(request.messages[0]["content"]) for request in requests])
        self.threads.add(threading.get_ident())
        return [self.turn(request) for request in requests]

    def turn(self, request: Request) -> Turn:
        previous = request.previous
        prompt = (1,) if previous is None else (*(previous.prompt_ids or ()), *(previous.output_ids or ()), 9)
        text = f"{request.messages[0]['content']} turn {(len(request.messages) + 1) // 2}"
        return Turn(
            message={"role": "assistant", "content": text}, prompt_ids=prompt, output_ids=(5, 6), logprobs=(-1.0, -2.0)
        )


def row(identity: object, **values: Any) -> Row:
    return {"id": str(identity), "prompt": [{"role": "user", "content": str(identity)}], **values}


def rows(count: int, **values: Any) -> list[Row]:
    return [row(i, **values) for i in range(count)]


# -- lockstep ---------------------------------------------------------------------------------------------------------


def test_batches_are_in_row_order_whatever_the_timing() -> None:
    lengths = [3, 1, 2, 5, 1, 4, 2, 3]
    played = [row(i, turns=turns) for i, turns in enumerate(lengths)]
    expected = [[str(i) for i, turns in enumerate(lengths) if turns > turn] for turn in range(5)]
    for seed in range(6):
        policy = Policy()
        scored = collect(World(seed=seed), played, policy)
        assert policy.batches == expected
        assert [s.rollout.row["id"] for s in scored] == [str(i) for i in range(8)]
        assert [len(s.rollout.turns) for s in scored] == lengths
        assert [s.rollout.text for s in scored] == [f"{i} turn {turns}" for i, turns in enumerate(lengths)]


def test_rollouts_of_one_turn_are_one_batch() -> None:
    policy = Policy()
    assert [s.score.reward for s in collect(World(), rows(200), policy)] == [0.5] * 200
    assert [len(batch) for batch in policy.batches] == [200]


def test_no_rows_are_no_rollouts() -> None:
    policy = Policy()
    assert collect(World(), [], policy) == [] and policy.batches == []


def test_the_policy_runs_in_the_callers_thread_and_the_world_on_one_loop() -> None:
    policy = Policy()
    loops: set[int] = set()

    class Watching(World, frozen=True):
        async def score(self, rollout: Rollout) -> Score:
            loops.add(id(asyncio.get_running_loop()))
            return Score(reward=0.5)

    for _ in range(2):
        collect(Watching(), rows(3), policy)
    assert policy.threads == {threading.get_ident()} and loops == {id(background_loop())}


def test_each_request_brings_the_turn_before_it_and_the_tools() -> None:
    seen: list[Request] = []

    class Remembering(Policy):
        def turn(self, request: Request) -> Turn:
            seen.append(request)
            return super().turn(request)

    tools = [{"type": "function", "function": {"name": "add"}}]
    (scored,) = collect(World(), [row("a", turns=3, tools=tools)], Remembering())
    assert [request.previous for request in seen] == [None, *scored.rollout.turns[:-1]]
    assert all(request.tools == tools for request in seen)
    assert [message["role"] for message in seen[-1].messages] == ["user", "assistant", "user", "assistant", "user"]


def test_slow_scoring_does_not_hold_up_later_turns() -> None:
    class SlowJudge(World, frozen=True):
        """The first row's verdict needs the second row's last turn: if turns waited for verdicts, none would come."""

        async def score(self, rollout: Rollout) -> Score:
            if rollout.row["id"] == "1":
                played_out.set()
            await asyncio.wait_for(played_out.wait(), timeout=10)
            return Score(reward=0.5)

    policy, played_out = Policy(), asyncio.Event()
    scored = collect(SlowJudge(), [row(0, turns=1), row(1, turns=4)], policy)
    assert [s.score.reward for s in scored] == [0.5, 0.5] and len(policy.batches) == 4


def test_two_threads_may_collect_at_the_same_time() -> None:
    done: dict[int, list[str]] = {}

    def work(number: int) -> None:
        done[number] = [s.rollout.text for s in collect(World(seed=number), rows(20, turns=3), Policy())]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert done == {number: [f"{i} turn 3" for i in range(20)] for number in range(3)}


async def test_rollouts_can_be_collected_from_within_a_notebooks_loop() -> None:
    assert len(collect(World(), rows(3), Policy())) == 3  # a kernel's loop is running in this thread


def test_collecting_gives_what_playing_one_row_gives() -> None:
    played = row("a", turns=3)
    (scored,) = collect(World(), [played], Policy())

    async def generate(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Turn:
        return scored.rollout.turns[(len(messages) - 1) // 2]

    assert asyncio.run(run_rollout(World(), played, generate)) == scored.rollout


# -- how a rollout ends -----------------------------------------------------------------------------------------------


def test_a_rollout_ends_when_the_world_has_nothing_to_say() -> None:
    (scored,) = collect(World(), [row("a", turns=2)], Policy())
    assert scored.rollout.stop == "done" and len(scored.rollout.messages) == 4
    assert scored.rollout.messages[-1] == scored.rollout.turns[-1].message


def test_a_rollout_ends_at_max_turns_with_the_policys_word() -> None:
    (scored,) = collect(World(max_turns=3), [row("a", turns=10)], Policy())
    assert scored.rollout.stop == "max_turns" and len(scored.rollout.turns) == 3
    assert scored.rollout.messages[-1]["role"] == "assistant"


def test_a_cut_off_answer_ends_the_rollout_and_the_world_is_not_asked() -> None:
    class Cut(Policy):
        def turn(self, request: Request) -> Turn:
            return super().turn(request).model_copy(update={"stop": "length"})

    (scored,) = collect(World(), [row("a", turns=3, breaks_after=1)], Cut())
    assert scored.rollout.stop == "length" and len(scored.rollout.turns) == 1
    assert scored.score.reward == 0.5  # the task says what a cut-off answer is worth


def test_scripted_replies_play_a_row() -> None:
    rollout = asyncio.run(
        run_rollout(World(), row("a", turns=3), scripted("one", {"role": "assistant", "content": "two"}))
    )
    assert [turn.message["content"] for turn in rollout.turns] == ["one", "two", "one"]


# -- side by side -----------------------------------------------------------------------------------------------------


def test_a_hundred_rollouts_played_side_by_side_do_not_wait_for_one_another() -> None:
    stuck = asyncio.Event()

    async def generate(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Turn:
        if messages[0]["content"] == "0":
            await stuck.wait()
        return Turn(message={"role": "assistant", "content": "x"})

    ended = []
    for index, scored in play_each(World(), rows(100, turns=3), generate, at_once=100):
        ended.append(index)
        assert len(scored.rollout.turns) == 3 and scored.score.reward == 0.5
        if len(ended) == 99:
            background_loop().call_soon_threadsafe(stuck.set)
    assert ended[-1] == 0 and sorted(ended) == list(range(100))


def test_no_more_are_played_at_once_than_allowed() -> None:
    now, most = 0, 0

    async def generate(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Turn:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1
        return Turn(message={"role": "assistant", "content": "x"})

    assert len(list(play_each(World(), rows(30), generate, at_once=7))) == 30 and most == 7


# -- limits of time ---------------------------------------------------------------------------------------------------


def test_a_world_that_never_answers_is_unscored_and_does_not_hold_up_the_others() -> None:
    scored = collect(World(), [row(0, turns=2), row(1, turns=2, pause=60.0)], Policy(), Patience(world=0.2))
    assert [s.score.reward for s in scored] == [0.5, None]
    assert scored[1].score.notes == {
        "error": "TimeoutError: the task's reply took longer than rewards.world_seconds = 0.2 s"
    }


class NeverScores(World, frozen=True):
    """A scorer that waits for what never comes, in row 1."""

    async def score(self, rollout: Rollout) -> Score:
        if rollout.row["id"] == "1":
            await asyncio.Event().wait()
        return Score(reward=0.5)


STUCK_SCORE = {"error": "TimeoutError: the task's score took longer than rewards.score_seconds = 0.2 s"}


def test_a_scorer_that_never_ends_is_unscored_and_does_not_hold_up_the_others() -> None:
    scored = collect(NeverScores(), rows(3, turns=2), Policy(), Patience(score=0.2))
    assert [s.score.reward for s in scored] == [0.5, None, 0.5]
    assert scored[1].score.notes == STUCK_SCORE and len(scored[1].rollout.turns) == 2


def test_side_by_side_a_scorer_that_never_ends_is_unscored_too() -> None:
    played = play_each(NeverScores(), rows(3), scripted("x"), at_once=2, patience=Patience(score=0.2))
    assert {index: s.score.notes for index, s in played} == {0: {}, 1: STUCK_SCORE, 2: {}}


def test_what_waits_in_a_queue_that_moves_is_not_given_up() -> None:
    class Queued(World, frozen=True):
        """A judge that is asked by one at a time: the last one waits longer than the limit."""

        async def score(self, rollout: Rollout) -> Score:
            async with judge:
                await asyncio.sleep(0.02)
            return Score(reward=0.5)

    judge, began = asyncio.Semaphore(1), time.monotonic()
    scored = collect(Queued(), rows(80), Policy(), Patience(score=1.0))
    assert time.monotonic() - began > 1.5
    assert [s.score.reward for s in scored] == [0.5] * 80


def test_a_timeout_of_the_worlds_own_is_not_taken_for_the_limit() -> None:
    class Impatient(World, frozen=True):
        async def reply(self, rollout: Rollout) -> list[Message]:
            raise TimeoutError("the database did not answer")

    (scored,) = collect(Impatient(), [row(0)], Policy(), Patience(world=5.0))
    assert scored.score.notes == {"error": "TimeoutError: the database did not answer"}


def test_a_score_leaves_a_judge_its_longest_pause_and_every_repeat_of_a_request() -> None:
    from lib.calls import FIRST_WAIT, LONGEST_PAUSE
    from lib.config import load_config
    from lib.grading.asking import ROUNDS
    from lib.judge import JudgeSettings

    judge, limits = JudgeSettings(), load_config("configs/judged.yaml").rewards
    waits = sum(FIRST_WAIT * 2**number for number in range(judge.attempts - 1))
    assert limits.score_seconds > LONGEST_PAUSE + ROUNDS * (judge.attempts * judge.timeout + waits)
    assert (limits.world_seconds, limits.score_seconds) == (Patience().world.seconds, Patience().score.seconds)


# -- room for tokens --------------------------------------------------------------------------------------------------


class Full(Policy):
    """Has no room for another turn once a conversation has so many messages."""

    def __init__(self, messages: int) -> None:
        super().__init__()
        self.messages = messages

    def __call__(self, requests: list[Request]) -> list[Turn | None]:  # type: ignore[override]
        turns = super().__call__(requests)
        return [
            None if len(request.messages) > self.messages else turn
            for request, turn in zip(requests, turns, strict=True)
        ]


def test_a_conversation_without_room_for_another_turn_ends_as_cut_off_with_the_policys_word() -> None:
    scored = collect(World(), [row(0, turns=4), row(1, turns=1), row(2, turns=2)], Full(3))
    assert [(s.rollout.stop, len(s.rollout.turns)) for s in scored] == [("length", 2), ("done", 1), ("done", 2)]
    full = scored[0].rollout
    assert full.messages[-1] == full.turns[-1].message and full.turns[-1].stop == "stop"
    assert scored[0].score.reward == 0.5  # the task says what a cut-off answer is worth
    assert to_tokens(full).mask == [1, 1, 0, 1, 1]


def test_a_policy_of_any_kind_can_say_that_there_is_no_room() -> None:
    async def generate(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Turn:
        if len(messages) > 3:
            raise OutOfRoomError
        return Turn(message={"role": "assistant", "content": "x"})

    (played,) = play_each(World(), [row(0, turns=4)], generate, at_once=1)
    assert (played[1].rollout.stop, len(played[1].rollout.turns), played[1].score.reward) == ("length", 2, 0.5)


def test_a_prompt_without_room_for_any_answer_is_unscored_with_the_reason() -> None:
    (scored,) = collect(World(), [row(0)], Full(0))
    assert scored.score.reward is None and scored.rollout.turns == ()
    assert scored.score.notes["error"].startswith("OutOfRoomError: the conversation is as long as it may be")


# -- what breaks is unscored, never zero ------------------------------------------------------------------------------


def test_a_scorer_that_raises_leaves_its_row_unscored_with_the_reason() -> None:
    scored = collect(World(), [row(0), row(1, earns="judge timed out"), row(2)], Policy())
    assert [s.score.reward for s in scored] == [0.5, None, 0.5]
    assert scored[1].score.notes == {"error": "TimeoutError: judge timed out"} and not scored[1].score.masked
    assert scored[1].rollout.text == "1 turn 1"


def test_a_world_that_breaks_leaves_its_row_unscored_and_the_others_go_on() -> None:
    scored = collect(World(), [row(0, turns=3), row(1, turns=3, breaks_after=2), row(2, turns=3)], Policy())
    assert [s.score.reward for s in scored] == [0.5, None, 0.5]
    assert scored[1].score.notes == {"error": "ConnectionError: the world is gone"}
    assert [len(s.rollout.turns) for s in (scored[0], scored[2])] == [3, 3]


@pytest.mark.parametrize("turn", [1, 2])
def test_a_world_that_breaks_leaves_the_turns_that_were_sampled(turn: int) -> None:
    (scored,) = collect(World(), [row(0, turns=3, breaks_after=turn)], Policy())
    assert len(scored.rollout.turns) == turn


def test_a_world_that_breaks_at_once_still_gives_tokens_to_mask_out() -> None:
    scored = collect(World(), [row(0), row(1, turns=2, breaks_after=1)], Policy())
    assert to_tokens(scored[1].rollout).output_ids == [5, 6]


def test_the_reason_of_an_unscored_row_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_API_KEY", "sk-verysecret1")
    (scored,) = collect(World(), [row(0, earns="401 for https://judge/?key=sk-verysecret1")], Policy())
    assert scored.score.notes == {"error": "TimeoutError: 401 for https://judge/?key=<JUDGE_API_KEY>"}


@pytest.mark.parametrize("reward", [1.5, -0.1, math.nan, math.inf])
def test_a_reward_outside_the_range_is_unscored_with_the_reason(reward: float) -> None:
    (scored,) = collect(World(), [row(0, earns=reward)], Policy())
    assert scored.score.reward is None
    assert scored.score.notes == {"error": f"ValueError: reward {reward} outside the task's reward_range 0 to 1"}


@pytest.mark.parametrize("reward", [0.0, 1.0, 1.0 + 1e-12, -1e-12])
def test_a_reward_at_the_ends_of_the_range_counts(reward: float) -> None:
    (scored,) = collect(World(), [row(0, earns=reward)], Policy())
    assert scored.score.reward == reward


def test_another_range_is_the_tasks_own() -> None:
    scored = collect(World(reward_range=(-1, 0)), [row(0, earns=-1.0), row(1, earns=0.5)], Policy())
    assert [s.score.reward for s in scored] == [-1.0, None]


@pytest.mark.parametrize("returned", [None, {"reward": 1.0}])
def test_a_scorer_that_returns_no_score_leaves_the_row_unscored(returned: object) -> None:
    (scored,) = collect(World(), [row(0, earns=returned)], Policy())
    assert scored.score.reward is None and scored.score.notes["error"]


def test_a_masked_score_stays_what_the_task_said() -> None:
    said = Score(reward=None, parts={"valid": 0.0}, notes={"why": "no action"}, masked=True)
    (scored,) = collect(World(), [row(0, earns=said)], Policy())
    assert scored.score == said


def test_an_endpoint_that_fails_leaves_its_row_unscored() -> None:
    async def generate(messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None) -> Turn:
        raise ConnectionError("no route to the endpoint")

    scored = asyncio.run(attempt(World(), row(0), generate))
    assert scored.score == Score(reward=None, notes={"error": "ConnectionError: no route to the endpoint"})
    assert scored.rollout.turns == ()


@pytest.mark.parametrize(
    "score",
    [
        Score(reward=0.5, parts={"perplexity": math.nan}),
        Score(reward=0.5, parts={"ratio": math.inf}),
        Score(reward=0.5, notes={"seen": {1, 2}}),
        Score(reward=0.5, notes={"value": math.nan}),
    ],
)
def test_a_score_that_is_no_json_is_unscored_with_the_reason(score: Score) -> None:
    (scored,) = collect(World(), [row(0, earns=score)], Policy())
    json.dumps([scored.score.parts, scored.score.notes], allow_nan=False)
    assert scored.score.reward is None and scored.score.notes["error"]


# -- accidents of the policy ------------------------------------------------------------------------------------------


class Accident(BaseException):
    """Like KeyboardInterrupt: no Exception."""


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt(), Accident()])
def test_an_error_of_the_policy_reaches_the_caller_and_the_loop_lives_on(error: BaseException) -> None:
    class Broken(Policy):
        def __call__(self, requests: list[Request]) -> list[Turn]:
            if len(self.batches) == 1:
                raise error
            return super().__call__(requests)

    with pytest.raises(type(error)):
        collect(World(), rows(20, turns=3), Broken())
    assert [s.score.reward for s in collect(World(), rows(5, turns=3), Policy())] == [0.5] * 5


def test_an_error_of_the_policy_cancels_the_rollouts_that_wait() -> None:
    def broken(requests: list[Request]) -> list[Turn]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        collect(World(), rows(30), broken)

    async def others() -> int:
        await asyncio.sleep(0.05)
        return len(asyncio.all_tasks()) - 1

    assert submit(others()).result(5) == 0


def in_another_process(code: str, seconds: float = 30) -> str:
    """What code prints; "hangs" where it does not end."""
    start = """
        import asyncio, os, signal, sys, threading, time
        from lib.rollout import collect
        from lib.task import Score, Task, Turn

        class Fine(Task, frozen=True):
            async def score(self, rollout):
                return Score(reward=0.5)

        rows = [{"id": str(i), "prompt": [{"role": "user", "content": "?"}]} for i in range(3)]
        policy = lambda requests: [Turn(message={"role": "assistant", "content": "x"}) for _ in requests]
    """
    command = [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(code)]
    try:
        done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return "hangs"
    return done.stdout + done.stderr


def test_an_interrupt_while_scores_are_awaited_ends_the_wait() -> None:
    code = """
        class Slow(Task, frozen=True):
            async def score(self, rollout):
                await asyncio.sleep(60)

        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
        try:
            collect(Slow(), rows, policy)
        except KeyboardInterrupt:
            print("interrupted", len(collect(Fine(), rows, policy)))
    """
    assert in_another_process(code) == "interrupted 3\n"


def test_an_interrupt_of_a_wait_ends_what_was_waited_for() -> None:
    code = """
        from lib.rollout import finish

        async def work():
            try:
                await asyncio.sleep(60)
            finally:
                await asyncio.sleep(0.3)  # it has things to end itself
                sys.stdout.write("ended ")

        threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
        try:
            finish(work())
        except KeyboardInterrupt:
            sys.stdout.write("interrupted ")
    """
    assert in_another_process(code).split() == ["ended", "interrupted"]


def test_a_scorer_that_exits_is_unscored_and_does_not_hang_the_run() -> None:
    code = """
        class Exits(Task, frozen=True):
            async def score(self, rollout):
                exec("exit(3)", {"exit": sys.exit})

        print([s.score.reward for s in collect(Exits(), rows, policy)])
    """
    assert in_another_process(code) == "[None, None, None]\n"


def test_a_scorer_that_raises_keyboard_interrupt_is_unscored_and_does_not_hang_the_run() -> None:
    code = """
        class Interrupts(Task, frozen=True):
            async def score(self, rollout):
                exec("raise KeyboardInterrupt")

        print([s.score.reward for s in collect(Interrupts(), rows, policy)])
    """
    assert in_another_process(code, seconds=5) == "[None, None, None]\n"


def test_a_policy_that_returns_too_few_turns_is_an_error_and_does_not_hang() -> None:
    code = """
        try:
            collect(Fine(), rows, lambda requests: policy(requests)[:1])
        except ValueError as error:
            print("refused")
    """
    assert in_another_process(code) == "refused\n"


def test_a_scorer_whose_own_task_was_cancelled_is_unscored() -> None:
    class Cancelling(World, frozen=True):
        async def score(self, rollout: Rollout) -> Score:
            if rollout.row["id"] == "1":
                task = asyncio.create_task(asyncio.sleep(60))
                task.cancel()
                await task
            return Score(reward=0.5)

    assert [s.score.reward for s in collect(Cancelling(), rows(3), Policy())] == [0.5, None, 0.5]


# -- too many unscored ------------------------------------------------------------------------------------------------


def unscored(reason: str) -> Score:
    return Score(reward=None, notes={"error": reason})


def test_few_unscored_rollouts_pass() -> None:
    check_unscored([Score(reward=1.0)] * 19 + [unscored("x")], 0.05, "step 1")
    check_unscored([], 0.0, "step 1")
    check_unscored([unscored("x")], 1.0, "step 1")


def test_too_many_unscored_rollouts_stop_with_the_reasons_counted() -> None:
    scores = [Score(reward=1.0)] * 10 + [unscored("Timeout")] * 3 + [unscored("Refused")] * 5 + [Score(reward=None)]
    with pytest.raises(UnscoredLimitError) as caught:
        check_unscored(iter(scores), 0.05, "step 7")
    text = str(caught.value)
    assert "step 7: 9 of 19 rollouts could not be judged, more than rewards.max_unscored = 0.05 allows" in text
    assert "Reasons: 5 x Refused; 3 x Timeout; 1 x no reason given." in text


def test_many_reasons_are_cut_to_the_most_frequent() -> None:
    scores = [unscored(str(i)) for i in range(9) for _ in range(9 - i)]
    with pytest.raises(UnscoredLimitError, match=r"Reasons: 9 x 0; 8 x 1; 7 x 2; 6 x 3; 5 x 4\."):
        check_unscored(scores, 0.5, "step 1")


def test_masked_rollouts_are_not_unscored() -> None:
    check_unscored([Score(reward=None, masked=True)] * 10, 0.0, "step 1")
    with pytest.raises(UnscoredLimitError):
        check_unscored([Score(reward=None, masked=True)] * 10 + [unscored("x")], 0.0, "step 1")


# -- tokens -----------------------------------------------------------------------------------------------------------


def turns(*pairs: tuple[tuple[int, ...], tuple[int, ...]], logprobs: bool = True) -> Rollout:
    made = tuple(
        Turn(
            message={"role": "assistant", "content": "x"},
            prompt_ids=prompt,
            output_ids=output,
            logprobs=tuple(-float(token) for token in output) if logprobs else None,
        )
        for prompt, output in pairs
    )
    return Rollout(row=row("r"), messages=(), turns=made)


def test_one_turn_is_its_prompt_and_its_answer() -> None:
    assert to_tokens(turns(((1, 2), (3, 4)))) == ([1, 2], [3, 4], [1, 1], [-3.0, -4.0])


def test_the_worlds_tokens_between_turns_are_masked_out() -> None:
    tokens = to_tokens(turns(((1,), (2, 3)), ((1, 2, 3, 7, 8), (4,)), ((1, 2, 3, 7, 8, 4), (5, 6))))
    assert tokens.prompt_ids == [1]
    assert tokens.output_ids == [2, 3, 7, 8, 4, 5, 6]
    assert tokens.mask == [1, 1, 0, 0, 1, 1, 1]
    assert tokens.logprobs == [-2.0, -3.0, 0.0, 0.0, -4.0, -5.0, -6.0]


def test_log_probabilities_missing_in_one_turn_are_missing_in_all() -> None:
    known, unknown = turns(((1,), (2,))), turns(((1, 2, 7), (3,)), logprobs=False)
    assert to_tokens(Rollout(row=row("r"), messages=(), turns=(*known.turns, *unknown.turns))).logprobs is None
    assert to_tokens(turns(((1,), (2,)), logprobs=False)).logprobs is None


def test_every_list_has_one_entry_a_token() -> None:
    for s in collect(World(), [row(i, turns=i + 1) for i in range(5)], Policy()):
        tokens = to_tokens(s.rollout)
        assert tokens.logprobs is not None
        assert len(tokens.output_ids) == len(tokens.mask) == len(tokens.logprobs)
        assert sum(tokens.mask) == 2 * len(s.rollout.turns)


@pytest.mark.parametrize("second", [(1, 2, 9, 7), (1, 2), (), (7, 1, 2, 3)])
def test_a_prompt_that_does_not_continue_the_earlier_one_is_refused(second: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="row r: the chat template rewrites earlier turns"):
        to_tokens(turns(((1, 2), (3,)), (second, (4,))))


@pytest.mark.parametrize("logprobs", [(-1.0,), (-1.0, -2.0, -3.0)])
def test_log_probabilities_that_are_not_one_a_token_are_refused(logprobs: tuple[float, ...]) -> None:
    turn = {
        "message": {"role": "assistant", "content": "x"},
        "prompt_ids": (1,),
        "output_ids": (2, 3),
        "logprobs": logprobs,
    }
    with pytest.raises(ValueError, match="r"):
        to_tokens(Rollout(row=row("r"), messages=(), turns=(Turn(**turn),)))


def test_a_turn_without_token_ids_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match="row r: a turn without token ids"):
        to_tokens(Rollout.of(row("r"), "text only"))


def test_signals_are_left_to_the_process() -> None:
    before = signal.getsignal(signal.SIGINT)
    collect(World(), rows(2), Policy())
    assert signal.getsignal(signal.SIGINT) is before


# -- tokens in training -----------------------------------------------------------------------------------------------


def two_turn_batch(chat: Any, worlds: str = "and?") -> list[Scored]:
    """Two groups of four two-turn rollouts with random tokens, and rewards that differ within the groups."""
    drawn = random.Random(0)

    def sample(prompts: list[list[int]]) -> tuple[list[list[int]], None]:
        return [[*drawn.choices(range(5, 200), k=drawn.randint(1, 5)), min(chat.end_ids)] for _ in prompts], None

    class Speaks(World, frozen=True):
        async def reply(self, rollout: Rollout) -> list[Message]:
            return [{"role": "user", "content": worlds}] if len(rollout.turns) < 2 else []

    played = [row(f"{group}", earns=[0.0, 0.25, 1.0, 0.5][copy]) for group in range(2) for copy in range(4)]
    return collect(Speaks(), played, batched(chat, sample))


def gradient_of(folder: Any, tokenizer: Any, batch: Batch, steps: int = 1) -> Any:
    """The first gradient that TRL's trainer takes of a batch (DAPO's loss, no KL)."""
    from test_trainer import group, trained

    groups = [group(seed, 0.0, 0.0, 0.0, 0.0) for seed in range(2)]
    return trained(folder, tokenizer, groups, lambda trainer, rows: batch, beta=0.0, steps=steps).gradients[0]


def test_the_loss_of_two_turns_is_that_of_the_same_tokens_turn_by_turn(tmp_path: Any) -> None:
    """By hand every turn is a sequence of its own: its prompt as it was sampled from, then what was sampled."""
    import torch
    from test_trainer import group, trainer_on

    tokenizer = build_tokenizer(["user\n", "assistant\n", "yes no", "and?"] * 5)
    scored = two_turn_batch(Chat(tokenizer))
    found = gradient_of(tmp_path / "trl", tokenizer, to_batch(scored, 4))
    model = trainer_on(tmp_path / "hand", tokenizer, [group(seed, 0.0, 0.0, 0.0, 0.0) for seed in range(2)]).model
    model.train()
    rewards = torch.tensor([s.score.reward for s in scored], dtype=torch.float64).view(2, 4)
    advantages = ((rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for advantage, (rollout, _) in zip(advantages, scored, strict=True):
        assert len(rollout.turns) == 2
        for turn in rollout.turns:
            prompt, output = turn.prompt_ids or (), turn.output_ids or ()
            logits = model(input_ids=torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
            total = total - advantage * logits.log_softmax(-1).gather(1, torch.tensor(output)[:, None]).sum()
            tokens += len(output)
    (total / tokens).backward()
    named = sorted((n, p) for n, p in model.named_parameters() if p.requires_grad)
    expected = torch.cat([p.grad.flatten() for _, p in named])
    # TRL keeps advantages in float32.
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def test_gradients_do_not_depend_on_the_worlds_tokens(tmp_path: Any) -> None:
    """Whatever the world says last, which no later token has seen, the gradient is the same to the bit."""
    import torch

    tokenizer = build_tokenizer(["user\n", "assistant\n", "yes no", "and?"] * 5)
    batch = to_batch(two_turn_batch(Chat(tokenizer)), 4)
    gradients = []
    for seed in range(3):
        said = [[random.Random(f"{seed} {i}").randrange(5, 200) for _ in range(4)] for i in range(8)]
        longer = batch._replace(
            output_ids=[ids + world for ids, world in zip(batch.output_ids, said, strict=True)],
            mask=[mask + [0] * 4 for mask in batch.mask],
        )
        gradients.append(gradient_of(tmp_path / str(seed), tokenizer, longer))
    assert float(gradients[0].abs().max()) > 0
    assert all(torch.equal(gradients[0], other) for other in gradients[1:])
    trained_on = batch._replace(mask=[[1] * len(mask) for mask in batch.mask])
    kept, lost = (gradient_of(tmp_path / name, tokenizer, b) for name, b in (("a", batch), ("b", trained_on)))
    assert not torch.allclose(kept, lost, rtol=1e-3)  # had the world's tokens been trained on, it would show


def test_training_over_several_turns_refuses_a_template_that_rewrites_them_before_it_samples(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib import models
    from lib.backends import local
    from lib.config import load_config
    from lib.generate import TemplateError
    from lib.runfolder import open_run

    places = {"paths.outputs": str(tmp_path / "outputs"), "paths.cache": str(tmp_path / "cache"), "starter.steps": 1}
    config = load_config("configs/smoke/decisions.yaml", places)
    load = models.load_tokenizer

    def rewriting(*given: Any) -> Any:
        tokenizer = load(*given)
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "</s>")
        return tokenizer

    monkeypatch.setattr(models, "load_tokenizer", rewriting)
    played = [row(i, gold=[{"role": "assistant", "content": "yes"}]) for i in range(16)]
    run = open_run("rewriting", config)
    run.write_rows("train", played)
    with pytest.raises(TemplateError, match="Use a template whose longer conversations begin with the shorter ones"):
        local.train(config, World(), run.read_rows("train"), run, stop=None)  # type: ignore[arg-type]
    assert run.rollouts() == []
