"""OpenAI's fine-tuning API on each host: the openai package, with a file of the host and with an uploaded data set."""

import json
from collections.abc import Iterator
from typing import NamedTuple

import openai
import pytest

from llama_stack_provider_moe.control.cli.hosts import HostName
from tests.support.host_harness import Server, tiny_interpreter
from tests.support.jobs_support import wait_for
from tests.support.openai_support import client, result_file
from tests.support.other_hosts import HostUnderTest, hosts, required, serving_on, upload

pytestmark = pytest.mark.e2e

CHATS = "".join(
    json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]}) + "\n"
    for n in range(8)
).encode()


class Running(NamedTuple):
    """A server on a host."""

    host: HostUnderTest
    server: Server


@pytest.fixture(scope="module", params=hosts(HostName.OGX))
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    host = required(request.param)
    folder = tmp_path_factory.mktemp("host")
    provider = {"training_python": tiny_interpreter(folder), "supervisor": {"poll_s": 0.1}}
    with serving_on(host, folder, provider) as server:
        yield Running(host, server)


@pytest.mark.parametrize("kind", ["file of the host", "uploaded data set"])
def test_a_whole_life(running: Running, kind: str) -> None:
    if kind == "file of the host":
        file = upload(running.server, running.host, CHATS)
    else:
        file = "chats"
        with running.server.http() as http:
            http.put("/datasets/chats", content=CHATS).raise_for_status()
    with client(running.server.url) as api:
        job = api.fine_tuning.jobs.create(model="owner/name", training_file=file, suffix="mine", metadata={"of": kind})
        wait_for(lambda: api.fine_tuning.jobs.retrieve(job.id).status not in ("queued", "running"))
        job = api.fine_tuning.jobs.retrieve(job.id)
        assert (job.status, job.training_file) == ("succeeded", file), job.error
        assert [each.id for each in api.fine_tuning.jobs.list(metadata={"of": kind})] == [job.id]
        assert len([each for each in api.fine_tuning.jobs.list_events(job.id) if each.type == "metrics"]) == 2
        assert len(result_file(api, job.result_files[0]).splitlines()) == 3


def test_mistakes_have_the_same_shape(running: Running) -> None:
    with client(running.server.url) as api:
        with pytest.raises(openai.NotFoundError):
            api.fine_tuning.jobs.create(model="owner/name", training_file="nope")
        with pytest.raises(openai.BadRequestError) as refused:
            api.fine_tuning.jobs.create(model="owner/name", training_file="nope", extra_body={"moe": {"adaptor": {}}})
        assert refused.value.param == "moe.adaptor"
        with pytest.raises(openai.NotFoundError):
            api.fine_tuning.jobs.retrieve("ftjob-none")
