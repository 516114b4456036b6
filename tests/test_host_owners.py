"""Whose a job is, on a real server with the host's `custom` authentication: every route is tried, new ones too."""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from typing import Any

import httpx
import pytest

from tests.bad_inputs import GOOD_BODIES, JOBS, WORDS
from tests.host_harness import API, QUICKSTART, Server, run_config, serving, tiny_interpreter
from tests.jobs_support import wait_for

pytestmark = pytest.mark.e2e

USERS = {
    "token-of-alice": {"principal": "alice", "attributes": {"roles": ["user"], "teams": ["ml"]}},
    "token-of-bob": {"principal": "bob", "attributes": {"roles": ["user"], "teams": ["ml"]}},
    "token-of-root": {"principal": "root", "attributes": {"roles": ["admin"]}},
}
ALICE, BOB, ROOT = USERS
POLICY = [
    {"permit": {"actions": ["create", "read", "update", "delete"]}, "when": "user with admin in roles"},
    {"permit": {"actions": ["create", "read", "update", "delete"]}, "when": "user is owner"},
    {"permit": {"actions": ["create"]}},
]
# Routes that are about no job in particular; each has its own test or line here.
GENERAL = {
    ("get", "/jobs"), ("post", "/jobs"), ("post", "/jobs/validate"), ("post", "/supervised-fine-tune"),
    ("post", "/preference-optimize"), ("get", "/health"), ("get", "/metrics"),
}  # fmt: skip
CHANGES = {"post", "delete", "put", "patch"}


class Authority(BaseHTTPRequestHandler):
    """The endpoint that the host asks who a token belongs to."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        user = USERS.get(asked["api_key"])
        content = json.dumps({**(user or {}), "message": "known" if user else "unknown"}).encode()
        self.send_response(200 if user else 403)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@contextmanager
def authority() -> Iterator[str]:
    endpoint = ThreadingHTTPServer(("127.0.0.1", 0), Authority)
    thread = threading.Thread(target=endpoint.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{endpoint.server_port}/"
    finally:
        endpoint.shutdown()
        thread.join()
        endpoint.server_close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("owners")
    with authority() as endpoint:
        auth = {"provider_config": {"type": "custom", "endpoint": endpoint}, "access_policy": POLICY}
        config = run_config(
            QUICKSTART, folder, stack={"server": {"auth": auth}},
            provider={"training_python": tiny_interpreter(folder), "prometheus": True, "supervisor": {"poll_s": 0.1}},
        )  # fmt: skip
        with serving(config, folder / "state") as running:
            body = {"dataset_id": "words", "purpose": "post-training/messages",
                    "source": {"type": "rows", "rows": WORDS}}  # fmt: skip
            headers = {"Authorization": f"Bearer {ALICE}"}
            httpx.post(running.url + "/v1beta/datasets", json=body, headers=headers, timeout=60).raise_for_status()
            yield running


@pytest.fixture(scope="module")
def clients(server: Server) -> Iterator[dict[str, httpx.Client]]:
    with server.http(token=ALICE) as alice, server.http(token=BOB) as bob, server.http(token=ROOT) as root:
        yield {ALICE: alice, BOB: bob, ROOT: root}


def a_job(server: Server, alice: httpx.Client, job_id: str) -> str:
    """A job of Alice's that has completed, with one file in its artifact."""
    answer = alice.post(JOBS, json=GOOD_BODIES[JOBS] | {"job_uuid": job_id})
    assert answer.status_code == 200, answer.text
    wait_for(lambda: alice.get(f"/jobs/{job_id}/status").json()["status"] == "completed")
    (server.config().jobs_dir / job_id / "artifacts" / "adapter-0" / "weights").write_text("hers")
    return job_id


@pytest.fixture(scope="module")
def job(server: Server, clients: dict[str, httpx.Client]) -> str:
    return a_job(server, clients[ALICE], "alices-own")


def requests_about(server: Server, job_id: str) -> list[tuple[str, str]]:
    """(method, path) of every route that takes a job, from what the running server says it serves."""
    headers = {"Authorization": f"Bearer {ALICE}"}
    served = httpx.get(server.url + "/openapi.json", headers=headers, timeout=60).json()["paths"]
    ours = {path.removeprefix(API): routes for path, routes in served.items() if path.startswith(API + "/")}
    about, general = [], set()
    for path, routes in ours.items():
        for method, route in routes.items():
            in_query = "job_uuid" in [each["name"] for each in route.get("parameters", []) if each["in"] == "query"]
            if "{job_uuid}" not in path and not in_query:
                general.add((method, path))
                continue
            filled = path.format(job_uuid=job_id, name="adapter-0", path="weights")
            about.append((method, filled + (f"?job_uuid={job_id}" if in_query else "")))
    assert general == GENERAL, "a new route is about a job, or belongs into GENERAL and gets a test"
    assert len(about) >= 14
    return sorted(about, key=lambda each: (each[0] == "delete", each[0] in CHANGES))


