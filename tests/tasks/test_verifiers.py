"""The task `verifiers` against the real package: classic and v1, each in an environment of its own under build/.

VERIFIERS_CLASSIC and VERIFIERS_V1 name other interpreters, with other versions in them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lib import PROJECT_ROOT, prepare
from lib.config import load_config
from lib.preflight.answers import known_answers
from lib.rollout import attempt, collect, run_rollout, submit
from lib.runfolder import open_run
from lib.task import Message, Rollout, Row, Score, TaskError, Turn, load_task
from lib.tasks import _verifiers_process, _verifiers_server
from lib.tasks._verifiers_make import make
from lib.tasks._verifiers_process import EnvironmentFailedError, given_environment
from lib.tasks.verifiers import VerifiersTask, with_calls

HERE = Path(__file__).parent / "verifiers_environments"
SUMS = str(HERE / "vf_sums.py")
CALL = '<tool_call>\n{"name": "lookup", "arguments": {"number": %s}}\n</tool_call>'


@pytest.fixture(scope="session")
def classic() -> str:
    return os.environ.get("VERIFIERS_CLASSIC") or str(make("classic"))


@pytest.fixture(scope="session")
def v1() -> str:
    return os.environ.get("VERIFIERS_V1") or str(make("v1"))


def task_of(python: str, kind: str = "single", **fields: Any) -> VerifiersTask:
    """A task on the classic environments of this folder. Equal ones share a child process."""
    args = {"kind": kind, **fields.pop("args", {})}
    return VerifiersTask(environment=SUMS, python=python, args=args, **fields)


def v1_task(python: str, name: str = "v1_sums", **fields: Any) -> VerifiersTask:
    return VerifiersTask(environment=str(HERE / f"{name}.py"), python=python, **fields)


def row_of(task: VerifiersTask, question: str) -> Row:
    rows = [*task.rows("train"), *task.rows("eval")]
    return next(row for row in rows if row["prompt"][-1]["content"] == question)


def score_of(task: VerifiersTask, row: Row, *said: str | Message) -> Score:
    return submit(task.score(Rollout.of(row, *said))).result(120)


def reply_of(task: VerifiersTask, row: Row, *said: str | Message) -> list[Message]:
    return submit(task.reply(Rollout.of(row, *said))).result(120)


def says(answers: Sequence[str]) -> Any:
    """A policy that gives these answers, one a turn."""
    left = iter(answers)

    async def generate(messages: Any, tools: Any) -> Turn:
        return Turn(message={"role": "assistant", "content": next(left)})

    return generate


def played(task: VerifiersTask, row: Row, answers: Sequence[str]) -> Rollout:
    return submit(run_rollout(task, row, says(answers))).result(120)


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def in_its_interpreter(python: str, script: str, *arguments: str, given: Any = None) -> Any:
    """What a script of the folder beside this one tells after RESULT, run by the interpreter of the environments."""
    environment = os.environ | {"PYTHONPATH": f"{PROJECT_ROOT}{os.pathsep}{HERE}"}
    done = subprocess.run(
        [python, str(HERE / script), *arguments],
        input=json.dumps(given),
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.rpartition("RESULT ")[2] or "null")


def version_of(task: VerifiersTask) -> str:
    return str(task._facts["version"])


# -- classic: rows ----------------------------------------------------------------------------------------------------


def test_rows_are_the_environments_own_and_hold_what_playing_them_needs(classic: str) -> None:
    task = task_of(classic, args={"held_out": 4})
    row = task.rows("train")[3]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["example"]["answer"] == "6" and row["example"]["info"] == {"number": 3}
    assert "tools" not in row and "gold" not in row
    assert (len(task.rows("train")), len(task.rows("eval"))) == (20, 4)
    assert all(int(row["example"]["answer"]) >= 2000 for row in task.rows("eval"))
    assert task.check() == []
    assert "set reward_range: [0, 1]" in " ".join(task.model_copy(update={"reward_range": (0.0, 0.5)}).check())


def test_where_nothing_is_held_out_a_share_is_and_check_says_so(classic: str) -> None:
    task = task_of(classic, eval_share=0.25)
    train, held = ([row["id"] for row in task.rows(split)] for split in ("train", "eval"))
    assert len(train) == 15 and len(held) == 5 and not set(train) & set(held)
    assert [row["id"] for row in task_of(classic, eval_share=0.25).rows("eval")] == held
    assert {row["id"] for row in task_of(classic, eval_share=0.5).rows("eval")} > set(held)
    assert any("held-out" in warning for warning in task.check())


def test_max_rows_bounds_a_split_and_gold_is_written_as_the_field_says(classic: str) -> None:
    task = task_of(classic, max_rows=6, gold="{answer}")
    rows = [*task.rows("train"), *task.rows("eval")]
    assert len(rows) == 6
    assert all(row["gold"][0]["content"] == row["example"]["answer"] for row in rows)
    assert score_of(task, rows[0], *rows[0]["gold"]).reward == 1.0


def test_prompts_that_only_the_rollout_knows_are_opened_for_the_rows(classic: str) -> None:
    task = task_of(classic, "prompts")
    if version_of(task).startswith("0.1.5"):
        pytest.skip("verifiers 0.1.5 takes the prompt from the data, whatever setup_state does")
    row = next(row for row in task.rows("train") if row["example"]["answer"] == "12")
    assert row["prompt"] == [user("6 + 6?"), user("the number has 2 digits")]
    assert reply_of(task, row, "13") == [user("lower, 1")]
    assert score_of(task, row, "13", user("lower, 1"), "12").reward == 0.5 + 0.5 / 2


# -- classic: rewards and turns are verifiers' own ---------------------------------------------------------------------

SCRIPTS = {  # RIGHT = the row's answer, between 12 and 40
    "single": [["RIGHT"], ["7"], [" RIGHT "], ["RIGHT is my answer"], ["x" * 2000], ["RIGHT\n"], ["é RIGHT"]],
    "game": [["RIGHT"], ["1", "99", "RIGHT"], ["x", "RIGHT"], ["1"] * 6, ["1", "2", "3", "4", "5", "RIGHT"]],
    "tools": [[CALL % 3, "RIGHT"], ["RIGHT"], ["7"], [CALL % 99, "RIGHT"], [CALL % 1, CALL % 2, CALL % 3, CALL % 4]],
}


@pytest.fixture(scope="module")
def own_scores(classic: str) -> dict[str, Any]:
    """What verifiers alone gives to the scripts, in its own loop: {kind: {question: [reward, metrics]}}."""
    given = {kind: {q: list(map(_own, said)) for q, said in answers(kind).items()} for kind in SCRIPTS}
    found: dict[str, Any] = in_its_interpreter(classic, "own_scores.py", given=given)
    return found


def answers(kind: str) -> dict[str, list[str]]:
    return {
        f"{i} + {i}?": [text.replace("RIGHT", str(2 * i)) for text in script]
        for i, script in enumerate(SCRIPTS[kind] * 2, start=6)
    }


def _own(text: str) -> Any:
    """A scripted answer as a server with a tool parser gives it."""
    if not text.startswith("<tool_call>"):
        return text
    call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    return call | {"arguments": json.dumps(call["arguments"])}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_rewards_and_metrics_equal_those_of_verifiers_own_loop_on_the_same_answers(
    classic: str, own_scores: dict[str, Any], kind: str
) -> None:
    task = task_of(classic, kind)
    assert len(own_scores[kind]) == len(answers(kind)) >= 10
    for question, said in answers(kind).items():
        rollout = played(task, row_of(task, question), said)
        fresh = submit(task.score(rollout)).result(60)
        again = submit(task.score(rollout)).result(60)  # nothing waits any more: played again from the transcript
        assert fresh == again
        assert [fresh.reward, fresh.parts] == own_scores[kind][question], question


def test_a_rollout_goes_on_where_it_waits_and_is_played_again_where_nothing_waits(classic: str) -> None:
    task = task_of(classic, "game")
    row = row_of(task, "4 + 4?")
    assert reply_of(task, row, "1") == [user("higher, 1")]
    assert reply_of(task, row, "1", user("higher, 1"), "9") == [user("lower, 2")]
    assert task._server._child
    task._server._child.give_up("the test")
    assert reply_of(task, row, "1", user("higher, 1"), "9", user("lower, 2"), "8") == []
    score = score_of(task, row, "1", user("higher, 1"), "9", user("lower, 2"), "8")
    assert score.reward == 0.5 + 0.5 / 3


def test_of_equal_transcripts_each_rollout_goes_on_with_a_world_of_its_own(classic: str) -> None:
    task = task_of(classic, "game")
    row = row_of(task, "4 + 4?")
    rolled = [reply_of(task, row, "dice") for _ in range(4)]
    assert len({json.dumps(reply) for reply in rolled}) == 4
    for reply in rolled:
        assert reply_of(task, row, "dice", *reply, "1") == [user("higher, 2")]


def test_an_environment_that_says_something_else_when_replayed_is_an_error_with_that_reason(classic: str) -> None:
    task = task_of(classic, "game")
    with pytest.raises(EnvironmentFailedError, match="does not follow from the conversation alone"):
        score_of(task, row_of(task, "4 + 4?"), "dice", user("you rolled 0.1"), "2")


def test_an_environment_that_rewrites_the_conversation_is_an_error_with_that_reason(classic: str) -> None:
    task = task_of(classic, "forgets")
    if version_of(task).startswith("0.1.5"):
        pytest.skip("in verifiers 0.1.5 an environment cannot rewrite the conversation")
    with pytest.raises(EnvironmentFailedError, match="rewrites earlier messages"):
        reply_of(task, row_of(task, "4 + 4?"), "1")


def test_a_rollout_that_was_cut_off_is_judged_as_far_as_it_got_and_the_environment_is_told(classic: str) -> None:
    task = task_of(classic, "game")
    row = row_of(task, "4 + 4?")
    turns = (Turn(message={"role": "assistant", "content": "8"}, stop="length"),)
    cut = Rollout(row=row, messages=(*row["prompt"], turns[0].message), turns=turns, stop="length")
    assert submit(task.score(cut)).result(60).parts["truncated"] == 1.0
    assert score_of(task, row, "8").parts["truncated"] == 0.0


def test_the_workbenchs_own_limit_of_turns_ends_a_rollout_as_the_end_of_the_context_does(classic: str) -> None:
    task = task_of(classic, "game", max_turns=2)
    rollout = played(task, row_of(task, "4 + 4?"), ["1", "2"])
    assert rollout.stop == "max_turns"
    score = submit(task.score(rollout)).result(60)
    assert score.reward == 0.5 / 3 and score.parts["right"] == 0.0


def test_an_empty_answer_is_the_policys_own_and_scored(classic: str) -> None:
    task = task_of(classic)
    assert score_of(task, task.rows("train")[0], "").reward == 0.5  # short, judged, and wrong


# -- classic: tools ---------------------------------------------------------------------------------------------------


def test_tools_stand_in_the_row_and_a_call_in_the_text_is_carried_out(classic: str) -> None:
    task = task_of(classic, "tools")
    row = row_of(task, "3 + 3?")
    function = row["tools"][0]["function"]
    assert function["name"] == "lookup" and function["parameters"]["required"] == ["number"]
    said = reply_of(task, row, f"Let me see. {CALL % 3}")
    assert [message["role"] for message in said] == ["tool"] and said[0]["content"] == "6"
    assert reply_of(task, row, f"Let me see. {CALL % 3}", *said, "6") == []


def test_a_call_that_fails_is_told_to_the_model_and_scored(classic: str) -> None:
    task = task_of(classic, "tools")
    row = row_of(task, "3 + 3?")
    assert "too large" in reply_of(task, row, CALL % 99)[0]["content"]
    if not version_of(task).startswith("0.1.5"):  # which raises KeyError on a tool that it does not know
        assert "search" in reply_of(task, row, CALL.replace("lookup", "search") % 1)[0]["content"]
    deep = '<tool_call>{"name": "lookup", "arguments": ' + "[" * 10_000 + "]" * 10_000 + "}</tool_call>"
    for text in ("<tool_call>{no json</tool_call>", deep, CALL % ('"' + "9" * 1_000_000 + '"')):
        assert score_of(task, row, text).reward == 0.0


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {}}}}
THOUGHT = "<think>hm</think>I call. "
CALLED = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("text", "calls", "before"),
    [
        (THOUGHT + CALLED, ["f"], THOUGHT.strip()),
        (CALLED.replace("f", "g"), ["g"], ""),
        ('[{"name": "f", "arguments": {}}]', ["f"], ""),
        ('[{"name": "g", "arguments": {}}]', None, None),
        ("[1, 2]", None, None),
        ("f is my answer", None, None),
        (f"<think>{CALLED}", None, None),
    ],
)
def test_calls_in_a_text_become_tool_calls_as_a_servers_parser_makes_them(
    text: str, calls: list[str] | None, before: str | None
) -> None:
    message = with_calls([{"role": "assistant", "content": text}], [TOOL])[0]
    assert [call["function"]["name"] for call in message.get("tool_calls", [])] == (calls or [])
    assert message["content"] == (text if before is None else before)


# -- classic: what breaks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "name", "as_zero"), [("raise", "breaking", 0.25), ("judge", "judged", 0.25)])
def test_a_reward_function_that_raises_leaves_the_answer_unscored_with_its_name(
    classic: str, text: str, name: str, as_zero: float
) -> None:
    task = task_of(classic)
    row = task.rows("train")[0]
    score = score_of(task, row, text)
    assert score.reward is None and f"reward function {name} raised" in score.notes["error"]
    score = score_of(task_of(classic, reward_errors="zero"), row, text)
    assert score.reward == as_zero and score.parts[name] == 0.0 and name in score.notes["raised"]


def test_a_metric_that_raises_costs_its_part_only(classic: str) -> None:
    task = task_of(classic)
    score = score_of(task, task.rows("train")[0], "metric")
    assert score.reward == 0.25 and score.parts["measured"] is None


def test_a_reward_that_is_no_number_is_unscored(classic: str) -> None:
    task = task_of(classic)
    assert score_of(task, task.rows("train")[0], "nan").reward is None


@pytest.mark.parametrize(
    ("text", "told"), [("exit", "SystemExit"), ("raise", "I broke"), ("gone", "the sandbox is gone")]
)
def test_an_environment_that_raises_leaves_its_own_rollout_unscored(classic: str, text: str, told: str) -> None:
    task = task_of(classic, "game")
    row = row_of(task, "4 + 4?")
    if text == "gone" and version_of(task).startswith("0.1.5"):
        pytest.skip("verifiers 0.1.5 has no vf.Error")
    scored = submit(attempt(task, row, says([text]))).result(60)
    assert scored.score.reward is None and told in scored.score.notes["error"]
    assert scored.rollout.turns and reply_of(task, row, "1") == [user("higher, 1")]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_verifiers_server, "GRACE", 1.0)


@pytest.mark.parametrize(
    ("text", "told"), [("exit", "SystemExit"), ("die", "exit status 7"), ("block", "longer than 4 s")]
)
def test_an_answer_that_kills_the_child_or_blocks_it_is_unscored_and_no_other_is(
    classic: str, impatient: None, text: str, told: str
) -> None:
    task = task_of(classic, seconds=4.0)
    row = task.rows("train")[0]
    pending = [submit(task.score(Rollout.of(row, answer))) for answer in [*["1"] * 15, text, *["2"] * 15]]
    scores = [future.exception(300) or future.result() for future in pending]
    bad = scores.pop(15)
    assert [score.reward for score in scores if isinstance(score, Score)] == [0.5] * 30
    assert told in str(bad.notes["error"] if isinstance(bad, Score) else bad)


def test_a_slow_turn_is_unscored_after_its_seconds_and_the_child_goes_on(classic: str) -> None:
    task = task_of(classic, "game", seconds=2.0)
    row = row_of(task, "4 + 4?")
    assert reply_of(task, row, "1") == [user("higher, 1")]
    child = task._server._child
    with pytest.raises(TimeoutError, match="longer than 2 s"):
        reply_of(task, row, "sleep")
    assert reply_of(task, row, "1") == [user("higher, 1")] and task._server._child is child


def test_a_hundred_rollouts_in_flight_do_not_wait_for_one_another(classic: str) -> None:
    task = task_of(classic, "game", max_turns=3)
    rows = task.rows("train")
    task._server.load()

    def generate(requests: Any) -> list[Turn]:
        return [Turn(message={"role": "assistant", "content": "slow"}) for _ in requests]

    begun = time.monotonic()
    scored = collect(task, [rows[number % len(rows)] for number in range(100)], generate)
    took = time.monotonic() - begun
    assert len(scored) == 100 and all(one.score.reward is not None and len(one.rollout.turns) == 3 for one in scored)
    assert took < 75  # 300 answers of half a second each, and a machine that others use


def test_what_waits_in_the_child_is_bounded(classic: str) -> None:
    in_its_interpreter(classic, "bounded.py", SUMS)


def script_in(folder: Path, text: str) -> str:
    path = folder / "python"
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "told"),
    [
        ("#!/bin/sh\necho hello; sleep 30\n", "spoke no JSON"),
        ("#!/bin/sh\nprintf '[1]\\n'; sleep 30\n", "spoke no JSON"),
        ("#!/bin/sh\nhead -c 1000000 /dev/urandom\n", "spoke no JSON"),
        ("#!/bin/sh\necho broken >&2; exit 3\n", "exit status 3.*broken"),
        ("#!/bin/sh\nsleep 30\n", "longer than 2 s"),
    ],
)
def test_a_child_that_speaks_rubbish_dies_or_says_nothing_is_an_error_that_says_so(
    tmp_path: Path, script: str, told: str
) -> None:
    task = task_of(script_in(tmp_path, script), load_seconds=2.0)
    with pytest.raises(TaskError, match=told):
        task.rows("train")


# -- what is refused --------------------------------------------------------------------------------------------------


def test_environments_that_cannot_work_here_are_refused_when_they_are_loaded(classic: str) -> None:
    task = task_of(classic)
    expected = {
        "group": "scores a group of answers together",
        "picture": "something else than text",
        "no_reward": "no reward function with a weight",
        "broken": "no licence for this environment",
        "unheard_of": "unheard_of",
    }
    if version_of(task).startswith("0.1.5"):
        del expected["group"]  # it has no rewards of groups
    told = in_its_interpreter(classic, "refusals.py", given=[[SUMS, {"kind": kind}] for kind in expected])
    for kind, text in zip(expected, told, strict=True):
        assert expected[kind] in text, kind


def test_what_is_missing_is_named_with_what_to_do(classic: str, tmp_path: Path) -> None:
    (tmp_path / "vf_empty.py").write_text("import no_such_package\n")
    (tmp_path / "vf_nothing.py").write_text("")
    for fields, told in (
        ({"environment": "", "python": classic}, r"task\.environment is not set"),
        ({"environment": "vf-unheard-of", "python": classic}, r"no environment 'vf-unheard-of'.*install its package"),
        ({"environment": "nowhere/vf_x.py", "python": classic}, "no such file"),
        ({"environment": str(tmp_path / "vf_empty.py"), "python": classic}, "needs the module 'no_such_package'"),
        ({"environment": str(tmp_path / "vf_nothing.py"), "python": classic}, "neither load_environment"),
        ({"environment": SUMS, "python": str(tmp_path / "python")}, "cannot be run"),
        ({"environment": SUMS, "python": sys.executable}, "has no verifiers in it: .*pip install verifiers"),
    ):
        with pytest.raises(TaskError, match=told):
            VerifiersTask(**fields).rows("train")


def test_without_an_interpreter_the_error_says_how_to_make_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(_verifiers_process, "PROJECT_ROOT", tmp_path)
    with pytest.raises(TaskError, match=r"make verifiers[\s\S]*\n.*pip install verifiers"):
        VerifiersTask(environment="vf-x").rows("train")


@pytest.mark.parametrize(("fields", "told"), [({"gold": "8"}, "answer"), ({"args": {"x": float("nan")}}, "args")])
def test_fields_that_cannot_be_meant_are_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(TaskError, match=told):
        load_task("verifiers", environment="vf-x", **fields)


# -- the process ------------------------------------------------------------------------------------------------------


def test_secrets_are_withheld_unless_they_are_named(classic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_JUDGE_KEY", "k")
    monkeypatch.setenv("HF_TOKEN", "t")
    task = task_of(classic, keys=("MY_JUDGE_KEY",))
    assert score_of(task, task.rows("train")[0], "x").parts.items() >= {"key": 1.0, "token": 0.0}.items()
    assert task.env_keys() == ["MY_JUDGE_KEY"]


def test_what_looks_like_a_secret_is_told_by_its_name() -> None:
    secrets = ["OPENAI_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "GOOGLE_APPLICATION_CREDENTIALS"]
    others = ["PATH", "HOME", "HTTPS_PROXY"]
    given = given_environment(dict.fromkeys([*secrets, *others], "x"), ("HF_TOKEN",))
    assert set(given) & {*secrets, *others} == {*others, "HF_TOKEN"}


CHILD = """
import os, signal, sys
from lib.tasks._verifiers_process import Source
from lib.tasks._verifiers_server import server
from lib.tasks import _verifiers_process
one, two = (server(Source(sys.argv[1], "vf-x")) for _ in range(2))
assert one is two
one._child = child = _verifiers_process.Child(one.source)
assert child.alive().result(60) == "pong"
print(child._process.pid, flush=True)
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["normal", "killed"])
def test_a_child_is_shared_and_ends_with_its_process_however_that_ends(classic: str, end: str) -> None:
    command = [sys.executable, "-c", CHILD, classic, end]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout, done.stderr
    for _ in range(200):
        try:
            os.kill(int(done.stdout), 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    pytest.fail("the child outlives its parent")


# -- the worked example -----------------------------------------------------------------------------------------------


@pytest.fixture
def gsm8k(classic: str) -> VerifiersTask:
    task = load_task("configs/examples/gsm8k/gsm8k.py", python=classic)
    assert isinstance(task, VerifiersTask)
    return task


def test_the_worked_example_is_a_users_file_with_problems_of_its_own(gsm8k: VerifiersTask) -> None:
    assert (len(gsm8k.rows("train")), len(gsm8k.rows("eval"))) == (38, 10)
    assert gsm8k.check() == []
    assert [path.name for path in gsm8k.input_files()] == ["problems.jsonl", "pyproject.toml", "vf_gsm8k.py"]


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("9 x 7 = 63, and 63 + 16 = 79.\n\\boxed{79}", 1.0),
        ("\\boxed{79.0}", 1.0),
        ("\\boxed{$79}", 1.0),
        ("\\boxed{78}", 0.1),
        ("\\boxed{78} no, \\boxed{79}", 0.0),
        ("so \\boxed{79}, the answer is \\boxed{79}", 0.9),
        ("\\boxed{79} no, \\boxed{78}", 0.0),
        ("<think>\\boxed{79}</think>79", 0.0),
        ("<think>\\boxed{79}", 0.0),
        ("79", 0.0),
        ("", 0.0),
    ],
)
def test_the_worked_example_scores_the_one_number_in_the_boxes(gsm8k: VerifiersTask, text: str, reward: float) -> None:
    row = gsm8k.rows("eval")[0]
    assert row["example"]["answer"] == "79"
    assert score_of(gsm8k, row, text).reward == pytest.approx(reward)


