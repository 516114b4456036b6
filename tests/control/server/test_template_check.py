"""A sample of a job's rows is rendered at submission: what is refused, and what the process that renders may cost."""

import asyncio
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from llama_stack_provider_moe.control.cli import screen
from llama_stack_provider_moe.control.server import compat, template_check
from llama_stack_provider_moe.control.server.routes import PREFIX
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import InvalidInput, InvalidRows
from tests.compute.data.test_template_check import ENDLESS, USER_FIRST, saved
from tests.control.server.test_allowed_paths import model_at
from tests.support.host_support import Datasets, over_http, serving_in_process
from tests.support.jobs_support import wait_for
from tests.support.tiny_models import CHATML

USER, ANSWER = {"role": "user", "content": "Is berth 4 free?"}, {"role": "assistant", "content": "Until noon."}
GREETING = {"role": "assistant", "content": "Harbour office, good morning."}
GOOD, BAD = {"messages": [USER, ANSWER]}, {"messages": [GREETING, USER, ANSWER]}
PAIR = {"prompt": [USER], "chosen": [ANSWER], "rejected": [GREETING]}
NOT_CHECKED = "the rows were not checked with the model's chat template: "
REFUSED = "the chat template refuses the conversation (the user begins)"
TEMPLATES = {"strict": USER_FIRST, "free": CHATML, "endless": ENDLESS, "bare": None}


def datasets() -> Datasets:
    made = Datasets()
    rows: dict[str, Any] = {
        "greets": [GOOD] * 4 + [BAD] + [GOOD] * 15,
        "hello": [BAD],
        "alpaca": [{"instruction": "Is berth 4 free?", "output": "Until noon."}] * 3,
        "many": [GOOD] * 20 + [BAD] + [GOOD] * 4979,
        "all-greet": [BAD] * 5000,
        "pairs": [PAIR] * 3 + [{**PAIR, "prompt": [GREETING, USER]}],
        "prompts": [{"messages": [USER]}, {"messages": [GREETING, USER]}],
        "text": [{"text": "Rivers run to the sea."}] * 4,
    }
    made.rows |= rows
    return made


def with_models(service: PostTrainingService) -> None:
    for name, template in TEMPLATES.items():
        saved(model_at(service.config.models_dir / name), template)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("checks"), datasets()) as made:
        with_models(made)
        yield made


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first import may take long on a busy machine."""
    monkeypatch.setattr(template_check, "LIMIT_S", 300.0)


def body(model: str = "strict", dataset_id: str = "good", **more: Any) -> dict[str, Any]:
    return {"recipe": "sft", "model": model, "data": {"dataset_id": dataset_id}, **more}


def accepted(service: PostTrainingService, asked: dict[str, Any]) -> list[str]:
    """The notes of a job that was accepted."""
    return asyncio.run(service.submit(asked)).notes


def child(service: PostTrainingService) -> psutil.Process:
    """The process that the service has started."""
    return psutil.Process(service._templates.pid)


@pytest.mark.usefixtures("patient")
def test_a_row_that_the_template_refuses_is_named(service: PostTrainingService) -> None:
    for request in (service.submit, service.validate):
        with pytest.raises(InvalidRows) as caught:
            asyncio.run(request(body(dataset_id="greets")))
        assert str(caught.value) == (
            "dataset 'greets': 20 of 20 rows looked at with the model's chat template: 1 problem(s) in 20 row(s): "
            f"row 5: messages: {REFUSED}"
        )
        assert (caught.value.count, caught.value.total_rows) == (1, 20)
        assert accepted(service, body(dataset_id="alpaca")) == []
    assert accepted(service, body("free", "greets")) == [], "this template renders every row"


@pytest.mark.usefixtures("patient")
def test_a_support_talk_that_the_office_begins(service: PostTrainingService) -> None:
    """An assistant's greeting first: trained where the template takes it, else named."""
    whole = {"options": {"validation_split": 0}}
    assert accepted(service, body("free", "hello", **whole)) == []
    with pytest.raises(InvalidRows, match=r"1 problem\(s\) in 1 row\(s\): row 1: messages: "):
        asyncio.run(service.submit(body("strict", "hello", **whole)))


