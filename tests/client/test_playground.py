"""The clients' methods about playgrounds, synchronous and asynchronous, while a thread writes answers as a job does."""

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from llama_stack_provider_moe.client import AsyncClient, Client, ServerRefused
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.jobdir.prompts import Answered, AnswerLog, Begun, Ended, PromptFiles, Text
from tests.support.host_support import folder_of, over_http, serving_in_process
from tests.support.jobs_support import wait_for

WORDS = ("An ", "egg ", "takes ", "six ", "minutes.")
PROMPT = {"messages": [{"role": "user", "content": "How long?"}]}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("client")) as made:
        yield made


@pytest.fixture(scope="module")
def url(service: PostTrainingService) -> Iterator[str]:
    with over_http(service) as found:
        yield found


@pytest.fixture(scope="module")
def playground(service: PostTrainingService, url: str) -> Iterator[str]:
    """A playground whose prompts a thread answers, a word at a time."""
    with Client(url) as client:
        job_id = client.submit({"recipe": "playground", "model": "owner/name"})["job_uuid"]
        files, ended = PromptFiles(folder_of(service, job_id).prompts), threading.Event()

        def answer() -> None:
            while not ended.wait(0.02):
                for number in files.waiting():
                    write(files, number)

        thread = threading.Thread(target=answer)
        thread.start()
        yield job_id
        ended.set()
        thread.join()


def write(files: PromptFiles, number: int) -> None:
    log = AnswerLog(files.answer(number))
    log.append(Begun(side="on", prompt_tokens=3))
    for word in WORDS:
        time.sleep(0.05)
        log.append(Text(side="on", text=word))
    log.append(Answered(side="on", text="".join(WORDS), tokens=len(WORDS), reason="stop", seconds=0.2))
    log.append(Ended())
    log.close()


def both(url: str, name: str, *given: Any) -> list[Any]:
    """The results of a method of both clients."""

    async def awaited() -> Any:
        async with AsyncClient(url) as client:
            return await getattr(client, name)(*given)

    with Client(url) as client:
        return [getattr(client, name)(*given), asyncio.run(awaited())]


def test_an_answer_is_awaited(url: str, playground: str) -> None:
    for found in both(url, "ask", playground, PROMPT):
        assert (found["status"], found["error"]) == ("answered", None)
        assert found["answers"]["on"]["text"] == "".join(WORDS)
        assert found["prompt"]["messages"] == PROMPT["messages"]


def test_pieces_come_in_order_each_once(url: str, playground: str) -> None:
    async def followed(number: int) -> list[Any]:
        async with AsyncClient(url) as client:
            return [piece async for piece in client.answer_pieces(playground, number)]

    with Client(url) as client:
        number = client.send_prompt(playground, PROMPT)["number"]
        pieces = list(client.answer_pieces(playground, number))
        assert [piece["type"] for piece in pieces] == ["begun", *["text"] * len(WORDS), "answered", "ended"]
        assert [piece["text"] for piece in pieces if piece["type"] == "text"] == list(WORDS)
        assert asyncio.run(followed(number)) == pieces


def test_a_playground_and_its_prompts_are_listed(url: str, playground: str) -> None:
    for found in both(url, "playground", playground):
        assert found["is_open"]
        assert found["loaded"] is None
        assert found["idle_s"] == 600
    for found in both(url, "send_prompt", playground, PROMPT):
        number = found["number"]
        with Client(url) as client:  # one that still waits is withdrawn, and then there is no such prompt
            wait_for(lambda: client.prompt_answer(playground, number)["status"] != "waiting")  # noqa: B023
        assert [each["number"] == number for each in both(url, "prompt_answer", playground, number)] == [True, True]
        assert {each["status"] for each in both(url, "stop_prompt", playground, number)} <= {"stopping", "answered"}


def test_what_the_server_refuses_is_an_error(url: str, playground: str) -> None:
    for name, given in (("send_prompt", ({"prompt": ""},)), ("prompt_answer", (99999,)), ("ask", ({},))):
        with pytest.raises(ServerRefused):
            both(url, name, playground, *given)
    with Client(url) as client, pytest.raises(ServerRefused, match="has no prompt 99999"):
        list(client.answer_pieces(playground, 99999))
