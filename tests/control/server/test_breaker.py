"""Tests submissions of circuit-breaker jobs: both routes, the rows of each set, and the error texts."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_stack_provider_moe.control.server.service import PostTrainingService
from tests.support.host_support import ROWS, Datasets, app_of, ask, folder_of, serving_in_process

DIALOGS = [
    {"messages": [{"role": "user", "content": f"Hi {n}"}, {"role": "assistant", "content": "Hello"}]} for n in range(5)
]
BODY: dict[str, Any] = {
    "recipe": "circuit_breaker",
    "model": "owner/name",
    "data": {"dataset_id": "good"},
    "circuit_breaker": {"retain": {"dataset_id": "dialogs", "format": "dialog", "ratio": 2.0}},
}
REQUEST: dict[str, Any] = {
    "job_uuid": "over-sft",
    "model": "owner/name",
    "hyperparam_search_config": {},
    "logger_config": {},
    "training_config": {
        "n_epochs": 1,
        "data_config": {"dataset_id": "good", "batch_size": 4, "shuffle": True, "data_format": "instruct"},
    },
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    datasets = Datasets()
    datasets.rows |= {"dialogs": DIALOGS, "few": ROWS[:3]}
    with serving_in_process(tmp_path_factory.mktemp("breaker"), datasets) as made:
        yield made


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_each_set_is_copied_into_the_job(service: PostTrainingService) -> None:
    body = {**BODY, "job_uuid": "whole", "data": {"dataset_id": "good", "validation_dataset_id": "few"}}
    block = {**BODY["circuit_breaker"], "safe": {"dataset_id": "few", "validation_dataset_id": "few", "ratio": 0.5}}
    answer = ask(service, "POST", "/jobs", json={**body, "circuit_breaker": block})
    assert answer.status_code == 200, answer.text
    folder = folder_of(service, "whole")
    counts = {path.stem: lines(path) for path in folder.data.glob("*.jsonl")}
    assert counts == {"train": 12, "validation": 3, "retain": 5, "safe": 3, "safe-validation": 3}
    spec = folder.read_spec()
    assert spec.recipe == "circuit_breaker"
    assert spec.adapter is not None
    assert (spec.adapter.rank, spec.adapter.alpha, spec.adapter.dropout) == (16, 16, 0.05)
    assert spec.circuit_breaker.retain.ratio == 2.0


def test_submission_through_the_apis_own_route(service: PostTrainingService) -> None:
    block = {**BODY["circuit_breaker"], "target_layers": "9,19", "alpha": 5}
    lora = {"type": "LoRA", "lora_attn_modules": ["q_proj"], "apply_lora_to_mlp": True, "apply_lora_to_output": False,
            "rank": 8, "alpha": 16}  # fmt: skip
    body = {**REQUEST, "algorithm_config": lora, "options": {"circuit_breaker": block, "seed": 7}}
    answer = ask(service, "POST", "/supervised-fine-tune", json=body)
    assert answer.status_code == 200, answer.text
    spec = folder_of(service, "over-sft").read_spec()
    assert spec.recipe == "circuit_breaker"
    assert (spec.circuit_breaker.target_layers, spec.circuit_breaker.alpha, spec.options.seed) == ("9,19", 5, 7)
    assert spec.adapter is not None
    assert spec.adapter.rank == 8


def test_validation_counts_every_set(service: PostTrainingService) -> None:
    answer = ask(service, "POST", "/jobs/validate", json=BODY)
    assert answer.status_code == 200, answer.text
    assert answer.json()["rows"] == {"train": 12, "retain": 5}
    assert answer.json()["validation_rows"] is None


def changed(block: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**BODY, **more, "circuit_breaker": {**BODY["circuit_breaker"], **block}}


CURVE = {"start": 1, "end": 2}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({key: value for key, value in BODY.items() if key != "circuit_breaker"}, "circuit_breaker: is missing"),
    (changed({"retain": {"dataset_id": "bad"}}), "dataset 'bad': 1 problem(s) in 12 row(s): row 4: row: has columns"),
    (changed({"retain": {"dataset_id": "one"}}), "circuit_breaker.retain.dataset_id: 'one' is not valid; expected at "
                                                 "least 2 rows"),
    (changed({"retain": {"dataset_id": "good", "format": "dialog"}}), "is an instruct row, but data_format is"),
    (changed({"retain": {"dataset_id": "good", "ratio": 0}}), "circuit_breaker.retain.ratio: 0 is not valid; expected"),
    (changed({"target_layers": "9-3"}), "circuit_breaker.target_layers: range '9-3' ends before it begins"),
    (changed({"target_layer": "9"}), "circuit_breaker.target_layer: unknown key (did you mean target_layers?)"),
    (changed({"weighting": "dual"}), "reroute_curve: is needed by variant 'rr' with weighting 'dual'"),
    (changed({"retain_curve": CURVE}), "retain_curve: is used by variant 'rr' with weighting 'dual' only"),
    (changed({"weighting": "dual", "reroute_curve": CURVE, "retain_curve": CURVE, "alpha": 2}), "alpha: is used by"),
    (changed({"variant": "repbend", "schedule_steps": 9}), "schedule_steps: is not valid with variant 'repbend'"),
    (changed({"repbend": {"kl": 1}}), "repbend: is used by variant 'repbend' only"),
    (changed({}, adapter=None), "adapter: null is not valid with recipe 'circuit_breaker'"),
    (changed({}, data={"dataset_id": "good", "packed": True}), "data.packed: true is for SFT only"),
    (changed({}, moe={"moe_load_balancing": "aux_free"}), "moe.moe_load_balancing: 'aux_free' is not valid with"),
    (changed({}, moe={"expert_dropout": 0.1}), "moe.expert_dropout: is for SFT only"),
    (changed({}, data={"dataset_id": "good", "validation_dataset_id": "few"}, options={"validation_split": 0}),
     "circuit_breaker.retain.validation_dataset_id: is missing, but other sets have one"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "expected"), REFUSED)
def test_errors_name_the_field(service: PostTrainingService, body: dict[str, Any], expected: str) -> None:
    answer = ask(service, "POST", "/jobs", json=body)
    assert (answer.status_code, expected in answer.json()["error"]["message"]) == (400, True), answer.text


def test_errors_name_fields_as_the_caller_wrote_them(service: PostTrainingService) -> None:
    for block, status, expected in (
        ({"retain": {"dataset_id": "nope"}}, 404, "no data set 'nope'"),
        ({"retain": {"dataset_id": "good"}, "alpha": -1}, 400, "options.circuit_breaker.alpha: -1 is not valid"),
        ({"retain": {"dataset_id": "one"}}, 400, "options.circuit_breaker.retain.dataset_id: 'one' is not valid"),
    ):
        body = {**REQUEST, "job_uuid": "refused", "options": {"circuit_breaker": block}}
        answer = ask(service, "POST", "/supervised-fine-tune", json=body)
        assert answer.status_code == status, answer.text
        assert expected in answer.json()["error"]["message"]


def test_the_document_describes_the_block_without_dead_references(service: PostTrainingService) -> None:
    document = app_of(service).openapi()
    references = set(re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)))
    assert all(each.startswith("#/components/schemas/") for each in references), references
    options = json.dumps(document["components"]["schemas"]["SupervisedFineTuneRequest"]["properties"]["options"])
    assert all(name in options for name in ("circuit_breaker", "target_layers", "ratio", "reroute_curve"))


def test_spec_comes_back_as_it_was_written(service: PostTrainingService) -> None:
    body = changed({"weighting": "dual", "reroute_curve": CURVE, "retain_curve": {**CURVE, "schedule": "cosine"}})
    job_id = asyncio.run(service.submit(body)).job_uuid
    folder = folder_of(service, job_id)
    assert json.loads(folder.spec.read_text()) == folder.read_spec().model_dump(mode="json")