def test_notebooks_one_and_two_take_the_worked_example(classic: str, tmp_path: Path) -> None:
    config = load_config("configs/gsm8k.yaml", {"paths.outputs": str(tmp_path), "task.python": classic})
    task = load_task(config.task.name, **config.task.params)
    run = open_run("gsm8k", config)
    assert prepare.prepare(task, run) == {"train": 38, "eval": 10}
    records = known_answers(task, run.read_rows("train"))
    assert {record["kind"] for record in records} >= {"gold", "wrong", "empty", "cheat: the prompt back"}
    for record in records:
        assert record["reward"] == 1.0 if record["kind"] == "gold" else record["reward"] < 1.0


# -- v1 ---------------------------------------------------------------------------------------------------------------


def test_a_v1_taskset_has_rows_rewards_and_metrics(v1: str) -> None:
    task = v1_task(v1, gold="{answer}")
    row = row_of(task, "3 + 3?")
    assert row["prompt"] == [{"role": "system", "content": "Only the number."}, user("3 + 3?")]
    assert (len(task.rows("train")), len(task.rows("eval"))) == (18, 2)
    assert score_of(task, row, *row["gold"]) == score_of(task, row, "6")
    for text, right, short in (("6", 1.0, 1.0), ("7", 0.0, 1.0), ("", 0.0, 1.0), ("it is seven", 0.0, 0.0)):
        score = score_of(task, row, text)
        assert score.reward == pytest.approx(0.8 * right + 0.2 * short)
        assert score.parts == {"right": right, "short": short, "length": float(len(text))}


