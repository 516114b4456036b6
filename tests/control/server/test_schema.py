"""Requests generated from the OpenAPI document of a running server, good and bad: none gets a 500.

schemathesis generates the same requests in every run. If we missed an exception, llama-stack 0.6.1 would answer 500,
drop the connection and log the exception.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings

from llama_stack_provider_moe.control.server.routes import PREFIX, create_router
from llama_stack_provider_moe.control.server.service import PostTrainingService
from llama_stack_provider_moe.spec.server_config import ProviderConfig
from tests.support.bad_inputs import DATASETS, GOOD_BODIES, JOBS
from tests.support.host_harness import QUICKSTART, Server, run_config, serving

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what it imports
    import schemathesis

pytestmark = pytest.mark.e2e

EXAMPLES = 12  # of each kind for each route
JOB = "known"
ROUTES = sorted(
    (method, route.path_format)  # type: ignore[attr-defined]
    for route in create_router(PostTrainingService(ProviderConfig(prometheus=True), {})).routes
    if route.include_in_schema  # type: ignore[attr-defined]
    for method in route.methods  # type: ignore[attr-defined]
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("schema")
    config = run_config(QUICKSTART, folder, provider={"prometheus": True, "supervisor": {"start": False}})
    with serving(config, folder / "state") as running:
        running.register("words", DATASETS["words"])
        with running.http() as http:
            assert http.post(JOBS, json=GOOD_BODIES[JOBS] | {"job_uuid": JOB}).status_code == 200
            assert http.post(f"/jobs/{JOB}/cancel").status_code == 200  # otherwise following it would never end
        yield running


@pytest.fixture(scope="module")
def described(server: Server) -> Any:
    # The document is made at the first request, which on a busy machine takes longer than the loader's 10 s.
    httpx.get(server.url + "/openapi.json", timeout=120).raise_for_status()
    return schemathesis.openapi.from_url(server.url + "/openapi.json")


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as made:
        yield made


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=lambda value: str(value).removeprefix(PREFIX))
def test_every_request_is_answered(described: Any, session: requests.Session, method: str, path: str) -> None:
    operation = described[path][method]
    modes = schemathesis.GenerationMode
    cases = operation.as_strategy(generation_mode=modes.POSITIVE)
    if operation.path_parameters or operation.query or operation.headers or operation.body:
        cases |= operation.as_strategy(generation_mode=modes.NEGATIVE)
    answered: set[int] = set()
    documented = described.raw_schema["paths"][path][method.lower()]["responses"]

    @settings(
        max_examples=2 * EXAMPLES, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=cases)
    def ask(case: Any) -> None:
        for job_id in (None, JOB):
            if job_id is not None:
                if "job_uuid" not in (case.path_parameters or {}) or method == "DELETE":
                    return
                case.path_parameters["job_uuid"] = job_id
            answer = case.call(session=session, timeout=60)
            answered.add(answer.status_code)
            assert answer.status_code < 500, f"{case.as_curl_command()}\n{answer.text}"
            assert str(answer.status_code) in documented, f"{case.as_curl_command()}\n{answer.text}"
            if answer.status_code >= 400 and path != PREFIX + "/health":
                assert list(answer.json()) == ["error"], case.as_curl_command()

    ask()
    assert answered


def test_the_server_is_unchanged(server: Server, session: requests.Session) -> None:
    answer = session.get(f"{server.url}{PREFIX}/health", timeout=60).json()
    jobs = answer["jobs"]
    assert (answer["status"], sum(jobs.values())) == ("ok", 1)
    assert jobs["cancelled"] + jobs["scheduled"] == 1, "a request may have resumed it"
    assert "Traceback" not in server.log.read_text(errors="replace")
