"""Playgrounds over the API: one for each owner, limits of prompts, and answers as a training process writes them."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.control.server import playgrounds
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.control.supervisor.playground_room import PlaygroundRoom
from llama_stack_provider_moe.errors import Conflict
from llama_stack_provider_moe.jobdir.folder import Artifact, write_atomic
from llama_stack_provider_moe.jobdir.prompts import Answered, AnswerLog, Begun, Ended, LoadedModel, PromptFiles, Text
from llama_stack_provider_moe.jobdir.state import JobState
from llama_stack_provider_moe.spec.limits_config import LimitsConfig
from llama_stack_provider_moe.spec.playground import MAX_WAITING, PlaygroundTraining
from tests.support.host_support import ask, caller, folder_of, serving_in_process, submit

PLAYGROUND = {"recipe": "playground", "model": "owner/name"}
PROMPT = {"messages": [{"role": "user", "content": "Hello?"}]}


@pytest.fixture
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("playgrounds")) as made:
        yield made


def start(service: PostTrainingService, **changes: Any) -> str:
    return asyncio.run(service.submit(PLAYGROUND | changes)).job_uuid


def files_of(service: PostTrainingService, job_id: str) -> PromptFiles:
    return PromptFiles(folder_of(service, job_id).prompts)


def message(answer: httpx.Response) -> str:
    text: str = answer.json()["error"]["message"]
    return text


def trained(service: PostTrainingService, **changes: Any) -> str:
    """A completed job with an adapter."""
    job_id = submit(service, **changes)
    folder = folder_of(service, job_id)
    folder.adapter.mkdir(parents=True)
    (folder.adapter / "adapter_config.json").write_text(
        json.dumps({"base_model_name_or_path": "owner/name", "peft_type": "LORA"})
    )
    (folder.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    made = Artifact.model_validate(
        {"identifier": f"{job_id}/adapter", "kind": "adapter", "path": str(folder.adapter), "epoch": 1, "step": 1,
         "created_at": "2026-01-01T00:00:00Z", "bytes": 7}
    )  # fmt: skip
    assert service.store.claim("me/1/1/1/1") is not None
    service.store.move(job_id, JobState.COMPLETED, artifacts=(made,))
    return job_id


def test_an_owner_has_one_playground(service: PostTrainingService) -> None:
    with caller("ann"):
        first = start(service)
        for act in (service.submit, service.validate):
            with pytest.raises(Conflict, match=f"'{first}' is your playground already, of owner/name"):
                asyncio.run(act(PLAYGROUND))
    with caller("ben"):
        start(service)
    with caller("ann"):
        second = start(service, playground={"replace": True})
        assert service.store.get(first, None).state is JobState.CANCELLED
        with pytest.raises(Conflict, match=f"'{second}' is your playground already"):
            asyncio.run(service.resume(first))
        asyncio.run(service.cancel(second))
        asyncio.run(service.resume(first))
        assert service.store.get(first, None).state is JobState.SCHEDULED


def test_the_result_of_a_job_is_its_adapter_on_its_base(service: PostTrainingService) -> None:
    job_id = trained(service)
    playground = start(service, model=job_id)
    spec = folder_of(service, playground).read_spec()
    assert isinstance(spec, playgrounds.PlaygroundSpec)
    assert (spec.model, spec.model_from) == ("owner/name", f"{job_id}/adapter")
    assert spec.adapter_folder == str(folder_of(service, job_id).adapter)
    answer = ask(service, "DELETE", f"/jobs/{job_id}")
    assert (answer.status_code, playground in answer.text) == (409, True), "it still needs the adapter"
    assert ask(service, "POST", f"/jobs/{playground}/prompts", json=PROMPT | {"adapter": "both"}).status_code == 200


@pytest.mark.parametrize("by", ["model", "adapter_folder"])
@pytest.mark.parametrize(("asked", "bits"), [({}, 8), ({"quantize_bits": 0}, 0), ({"quantize_bits": 4}, 4)])
def test_the_base_is_quantised_as_the_adapters_job_trained_it(
    service: PostTrainingService, by: str, asked: dict[str, int], bits: int
) -> None:
    job_id = trained(service, adapter={"rank": 2, "quantize_base": True, "quantize_bits": 8})
    names = {"model": job_id} if by == "model" else {"model": "owner/name", "adapter_folder": job_id}
    spec = folder_of(service, start(service, training=asked, playground={"replace": True}, **names)).read_spec()
    assert isinstance(spec, playgrounds.PlaygroundSpec)
    assert spec.training.quantize_bits == bits


def test_the_scales_are_quantised_as_the_adapters_job_trained_on_them(service: PostTrainingService) -> None:
    job_id = trained(service, adapter={"rank": 2, "quantize_base": True, "quantize_scales": True})
    spec = folder_of(service, start(service, training={}, playground={"replace": True}, model=job_id)).read_spec()
    assert isinstance(spec, playgrounds.PlaygroundSpec)
    assert (spec.training.quantize_bits, spec.training.quantize_scales) == (4, True)
    with pytest.raises(ValueError, match="quantize_scales: true is used only with quantize_bits 4"):
        PlaygroundTraining(quantize_bits=8, quantize_scales=True)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({}, "messages: is missing; state either messages or prompt"),
        (PROMPT | {"prompt": "a"}, "messages: state either messages or prompt, not both"),
        ({"messages": []}, "messages: [] is not valid; expected at least 1 item"),
        ({"messages": [{"role": "user", "content": "a"}] * 201}, "is not valid; expected at most 200 items"),
        (PROMPT | {"seed": "7"}, "seed: '7' is not valid; expected an integer"),
        (PROMPT | {"temperature": "1"}, "temperature: '1' is not valid; expected a number"),
        (PROMPT | {"max_tokens": "7"}, "max_tokens: '7' is not valid; expected an integer"),
        (PROMPT | {"routing": "no"}, "routing: 'no' is not valid; expected true or false"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "the last one has role 'assistant'; expected 'user'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content: is missing"),
        (PROMPT | {"temperature": 3}, "temperature: 3 is not valid; expected <= 2"),
        (PROMPT | {"temperature": 1e-300}, "temperature: 1e-300 is not valid; expected 0, or 0.01 to 2"),
        (PROMPT | {"top_p": 0}, "top_p: 0 is not valid; expected > 0"),
        (PROMPT | {"seed": -1}, "seed: -1 is not valid; expected >= 0"),
        (PROMPT | {"max_tokens": 20}, "max_tokens: 20 is not valid; expected at most 16, playground.max_new_tokens"),
        (PROMPT | {"adapter": "off"}, "has no adapter to switch off: owner/name is a whole model"),
        (PROMPT | {"adapter": "maybe"}, "adapter: 'maybe' is not valid; expected 'on', 'off' or 'both'"),
        (PROMPT | {"top_k": 3}, "top_k: unknown key"),
        (PROMPT | {"routing": True}, "routing: True is not valid; expected false, because the model is dense"),
    ],
)
def test_a_bad_prompt_is_refused_with_its_field(service: PostTrainingService, body: dict[str, Any], told: str) -> None:
    job_id = start(service, playground={"max_new_tokens": 16})
    files = files_of(service, job_id)
    files.folder.mkdir()
    write_atomic(files.model, LoadedModel(has_adapter=False, moe_layers=[], experts=0, top_k=0))
    answer = ask(service, "POST", f"/jobs/{job_id}/prompts", json={"max_tokens": 16} | body)
    assert answer.status_code == 400
    assert told in message(answer)
    assert files.numbers() == []


def test_a_waiting_job_is_told_of_the_playground_in_its_way(service: PostTrainingService) -> None:
    """Only once the supervisor has asked for room, and without the name of another owner's job."""
    with caller("ann"):
        first = start(service)
    assert service.store.claim("me/1/1/1/1") is not None
    with caller("ben"):
        waits = submit(service)
    files = files_of(service, first)
    files.folder.mkdir()

    def reason() -> object:
        with caller("ben"):
            return asyncio.run(service.status(waits)).resources_allocated.get("reason")

    assert reason() is None
    room = PlaygroundRoom(service.store, None, LimitsConfig())
    room.look(service.store.running())
    assert files.wanted.exists()
    assert first not in str(reason())
    assert "a playground has the place of a waiting job" in str(reason())
    with caller("ben"):
        asyncio.run(service.cancel(waits))
    room.look(service.store.running())
    assert not files.wanted.exists()