def test_a_v1_game_is_played_turn_by_turn_and_again_from_its_transcript(v1: str) -> None:
    task = v1_task(v1, "v1_guess")
    row = next(row for row in [*task.rows("train"), *task.rows("eval")] if row["example"]["index"] == 6)
    rollout = played(task, row, ["3", "nine", "9", "6"])
    told = [message["content"] for message in rollout.messages[1:]]
    assert told == ["3", "higher", "nine", "no number", "9", "lower", "6"]
    assert [submit(task.score(rollout)).result(60).reward for _ in range(2)] == [1.0, 1.0]
    assert score_of(task, row, "3", user("higher"), "4").reward == 0.0
    with pytest.raises(EnvironmentFailedError, match="says something else"):
        score_of(task, row, "3", user("lower"), "6")


def test_a_v1_environment_may_open_the_conversation_itself(v1: str) -> None:
    task = v1_task(v1, "v1_guess", args={"opens": True})
    row = task.rows("train")[0]
    assert row["prompt"] == [user("Guess my number.")]
    assert score_of(task, row, str(row["example"]["index"])).reward == 1.0


def test_a_v1_reward_that_raises_is_unscored_and_one_that_exits_harms_no_other(v1: str) -> None:
    task = v1_task(v1)
    row = task.rows("train")[0]
    score = score_of(task, row, "raise")
    assert score.reward is None and "the judge does not answer" in score.notes["error"]
    with pytest.raises(EnvironmentFailedError, match=r"ended \(exit status 1\).*enough"):
        score_of(task, row, "exit")
    assert score_of(task, row, "1").reward is not None


