"""`moe-train guard check`, and `guard run` on a file of rules and on a server."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter

from llama_stack_provider_moe.control.cli.exits import Exit
from tests.control.guard.test_routes import create_router, serving
from tests.support.cli_support import moe_train
from tests.support.host_harness import RUN_CONFIGS
from tests.support.served_app import served

RULES = RUN_CONFIGS / "shields" / "tools.yaml"
CALL = {"type": "function", "function": {"name": "read_file", "arguments": '{"path": "/etc/passwd"}'}}
BAD: Any = [{"role": "user", "content": "go"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
MAIL = {"to": ["ann@example.org"], "subject": "a", "body": "b"}


def written(folder: Path, content: Any, name: str = "conversation.json") -> str:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_check_shows_tools_and_tries_examples() -> None:
    done = moe_train("guard", "check", str(RULES))
    assert (done.code, done.err) == (Exit.OK, "")
    assert "4 tools; 10 of 10 examples hold" in done.out
    assert "warning" not in done.out
    document = moe_train("guard", "check", str(RULES), "--json").document
    assert (document["failures"], document["warnings"], document["examples"]) == ([], [], 10)
    assert [each["tool"] for each in document["tools"]] == ["search", "read_file", "fetch_page", "send_mail"]


def test_check_fails_where_an_example_fails(tmp_path: Path) -> None:
    rules = {"version": 1, "tools": {"a": {"parameters": {"properties": {"b": {"type": "string"}}}}},
             "examples": [{"tool": "a", "arguments": {}, "verdict": "refused"}]}  # fmt: skip
    done = moe_train("guard", "check", written(tmp_path, rules))
    assert done.code == Exit.FAILED
    assert ": 1 tool; " in done.out
    assert "failed: examples.0: a for anonymous is allowed; expected refused" in done.out
    assert "warning: tools.a: nothing limits the text 'b'" in done.out


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("version: 1\ntools: {a: {}}\n", "tools.a.parameters: is missing"),
        ("version: 1\n", "tools: is missing"),
        ("version: 1\nversion: 1\n", "line 2: key 'version' is given twice"),
        ("{", "FILE: "),
    ],
)
def test_check_refuses_rules_that_are_wrong(tmp_path: Path, content: str, says: str) -> None:
    done = moe_train("guard", "check", written(tmp_path, content, "rules.yaml"))
    assert (done.code, done.out) == (Exit.REFUSED, "")
    assert says in done.err


def test_run_with_rules_asks_no_server(tmp_path: Path) -> None:
    words = ["guard", "run", written(tmp_path, {"messages": BAD}), "--rules", str(RULES)]
    done = moe_train(*words, "--url", "http://127.0.0.1:1")
    assert (done.code, done.err) == (Exit.FAILED, "")
    assert "tools.read_file.rules.0.inside" in done.out
    (verdict,) = moe_train(*words, "--json").document["verdicts"]
    assert verdict["violation"]["metadata"]["count"] == 1


def test_run_knows_the_principal(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "send_mail", "arguments": json.dumps(MAIL)}}
    words = ["guard", "run", written(tmp_path, [{"role": "assistant", "tool_calls": [call]}]), "--rules", str(RULES)]
    assert moe_train(*words).code == Exit.OK
    assert moe_train(*words, "--principal", "staff-ann").code == Exit.OK
    assert moe_train(*words, "--principal", "guest").code == Exit.FAILED


@pytest.mark.parametrize(
    ("content", "more", "says"),
    [
        ("[]", [], "messages: '0 messages' is not valid"),
        ('{"message": []}', [], "a list of messages, or an object with messages"),
        ('[{"role": "user"}]', [], "messages[0].content"),
        ("[", [], "messages, or an object with messages, in JSON"),
        ("", [], "messages, or an object with messages; the file is empty"),
        ("7", [], "a list of messages, or an object with messages; this is a number"),
        ("[]", ["--shield", "a"], "no --shield and no --session"),
        ("[]", ["--session", "a"], "no --shield and no --session"),
    ],
)
def test_run_refuses_what_is_no_conversation(tmp_path: Path, content: str, more: list[str], says: str) -> None:
    done = moe_train("guard", "run", written(tmp_path, content), "--rules", str(RULES), *more)
    assert (done.code, done.out) == (Exit.REFUSED, "")
    assert says in " ".join(done.err.split())


def test_run_asks_the_shields_of_a_server(tmp_path: Path) -> None:
    file = written(tmp_path, [{"role": "user", "content": "I cook"}])
    with serving() as service, served(create_router(service)) as url:
        words = ["guard", "run", file, "--url", url, "--json"]
        done = moe_train(*words, "--session", "one")
        assert done.code == Exit.FAILED, done.err
        found = {each["shield_id"]: each["violation"] for each in done.document["verdicts"]}
        assert set(found) == {"cooking", "session", "tools"}
        assert found["tools"] is None
        assert found["cooking"]["metadata"]["score"] == 0.9
        assert len(moe_train(*words, "--shield", "tools").document["verdicts"]) == 1
        assert "`--session` of `guard run`" in moe_train(*words).err, "the trajectory needs a session"
        assert "expected one of ['tools', 'cooking', 'session']" in moe_train(*words, "--shield", "no").err
    assert moe_train(*words).code == Exit.LOST


@pytest.mark.parametrize("more", [[], ["--shield", "tools"]])
def test_run_on_a_server_without_shields_says_which_has_them(tmp_path: Path, more: list[str]) -> None:
    file = written(tmp_path, [{"role": "user", "content": "I cook"}])
    with served(APIRouter()) as url:
        done = moe_train("guard", "run", file, "--url", url, *more)
    assert (done.code, done.out) == (Exit.REFUSED, "")
    told = " ".join(done.err.split())
    assert f"{url} answered 404 Not Found: no server with provider inline::moe-guard" in told
    assert "--server guarded" in told
    assert "--rules FILE" in told
    assert "inline::moe answers" not in told