@pytest.mark.usefixtures("patient")
def test_a_large_set_is_sampled_and_the_error_says_so(service: PostTrainingService) -> None:
    with pytest.raises(InvalidRows, match=r"'many': 64 of 5000 rows looked at .* in 64 row.*: row 21: "):
        asyncio.run(service.submit(body(dataset_id="many")))
    with pytest.raises(InvalidRows) as caught:
        asyncio.run(service.submit(body(dataset_id="all-greet")))
    assert (caught.value.count, len(caught.value.problems)) == (64, InvalidRows.SHOWN)
    assert str(caught.value).endswith("; and 44 more")


EVAL = {"recipe": "sft", "model": "strict", "data": {"dataset_id": "alpaca"}}
BREAKER = {
    "recipe": "circuit_breaker", "model": "strict", "adapter": {"rank": 2, "alpha": 4},
    "training": {"max_steps_per_epoch": 4},
}  # fmt: skip
ANALYSIS = {"recipe": "routing_analysis", "model": "strict"}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"recipe": "dpo", "model": "strict", "data": {"dataset_id": "pairs"}}, "'pairs': .*row 4: chosen: .*begins"),
        (body(data={"dataset_id": "good", "validation_dataset_id": "greets"}), "'greets': .*row 5: "),
        ({**BREAKER, "data": {"dataset_id": "greets"}, "circuit_breaker": {"retain": {"dataset_id": "good"}}},
         "'greets': .*row 5: messages: message 3: "),
        ({**BREAKER, "data": {"dataset_id": "good"}, "circuit_breaker": {"retain": {"dataset_id": "greets"}}},
         "'greets': .*row 5: messages: the"),
        ({**EVAL, "eval": {"refuse_dataset_id": "prompts"}}, "'prompts': .*row 2: messages: "),
        ({**EVAL, "eval": {"retain_dataset_id": "greets"}}, "'greets': .*row 5: messages: "),
        ({**ANALYSIS, "data": {"sets": {"one": "alpaca", "two": "greets"}}}, "'greets': .*row 5: messages: "),
    ],
)  # fmt: skip
def test_every_data_set_of_a_job_is_looked_at(service: PostTrainingService, asked: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidRows, match=told):
        asyncio.run(service.validate(asked))


@pytest.mark.wide
@pytest.mark.usefixtures("patient")
def test_a_model_of_the_hub_s_cache_is_at_hand(tmp_path: Path) -> None:
    with serving_in_process(tmp_path, datasets()) as service:
        hub_job = body("owner/name", "greets")
        assert accepted(service, hub_job) == [], "the cache has its config alone"
        assert service._templates.pid is None, "so no process was started"
        [snapshot] = (tmp_path / "hub").glob("models--owner--name/snapshots/*")
        saved(snapshot, USER_FIRST)
        with pytest.raises(InvalidRows, match="row 5: "):
            asyncio.run(service.submit(hub_job))


@pytest.mark.usefixtures("patient")
def test_conversations_need_a_template_and_texts_do_not(service: PostTrainingService) -> None:
    with pytest.raises(
        InvalidInput, match=r"^model: '.*/bare' is not valid; expected a model that can render"
    ) as caught:
        asyncio.run(service.submit(body("bare")))
    assert "set options.chat_template to one of chatml, plain" in str(caught.value)
    assert accepted(service, body("bare", options={"chat_template": "chatml"})) == []
    assert accepted(service, body("bare", "text")) == []