def test_a_job_of_another_recipe_takes_no_prompts(service: PostTrainingService) -> None:
    job_id = submit(service)
    for answer in (
        ask(service, "POST", f"/jobs/{job_id}/prompts", json=PROMPT),
        ask(service, "GET", f"/jobs/{job_id}/prompts"),
        ask(service, "GET", f"/jobs/{job_id}/prompts/1"),
        ask(service, "DELETE", f"/jobs/{job_id}/prompts/1"),
    ):
        assert answer.status_code == 409
        assert message(answer) == f"job {job_id!r} is no playground: its recipe is 'sft'"


def test_few_prompts_wait(service: PostTrainingService) -> None:
    """The one too many leaves nothing; a place is free once one is stopped, or its answer begins."""
    job_id = start(service)
    path = f"/jobs/{job_id}/prompts"
    sent = [ask(service, "POST", path, json=PROMPT).json() for _ in range(MAX_WAITING)]
    assert [each["number"] for each in sent] == list(range(1, MAX_WAITING + 1))
    assert [each["ahead"] for each in sent] == list(range(MAX_WAITING))
    answer = ask(service, "POST", path, json=PROMPT)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "5")
    assert files_of(service, job_id).numbers() == list(range(1, MAX_WAITING + 1))
    assert ask(service, "DELETE", f"{path}/3").json()["status"] == "withdrawn"
    after = ask(service, "POST", path, json=PROMPT)
    assert (after.status_code, after.json()["number"]) == (200, MAX_WAITING + 2), "a withdrawn number is not used again"
    assert ask(service, "DELETE", f"{path}/{MAX_WAITING + 2}").json()["status"] == "withdrawn"
    assert ask(service, "POST", path, json=PROMPT).json()["number"] == MAX_WAITING + 3
    AnswerLog(files_of(service, job_id).answer(1)).close()
    assert ask(service, "POST", path, json=PROMPT).status_code == 200
    assert ask(service, "GET", f"{path}/3").status_code == 404


