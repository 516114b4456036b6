"""Tests the limits of requests and data sets; exceeding them costs the server nothing."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from llama_stack_provider_moe.control.server import routes
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.bad_inputs import GOOD_BODIES, SFT
from tests.support.host_support import BODY, ROWS, Datasets, app_of, ask, over_http, scope_of, serving_in_process

LIMIT_BYTES, MAX_ROWS = 100_000, 12
PATHS = ["/jobs", "/jobs/validate", "/supervised-fine-tune", "/preference-optimize", "/job/cancel"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    datasets = Datasets()
    datasets.rows["one-more"] = [*ROWS, ROWS[0]]
    folder = tmp_path_factory.mktemp("limits")
    with serving_in_process(folder, datasets, max_body_bytes=LIMIT_BYTES, max_rows=MAX_ROWS) as made:
        yield made


def test_the_limits_are_the_servers() -> None:
    made = ProviderConfig()
    assert (made.max_body_bytes, made.max_rows) == (8 << 20, 10_000_000)
    for field, allowed, refused in (
        ("max_body_bytes", (65536, 1 << 30), (65535, (1 << 30) + 1)), ("max_rows", (1, 10**12), (0, -1)),
    ):  # fmt: skip
        for value in allowed:
            assert getattr(ProviderConfig.model_validate({field: value}), field) == value
        for value in refused:
            with pytest.raises(ValidationError, match=field):
                ProviderConfig.model_validate({field: value})


def a_body(size: int) -> bytes:
    return json.dumps(BODY).encode().ljust(size)


def test_the_largest_body_is_accepted(service: PostTrainingService) -> None:
    headers = {"content-type": "application/json"}
    answer = ask(service, "POST", "/jobs/validate", content=a_body(LIMIT_BYTES), headers=headers)
    assert answer.status_code == 200
    answer = ask(service, "POST", "/jobs/validate", content=a_body(LIMIT_BYTES + 1), headers=headers)
    assert answer.status_code == 413


@pytest.mark.parametrize("path", PATHS)
def test_an_endless_body_is_not_read(service: PostTrainingService, path: str) -> None:
    sent: list[Any] = []
    chunk, taken = b" " * 65536, 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        taken += len(chunk)
        return {"type": "http.request", "body": chunk, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = scope_of((routes.PREFIX + path).encode(), method="POST")
    asyncio.run(app_of(service)(scope, receive, send))
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["error"]["message"] == (
        "the body has more than 100000 bytes (`max_body_bytes` of this server); rows of a job belong in a data set"
    )
    assert taken <= LIMIT_BYTES + 2 * len(chunk)


def test_a_client_that_sends_too_much_gets_the_reason_and_can_continue(service: PostTrainingService) -> None:
    with over_http(service) as url, httpx.Client(base_url=url + routes.PREFIX, timeout=60) as client:
        headers = {"content-type": "application/json"}
        answer = client.post("/jobs", content=a_body(LIMIT_BYTES + 100_000), headers=headers)
        assert answer.status_code == 413
        assert client.get("/health").status_code == 200


def test_the_row_limit_is_exact(service: PostTrainingService) -> None:
    assert len(ROWS) == MAX_ROWS
    assert ask(service, "POST", "/jobs/validate", json=BODY).status_code == 200
    answer = ask(service, "POST", "/jobs", json=BODY | {"data": {"dataset_id": "one-more"}})
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "data.dataset_id: 'one-more' is not valid; expected a data set of at most 12 rows (`max_rows` of this server)"
    )
    body = BODY | {"data": {"dataset_id": "good", "validation_dataset_id": "one-more"}}
    assert "data.validation_dataset_id: 'one-more'" in ask(service, "POST", "/jobs", json=body).text
    given = GOOD_BODIES[SFT]["training_config"]
    body = GOOD_BODIES[SFT] | {
        "training_config": given | {"data_config": given["data_config"] | {"dataset_id": "one-more"}}
    }
    message = ask(service, "POST", SFT, json=body).json()["error"]["message"]
    assert message.startswith("training_config.data_config.dataset_id: 'one-more' is not valid"), (
        "the error has the caller's name of the field"
    )
    assert not any((service.config.state_dir / "staging").iterdir())
