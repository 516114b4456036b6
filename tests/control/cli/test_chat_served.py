"""`moe-train chat --served`: what a chat with the host's inference refuses, and answers that fail.

The host is a transport of httpx here; `tests/system/test_serving_hosts.py` has real ones.
"""

import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.control.cli.chat_served import ServedChat, served_model
from llama_stack_provider_moe.control.cli.chat_turns import Asked
from llama_stack_provider_moe.control.cli.client import Client
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.errors import InvalidInput, ServerRefused
from tests.support.cli_support import moe_train

ASKED = Asked("on", 42, 0.5, 1.0, 16, False)


def piece(text: str, reason: str | None = None) -> str:
    return json.dumps({"choices": [{"delta": {"content": text}, "finish_reason": reason}]})


class Host:
    """A host whose inference gives prepared streams, and remembers what it was asked."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.asked: list[dict[str, Any]] = []
        self._answers = list(answers)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/exports"):
            made = [{"job_uuid": "export-1", "served_as": None}, {"job_uuid": "export-2", "served_as": "cpp/ft-mine"}]
            return httpx.Response(200, json={"data": made if "/mine/" in request.url.path else made[:1]})
        assert (request.method, request.url.path) == ("POST", "/below/v1/chat/completions")
        self.asked.append(json.loads(request.content))
        lines = self._answers.pop(0)
        if lines[0] == "refused":
            return httpx.Response(404, json={"error": {"message": "no such model"}})
        return httpx.Response(200, text="".join(f"data: {line}\n\n" for line in lines))


def client(host: Host) -> Client:
    return Client("http://server/below", transport=httpx.MockTransport(host))


def test_a_conversation_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    host = Host(
        [piece("An "), json.dumps({"choices": []}), piece("egg.", "stop"), "[DONE]"], [piece("Yes", "length"), "[DONE]"]
    )
    with client(host) as server:
        model = served_model(server, "mine")
        chat = ServedChat(server, Screen(as_json=False), model, ASKED, "Be brief.")
        assert chat.say("What is it?")
        assert chat.say("Sure?")
    assert host.asked[0]["model"] == "cpp/ft-mine"
    assert host.asked[1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "An egg."},
        {"role": "user", "content": "Sure?"},
    ]
    assert (host.asked[1]["seed"], host.asked[1]["max_tokens"], host.asked[1]["stream"]) == (42, 16, True)
    shown = capsys.readouterr()
    assert shown.out == "An egg.\nYes\n"
    assert "stopped at --max-tokens" in shown.err


def test_answers_that_fail_leave_no_trace_in_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    failed = json.dumps({"error": {"message": "out of memory"}})
    host = Host([piece("Li")], [piece("Li"), failed], ["refused"], [piece("Lima", "stop"), "[DONE]"])
    with client(host) as server:
        chat = ServedChat(server, Screen(as_json=False), "cpp/ft-mine", ASKED, None)
        assert not chat.say("one")
        assert "broke off" in capsys.readouterr().err
        with pytest.raises(ServerRefused, match="out of memory"):
            chat.say("two")
        with pytest.raises(ServerRefused, match="no such model"):
            chat.say("three")
        assert chat.say("four")
    assert host.asked[-1]["messages"] == [{"role": "user", "content": "four"}]


def test_as_json_each_piece_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with client(Host([piece("Lima", "stop"), "[DONE]"])) as server:
        assert ServedChat(server, Screen(as_json=True), "cpp/ft-mine", ASKED, None).say("one")
    first, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert first == {"type": "text", "text": "Lima"}
    assert (last["type"], last["text"], last["reason"]) == ("answered", "Lima", "stop")


def test_what_a_served_model_can_not_do_is_refused() -> None:
    with client(Host()) as server:
        with pytest.raises(InvalidInput, match=r"--served.*a job whose result this server serves"):
            served_model(server, "other")
        for change, field in (({"adapter": "both"}, "--adapter"), ({"routing": True}, "--routing")):
            with pytest.raises(InvalidInput, match=field):
                ServedChat(server, Screen(as_json=False), "cpp/ft-mine", ASKED._replace(**change), None)


@pytest.mark.parametrize("option", ["--end", "--replace"])
def test_options_of_playgrounds_are_refused(option: str) -> None:
    done = moe_train("chat", "mine", "--served", option)
    assert done.code != 0
    assert f"{option}: True is not valid; expected to be left out with --served" in done.err