def test_a_strangers_every_request_finds_nothing(server: Server, clients: dict[str, httpx.Client], job: str) -> None:
    for (method, path), (_, elsewhere) in zip(
        requests_about(server, job), requests_about(server, "no-such-job"), strict=True
    ):
        answer, nothing = clients[BOB].request(method, path), clients[BOB].request(method, elsewhere)
        assert answer.status_code == nothing.status_code == 404, f"{method} {path}: {answer.text}"
        assert answer.json() == {"error": {"message": f"job {job!r} does not exist"}}
        assert nothing.text == answer.text.replace(job, "no-such-job"), "not even that it exists"
    for query, header in (("?follow=true", {}), ("?follow=true", {"Last-Event-ID": "0"})):
        assert clients[BOB].get(f"/jobs/{job}/logs{query}", headers=header).status_code == 404
    assert clients[BOB].post("/job/cancel", json={"job_uuid": job}).status_code == 404
    assert clients[ALICE].get(f"/jobs/{job}/status").json()["status"] == "completed", "and nothing happened"


def test_a_strangers_list_and_names(server: Server, clients: dict[str, httpx.Client], job: str) -> None:
    assert clients[BOB].get("/jobs").json() == {"data": [], "has_more": False}
    assert clients[BOB].get("/jobs", params={"after": job}).status_code == 404
    body = GOOD_BODIES[JOBS] | {"model": str(server.config().jobs_dir / job / "artifacts" / "adapter-0")}
    for path in (JOBS, "/jobs/validate"):
        answer = clients[BOB].post(path, json=body)
        assert (answer.status_code, job in answer.json()["error"]["message"]) == (404, True), "its artifacts neither"
    answer = clients[BOB].post(JOBS, json=GOOD_BODIES[JOBS] | {"job_uuid": "bobs"})
    assert (answer.status_code, "'words'" in answer.text) == (404, True), "nor her data set"


def test_the_figures_of_all_jobs_are_an_administrators(clients: dict[str, httpx.Client], job: str) -> None:
    for token in (ALICE, BOB):
        answer = clients[token].get("/metrics")
        assert answer.status_code == 403
        assert "the access policy must permit you to read post_training_job::*" in answer.json()["error"]["message"]
    answer = clients[ROOT].get("/metrics")
    assert answer.status_code == 200
    assert re.search(r'^moe_jobs\{recipe="sft",state="completed"\} [1-9]', answer.text, re.MULTILINE)


def test_without_a_token_only_health_is_told(server: Server, job: str) -> None:
    with server.http() as nobody, server.http(token="token-of-nobody") as unknown:
        for client in (nobody, unknown):
            for method, path in [*requests_about(server, job), *GENERAL - {("get", "/health")}]:
                assert client.request(method, path).status_code == 401, f"{method} {path}"
        assert nobody.get("/health").status_code == 200


def test_her_own_job_answers_its_owner_on_every_route(
    server: Server, clients: dict[str, httpx.Client], job: str
) -> None:
    for (method, path), token in product(requests_about(server, job), (ALICE, ROOT)):
        if method == "get":
            answer = clients[token].get(path)
            assert answer.status_code == 200, f"{path}: {answer.text}"
    assert clients[ALICE].get(f"/jobs/{job}/artifacts/adapter-0/weights").text == "hers"
    assert [each["job_uuid"] for each in clients[ROOT].get("/jobs").json()["data"]].count(job) == 1
    deleted = a_job(server, clients[ALICE], "alices-other")
    for method, path in requests_about(server, deleted):
        if method in CHANGES:
            answer = clients[ROOT].request(method, path)
            # Its exports can be asked for: only the body is missing.
            expected = 200 if method == "delete" else 400 if path.endswith("/exports") else 409
            assert answer.status_code == expected, f"{path}: {answer.text}"
    assert clients[ALICE].get(f"/jobs/{deleted}").status_code == 404


def test_what_is_kept_names_nobody(server: Server, job: str) -> None:
    """A principal may be a secret, such as the key itself."""
    for path in [*(server.config().jobs_dir / job).rglob("*"), *server.state_dir.glob("jobs.db*")]:
        if path.is_file():
            content = path.read_bytes().replace(b"alices-o", b"")
            assert b"alice" not in content, path


# Last, for it ends the server.


def test_a_follower_does_not_hold_a_server_that_ends(server: Server, clients: dict[str, httpx.Client]) -> None:
    alice = clients[ALICE]
    assert alice.post(JOBS, json=GOOD_BODIES[JOBS] | {"job_uuid": "slow-one"}).status_code == 200
    wait_for(lambda: (server.config().jobs_dir / "slow-one" / "output.log").exists())
    with alice.stream("GET", "/jobs/slow-one/logs", params={"follow": True}) as answer:
        lines = answer.iter_lines()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "hello from the child" in next(line for line in lines if line.startswith("data:"))
        server.process.terminate()
        assert not any("event: end" in line for line in lines), "the job goes on"
    server.process.wait(timeout=120)
