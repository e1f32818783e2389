"""Scrubbing: what counts as a secret, in which forms it is found, and streams that pass on whole lines."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from lib import PROJECT_ROOT
from lib.log import ScrubbedStream, echo, scrub

VALUE = "canary-0123456789"


@pytest.mark.parametrize(
    "name",
    [
        "OPENAI_API_KEY", "HF_TOKEN", "MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET", "db_password", "DB_PASSWD", "GITHUB_PAT",
        "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "API_KEY_2", "GOOGLE_CREDENTIALS", "MY_CREDENTIAL", "KEY",
    ],
)  # fmt: skip
def test_a_variable_with_the_name_of_a_secret_is_scrubbed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, VALUE)
    assert scrub(f"<{VALUE}>") == f"<<{name}>>"


@pytest.mark.parametrize("name", ["KEYBOARD", "TOKENIZERS_PARALLELISM", "MONKEY_BUSINESS", "HOME", "SECRETARY"])
def test_other_variables_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, VALUE)
    assert scrub(VALUE) == VALUE


def test_a_secret_is_found_as_it_stands_in_json(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = 'pass"word\\with\tall of it'
    monkeypatch.setenv("MY_PASSWORD", secret)
    assert scrub(json.dumps({"output": f"it is {secret}"})) == '{"output": "it is <MY_PASSWORD>"}'


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_a_secret_beyond_ascii_is_found_in_json_of_either_kind(
    ensure_ascii: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_PASSWORD", 'gänse"füßchen')
    assert "nsef" not in scrub(json.dumps('gänse"füßchen', ensure_ascii=ensure_ascii))
    assert "MY_PASSWORD" in scrub(json.dumps('gänse"füßchen', ensure_ascii=ensure_ascii))


def test_a_secret_is_found_in_a_representation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_PASSWORD", r"back\slash-and-more")
    assert "MY_PASSWORD" in scrub(repr(r"back\slash-and-more"))


def test_every_place_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", VALUE)
    assert VALUE not in scrub(f"{VALUE}{VALUE} x {VALUE}\n{VALUE}")


# -- streams ----------------------------------------------------------------------------------------------------------


def passed(*writes: str) -> str:
    out = io.StringIO()
    stream = ScrubbedStream(out)
    for text in writes:
        stream.write(text)
        stream.flush()
    stream.close()
    return out.getvalue()


def test_a_secret_across_two_writes_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", VALUE)
    assert passed("it is " + VALUE[:7], VALUE[7:] + "\nnext") == "it is <A_KEY>\nnext\n"


def test_a_secret_of_several_lines_is_scrubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "-----BEGIN-----\nabcdefghijkl\nmnopqrstuvwx\n-----END-----"
    monkeypatch.setenv("PRIVATE_KEY", secret)
    assert "abcdefghijkl" not in passed(secret + "\n") and "mnopqrstuvwx" not in passed(*secret)


def test_lines_are_passed_on_once_they_are_whole() -> None:
    out = io.StringIO()
    stream = ScrubbedStream(out)
    stream.write("one\ntw")
    assert out.getvalue() == "one\n"
    stream.write("o\n\nthree")
    assert out.getvalue() == "one\ntwo\n\n"
    stream.close()
    assert out.getvalue() == "one\ntwo\n\nthree\n"
    stream.close()
    assert out.getvalue() == "one\ntwo\n\nthree\n"


def test_what_is_written_is_said_to_be_written() -> None:
    assert ScrubbedStream(io.StringIO()).write("abc") == 3


def test_echo_scrubs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("A_KEY", VALUE)
    echo(f"it is {VALUE}")
    assert capsys.readouterr().out == "it is <A_KEY>\n"


def test_a_file_only_log_leaves_the_terminal_alone(tmp_path: Path) -> None:
    code = "import sys, logging; from pathlib import Path; from lib.log import start_logging\n"
    code += "start_logging(Path(sys.argv[1]), terminal=False); logging.getLogger('lib.x').info('only there')"
    command = [sys.executable, "-c", code, str(tmp_path / "log.txt")]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == "" and "only there" in (tmp_path / "log.txt").read_text()


def test_other_libraries_do_not_write_into_our_log() -> None:
    assert logging.getLogger("elsewhere").handlers == []