@pytest.mark.usefixtures("patient")
def test_an_endless_template_costs_the_limit_and_its_process(
    service: PostTrainingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert accepted(service, body("free")) == []
    monkeypatch.setattr(template_check, "LIMIT_S", 1.0)
    before, pulses = child(service), []

    async def submit() -> list[str]:
        async def pulse() -> None:
            while True:
                pulses.append(time.monotonic())
                await asyncio.sleep(0.02)

        beating = asyncio.create_task(pulse())
        notes = (await service.submit(body("endless"))).notes
        beating.cancel()
        return notes

    began = time.monotonic()
    assert asyncio.run(submit()) == [NOT_CHECKED + "the chat template gave no answer within 1 s"]
    assert time.monotonic() - began < 90, "far less than the 300 s that it would have without the limit"
    assert len(pulses) >= 10, "the event loop ran meanwhile"
    assert not before.is_running()
    monkeypatch.setattr(template_check, "LIMIT_S", 300.0)
    with pytest.raises(InvalidRows):
        asyncio.run(service.submit(body(dataset_id="greets")))


@pytest.mark.usefixtures("patient")
def test_a_killed_process_is_replaced(service: PostTrainingService) -> None:
    assert accepted(service, body("free")) == []
    first = child(service)
    first.kill()
    first.wait()
    assert accepted(service, body("free")) == []
    second = child(service)
    told: list[str] = []
    waiting = threading.Thread(target=lambda: told.extend(accepted(service, body("endless"))))
    waiting.start()
    busy = second.cpu_times().user + 0.3
    wait_for(lambda: second.cpu_times().user > busy)
    second.kill()
    waiting.join()
    assert told == [NOT_CHECKED + "its process ended or gave no answer that can be read (EOFError)"]
    assert accepted(service, body("free")) == []
    assert child(service).pid not in (first.pid, second.pid)


@pytest.mark.usefixtures("patient")
def test_an_idle_process_is_replaced_before_it_ends_itself(
    service: PostTrainingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert accepted(service, body("free")) == []
    first = child(service).pid
    assert accepted(service, body("free")) == []
    assert child(service).pid == first
    monkeypatch.setattr(template_check, "IDLE_S", 0.0)
    assert accepted(service, body("free")) == []
    assert child(service).pid != first


@pytest.mark.usefixtures("patient")
def test_nothing_of_the_rows_is_logged(
    service: PostTrainingService, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InvalidRows):
        asyncio.run(service.submit(body(dataset_id="greets")))
    assert accepted(service, body("free")) == []
    out, err = capfd.readouterr()
    assert "berth" not in caplog.text + out + err


@pytest.mark.usefixtures("patient")
def test_a_server_that_stops_does_not_wait_for_a_template(
    service: PostTrainingService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's server waits for requests before it shuts a provider down."""
    assert accepted(service, body("free")) == []
    busy, told = child(service), list[str]()
    waiting = threading.Thread(target=lambda: told.extend(accepted(service, body("endless"))))
    waiting.start()
    worked = busy.cpu_times().user + 0.3
    wait_for(lambda: busy.cpu_times().user > worked)
    monkeypatch.setattr(compat, "is_stopping", lambda: True)
    waiting.join(30)
    assert told == [NOT_CHECKED + "the server is stopping"]
    assert not busy.is_running()


@pytest.mark.usefixtures("patient")
def test_jobs_of_the_other_loader_are_looked_at(tmp_path: Path) -> None:
    with serving_in_process(tmp_path, datasets(), unsloth_python=sys.executable) as service:
        with_models(service)
        asked = body(dataset_id="greets", loader="unsloth", adapter={"rank": 2, "alpha": 4})
        with pytest.raises(InvalidRows, match="row 5: ") as caught:
            asyncio.run(service.submit(asked))
    assert screen.problems(str(caught.value))[1:] == [f"row 5: messages: {REFUSED}"], "a line each on a screen"


@pytest.mark.usefixtures("patient")
def test_many_jobs_at_a_time_are_all_checked(service: PostTrainingService) -> None:
    async def submit() -> list[Any]:
        asked = [body("free" if number % 2 else "strict", "greets") for number in range(8)]
        return await asyncio.gather(*(service.submit(each) for each in asked), return_exceptions=True)

    kinds = [type(each).__name__ for each in asyncio.run(submit())]
    assert kinds == ["InvalidRows", "SubmittedJob"] * 4
    assert child(service)


@pytest.mark.usefixtures("patient")
def test_the_answer_over_http_names_the_row(service: PostTrainingService) -> None:
    with over_http(service) as url:
        answer = httpx.post(f"{url}{PREFIX}/jobs/validate", json=body(dataset_id="greets"), timeout=120)
    assert answer.status_code == 400
    assert "row 5: messages: " in answer.json()["error"]["message"]
