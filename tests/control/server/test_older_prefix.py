"""Tests the second prefix of the routes, `/v1/post-training`, which older SDKs call."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from llama_stack_provider_moe.control.server import compat
from llama_stack_provider_moe.control.server.openai.routes import PREFIX as FINE_TUNING
from llama_stack_provider_moe.control.server.routes import OLDER_PREFIX, PREFIX, create_router
from llama_stack_provider_moe.control.server.service import PostTrainingService
from tests.support.host_support import BODY, app_of, serving_in_process


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostTrainingService]:
    folder: Path = tmp_path_factory.mktemp("older")
    with serving_in_process(folder, prometheus=True) as made:
        yield made


def served(service: PostTrainingService, prefix: str) -> dict[tuple[str, str], Any]:
    return {
        (method, route.path.removeprefix(prefix)): route.openapi_extra  # type: ignore[attr-defined]
        for route in create_router(service).routes
        if getattr(route, "path", "").startswith(prefix + "/")
        for method in route.methods  # type: ignore[attr-defined]
    }


def ask(service: PostTrainingService, method: str, path: str, **request: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app_of(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(send())


def test_both_prefixes_serve_the_same_routes(service: PostTrainingService) -> None:
    newer = served(service, PREFIX)
    assert ("POST", "/jobs") in newer
    assert ("GET", "/datasets/{name}/profile") in newer
    assert served(service, OLDER_PREFIX) == newer
    assert newer["GET", "/health"] == {compat.PUBLIC_ROUTE_KEY: True}


def test_the_document_describes_each_route_once(service: PostTrainingService) -> None:
    paths = app_of(service).openapi()["paths"]
    assert paths
    assert all(path.startswith((PREFIX + "/", FINE_TUNING + "/")) for path in paths)


def test_a_job_of_one_prefix_is_a_job_of_the_other(service: PostTrainingService) -> None:
    job = ask(service, "POST", f"{OLDER_PREFIX}/jobs", json=BODY).json()["job_uuid"]
    for view in (f"/jobs/{job}/status", f"/job/status?job_uuid={job}", "/jobs", f"/job/artifacts?job_uuid={job}"):
        older, newer = ask(service, "GET", OLDER_PREFIX + view), ask(service, "GET", PREFIX + view)
        assert (older.status_code, older.json()) == (200, newer.json())
    assert ask(service, "POST", f"{OLDER_PREFIX}/job/cancel", json={"job_uuid": job}).status_code == 200
    assert ask(service, "GET", f"{PREFIX}/jobs/{job}/status").json()["status"] == "cancelled"


def test_errors_have_the_same_form(service: PostTrainingService) -> None:
    for method, path, content in (("GET", "/jobs/none", None), ("POST", "/jobs", b"{"), ("POST", "/jobs", b"{}")):
        older, newer = (ask(service, method, prefix + path, content=content) for prefix in (OLDER_PREFIX, PREFIX))
        assert older.status_code == newer.status_code >= 400
        assert older.json() == newer.json()


def test_rows_are_taken_in_pieces_there_too(service: PostTrainingService) -> None:
    """The limit on bodies, 8 MiB by default, does not hold for uploads."""
    rows = b'{"prompt": "a", "completion": "' + b"b" * (1 << 20) + b'"}\n'
    answer = ask(service, "PUT", f"{OLDER_PREFIX}/datasets/large", content=rows * 9)
    assert (answer.status_code, answer.json()["rows"]) == (200, 9)
