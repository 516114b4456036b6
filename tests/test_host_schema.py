"""Requests made up from the OpenAPI document of a running server, good and bad: each is answered, none with a 500.

Made by schemathesis, the same ones in every run. An exception that none of ours caught would be answered with a 500 by
llama-stack 0.6.1, which then drops the connection, and would stand in the server's log.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings

from llama_stack_provider_moe.config import ProviderConfig
from llama_stack_provider_moe.host.routes import PREFIX, create_router
from llama_stack_provider_moe.host.service import PostTrainingService
from tests.bad_inputs import DATASETS, GOOD_BODIES, JOBS
from tests.host_harness import QUICKSTART, Server, run_config, serving

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what it imports
    import schemathesis

pytestmark = pytest.mark.e2e

EXAMPLES = 12  # of each kind for each route
JOB = "known"
ROUTES = sorted(
    (method, route.path_format)  # type: ignore[attr-defined]
    for route in create_router(PostTrainingService(ProviderConfig(prometheus=True), {})).routes
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
            assert http.post(f"/jobs/{JOB}/cancel").status_code == 200  # or following it would have no end
        yield running


@pytest.fixture(scope="module")
def described(server: Server) -> Any:
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
            if answer.status_code >= 400 and path != PREFIX + "/health":
                assert list(answer.json()) == ["error"], case.as_curl_command()

    ask()
    assert answered


def test_the_server_is_as_it_was(server: Server, session: requests.Session) -> None:
    answer = session.get(f"{server.url}{PREFIX}/health", timeout=60).json()
    assert (answer["status"], answer["jobs"]["cancelled"]) == ("ok", 1)
    assert "Traceback" not in server.log.read_text(errors="replace")
