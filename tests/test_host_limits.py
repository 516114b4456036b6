"""What a request may hold: bodies and data sets have bounds, and what is beyond them costs the server nothing."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.host import routes, rows
from llama_stack_provider_moe.host.service import PostTrainingService
from tests.host_support import BODY, ROWS, app_of, ask, over_http, scope_of, serving_in_process

PATHS = ["/jobs", "/jobs/validate", "/supervised-fine-tune", "/preference-optimize", "/job/cancel"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    with serving_in_process(tmp_path_factory.mktemp("limits")) as made:
        yield made


def a_body(size: int) -> bytes:
    return json.dumps(BODY).encode().ljust(size)


def test_the_largest_body_is_taken(service: PostTrainingService) -> None:
    headers = {"content-type": "application/json"}
    answer = ask(service, "POST", "/jobs/validate", content=a_body(routes.MAX_BODY_BYTES), headers=headers)
    assert answer.status_code == 200
    answer = ask(service, "POST", "/jobs/validate", content=a_body(routes.MAX_BODY_BYTES + 1), headers=headers)
    assert answer.status_code == 413


@pytest.mark.parametrize("path", PATHS)
def test_a_body_without_end_is_not_read(service: PostTrainingService, path: str) -> None:
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
    assert json.loads(sent[1]["body"])["error"]["message"].startswith("the body has more than 8388608 bytes; ")
    assert taken <= routes.MAX_BODY_BYTES + 2 * len(chunk)


def test_a_sender_of_too_much_hears_why_and_may_go_on(service: PostTrainingService) -> None:
    with over_http(service) as url, httpx.Client(base_url=url + routes.PREFIX) as client:
        headers = {"content-type": "application/json"}
        answer = client.post("/jobs", content=a_body(routes.MAX_BODY_BYTES + 100_000), headers=headers)
        assert answer.status_code == 413
        assert client.get("/health").status_code == 200


def test_too_many_rows_are_refused(service: PostTrainingService, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROWS", len(ROWS))
    assert ask(service, "POST", "/jobs/validate", json=BODY).status_code == 200
    monkeypatch.setattr(rows, "MAX_ROWS", len(ROWS) - 1)
    answer = ask(service, "POST", "/jobs", json=BODY)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == (
        "data.dataset_id: 'good' is not valid; expected a data set of at most 11 rows"
    )
    assert not any((service.config.state_dir / "staging").iterdir())
