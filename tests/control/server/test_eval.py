"""Tests submissions with `eval`: the data sets are copied, wrong rows are named, and the judge is checked."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.cli import show
from llama_stack_provider_moe.control.server import wire_requests
from llama_stack_provider_moe.control.server.api_requests import draft
from llama_stack_provider_moe.control.server.progress import progress
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.errors import Forbidden, InvalidBody, InvalidRows
from llama_stack_provider_moe.jobdir.events import Assessed, EventLog, Step
from tests.support.host_support import BODY, ROWS, Datasets, folder_of, serving_in_process, submit

TOOL = {"name": "read_file", "parameters": {"type": "object"}}
SCENARIO = {
    "messages": [{"role": "user", "content": "Read."}], "tools": [TOOL], "forbidden": [{"name": "read_file"}]
}  # fmt: skip
EVAL = {
    "refuse_dataset_id": "prompts",
    "retain_dataset_id": "good",
    "scenarios_dataset_id": "scenarios",
    "judge": {"labelled_dataset_id": "labels"},
}


@pytest.fixture
def datasets() -> Datasets:
    made = Datasets()
    more: dict[str, list[Any]] = {
        "prompts": [{"prompt": "Open the door."}],
        "scenarios": [SCENARIO],
        "labels": [{"prompt": "?", "answer": "No.", "refusal": True}],
        "wrong": [SCENARIO, {**SCENARIO, "forbidden": []}, {**SCENARIO, "messages": "?"}],
    }
    made.rows.update(more)
    return made


@pytest.fixture
def service(tmp_path: Path, datasets: Datasets) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path, datasets) as made:
        yield made


@pytest.mark.parametrize("recipe", ["sft", "dpo"])
def test_the_data_sets_are_copied_into_the_jobs_folder(
    service: PostTrainingService, datasets: Datasets, recipe: str
) -> None:
    if recipe == "dpo":  # pairs to train on, conversations to evaluate
        datasets.rows["pairs"] = [{"prompt": row["prompt"], "chosen": "Yes.", "rejected": "No."} for row in ROWS]
    data = {"dataset_id": "pairs" if recipe == "dpo" else "good"}
    folder = folder_of(service, submit(service, recipe=recipe, data=data, eval=EVAL))
    found = {path.stem: len(path.read_text().splitlines()) for path in folder.data.glob("*.jsonl")}
    assert found == {"train": 12, "eval-refuse": 1, "eval-retain": 12, "eval-scenarios": 1, "eval-labelled": 1}
    [row] = [json.loads(line) for line in folder.rows("eval-scenarios").read_text().splitlines()]
    assert row["tools"][0]["function"]["name"] == "read_file"
    answer = asyncio.run(service.validate(BODY | {"eval": EVAL}))
    assert answer.rows["eval-refuse"] == 1


def test_wrong_rows_are_named_before_anything_is_created(service: PostTrainingService) -> None:
    with pytest.raises(InvalidRows) as caught:
        submit(service, eval={"scenarios_dataset_id": "wrong"})
    assert [(each.row, each.field) for each in caught.value.problems] == [(2, "forbidden"), (3, "messages")]
    with pytest.raises(InvalidRows, match="row 1: completion: is missing"):  # perplexity needs answers
        submit(service, eval={"retain_dataset_id": "prompts"})
    assert not any(path.is_dir() for path in service.config.jobs_dir.iterdir())


def test_a_judge_is_checked_like_any_model(service: PostTrainingService, tmp_path: Path) -> None:
    """A model that may not be trained may not be a judge either."""
    (tmp_path / "elsewhere").mkdir()
    judge = {"kind": "model", "model": str(tmp_path / "elsewhere")}
    with pytest.raises(Forbidden, match=r"eval\.judge\.model"):
        submit(service, eval={"refuse_dataset_id": "prompts", "judge": judge})


def test_urls_are_refused(service: PostTrainingService) -> None:
    for block in ({"url": "http://10.0.0.1/v1"}, {"judge": {"url": "http://10.0.0.1/v1"}}):
        with pytest.raises(InvalidBody, match="url"):
            submit(service, eval={"refuse_dataset_id": "prompts", **block})


def test_the_apis_own_request_accepts_the_block() -> None:
    request = wire_requests.SupervisedFineTuneRequest.model_validate({
        "job_uuid": "j", "model": "owner/name", "training_config": {"n_epochs": 1, "data_config": {
            "dataset_id": "good", "batch_size": 1, "shuffle": True, "data_format": "instruct"}},
        "hyperparam_search_config": {}, "logger_config": {}, "eval": EVAL,
    })  # fmt: skip
    assert draft(request).body["eval"] == EVAL


def test_the_status_has_the_last_measurement(service: PostTrainingService) -> None:
    job_id = submit(service, eval=EVAL)
    folder = folder_of(service, job_id)
    job = service.store.get(job_id, None)
    assert progress(job, folder)["safety"] is None
    events = EventLog(folder.events)
    figure = {"n": 4.0, "value": 0.5, "low": 0.15, "high": 0.85}
    events.append(Assessed(step=0, measured={"before": {"refusal_rate": figure}}, differences={}, exceeded=[]))
    folder.before.write_text("{}")
    for step in range(4000):  # until the event is outside the window that a status reads
        events.append(Step(step=step, max_steps=4000, epoch=0.5, metrics=dict.fromkeys("abcdefghijklmnop", 1.0)))
    safety = progress(job, folder)["safety"]
    assert safety["measured"]["before"]["refusal_rate"] == figure
    events.append(Assessed(step=4000, measured={}, differences={}, exceeded=["refusal_drop"]))
    assert progress(job, folder)["safety"]["exceeded"] == ["refusal_drop"]
    shown = show.safety(
        {
            "resources_allocated": {
                "safety": {"measured": {"before": {"refusal_rate": figure}, "after": {"refusal_rate": figure}}}
            }
        }
    )
    assert shown == "refusal_rate 0.5 -> 0.5 (n=4)"
    events.close()
