"""`moe-train chat` against a live server, while a thread answers prompts as a playground does."""

import io
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from llama_stack_provider_moe.client.sync_client import Client
from llama_stack_provider_moe.control.cli.chat_turns import Asked, Chat
from llama_stack_provider_moe.control.cli.client import Client as CliClient
from llama_stack_provider_moe.control.cli.exits import Exit
from llama_stack_provider_moe.control.cli.screen import Screen
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.folder import write_atomic
from llama_stack_provider_moe.jobdir.prompts import Answered, AnswerLog, Begun, Ended, LoadedModel, PromptFiles, Text
from tests.control.server.test_playgrounds import trained
from tests.support.cli_support import moe_train
from tests.support.host_support import folder_of, over_http, serving_in_process

LIMIT_S = 60.0


class Playground:
    """An open playground whose prompts a thread answers with one word each, without an end while `held` is set.

    Attributes:
        begun: set once an answer has its first word.
        held: while set, answers do not end unless somebody stops them.
    """

    def __init__(self, service: PostTrainingService, url: str) -> None:
        with Client(url) as client:
            self.name = client.submit({"recipe": "playground", "model": trained(service)})["job_uuid"]
        self.files = PromptFiles(folder_of(service, self.name).prompts)
        self.files.folder.mkdir()
        write_atomic(self.files.model, LoadedModel(has_adapter=True, moe_layers=[], experts=0, top_k=0))
        self.begun, self.held, self._over = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()

    def _answer(self) -> None:
        while not self._over.wait(0.02):
            for number in self.files.waiting():
                side = self.files.read_prompt(number).adapter
                assert side != "both"
                log = AnswerLog(self.files.answer(number))
                log.append(Begun(side=side, prompt_tokens=3))
                log.append(Text(side=side, text="An egg"))
                self.begun.set()
                while self.held.is_set() and not self.files.stop(number).exists() and not self._over.wait(0.02):
                    pass
                reason = "stopped" if self.files.stop(number).exists() else "stop"
                log.append(Answered(side=side, text="An egg", tokens=2, reason=reason, seconds=0.1))
                log.append(Ended())
                log.close()

    def close(self) -> None:
        self._over.set()
        self._thread.join()


@pytest.fixture
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("chat")) as made:
        yield made


@pytest.fixture
def url(service: PostTrainingService) -> Iterator[str]:
    with over_http(service) as found:
        yield found


@pytest.fixture
def playground(service: PostTrainingService, url: str) -> Iterator[Playground]:
    made = Playground(service, url)
    yield made
    made.close()


def talk(server: CliClient, name: str) -> Chat:
    return Chat(server, Screen(as_json=False), server.playground(name), Asked("both", 1, 0.5, 1.0, 16, False), None)


def test_an_interrupt_ends_the_turn_of_both_sides(
    url: str, playground: Playground, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other side is not asked, and neither remembers the message."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    playground.held.set()

    def interrupt() -> None:
        playground.begun.wait(LIMIT_S)
        time.sleep(0.5)
        # A signal, which also ends a read; again if Python lost it in a destructor, whose exceptions are ignored.
        while True:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            if ended.wait(10):
                return

    ended = threading.Event()
    interrupting = threading.Thread(target=interrupt)
    with CliClient(url) as server:
        chat = talk(server, playground.name)
        interrupting.start()
        assert not chat.say("How long?")
        ended.set()
        interrupting.join()
        assert playground.files.numbers() == [1]
        assert "stopped; this message is not part of the conversation" in capsys.readouterr().err
        playground.held.clear()
        assert chat.say("And now?")
    assert playground.files.numbers() == [1, 2, 3]
    for number in (2, 3):
        messages = playground.files.read_prompt(number).messages
        assert messages is not None
        assert [each.content for each in messages] == ["And now?"]


def test_a_lost_server_and_its_return_are_told(service: PostTrainingService) -> None:
    notes: list[str] = []
    found: list[str] = []
    with over_http(service) as url:
        port = int(url.rpartition(":")[2])
        playground = Playground(service, url)
    try:
        playground.held.set()
        with CliClient(url, note=notes.append) as server:

            def follow() -> None:
                found.extend(piece["type"] for piece in server.answer_pieces(playground.name, 1))

            following = threading.Thread(target=follow)
            with over_http(service, port):
                server.send_prompt(playground.name, {"prompt": "How long?"})
                following.start()
                playground.begun.wait(LIMIT_S)
                time.sleep(0.5)
            deadline = time.monotonic() + LIMIT_S
            while not notes:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            with over_http(service, port):
                playground.held.clear()
                following.join(LIMIT_S)
    finally:
        playground.close()
    assert found == ["begun", "text", "answered", "ended"]
    assert re.fullmatch(rf"no server answers at {url} .*; trying again for 60 s", notes[0])
    assert notes[1:] == ["the server answers again"]


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "utf-8"))


def test_input_that_is_not_utf_8_is_refused_as_such(
    url: str, playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The remark that the playground stays comes after the error."""
    pipe(monkeypatch, b"bin\xff")
    done = moe_train("chat", playground.name, "--url", url)
    assert done.code == Exit.REFUSED
    assert "standard input: b'\\xff' is not valid; expected UTF-8 text; byte 4 is the first that is not" in done.err
    assert done.err.index("standard input") < done.err.index("the playground stays for a while")
    assert done.err.count("the playground stays") == 1
    assert playground.files.numbers() == []


def test_a_second_playground_is_refused_in_the_words_of_the_command(
    url: str, playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, b"Hello?")
    done = moe_train("chat", "other/name", "--url", url)
    assert done.code == Exit.REFUSED
    assert f"'{playground.name}' is your playground already" in done.err
    assert f"chat with moe-train chat other/name --replace --url {url}" in done.err
    assert "stays" not in done.err


def test_a_chat_that_ends_well_says_that_the_playground_stays(
    url: str, playground: Playground, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe(monkeypatch, b"Hello?")
    done = moe_train("chat", playground.name, "--url", url)
    assert (done.code, done.out) == (Exit.OK, "An egg\n")
    assert done.err.splitlines()[-1].startswith("the playground stays for a while. Chat again: moe-train chat")