def test_a_hundred_v1_rollouts_in_flight_are_each_scored(v1: str) -> None:
    task = v1_task(v1)
    row = row_of(task, "3 + 3?")
    pending = [submit(task.score(Rollout.of(row, "6" if number % 2 else "7"))) for number in range(100)]
    assert [round(future.result(120).reward or 0, 6) for future in pending] == [0.2, 1.0] * 50


@pytest.mark.slow  # verifiers starts a process for the tools of every rollout, and looks once a second whether it runs
def test_the_tools_of_a_v1_taskset_are_served_and_called(v1: str) -> None:
    task = v1_task(v1, "v1_tools")
    if version_of(v1_task(v1)).startswith("0.3"):
        with pytest.raises(TaskError, match=r"need verifiers 0\.4"):
            task.rows("train")
        return
    row = row_of(task, "What is 3 + 7?")
    call = {"name": row["tools"][0]["function"]["name"], "arguments": {"a": 3, "b": 7}}
    text = f"<tool_call>{json.dumps(call)}</tool_call>"
    said = reply_of(task, row, text)
    assert [message["content"] for message in said] == ["10"]
    assert reply_of(task, row, text, *said, "10") == []
    assert score_of(task, row, text, *said, "10").reward == 1.0


def test_what_v1_cannot_do_here_is_refused(v1: str) -> None:
    expected = {
        "v1_endless": "never ends: set task.max_rows",
        "v1_pair": "several agents (asker, answerer)",
    }
    if not version_of(v1_task(v1)).startswith("0.3"):  # which has both APIs
        expected["vf_plain"] = "0.1.5 to 0.3.1"
    given = [[str(HERE / f"{name}.py"), {"n": 0} if name == "v1_endless" else {}] for name in expected]
    for name, text in zip(expected, in_its_interpreter(v1, "refusals.py", given=given), strict=True):
        assert expected[name] in text, name
    assert len(v1_task(v1, "v1_endless", args={"n": 0}, max_rows=8).rows("train")) == 7


def test_a_v1_row_that_is_another_one_by_now_is_not_scored(v1: str) -> None:
    task = v1_task(v1)
    row = {**task.rows("train")[0]}
    row["example"] = {**row["example"], "hash": "0" * 64}
    with pytest.raises(EnvironmentFailedError, match="did its data change"):
        score_of(task, row, "0")
