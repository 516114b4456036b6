"""Tests job ownership on a real server with the host's `custom` authentication, on every route, even new ones."""

import json
import re
from collections.abc import Iterator
from itertools import product

import httpx
import pytest

from llama_stack_provider_moe.control.server.openai.routes import PREFIX as FINE_TUNING
from llama_stack_provider_moe.control.server.routes import OLDER_PREFIX
from tests.support.authority import authority
from tests.support.bad_inputs import GOOD_BODIES, JOBS, WORDS
from tests.support.host_harness import API, QUICKSTART, Server, run_config, serving, tiny_interpreter
from tests.support.jobs_support import wait_for
from tests.support.live_folders import contents

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
# Routes without a job; each has its own test or line here.
GENERAL = {
    ("get", "/jobs"), ("post", "/jobs"), ("post", "/jobs/validate"), ("post", "/supervised-fine-tune"),
    ("post", "/preference-optimize"), ("get", "/health"), ("get", "/metrics"), ("get", "/datasets"),
    ("put", "/datasets/{name}"), ("get", "/datasets/{name}"), ("delete", "/datasets/{name}"),
    ("get", "/datasets/{name}/profile"), ("get", "/datasets/{name}/rows"), ("get", "/quota"), ("get", "/quotas"),
    ("get", "/overview"), ("get", "/figures"), ("get", "/templates"), ("get", "/schema"), ("post", "/jobs/plan"),
    ("get", "/activity"), ("get", "/sweeps"), ("post", "/sweeps"), ("get", "/sweeps/{sweep_uuid}"),
    ("get", "/pipelines"), ("post", "/pipelines"), ("post", "/pipelines/validate"),
    ("get", "/pipelines/{pipeline_uuid}"), ("delete", "/pipelines/{pipeline_uuid}"),
    ("post", "/pipelines/{pipeline_uuid}/cancel"), ("post", "/pipelines/{pipeline_uuid}/resume"),
    ("delete", "/sweeps/{sweep_uuid}"), ("post", "/sweeps/{sweep_uuid}/cancel"), ("post", "/graders/validate"),
    ("post", "/graders/run"),
    ("get", "/feedback"), ("post", "/feedback"), ("delete", "/feedback"),
}  # fmt: skip
CHANGES = {"post", "delete", "put", "patch"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("owners")
    with authority(USERS) as endpoint:
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
            filled = path.format(job_uuid=job_id, name="adapter-0", path="weights", number=1)
            about.append((method, filled + (f"?job_uuid={job_id}" if in_query else "")))
    assert general == GENERAL, "a new route either takes a job, or belongs in GENERAL and gets a test"
    assert len(about) >= 14
    return sorted(
        about, key=lambda each: (each == ("delete", f"/jobs/{job_id}"), each[0] == "delete", each[0] in CHANGES)
    )


def test_every_request_of_another_user_finds_nothing(
    server: Server, clients: dict[str, httpx.Client], job: str
) -> None:
    for (method, path), (_, elsewhere) in zip(
        requests_about(server, job), requests_about(server, "no-such-job"), strict=True
    ):
        answer, nothing = clients[BOB].request(method, path), clients[BOB].request(method, elsewhere)
        assert answer.status_code == nothing.status_code == 404, f"{method} {path}: {answer.text}"
        assert answer.json() == {"error": {"message": f"job {job!r} does not exist"}}
        assert nothing.text == answer.text.replace(job, "no-such-job"), "the answer must not reveal that it exists"
    for query, header in (("?follow=true", {}), ("?follow=true", {"Last-Event-ID": "0"})):
        assert clients[BOB].get(f"/jobs/{job}/logs{query}", headers=header).status_code == 404
        assert clients[BOB].get(f"/jobs/{job}/events{query}", headers=header).status_code == 404
        assert clients[BOB].get(f"/jobs/{job}/prompts/1{query}", headers=header).status_code == 404
    assert clients[BOB].get("/figures", params={"jobs": job}).json() == {"data": []}
    assert clients[BOB].get("/overview").json()["jobs"]["completed"] == 0
    assert clients[BOB].post("/job/cancel", json={"job_uuid": job}).status_code == 404
    assert clients[ALICE].get(f"/jobs/{job}/status").json()["status"] == "completed", "nothing happened to the job"


def fine_tuning_requests(server: Server, job_id: str) -> list[tuple[str, str]]:
    """(method, path) of every route of OpenAI's API that takes a job or its file, without our own prefix."""
    headers = {"Authorization": f"Bearer {ALICE}"}
    served = httpx.get(server.url + "/openapi.json", headers=headers, timeout=60).json()["paths"]
    found = [
        (method, server.url + path.format(fine_tuning_job_id=f"ftjob-{job_id}", file_id=f"file-result-{job_id}"))
        for path, routes in served.items() for method in routes
        if path.startswith(FINE_TUNING) and "{" in path
    ]  # fmt: skip
    assert len(found) == 8
    return found


def test_a_fine_tuning_job_is_its_owners_alone(server: Server, clients: dict[str, httpx.Client], job: str) -> None:
    about = fine_tuning_requests(server, job)
    for (method, path), (_, elsewhere) in zip(about, fine_tuning_requests(server, "no-such-job"), strict=True):
        hers, nothing = clients[BOB].request(method, path), clients[BOB].request(method, elsewhere)
        assert hers.status_code == nothing.status_code == 404, f"{method} {path}: {hers.text}"
        assert nothing.text == hers.text.replace(job, "no-such-job"), "the answer must not reveal that it exists"
    listed = server.url + f"{FINE_TUNING}/jobs"
    assert clients[BOB].get(listed).json()["data"] == []
    for token in (ALICE, ROOT):
        assert f"ftjob-{job}" in [each["id"] for each in clients[token].get(listed).json()["data"]]
        for method, path in about:
            assert clients[token].request(method, path).status_code == (200 if method == "get" else 409), path
    with server.http() as nobody, server.http(token="token-of-nobody") as unknown:
        for client in (nobody, unknown):
            for method, path in [*about, ("get", listed), ("post", listed)]:
                assert client.request(method, path).status_code == 401, f"{method} {path}"


def test_lists_and_names_of_another_user(server: Server, clients: dict[str, httpx.Client], job: str) -> None:
    assert clients[BOB].get("/jobs").json() == {"data": [], "has_more": False}
    assert clients[BOB].get("/jobs", params={"after": job}).status_code == 404
    body = GOOD_BODIES[JOBS] | {"model": str(server.config().jobs_dir / job / "artifacts" / "adapter-0")}
    for path in (JOBS, "/jobs/validate"):
        answer = clients[BOB].post(path, json=body)
        assert (answer.status_code, job in answer.json()["error"]["message"]) == (404, True), (
            "its artifacts are hidden too"
        )
    answer = clients[BOB].post(JOBS, json=GOOD_BODIES[JOBS] | {"job_uuid": "bobs"})
    assert (answer.status_code, "'words'" in answer.text) == (404, True), "her data set is hidden too"


def test_only_administrators_see_the_figures_of_all_jobs(clients: dict[str, httpx.Client], job: str) -> None:
    for token in (ALICE, BOB):
        answer = clients[token].get("/metrics")
        assert answer.status_code == 403
        assert "the access policy must permit you to read post_training_job::*" in answer.json()["error"]["message"]
    answer = clients[ROOT].get("/metrics")
    assert answer.status_code == 200
    assert re.search(r'^moe_jobs\{recipe="sft",state="completed"\} [1-9]', answer.text, re.MULTILINE)


def test_each_owner_sees_their_quota_and_administrators_all(clients: dict[str, httpx.Client], job: str) -> None:
    owners = {token: clients[token].get("/quota").json()["owner"] for token in (ALICE, BOB, ROOT)}
    assert len(set(owners.values())) == 3
    assert clients[ALICE].get("/quotas").status_code == clients[BOB].get("/quotas").status_code == 403
    assert owners[ALICE] in [each["owner"] for each in clients[ROOT].get("/quotas").json()["data"]]


def test_without_a_token_only_health_answers(server: Server, job: str) -> None:
    with server.http() as nobody, server.http(token="token-of-nobody") as unknown:
        for client in (nobody, unknown):
            for method, path in [*requests_about(server, job), *GENERAL - {("get", "/health")}]:
                assert client.request(method, path).status_code == 401, f"{method} {path}"
        assert nobody.get("/health").status_code == 200
        older = server.url + OLDER_PREFIX
        assert nobody.get(older + "/health").status_code == 200
        assert nobody.get(f"{older}/jobs/{job}/status").status_code == nobody.get(older + "/jobs").status_code == 401


def test_the_older_prefix_has_the_same_owners(server: Server, clients: dict[str, httpx.Client], job: str) -> None:
    view = f"{server.url}{OLDER_PREFIX}/jobs/{job}/status"
    assert clients[ALICE].get(view).json() == clients[ALICE].get(f"/jobs/{job}/status").json()
    assert (clients[ALICE].get(view).status_code, clients[BOB].get(view).status_code) == (200, 404)


def test_an_uploaded_data_set_is_its_owners_alone(server: Server, clients: dict[str, httpx.Client]) -> None:
    rows = "".join(json.dumps(row) + "\n" for row in WORDS).encode()
    version = clients[ALICE].put("/datasets/hers", content=rows).json()["sha256"]
    body = GOOD_BODIES[JOBS] | {"data": {"dataset_id": "hers"}}
    for token in (BOB, ROOT):
        assert clients[token].get("/datasets").json()["data"] == []
        nothing = clients[token].get("/datasets/no-such-set")
        for method in ("get", "delete"):
            answer = clients[token].request(method, "/datasets/hers")
            assert (answer.status_code, answer.text) == (404, nothing.text.replace("no-such-set", "hers"))
        profile = clients[token].get("/datasets/hers/profile", params={"recipe": "sft"})
        assert (profile.status_code, profile.text) == (404, nothing.text.replace("no-such-set", "hers"))
        assert clients[token].post("/jobs", json=body).status_code == 404
    with server.http() as nobody:
        assert nobody.put("/datasets/hers", content=rows).status_code == 401
    assert clients[BOB].put("/datasets/hers", content=rows * 2).json()["is_new"]
    assert [each["sha256"] for each in clients[ALICE].get("/datasets/hers").json()["versions"]] == [version]
    job = clients[ALICE].post("/jobs", json=body).json()["job_uuid"]
    assert clients[ALICE].delete("/datasets/hers").json()["versions"] == [version]
    wait_for(lambda: clients[ALICE].get(f"/jobs/{job}/status").json()["status"] == "completed")
    assert clients[ALICE].get(f"/jobs/{job}").json()["sources"]["train"]["version"] == version
    assert clients[BOB].get("/datasets/hers").json()["versions"][0]["rows"] == 2 * len(WORDS)


def test_her_own_job_answers_its_owner_on_every_route(
    server: Server, clients: dict[str, httpx.Client], job: str
) -> None:
    for (method, path), token in product(requests_about(server, job), (ALICE, ROOT)):
        if method == "get":
            answer = clients[token].get(path)
            expected = 409 if "/prompts" in path else 200  # her job is no playground
            assert answer.status_code == expected, f"{path}: {answer.text}"
    assert clients[ALICE].get(f"/jobs/{job}/artifacts/adapter-0/weights").text == "hers"
    assert [each["job_uuid"] for each in clients[ROOT].get("/jobs").json()["data"]].count(job) == 1
    deleted = a_job(server, clients[ALICE], "alices-other")
    for method, path in requests_about(server, deleted):
        if method in CHANGES:
            answer = clients[ROOT].request(method, path)
            # An export, labels and prompts pass the access check: only the body is missing. No job is a playground.
            needs_body = method == "patch" or path.endswith(("/exports", "/prompts"))
            is_gone = method == "delete" and "/prompts" not in path
            expected = 200 if is_gone else 400 if needs_body else 409
            assert answer.status_code == expected, f"{path}: {answer.text}"
    assert clients[ALICE].get(f"/jobs/{deleted}").status_code == 404


def test_stored_owners_are_hashes(server: Server, job: str) -> None:
    """A principal may be a secret, such as the key itself."""
    for path, content in contents(server.state_dir):
        if job in path.parts or path.name.startswith("jobs.db"):
            assert b"alice" not in content.replace(b"alices-o", b""), path


# This test comes last, because it ends the server.


def test_a_follower_does_not_delay_a_server_that_ends(server: Server, clients: dict[str, httpx.Client]) -> None:
    alice = clients[ALICE]
    assert alice.post(JOBS, json=GOOD_BODIES[JOBS] | {"job_uuid": "slow-one"}).status_code == 200
    wait_for(lambda: (server.config().jobs_dir / "slow-one" / "output.log").exists())
    with alice.stream("GET", "/jobs/slow-one/logs", params={"follow": True}) as answer:
        lines = answer.iter_lines()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert "hello from the child" in next(line for line in lines if line.startswith("data:"))
        server.process.terminate()
        assert not any("event: end" in line for line in lines), "the job continues"
    server.process.wait(timeout=120)