def test_a_playground_that_ends_takes_no_prompts(service: PostTrainingService) -> None:
    job_id = start(service)
    path = f"/jobs/{job_id}/prompts"
    assert ask(service, "POST", path, json=PROMPT).status_code == 200
    assert service.store.claim("me/1/1/1/1") is not None
    files_of(service, job_id).closed.touch()
    answer = ask(service, "POST", path, json=PROMPT)
    assert answer.status_code == 409
    assert "takes no prompts: it has had no prompt for a while and ends" in message(answer)
    files_of(service, job_id).closed.unlink()
    asyncio.run(service.cancel(job_id))
    assert "it is being cancelled" in message(ask(service, "POST", path, json=PROMPT))
    service.store.move(job_id, JobState.CANCELLED, reason="cancelled")
    answer = ask(service, "POST", path, json=PROMPT)
    assert (answer.status_code, "it is cancelled; start another" in message(answer)) == (409, True)
    left = ask(service, "GET", f"{path}/1").json()
    assert (left["status"], left["error"]) == ("failed", playgrounds.UNANSWERED)
    assert not ask(service, "GET", path).json()["is_open"]


def test_an_answer_is_read_and_streamed_as_it_comes(service: PostTrainingService) -> None:
    job_id = start(service)
    path = f"/jobs/{job_id}/prompts"
    assert ask(service, "POST", path, json=PROMPT).json() == {"job_uuid": job_id, "number": 1, "ahead": 0}
    assert ask(service, "GET", f"{path}/1").json() | {"prompt": None} == {
        "job_uuid": job_id, "number": 1, "status": "waiting", "prompt": None, "answers": {}, "error": None,
    }  # fmt: skip
    log = AnswerLog(files_of(service, job_id).answer(1))
    log.append(Begun(side="on", prompt_tokens=4))
    log.append(Text(side="on", text="Hel"))
    begun = ask(service, "GET", f"{path}/1").json()
    assert (begun["status"], begun["answers"]["on"]["text"]) == ("answering", "Hel")
    assert ask(service, "DELETE", f"{path}/1").json()["status"] == "stopping"
    assert files_of(service, job_id).stop(1).exists()
    log.append(Text(side="on", text="lo\u2028"))
    log.append(Answered(side="on", text="Hello\u2028", tokens=2, reason="stopped", seconds=0.1))
    log.append(Ended())
    log.close()
    ended = ask(service, "GET", f"{path}/1").json()
    assert (ended["status"], ended["error"]) == ("answered", None)
    assert ended["answers"]["on"]["text"] == "Hello\u2028"
    assert ask(service, "DELETE", f"{path}/1").json()["status"] == "answered"
    streamed = events(ask(service, "GET", f"{path}/1?follow=true").text)
    assert [piece["type"] for piece in streamed[0]["pieces"]] == ["begun", "text", "text", "answered", "ended"]
    assert streamed[-1] == {"job_uuid": job_id, "status": "answered"}
    place = files_of(service, job_id).answer(1).read_bytes().index(b"\n") + 1
    later = events(ask(service, "GET", f"{path}/1?follow=true", headers={"Last-Event-ID": str(place)}).text)
    assert [piece["type"] for piece in later[0]["pieces"]] == ["text", "text", "answered", "ended"]
    assert ask(service, "GET", path).json()["data"] == [{"number": 1, "status": "answered"}]
    assert ask(service, "GET", f"{path}/2?follow=true").status_code == 404


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line.removeprefix("data: ")) for line in text.splitlines() if line.startswith("data: ")]


def test_a_link_in_place_of_the_folder_is_refused(service: PostTrainingService, tmp_path: Any) -> None:
    job_id = start(service)
    files_of(service, job_id).folder.symlink_to(tmp_path)
    answer = ask(service, "GET", f"/jobs/{job_id}/prompts")
    assert (answer.status_code, "is a link" in message(answer)) == (403, True)


def test_settings_are_checked_at_the_door(service: PostTrainingService) -> None:
    for block, told in (
        ({"idle_s": 4}, "playground.idle_s: 4 is not valid; expected >= 5"),
        ({"idle_s": 7201}, "playground.idle_s: 7201 is not valid; expected <= 7200"),
        ({"max_new_tokens": 5000}, "playground.max_new_tokens: 5000 is not valid; expected <= 4096"),
        ({"warm_s": 4}, "playground.warm_s: unknown key"),
    ):
        answer = ask(service, "POST", "/jobs", json=PLAYGROUND | {"playground": block})
        assert (answer.status_code, told in message(answer)) == (400, True), answer.text
    for more in ({"data": {"dataset_id": "good"}}, {"resources": {"gpus": 2}}, {"adapter": None}):
        assert ask(service, "POST", "/jobs", json=PLAYGROUND | more).status_code == 400
